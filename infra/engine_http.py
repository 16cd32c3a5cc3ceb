"""One request to an engine that speaks vLLM's API: JSON goes in, JSON comes out, failures are ours."""

from collections.abc import Mapping
from typing import Any

import httpx

from sia_events.infra.providers.failures import kind_of
from sia_events.shared.ports import ModelFailed

QUOTED = 500


async def ask(http: httpx.AsyncClient, name: str, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The reply of the engine `name` to a POST of `body`, or to a GET without one; {} where it says a mere word.

    Raises ModelFailed with the engine's own status.
    """
    try:
        response = await (http.get(path) if body is None else http.post(path, json=body))
    except httpx.TimeoutException as error:
        raise ModelFailed(504, f"{name} gave no answer in time", "timeout") from error
    except httpx.HTTPError as error:
        raise ModelFailed(503, f"{name} does not answer: {type(error).__name__}: {error}") from error
    status = response.status_code
    if status != 200:
        raise ModelFailed(status, f"{name} answered {status}: {response.text[:QUOTED]}", kind_of(status))
    if not response.headers.get("content-type", "").startswith("application/json"):
        return {}
    try:
        return response.json()
    except ValueError as error:
        raise ModelFailed(502, f"{name} answered with what is no JSON", "garbage") from error
