"""The archive of scored versions: PUCT by hand, what holds of it always, and what each search asks for."""

from collections import Counter
from math import sqrt
from typing import Any

import pytest
from given import given, recorded
from hypothesis import given as for_all
from hypothesis import strategies as st
from story import (
    ACCEPTED,
    D,
    accepted,
    asked,
    failed,
    fed_back,
    feedback_asked,
    patched,
    proposed,
    registered,
    scored,
    started,
    trained,
)

from sia_events.feedback_svc.service import feedback_svc
from sia_events.shared.archive import CAPACITY, CHILDREN_KEPT, kept, ranked, related, starts, visited
from sia_events.shared.archive import scored as rewards_of
from sia_events.shared.events import (
    AttemptRequested,
    Estimate,
    Event,
    HarnessPatchRequested,
    RunSettings,
    Scored,
    Start,
    Weights,
)
from sia_events.shared.run import Run, Version, fold


def on_dev(version: str, value: float) -> Scored:
    return scored(version, "dev", "1", score=Estimate(value=value, low=value, high=value, n=1))


def start(version: str) -> Start:
    terms = {"reward": 0, "value": 0, "prior": 0, "visits": 0, "expansions": 0, "scale": 0, "puct": 0}
    return Start.model_validate({"version": version, "share": 1, **terms})


def patches(generation: int, *versions: str) -> HarnessPatchRequested:
    """Asked for from these versions."""
    chosen = tuple(start(version) for version in versions)
    return HarnessPatchRequested(generation=generation, parent=versions[0], candidates=3, seed=0, starts=chosen)


FIRST = (registered(), started(search="archive", candidates=2), proposed(), on_dev("g0a", 0.5), accepted("g0a"))
ONE = (
    *FIRST,
    HarnessPatchRequested(generation=1, parent="g0a", candidates=3, seed=0),
    *(patched("g1a"), patched("g1b"), patched("g1c")),
    *(on_dev("g1a", 0.7), on_dev("g1b", 0.6), on_dev("g1c", 0.4)),
)
TWO = (
    *ONE,
    patches(2, "g1a", "g1b"),
    *(patched("g2a", "g1a"), patched("g2b", "g1b"), asked("g2b", "dev")),
    *(on_dev("g2a", 0.65), failed("g2b", "dev")),
)


def ranking(*events: Event) -> list[tuple[str, float]]:
    return [(state.version, pytest.approx(state.puct)) for state in ranked(fold(recorded(*events)))]


def test_puct_after_one_expansion_is_what_a_hand_computes():
    # Kept are 0.7, 0.6 and the first, 0.5: scale 0.2, priors 3/6, 2/6, 1/6. T = 1, and n = 1 for the first alone.
    root = sqrt(2)
    by_hand = [
        ("g1a", 0.7 + 0.2 * 3 / 6 * root),
        ("g0a", 0.7 + 0.2 * 1 / 6 * root / 2),
        ("g1b", 0.6 + 0.2 * 2 / 6 * root),
    ]
    assert ranking(*ONE) == by_hand


def test_puct_after_three_expansions_is_what_a_hand_computes():
    # T = 3, so the root is 2. g1a is worth its child, less than itself; g1b's child failed, so it is worth itself.
    by_hand = [
        ("g2a", 0.65 + 0.2 * 3 / 10 * 2),
        ("g1a", 0.65 + 0.2 * 4 / 10 * 2 / 2),
        ("g0a", 0.7 + 0.2 * 1 / 10 * 2 / 4),
        ("g1b", 0.6 + 0.2 * 2 / 10 * 2 / 2),
    ]
    assert ranking(*TWO) == by_hand
    run = fold(recorded(*TWO))
    assert visited(run) == {"g0a": 3, "g1a": 1, "g1b": 1} and run.expanded == ("g0a", "g1a", "g1b")


def test_a_pick_blocks_its_ancestors_and_descendants_and_candidates_are_dealt_round():
    run = fold(recorded(*TWO))
    assert [(s.version, s.share) for s in starts(run, 1, 1)] == [("g2a", 1)]
    assert [(s.version, s.share) for s in starts(run, 2, 2)] == [("g2a", 1), ("g1b", 1)]
    assert [(s.version, s.share) for s in starts(run, 5, 5)] == [("g2a", 3), ("g1b", 2)]
    assert [(s.version, s.share) for s in starts(run, 5, 1)] == [("g2a", 5)]


def test_where_less_is_better_the_lowest_score_ranks_first():
    less = (registered(maximize=False), *ONE[1:])
    # Turned round: -0.4 of g1c, -0.5 of the first, -0.6 of g1b; the worst child is not kept.
    states = ranked(fold(recorded(*less)))
    assert [(s.version, s.reward) for s in states] == [("g1c", -0.4), ("g0a", -0.5), ("g1b", -0.6)]


def test_a_version_with_other_weights_is_a_state_and_its_rollouts_an_expansion_however_often_tried():
    tries = [asked("g1a", "train", tries=tries) for tries in (0, 1)]
    run = fold(recorded(*ONE, *tries, trained("g2a", "g1a"), on_dev("g2a", 0.9)))
    assert run.expanded == ("g0a", "g1a")
    best = starts(run, 1, 1)[0]
    assert (best.version, best.expansions) == ("g2a", 2)


def under(search: str, *past: Event) -> list[Event]:
    """The past of a run that searches so."""
    opening = started(search=search, candidates=2)
    return [opening if event.type == "RunStarted" else event for event in past]  # type: ignore[attr-defined]


