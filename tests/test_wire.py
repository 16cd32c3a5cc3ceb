"""The wire form: one golden line of every event ever shipped, read and written byte for byte; all else is refused."""

import json
import re
import runpy
import subprocess
import sys
import zlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from given import altered, recorded
from hypothesis import given as for_all
from hypothesis import strategies as st
from story import SECOND

from sia_events.infra.nats_streams import Message
from sia_events.infra.nats_wire import packed, read_envelope, trace_subject
from sia_events.shared import record as module
from sia_events.shared.code import code
from sia_events.shared.events import EVENTS
from sia_events.shared.ports import Envelope
from sia_events.shared.record import (
    GENESIS,
    NewerRecord,
    UnreadableRecord,
    broken_link,
    follows,
    parse_record,
    place,
    to_wire,
)

# A line is added with a new event and with a new schema, and none is ever changed: old streams hold them.
GOLDEN = (Path(__file__).parent / "golden/events.jsonl").read_bytes().splitlines()
LOGGED = next(line for line in GOLDEN if b'"type":"ExecutionLogged"' in line)


def test_every_event_type_has_a_golden_line():
    assert {json.loads(line)["type"] for line in GOLDEN} == EVENTS.keys()


@pytest.mark.parametrize("line", GOLDEN, ids=lambda line: json.loads(line)["type"])
def test_a_golden_line_is_read_and_written_byte_for_byte(line: bytes):
    found = parse_record(line)
    assert to_wire(found) == line
    assert type(found.event) is EVENTS[found.type]


def test_the_chain_over_the_golden_lines_is_whole():
    assert broken_link([parse_record(line) for line in GOLDEN]) is None


def test_a_record_follows_from_the_one_before_however_its_bytes_are_put():
    one, two = recorded(*SECOND)[:2]
    padded = json.dumps(json.loads(two.wire), indent=1).encode()
    assert follows(one.chain, two.wire, two.chain) and follows(one.chain, padded, two.chain)
    for wire in (two.wire, padded):
        assert not follows(two.chain, wire, two.chain), "behind another record"
        assert not follows(one.chain, wire.replace(b"test", b"tesT"), two.chain), "and not as something else"


@pytest.mark.parametrize("line", GOLDEN, ids=lambda line: json.loads(line)["type"])
def test_a_record_is_a_cloud_event(line: bytes):
    """CloudEvents 1.0, sections 3.1 (naming) and "Required attributes"; the JSON format's section 3."""
    event = json.loads(line)
    assert event["specversion"] == "1.0" and event["id"] and event["source"] and event["type"]
    assert datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0)
    assert event["subject"] == event["run"] and event["source"] == event["producer"]
    for name, value in event.items():
        assert name.isalnum() and name.islower() and len(name) <= 20
        assert name == "data" or isinstance(value, str | int)


