"""The status of a home as metrics: OpenMetrics text, printed by `sia status --metrics` or scraped from a port."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sia_events import app, gateway_here, log_here
from sia_events.errors import MENDABLE, Unusable
from sia_events.gateway_here import Door
from sia_events.home import running_node
from sia_events.status import status_on

HOST = "127.0.0.1"
READ_S = 3.0  # a scraper asks every few seconds, and gives up after ten


def metrics_text(found: Mapping[str, Any]) -> str:
    """What `status` found, as OpenMetrics 1.0 text. What it could not find out has no sample; no run is named."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(found))
    return generate_latest(registry).decode()


@asynccontextmanager
async def scraped(node: app.Node, port: int) -> AsyncIterator[None]:
    """Answer GET /metrics on the port, on loopback alone. Raises Unusable where somebody else has it.

    Not on the gateway's door: that is open to agents, whom it does not concern how a home is.
    """
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        why = f"{HOST}:{port}: {error.strerror}; set SIA_METRICS_PORT to another one"
        raise Unusable(f"metrics cannot be served on {why}") from error
    # A connection of its own: what the services keep of their runs is not to make room for every run of the home.
    async with app.stores_of_home(node.settings, "metrics", running=True) as own:
        door = Door(uvicorn.Config(_routes(own), log_level="error", access_log=False, lifespan="off"))
        serving = asyncio.create_task(door.serve(sockets=[listening]))
        try:
            yield
        finally:
            door.should_exit = True
            await serving


def _routes(node: app.Node) -> Starlette:
    async def metrics(request: Request) -> Response:
        try:
            found = await status_on(node, running_node(node.settings), READ_S, here=False)
        except MENDABLE as error:
            return PlainTextResponse(f"{error}\n", 503)
        return Response(metrics_text(found), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/metrics", metrics)])


class _Status:
    """A collector, as the registry wants one, of a status that was looked up already."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        found = self._found
        streams = {each["stream"]: each for each in found["streams"]}
        tables = {each["table"]: each for each in found["tables"]}
        yield _gauge("stream_messages", "Messages on the stream", "stream", _column(streams, "messages"))
        yield _gauge("stream_bytes", "Size of the stream", "stream", _column(streams, "bytes"))
        yield _gauge("stream_limit_bytes", "Size at which the stream is full", "stream", _column(streams, "limit"))
        lag = "Messages on the stream that the tables do not have yet"
        yield _gauge("stream_lag_messages", lag, "stream", _column(streams, "lag"))
        services = found["services"]
        yield _gauge("service_waiting_records", "Records not handed out yet", "service", _column(services, "waiting"))
        yield _gauge("service_in_flight_records", "Records being answered", "service", _column(services, "out"))
        yield _gauge("service_served_runs", "Runs that somebody serves", "service", _column(services, "runs"))
        up = {name: name in found["up"] for name in (gateway_here.NAME, log_here.NAME)}
        yield _gauge("up", "Whether a process of this home is it", "service", up)
        yield _gauge("log_up", "Whether the log answers", None, {"": found["log"] is None})
        yield _gauge("table_rows", "Rows of the table, doubled ones too", "table", _column(tables, "rows"))
        yield _gauge("table_bytes", "Size of the table on disk", "table", _column(tables, "bytes"))
        yield _gauge("runs", "Runs by what became of them", "status", found["runs"] or {})
        yield _gauge("open_dead_letters", "Dead letters that nobody has dealt with", None, {"": found["letters"]})
        yield _gauge("disk_free_bytes", "Room left on the disk of the home", None, {"": found["free"]})


def _gauge(name: str, told: str, label: str | None, values: Mapping[str, float | None]) -> Metric:
    family = GaugeMetricFamily(f"sia_{name}", told, labels=[label] if label else [])
    for key, value in values.items():
        if value is not None:
            family.add_metric([key] if label else [], value)
    return family


def _column(rows: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float | None]:
    return {key: row[name] for key, row in rows.items()}
