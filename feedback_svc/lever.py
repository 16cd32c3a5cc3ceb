"""Which lever the next generation pulls, by rule, on figures of the log. Pure; the controls it is compared with too."""

import random
from dataclasses import dataclass

from sia_events.shared.events import Evidence, Lever
from sia_events.shared.run import Run

INVALID_IS_HIGH = 0.2


@dataclass(frozen=True)
class LeverChoice:
    lever: Lever
    reasons: tuple[str, ...]
    evidence: Evidence


def gather(run: Run) -> Evidence:
    """The figures a choice is taken on; all of them stand in the run's records."""
    incumbent = run.incumbent
    assert incumbent is not None, "feedback is asked for behind the first verdict"
    dev = run.scored(incumbent, "dev")
    last = dev[-1] if dev else None
    gains = {lever: _gains(run, lever) for lever in ("harness", "weights")}
    return Evidence(
        incumbent=incumbent,
        dev_score=last.score.value if last else None,
        invalid_rate=round((last.failures.get("invalid", 0) + last.failures.get("unanswered", 0)) / last.score.n, 6)
        if last
        else 0.0,
        skew=last.skew if last else 0.0,
        last_harness_gain=gains["harness"][-1] if gains["harness"] else None,
        last_weights_gain=gains["weights"][-1] if gains["weights"] else None,
        harness_tries=len(gains["harness"]),
        weights_tries=len(gains["weights"]),
        generations_left=run.settings.generations - run.generation + 1,
    )


def choose_lever(run: Run) -> LeverChoice:
    """The lever of generation `run.generation` under the run's policy.

    `auto` turns the harness until it stops paying, then the weights, and looks again after each: first make the right
    action reachable, then make it likely. While many answers are invalid the harness is preferred, two tries for each
    of the weights.
    """
    evidence = gather(run)
    policy = run.settings.lever
    if policy in ("harness", "weights"):
        return LeverChoice(policy, (f"the run pulls {policy} only",), evidence)
    if policy == "alternate":
        lever: Lever = "harness" if run.generation % 2 else "weights"
        return LeverChoice(lever, (f"alternating: generation {run.generation}",), evidence)
    if policy == "random":
        lever = random.Random(f"{run.settings.seed}/{run.generation}").choice(("harness", "weights"))
        return LeverChoice(lever, (f"drawn with seed {run.settings.seed}",), evidence)
    return LeverChoice(*_by_rule(evidence, run.settings.plateau_gain, _last_lever(run)), evidence)


def _by_rule(seen: Evidence, plateau: float, last: Lever | None) -> tuple[Lever, tuple[str, ...]]:
    if seen.invalid_rate > INVALID_IS_HIGH:
        share = f"{seen.invalid_rate:.0%} of dev answers are missing or invalid"
        if seen.harness_tries <= 2 * seen.weights_tries + 1:
            return "harness", (f"{share}: make the right answer reachable before it is made likely",)
    if seen.weights_tries == 0 and seen.generations_left == 1:
        return "weights", ("the last generation, and the weights have not been tried",)
    if seen.last_harness_gain is None:
        return "harness", ("no harness edit has been tried yet, and edits are cheap",)
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
