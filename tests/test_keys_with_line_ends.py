"""A key that came with a line's end is used without it; one that is broken in two is told to nobody."""

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gateway_house
import pytest
import structlog
from command import sia
from gateway_house import ANTHROPIC, COMPATIBLE, GOOGLE, OPENAI, house
from llm_author import SMALL
from structlog.testing import LogCapture
from test_gateway_faults import EVERY_WIRE

from sia_events.infra.providers.finder import Providers
from sia_events.shared.ports import ModelFailed
from sia_events.shared.providers import Provider

FIRST, SECOND = "sk-the-first-half", "and-the-second-half"
BROKEN = [f"{FIRST}\r\n{SECOND}", f"{FIRST}\n{SECOND}", f"{FIRST}\r{SECOND}", f"{FIRST}\r\nX-More: {SECOND}"]
ENDED = ["\n", "\r\n", "\r", " \r\n\r\n"]
EVERY = pytest.mark.parametrize("model", [COMPATIBLE, OPENAI, ANTHROPIC, GOOGLE])


def in_none(*told: str) -> bool:
    return not [text for text in told if FIRST in text or SECOND in text]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[LogCapture]:
    """Every line that is logged, ours and of every library, however unimportant."""
    caplog.set_level(logging.DEBUG)
    before = structlog.get_config()
    structlog.configure(processors=[capture := LogCapture()], wrapper_class=structlog.BoundLogger)
    yield capture
    structlog.configure(**before)


@EVERY
@pytest.mark.parametrize("end", ENDED)
async def test_a_line_s_end_behind_a_key_is_no_part_of_it(model: str, end: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gateway_house, "KEY", FIRST + end)
    async with house() as there, there.http(model) as client:
        reply = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
        assert reply.status_code == 200, reply.text
        headers = there.provider.requests[0].headers
    sent = [headers.get("x-goog-api-key"), headers.get("x-api-key"), headers.get("authorization")]
    assert [value.removeprefix("Bearer ") for value in sent if value] == [FIRST]


@EVERY
@EVERY_WIRE
async def test_a_key_that_is_broken_in_two_stands_in_no_reply_record_or_log_line(
    path: str,
    body: dict[str, Any],
    model: str,
    logged: LogCapture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    replies, recorded = [], []
    for key in BROKEN:
        monkeypatch.setattr(gateway_house, "KEY", key)
        async with house() as there, there.http(model) as client:
            replies += [await client.post(path, json={**body, "stream": stream}) for stream in (False, True)]
            recorded += await there.recorded()
            assert there.provider.count == 0
    assert all(reply.status_code >= 500 and "KEY holds no key" in reply.text for reply in replies)
    assert [call.fault for call in recorded] == ["no_key"] * len(BROKEN)
    assert in_none(*(reply.text for reply in replies), *map(repr, recorded))
    assert caplog.records, "libraries have been listened to"
    assert in_none(caplog.text, repr(logged.entries), *(repr(vars(record)) for record in caplog.records))


@pytest.mark.parametrize("kind", ["openai", "anthropic", "google"])
@pytest.mark.parametrize("key", BROKEN)
def test_nor_does_it_stand_in_what_is_raised_before_anybody_is_asked(kind: Any, key: str):
    providers = Providers({kind: Provider(kind=kind, key_env="KEY")}, {"KEY": key})
    with pytest.raises(ModelFailed, match="set KEY to a key") as raised:
        providers.find(f"{kind}/m")
    assert in_none("".join(traceback.format_exception(raised.value)))


def test_a_run_with_such_a_key_is_refused_before_anything_is_created(tmp_path: Path, task: Path):
    for words in (("run", task, *SMALL), ("doctor", "--json"), ("doctor",)):
        done = sia(tmp_path / "home", *words, OPENAI_API_KEY=BROKEN[0])
        assert in_none(done.stdout, done.stderr) and "OPENAI_API_KEY holds no key" in done.stdout + done.stderr
        assert words[0] == "doctor" or (done.returncode == 2 and not (tmp_path / "home").exists()), done.stderr
