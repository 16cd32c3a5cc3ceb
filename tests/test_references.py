"""Which blobs a record names: those that its fields are declared to name, and nothing that only looks like one."""

from given import recorded
from story import accepted, logged, patched, registered, scored, started, trained

from sia_events.event_log.references import Reference, members, named
from sia_events.shared.events import Event, RunSteered
from sia_events.shared.record import Record

TEXT = "ab" * 32


def only(event: Event) -> Record:
    return recorded(registered(), started(), event)[-1]


def test_fields_name_blobs_and_trees_as_they_are_declared():
    task = registered()
    found = set(named(recorded(task)[0]))
    trees = {*task.datasets.values(), task.reference}
    assert {each.digest for each in found if each.tree and not each.private} == trees
    assert {each.digest for each in found if each.private} == {task.answers, *filter(None, [task.judge])}
    assert Reference(task.spec) in found
    ran = logged("g0a", "dev")
    assert set(named(only(ran))) == {Reference(ran.outputs, tree=True), Reference(ran.trajectory)}


def test_an_adapter_within_the_weights_is_a_tree():
    learned = trained("g1a", "g0a")
    assert learned.weights.adapter
    assert Reference(learned.weights.adapter, tree=True) in set(named(only(learned)))


def test_text_that_looks_like_a_digest_names_nothing():
    assert list(named(only(RunSteered(text=TEXT)))) == []
    assert TEXT not in {each.digest for each in named(only(patched("g1a", reason=TEXT)))}
    assert list(named(only(accepted("g0a")))) == []
    assert all(each.digest != TEXT for each in named(only(scored("g0a", "dev", "10"))))


def test_members_are_those_of_a_manifest():
    assert members(b'{"a.py":"%s"}' % TEXT.encode()) == (TEXT,)
    assert members(b'{"a.py":"no digest"}') == members(b"[]") == members(b"print()") == ()
