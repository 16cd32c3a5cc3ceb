"""What an endpoint tells of a reply's tokens may be half of it or nonsense: the reply is paid for, and is kept."""

from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from gateway_house import Clock

from sia_events.infra.memory import MemoryBus
from sia_events.model_gateway.asking import Calls
from sia_events.model_gateway.budget import Ledger
from sia_events.model_gateway.door import gateway
from sia_events.model_gateway.journal import Journal
from sia_events.model_gateway.token import TokenDoor
from sia_events.shared.calls import decode_call

SECRET = "a secret of the tests"


class Endpoint:
    """The `Models` port of a chat that tells `usage`."""

    def __init__(self, usage: Any) -> None:
        self.usage, self.count = usage, 0

    async def chat(self, call: Any) -> Any:
        self.count += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": "good day"}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": self.usage}


@pytest.mark.parametrize("usage", [{"prompt_tokens": None, "completion_tokens": 3}, {"completion_tokens": 3}, [3], "3"])
async def test_it_is_recorded_and_not_asked_again(usage: Any):
    bus, endpoint = MemoryBus(), Endpoint(usage)
    models, ledger = cast(Any, lambda model: endpoint), Ledger(bus, Clock(), lambda model, used: 0.01)
    calls = Calls(Journal(bus), models, Clock(), ledger, 1.0)
    claims = {"run": "r1", "attempt": "g0a.dev", "version": "g0a", "model": "m/m", "adapter": None}
    claims |= {"start": "one", "sample": False, "seed": 1, "expires": 4e9}
    head = {"authorization": f"Bearer {TokenDoor(Path(), SECRET).token(claims)}"}
    transport = httpx.ASGITransport(gateway(calls, SECRET, Clock()))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=head) as client:
        reply = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert reply.status_code == 200 and "good day" in reply.text
    (line,) = [line for each in await bus.traces("r1", "model_call", "g0a.dev") for line in each.lines]
    assert decode_call(line).reply and decode_call(line).usd == 0.01 and endpoint.count == 1
