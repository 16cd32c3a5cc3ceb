"""Which lever the next generation pulls, by rule, on figures of the log. Pure; the controls it is compared with too."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sia_events.agents.lineage import executions, lever_of
from sia_events.feedback_svc.algorithm import Signal, pick
from sia_events.feedback_svc.decide import whole_attempts
from sia_events.shared.events import Evidence, HarnessPatched, Lever, Scored, Split, WeightsUpdated
from sia_events.shared.providers import trainable
from sia_events.shared.record import Record
from sia_events.shared.run import Run

LEVERS: tuple[Lever, ...] = ("harness", "weights")
INVALID_IS_HIGH = 0.2
TENTHS = 10
DIGITS = 6


@dataclass(frozen=True)
class LeverChoice:
    """`algorithm` is None for the harness."""

    lever: Lever
    algorithm: str | None
    reasons: tuple[str, ...]
    evidence: Evidence


def gather(run: Run, records: Sequence[Record]) -> Evidence:
    """The figures a choice is taken on; all of them stand in the run's `records`, of which `run` is the fold."""
    incumbent = run.incumbent
    assert incumbent is not None, "feedback is asked for behind the first verdict"
    dev = run.scored(incumbent, "dev")
    last = dev[-1] if dev else None
    ran = run.executions.get(last.attempt) if last else None
    maximize = run.task is None or run.task.maximize
    of, rewards = rewards_seen(run, incumbent)
    gains = {lever: _gains(run, lever) for lever in LEVERS}
    return Evidence(
        incumbent=incumbent,
        dev_score=last.score.value if last else None,
        invalid_rate=invalid_rate(last) if last else 0.0,
        skew=last.skew if last else 0.0,
        last_harness_gain=gains["harness"][-1] if gains["harness"] else None,
        last_weights_gain=gains["weights"][-1] if gains["weights"] else None,
        harness_tries=len(gains["harness"]),
        weights_tries=len(gains["weights"]),
        generations_left=run.settings.generations - run.generation + 1,
        failures=dict(sorted(last.failures.items())) if last else {},
        rewards=histogram(rewards, maximize),
        reward_mean=round(sum(rewards) / len(rewards), DIGITS) if rewards else None,
        reward_skew=skewness(rewards),
        rewards_of=of,
        calls_an_item=round(ran.calls / _rollouts(run, last), DIGITS) if ran and last else None,
        seconds_of={lever: _seconds(run, records, lever) for lever in LEVERS if gains[lever]},
        usd_of={lever: _usd(run, records, lever) for lever in LEVERS if gains[lever]},
    )


def rewards_seen(run: Run, version: str) -> tuple[Split, Sequence[float]]:
    """What learning would see: the rewards of the version's rollouts where it has some, else of its dev items."""
    if drawn := [each.reward for each in whole_attempts(run, run.versions[version], 0)]:
        return "train", drawn
    sign = 1.0 if run.task is None or run.task.maximize else -1.0
    for split in ("train", "dev"):
        if found := [sign * item for scored in run.scored(version, split) for item in scored.items]:
            return split, found
    return "dev", ()


def _rollouts(run: Run, scored: Scored) -> int:
    """How many rollouts an attempt at those items would be: one, where a task has no items to be asked one by one."""
    return 1 if run.task is not None and run.task.whole else len(scored.items)


def invalid_rate(scored: Scored) -> float:
    """The share of answers that are missing, or none that could be right."""
    return round((scored.failures.get("invalid", 0) + scored.failures.get("unanswered", 0)) / scored.score.n, DIGITS)


def histogram(rewards: Sequence[float], maximize: bool = True) -> tuple[int, ...]:
    """How many rewards lie in each tenth of their range, lowest first.

    The range is 0 to 1, or -1 to 0, where all lie in it, else from the least to the most; empty where that is a point.
    Rewards that are scores turned round, of a task that does not `maximize`, are at their best at 0.
    """
    if not rewards:
        return ()
    low, high = _usual(rewards, maximize) or (min(rewards), max(rewards))
    if low == high:
        return ()
    # A score on the edge of two tenths is in the upper one, also where 1 - 0.9 comes to a little less than 0.1.
    tenths = [round(TENTHS * (reward - low) / (high - low), DIGITS) for reward in rewards]
    places = [min(TENTHS - 1, int(tenth)) for tenth in tenths]
    return tuple(places.count(place) for place in range(TENTHS))


