"""Numbers that leave nothing to draw from are refused as the request's fault: the engine and its batch live on."""

from typing import Any

import httpx
import pytest
from tiny_served import NAME, make_home, served

CHAT, CHOICE = ("/v1/chat/completions", {"max_tokens": 2}), ("/v1/choice", {"choices": ["w1", "w2"]})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("engine")
    make_home(home)
    with served(home, "--socket", str(home / "model.sock")):
        transport = httpx.HTTPTransport(uds=str(home / "model.sock"))
        with httpx.Client(transport=transport, base_url="http://model", timeout=30) as http:
            yield http


@pytest.mark.parametrize(
    ("call", "more"),
    [
        (CHAT, {"temperature": 1e-320}),
        (CHOICE, {"temperature": 1e-320}),
        (CHOICE, {"temperature": 0.5, "bias": [1.7e308, 0]}),
    ],
)
def test_what_would_be_divided_beyond_all_numbers_is_refused(
    engine: httpx.Client, call: tuple[str, dict[str, Any]], more: dict[str, Any]
):
    path, body = call
    reply = engine.post(path, json={"model": NAME, "messages": [{"role": "user", "content": "w1"}], **body, **more})
    assert reply.status_code == 400, reply.text


@pytest.mark.parametrize("more", [{}, {"temperature": 0}, {"temperature": 1e-9, "bias": [1e100, -1e100]}])
def test_the_least_that_is_taken_is_answered(engine: httpx.Client, more: dict[str, Any]):
    path, body = CHOICE
    reply = engine.post(path, json={"model": NAME, "messages": [{"role": "user", "content": "w1"}], **body, **more})
    assert reply.status_code == 200 and reply.json()["choice"] in body["choices"], reply.text