def test_keys_are_sorted_and_nothing_is_padded():
    for line in GOLDEN:
        assert json.dumps(json.loads(line), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == line


def changed(**attributes: Any) -> bytes:
    return json.dumps({**json.loads(LOGGED), **attributes}).encode()


def without(attribute: str) -> bytes:
    body = json.loads(LOGGED)
    del body[attribute]
    return json.dumps(body).encode()


def nested(depth: int) -> bytes:
    return changed(data=0).replace(b'"data": 0', b'"data": ' + b'{"a":' * depth + b"1" + b"}" * depth)


UNREADABLE = {
    "nothing": b"",
    "no JSON": b"hello",
    "a cut line": LOGGED[:-5],
    "two records": LOGGED * 2,
    "a byte order mark": b"\xef\xbb\xbf" + LOGGED,
    "bytes that are no text": LOGGED.replace(b"g0a.dev", b"\xff\xfe"),
    "half a surrogate pair": LOGGED.replace(b"g0a.dev", b"\\ud800"),
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "a list of lists": b"[" * 100_000 + b"]" * 100_000,
    "data nested too deep": nested(100_000),
    "data nested rather deep": nested(900),
    "an unknown type": changed(type="NotYetInvented"),
    "a type that is no text": changed(type=["Scored"]),
    "a newer schema": changed(schema=module.SCHEMA + 1),
    "a schema before the first": changed(schema=0),
    "a schema that is no number": changed(schema="1"),
    "another CloudEvents": changed(specversion="2.0"),
    "position nought": changed(position=0),
    "a position beyond all": changed(position=10**40),
    "a position that is no whole number": changed(position=1.5),
    "a position that is true": changed(position=True),
    "a run that is no text": changed(run=5),
    "a run without a name": changed(run=""),
    "an id that is no UUID": changed(id="first"),
    "an id that is a number": changed(id=5),
    "a cause of null": changed(cause=None),
    "a time that is none": changed(time="noon"),
    "a time of nowhere": changed(time="2026-01-01T12:00:00"),
    "a chain that is no digest": changed(chain="abc"),
    "not a number": LOGGED.replace(b"12.345", b"NaN"),
    "infinity": LOGGED.replace(b"12.345", b"1e999"),
    "a number of 5,000 digits": LOGGED.replace(b"6400", b"9" * 5000),
    "a field more": changed(data={**json.loads(LOGGED)["data"], "more": 1}),
    "no field": changed(data={}),
    "a digest of another length": LOGGED.replace(b"a" * 64, b"a" * 63),
}


@pytest.mark.parametrize("wire", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_is_no_record_of_ours_is_refused(wire: bytes):
    with pytest.raises(UnreadableRecord):
        parse_record(wire)


OPTIONAL = {"cause", "subject", "source", "datacontenttype"}


@pytest.mark.parametrize("attribute", sorted(json.loads(LOGGED).keys() - OPTIONAL))
def test_a_record_that_lacks_an_attribute_is_refused(attribute: str):
    with pytest.raises(UnreadableRecord, match=attribute):
        parse_record(without(attribute))


@for_all(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(wire: bytes):
    with pytest.raises(UnreadableRecord):
        parse_record(wire)


@for_all(st.integers(0, len(LOGGED) - 1), st.integers(0, 255))
def test_one_changed_byte_is_refused_or_breaks_the_chain_or_changes_nothing(place: int, byte: int):
    line = LOGGED[:place] + bytes([byte]) + LOGGED[place + 1 :]
    records = [parse_record(each) for each in GOLDEN]
    try:
        found = parse_record(line)
    except UnreadableRecord:
        return
    number = records.index(parse_record(LOGGED))
    spoilt = [*records[:number], found, *records[number + 1 :]]
    assert found == records[number] or broken_link(spoilt) is not None


@pytest.mark.parametrize("bit", [1, 16, 128])
def test_whatever_bit_is_flipped_the_link_of_what_is_read_can_be_told(bit: int):
    for at in range(len(LOGGED)):
        line = LOGGED[:at] + bytes([LOGGED[at] ^ bit]) + LOGGED[at + 1 :]
        with suppress(UnreadableRecord):
            try:
                read = parse_record(line).wire
            except NewerRecord as newer:
                read = newer.wire
            assert not follows(GENESIS, read, "0" * 64)
            read.decode()


@pytest.mark.parametrize("attribute", ["source", "subject", "datacontenttype", "traceparent"])
@pytest.mark.parametrize("value", [b'"\xff"', b'"\xed\xa0\x80"', b"1e999", b"9" * 5000])
def test_an_attribute_that_nobody_can_link_breaks_the_chain_and_nothing_else(attribute: str, value: bytes):
    line = LOGGED.replace(b'{"', b'{"%b":%b,"' % (attribute.encode(), value), 1)
    with suppress(UnreadableRecord):
        assert not follows(GENESIS, parse_record(line).wire, "0" * 64)


def test_attributes_that_others_add_are_left_alone():
    assert parse_record(changed(traceparent="00-ab-cd-01")) == parse_record(LOGGED)


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"schema": module.SCHEMA + 1}, rf"schema {module.SCHEMA + 1}; this release reads up to {module.SCHEMA}"),
        ({"type": "NotYetInvented"}, "unknown event type 'NotYetInvented'"),
        ({}, "data that no ExecutionLogged has here"),
    ],
)
def test_what_other_code_wrote_is_told_from_what_is_no_record_and_what_to_do_is_said(
    attributes: dict[str, Any], why: str
):
    with pytest.raises(NewerRecord, match=rf"(?s)record 5 of run golden .*{why}.*Use the release that wrote it"):
        parse_record(changed(**attributes, data={"unheard": "of"}))


