"""The status as metrics: text that a monitoring system's own parser reads, printed and scraped, naming no run."""

import socket
from pathlib import Path

import httpx
import pytest
from bus_on import notes, opened
from command import sia, start
from scraping import samples

from sia_events import app
from sia_events.event_log import recorder
from sia_events.home import hold
from sia_events.log_here import open_log
from sia_events.metrics import metrics_text, scraped
from sia_events.shared.events import ServiceFailed
from sia_events.shared.settings import Settings
from sia_events.status import status

LETTER = ServiceFailed(service="tester", failed=None, sequence=9, error="E: no", payload="0" * 64, tries=1)


async def test_lag_sizes_limits_and_letters_are_gauges_that_a_parser_reads(tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node:
        first, *_ = await opened(node.bus, "secretive", LETTER)
        async with open_log(settings) as log:
            await recorder.catch_up(node.bus, log)
        await node.bus.append("secretive", notes("secretive", first, "a", "b"))
    text = metrics_text(await status(settings))
    found = samples(text)
    assert found["sia_stream_lag_messages", "SIA"] == 2 and found["sia_stream_messages", "SIA"] == 4
    assert 0 < found["sia_stream_bytes", "SIA"] < found["sia_stream_limit_bytes", "SIA"] == 2 * 2**30
    assert found["sia_open_dead_letters", ""] == 1 and found["sia_runs", "interrupted"] == 1
    assert found["sia_service_waiting_records", "evaluator"] == found["sia_service_in_flight_records", "evaluator"] == 0
    assert found["sia_log_up", ""] == 1 and found["sia_up", "recorder"] == 0 and found["sia_table_rows", "events"] == 2
    assert "secretive" not in text and str(tmp_path) not in text


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_whoever_records_answers_metrics_on_loopback(port: int, tmp_path: Path):
    serving = start(tmp_path, "serve", "recorder", SIA_METRICS_PORT=str(port))
    try:
        assert serving.stdout and "serving" in serving.stdout.readline()
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        found = samples(answer.text)
        assert found["sia_up", "recorder"] == 1 and found["sia_stream_lag_messages", "SIA_TRACE"] == 0
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=30).status_code == 404
    finally:
        serving.terminate()
        assert serving.wait(timeout=30) == 0


async def test_a_scrape_reads_runs_apart_from_the_services_and_opens_no_log_in_their_process(port: int, tmp_path: Path):
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node:
        await opened(node.bus, "r1")
    async with hold(settings, "test"), app.stores(settings) as node, httpx.AsyncClient(timeout=30) as client:
        async with scraped(node, port):
            found = samples((await client.get(f"http://127.0.0.1:{port}/metrics")).text)
        assert found["sia_log_up", ""] == 0 and not (tmp_path / "log").exists()
        assert found["sia_runs", "running"] == 1 and not node.bus._runs._tails  # type: ignore[attr-defined]


def test_a_port_that_somebody_has_is_named(port: int, tmp_path: Path):
    with socket.create_server(("127.0.0.1", port)):
        done = sia(tmp_path, "serve", "recorder", SIA_METRICS_PORT=str(port))
    assert done.returncode == 2 and f"127.0.0.1:{port}" in done.stderr and "SIA_METRICS_PORT" in done.stderr