def asked_under(search: str, *past: Event) -> HarnessPatchRequested:
    story = given(feedback_svc, *under(search, *past)).when(fed_back(3, incumbent="g1a"))
    (event,) = story.then_types(HarnessPatchRequested)
    assert isinstance(event, HarnessPatchRequested)
    return event


def test_each_search_starts_its_candidates_from_another_place():
    past = (*TWO, accepted("g1a", "g0a"), feedback_asked(3, "g1a"))
    line, anew, reuse = (asked_under(search, *past) for search in ("line", "best-of-k", "archive"))
    assert (line.parent, line.starts) == ("g1a", ())
    assert (anew.parent, anew.starts) == ("g0a", ())
    assert reuse.parent == "g2a" and reuse.starts == starts(fold(recorded(*past)), 2, 2)
    first = reuse.starts[0]
    bonus = first.scale * first.prior * sqrt(1 + first.expansions) / (1 + first.visits)
    assert first.puct == pytest.approx(first.value + bonus)


@pytest.mark.parametrize(
    ("search", "picked"), [("line", ()), ("best-of-k", ()), ("archive", (("g2a", 256), ("g1b", 256)))]
)
def test_rollouts_are_the_incumbents_and_in_an_archive_start_from_what_puct_picks(
    search: str, picked: tuple[tuple[str, int], ...]
):
    past = under(search, *TWO, accepted("g1a", "g0a"), feedback_asked(3, "g1a"))
    (event,) = given(feedback_svc, *past).when(fed_back(3, "weights", "g1a")).then_types(AttemptRequested)
    assert isinstance(event, AttemptRequested) and (event.version, event.split) == ("g1a", "train")
    assert tuple((start.version, start.share) for start in event.starts) == picked
    run = fold(recorded(*past, event))
    assert run.expanded[3:] == (tuple(version for version, _ in picked) or ("g1a",))


def test_a_line_is_what_a_run_is_without_a_word_about_it():
    assert RunSettings().search == "line"
    (event,) = given(feedback_svc, *ACCEPTED, feedback_asked(1)).when(fed_back(1)).then_types(HarnessPatchRequested)
    assert isinstance(event, HarnessPatchRequested) and (event.parent, event.starts) == ("g0a", ())


@st.composite
def searches(draw: st.DrawFn) -> Run:
    """Some first versions and descendants of theirs, with rewards, of which some were started from."""
    size = draw(st.integers(1, 14))
    names = [f"v{n}" for n in range(size)]
    parents = [draw(st.sampled_from([None, *names[:n]])) for n in range(size)]
    values = draw(st.lists(st.integers(0, 4).map(float), min_size=size, max_size=size))
    expanded = draw(st.lists(st.sampled_from(names), max_size=12))
    return searched(dict(zip(names, parents, strict=True)), dict(zip(names, values, strict=True)), expanded)


def searched(parents: dict[str, str | None], values: dict[str, float], expanded: list[str]) -> Run:
    def version(name: str) -> Version:
        return Version(name, 0 if parents[name] is None else 1, parents[name], None, D, Weights(model="m"), (), "")

    scores: dict[str, Any] = {f"{name}.dev": on_dev(name, value) for name, value in values.items()}
    return Run(versions={name: version(name) for name in parents}, scores=scores, expanded=tuple(expanded))


@for_all(searches())
def test_visits_are_conserved(run: Run):
    visits, begun = visited(run), Counter(run.expanded)
    for name in run.versions:
        children = [other.name for other in run.versions.values() if other.parent == name]
        assert visits[name] == begun[name] + sum(visits[child] for child in children)
    assert sum(visits[v.name] for v in run.versions.values() if v.parent is None) == len(run.expanded)


@for_all(searches(), st.integers(1, 6))
def test_starts_are_of_different_lineages_and_share_all_candidates(run: Run, candidates: int):
    picked = starts(run, candidates, candidates)
    assert sum(s.share for s in picked) == candidates
    names = [s.version for s in picked]
    assert not any(related(run, one, other) for one in names for other in names if one != other)
    assert picked[0].puct == max(s.puct for s in ranked(run)) and starts(run, candidates, candidates) == picked


@for_all(searches())
def test_priors_are_a_distribution_and_two_children_of_a_parent_are_kept(run: Run):
    states = ranked(run)
    assert sum(s.prior for s in states) == pytest.approx(1, abs=1e-6)
    parents = Counter(run.versions[s.version].parent for s in states)
    assert all(count <= CHILDREN_KEPT for parent, count in parents.items() if parent is not None)


@for_all(searches(), st.integers(-3, 3), st.integers(1, 5))
def test_another_unit_or_zero_of_the_score_changes_every_puct_alike(run: Run, zero: int, unit: int):
    values = {name: zero + unit * reward for name, reward in rewards_of(run).items()}
    other = searched({v.name: v.parent for v in run.versions.values()}, values, list(run.expanded))
    one, two = ({s.version: s.puct for s in ranked(each)} for each in (run, other))
    assert two == pytest.approx({name: zero + unit * puct for name, puct in one.items()}, abs=1e-6)


def test_beyond_its_capacity_the_archive_keeps_the_best_and_the_first_version():
    size = CAPACITY + 200
    names = [f"v{n}" for n in range(size)]
    parents: dict[str, str | None] = dict(zip(names, [None, *names], strict=False))
    rewards = {name: float(place) for place, name in enumerate(names)}
    stay = kept(searched(parents, rewards, []), rewards)
    assert len(stay) == CAPACITY and stay == [names[0], *names[-CAPACITY + 1 :]]