def test_what_is_nested_as_deep_as_can_just_be_read_follows_from_nothing():
    for depth in range(900, 1000):
        wire = changed(more=0).replace(b'"more": 0', b'"more": ' + b'{"a":' * depth + b"1" + b"}" * depth)
        with suppress(UnreadableRecord):
            record = parse_record(wire)
            assert not follows(module.GENESIS, record.wire, record.chain)


def test_a_record_tells_what_code_wrote_it_and_its_chain_vouches_for_it():
    one, two = recorded(*SECOND)[:2]
    assert two.code == parse_record(two.wire).code == code()
    assert broken_link([one, altered(two, code="sia-events 9.9.9")]) is not None
    assert parse_record(LOGGED).code is None, "up to schema 3"


def test_the_same_sources_are_the_same_code_in_every_process():
    program = "from sia_events.shared.code import code; print(code())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code()
    assert re.fullmatch(r"sia-events \d+\.\d+\.\d+\+(g?)[0-9a-f]{12}", code())


def test_a_link_to_nowhere_among_the_sources_is_no_source(tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "code.py").write_bytes(Path(module.__file__).with_name("code.py").read_bytes())
    digest = runpy.run_path(str(shared / "code.py"))["_digest"]
    before = digest()
    (shared / ".#code.py").symlink_to("somebody@somewhere.1")  # as an editor marks a file that is being changed
    assert digest() == before


def test_an_old_record_is_mended_where_it_enters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SCHEMA", 3)
    monkeypatch.setitem(module.UPCASTS, ("RunPaused", 1), lambda data: {"reason": data["why"]})
    monkeypatch.setitem(module.UPCASTS, ("RunPaused", 2), lambda data: {"reason": data["reason"].upper()})
    old = changed(type="RunPaused", data={"why": "lunch"})
    assert parse_record(old).event == EVENTS["RunPaused"](reason="LUNCH")  # type: ignore[call-arg]
    assert parse_record(old).schema == 1


def test_runs_from_before_there_was_a_pause_are_read_as_without_one():
    settings = [parse_record(line).event.settings for line in GOLDEN if b'"settings":' in line]  # type: ignore[attr-defined]
    assert [each.pause_after_failures for each in settings] == [0] * 4 + [10] * (len(settings) - 4)


def test_a_time_of_another_zone_is_recorded_as_utc():
    first = recorded(*SECOND)[0]
    draft = module.Draft(first.event, first.producer, None, first.correlation, first.id)
    east = datetime(2026, 1, 1, 14, tzinfo=timezone(timedelta(hours=2)))
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert place(draft, "r1", 1, module.GENESIS, east) == place(draft, "r1", 1, module.GENESIS, noon)


def test_a_record_moved_dropped_or_swapped_breaks_the_chain():
    records = recorded(*SECOND)
    assert broken_link(records) is None
    assert broken_link(records[1:]) is records[1]
    assert broken_link([*records[:3], *records[4:]]) is records[4]
    assert broken_link([records[0], altered(records[1], position=7), *records[2:]]) is not None


def test_the_same_answer_has_the_same_id_in_every_process():
    assert str(module.derived_id("r1", None, "cli", 0)) == "c94f6222-76a2-5416-b5be-d4e78e57fa88"


def test_an_envelope_is_read_whichever_way_it_was_packed():
    """By zlib once, by Zstandard now; a stream keeps both as they are."""
    lines, subject = (b'{"a":1}', b'{"b":2}'), trace_subject("r1", "model_call", "g0a.dev")
    (body,) = packed(lines, 1000)
    for data in (body, zlib.compress(b"\n".join(lines))):
        assert read_envelope(Message(1, subject, data)) == Envelope("r1", "model_call", "g0a.dev", lines)
    for broken in (body[:-1], b"neither"):
        with pytest.raises(UnreadableRecord, match=r"sia\.trace\.r1"):
            read_envelope(Message(1, subject, broken))