def worthless(rewards: Sequence[float], maximize: bool = True) -> float | None:
    """The share of rewards that are as good as none: those in the lowest tenth of 0 to 1, or of -1 to 0.

    Where that is not their range, as of how many times as fast a kernel is, those that are the least itself; None where
    all are alike.
    """
    if not rewards:
        return None
    usual = _usual(rewards, maximize)
    if usual is None and min(rewards) == max(rewards):
        return None
    most = round(usual[0] + 1 / TENTHS, DIGITS) if usual else None
    none = sum(reward == min(rewards) if most is None else round(reward, DIGITS) < most for reward in rewards)
    return round(none / len(rewards), DIGITS)


def _usual(rewards: Sequence[float], maximize: bool) -> tuple[float, float] | None:
    """The range of usual scores in which all of them lie."""
    usual = ((0.0, 1.0), (-1.0, 0.0)) if maximize else ((-1.0, 0.0),)
    return next((each for each in usual if each[0] <= min(rewards) <= max(rewards) <= each[1]), None)


def skewness(rewards: Sequence[float]) -> float | None:
    """Third standardised moment, m₃ / m₂^1.5 of the central moments; None where all are alike."""
    if not rewards:
        return None
    mean = sum(rewards) / len(rewards)
    widest = max(abs(reward - mean) for reward in rewards)
    if not widest:
        return None
    # Skewness has no scale, and powers of these neither overflow nor vanish.
    away = [(reward - mean) / widest for reward in rewards]
    second, third = (sum(each**power for each in away) / len(away) for power in (2, 3))
    return round(third / second**1.5, DIGITS)


def choose_lever(run: Run, records: Sequence[Record], signal: Signal) -> LeverChoice:
    """Lever and algorithm of generation `run.generation` under the run's policy."""
    evidence = gather(run, records)
    lever, reasons = _lever(run, evidence)
    if lever == "harness":
        return LeverChoice(lever, None, reasons, evidence)
    picked = pick(run.settings, evidence, signal)
    return LeverChoice(lever, picked.algorithm, (*reasons, *picked.reasons), evidence)


def _lever(run: Run, evidence: Evidence) -> tuple[Lever, tuple[str, ...]]:
    """The lever and why.

    `auto` turns the harness until it stops paying, then the weights, and looks again after each: first make the right
    action reachable, then make it likely. While many answers are invalid the harness is preferred, two tries for each
    of the weights.
    """
    policy = run.settings.lever
    if policy in ("harness", "weights"):
        return policy, (f"the run pulls {policy} only",)
    if policy == "alternate":
        return "harness" if run.generation % 2 else "weights", (f"alternating: generation {run.generation}",)
    if policy == "random":
        drawn = random.Random(f"{run.settings.seed}/{run.generation}").choice(LEVERS)
        return drawn, (f"drawn with seed {run.settings.seed}",)
    if not trainable(run.settings.target_model):
        # Thousands of rollouts would be paid for before the trainer could refuse them.
        return "harness", (f"the weights of {run.settings.target_model} are not ours to change, so the harness is",)
    if evidence.calls_an_item == 0:
        return "harness", (f"{evidence.incumbent} asks no model anything: other weights would change nothing",)
    return _by_rule(evidence, run.settings.plateau_gain, _last_lever(run))


