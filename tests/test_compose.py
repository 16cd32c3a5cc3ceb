"""The compose file, which is not run here: its services are ours, and its servers' settings mean what they should."""

import asyncio
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import clickhouse_connect
import pytest
import yaml
from store_owner import owner

from sia_events.app import LOOPS, SERVICES
from sia_events.infra.nats_server import binary
from sia_events.status import UNBOUNDED

COMPOSE = Path(__file__).parent.parent / "docker-compose.yml"


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


def test_every_service_has_a_container_and_no_container_another(compose: Any) -> None:
    commands = [service["command"] for service in compose["services"].values() if "serve" in service.get("command", ())]
    assert sorted(name for _, name in commands) == sorted((*SERVICES, *LOOPS))


def test_the_stream_servers_settings_are_read_by_a_stream_server(compose: Any, tmp_path: Path) -> None:
    settings = tmp_path / "nats.conf"
    settings.write_text(compose["configs"]["nats"]["content"].replace("/data", str(tmp_path)))
    checked = subprocess.run([asyncio.run(binary()), "-t", "-c", settings], capture_output=True, text=True)
    assert checked.returncode == 0 and "is valid" in checked.stderr, checked.stderr


def test_what_clickhouse_writes_about_itself_has_an_end(compose: Any, tmp_path: Path) -> None:
    tables = ElementTree.fromstring(compose["configs"]["clickhouse"]["content"])
    kept = {table.tag: table.findtext("ttl") for table in tables if table.get("remove") != "1"}
    assert {"query_log", "part_log"} <= kept.keys()
    with owner(tmp_path / "log") as running:
        client = clickhouse_connect.get_client(dsn=running.dsn, autogenerate_session_id=False)
        columns = "(event_date Date) ENGINE = MergeTree ORDER BY event_date"
        for table, ttl in kept.items():
            client.command(f"CREATE TABLE system.{table} {columns} TTL {ttl}")
        assert client.query(UNBOUNDED).result_rows == []
        client.command(f"CREATE TABLE system.text_log {columns}")
        assert client.query(UNBOUNDED).result_rows == [("text_log",)]
        client.close()