def _by_rule(seen: Evidence, plateau: float, last: Lever | None) -> tuple[Lever, tuple[str, ...]]:
    if seen.invalid_rate > INVALID_IS_HIGH:
        share = f"{seen.invalid_rate:.0%} of dev answers are missing or invalid"
        if seen.harness_tries <= 2 * seen.weights_tries + 1:
            return "harness", (f"{share}: make the right answer reachable before it is made likely",)
    if seen.weights_tries == 0 and seen.generations_left == 1:
        return "weights", ("the last generation, and the weights have not been tried",)
    if seen.last_harness_gain is None:
        return "harness", ("no harness edit has been tried yet, and edits are cheap",)
    if by_price := _by_price(seen, plateau):
        return by_price
    stalled = seen.last_harness_gain < plateau
    if not stalled and last != "weights":
        return "harness", (
            f"the last harness change gained {seen.last_harness_gain:+.3f} on the gate: not on a plateau",
        )
    if last == "harness":
        return "weights", (f"the last harness change gained {seen.last_harness_gain:+.3f} on the gate: a plateau",)
    if seen.last_weights_gain is not None and seen.last_weights_gain >= plateau:
        return "weights", (f"the last weight update gained {seen.last_weights_gain:+.3f} on the gate: it still pays",)
    return "harness", ("the weights have stalled: with other weights another harness may fit better",)


def _by_price(seen: Evidence, plateau: float) -> tuple[Lever, tuple[str, ...]] | None:
    """Of two levers that both pay, or neither, the one whose last gain was more for what a generation of it takes.

    In dollars, where both are known to take some: on one's own machine a try is free but for its time. None where one
    lever pays and the other does not, where one was not tried yet, and where neither gives more.
    """
    harness, weights = seen.last_harness_gain, seen.last_weights_gain
    if harness is None or weights is None or (harness >= plateau) != (weights >= plateau):
        return None
    for prices, unit in ((seen.usd_of, "USD"), (seen.seconds_of, "s")):
        if (for_harness := prices.get("harness")) and (for_weights := prices.get("weights")):
            ahead = harness / for_harness - weights / for_weights
            told = (
                f"the last harness change gained {harness:+.3f} on the gate for {for_harness:.3g} {unit}, the last "
                f"weight update {weights:+.3f} for {for_weights:.3g} {unit}: more for its price"
            )
            return ("harness" if ahead > 0 else "weights", (told,)) if ahead else None
    return None


def _last_lever(run: Run) -> Lever | None:
    return run.feedback[-1].lever if run.feedback else None


def _gains(run: Run, lever: Lever) -> list[float]:
    """What each generation under `lever` gained on the gate, oldest first; 0 where nothing was accepted."""
    gains: list[float] = []
    for feedback in run.feedback:
        if feedback.lever == lever and feedback.generation < run.generation:
            verdicts = [run.verdicts[v.name] for v in run.of_generation(feedback.generation) if v.name in run.verdicts]
            accepted = [v for v in verdicts if v.type == "VersionAccepted" and v.comparison]
            gains.append(accepted[0].comparison.gain if accepted and accepted[0].comparison else 0.0)
    return gains


def _seconds(run: Run, records: Sequence[Record], lever: Lever) -> float:
    """Seconds that agents and training took under a lever, a generation that pulled it, in the mean."""
    ran = sum(logged.seconds for logged in executions(records) if lever_of(run, logged) == lever)
    learned = (
        sum(r.event.seconds for r in records if isinstance(r.event, WeightsUpdated)) if lever == "weights" else 0.0
    )
    return round((ran + learned) / len(_gains(run, lever)), DIGITS)


def _usd(run: Run, records: Sequence[Record], lever: Lever) -> float | None:
    """Dollars under a lever, a generation that pulled it, in the mean; None where a price is unknown."""
    paid = [logged.usd for logged in executions(records) if lever_of(run, logged) == lever]
    if lever == "harness":
        paid += [r.event.written.usd for r in records if isinstance(r.event, HarnessPatched) and r.event.written]
    else:
        # A machine without a price is one's own: what it takes is told in seconds.
        paid += [r.event.usd or 0.0 for r in records if isinstance(r.event, WeightsUpdated)]
    known = [usd for usd in paid if usd is not None]
    return round(sum(known) / len(_gains(run, lever)), DIGITS) if len(known) == len(paid) else None
