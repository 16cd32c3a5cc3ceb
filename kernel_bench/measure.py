"""One candidate, judged: right on fresh inputs, and how much faster than the baseline."""

import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import geometric_mean, median

import numpy as np

from sia_events.kernel_bench.check import compare
from sia_events.kernel_bench.environment import Environment, environment
from sia_events.kernel_bench.host import BenchUnavailable, Launch, Refused, Worker, plain, worker
from sia_events.kernel_bench.oracle import oracle
from sia_events.kernel_bench.problems import Array, Inputs, Problem, shipped
from sia_events.kernel_bench.timing import Cost, interval

SOURCE_BYTES = 256 << 10
"""A longer source is refused: it may hold a table of answers."""

INCREDIBLE = 10.0
"""A larger speed-up goes to quarantine: it is more often a hole in the bench than a kernel."""

IDLE_SHARE = 0.5
"""More of the wall time spent neither running nor waiting for a CPU goes to quarantine: something else did the work."""


@dataclass(frozen=True)
class Measurement:
    """The verdict on one candidate.

    `correct`: every output was right, the timed ones too. `reason`: why not, or why it is flagged. `flagged`: in
    quarantine, a person looks before anything is accepted. `speedup`: median over the repeats of the baseline's CPU
    time / the candidate's on the same inputs, `low` and `high` its 20th and 80th percentile; `reference_ms` and
    `candidate_ms`: median CPU time; over several timed cases each is the geometric mean. `max_error`: largest
    absolute error. These six are None unless correct. `rounds`: the speed-up of each repeat, 0 unless correct.
    `seed`: draws the same inputs again.
    """

    problem: str
    correct: bool
    reason: str
    flagged: bool
    speedup: float | None
    low: float | None
    high: float | None
    reference_ms: float | None
    candidate_ms: float | None
    max_error: float | None
    rounds: tuple[float, ...]
    repeats: int
    seed: int
    environment: Environment


@dataclass(frozen=True)
class Judged:
    """One right output: what it cost, and its largest absolute error."""

    cost: Cost
    error: float


@dataclass(frozen=True)
class Pair:
    """Baseline and candidate on the same inputs."""

    baseline: Judged
    candidate: Judged


def measure(
    source: str,
    problem: Problem,
    *,
    seed: int | None = None,
    repeats: int = 9,
    timeout_s: float = 120.0,
    launch: Launch = plain,
    stop: int | None = None,
) -> Measurement:
    """Check `source`, which defines `custom_kernel(data)`, and time it against the problem's baseline.

    Every call gets inputs of its own, drawn from `seed`; whoever wrote `source` must not be able to guess it, so
    leave it out or draw it afresh. `timeout_s` is the wall time of all that the candidate does, and as much is the
    baseline's. `launch` puts both workers in a box. What a candidate does wrong is in the Measurement; raises
    BenchUnavailable when the bench itself fails, and Stopped once the descriptor `stop` can be read.
    """
    seed = secrets.randbits(128) if seed is None else seed
    try:
        rounds = run(source, problem, np.random.default_rng(seed), repeats, timeout_s, launch, stop)
    except Refused as refusal:
        return Measurement(
            problem=problem.name,
            correct=False,
            reason=str(refusal),
            flagged=False,
            speedup=None,
            low=None,
            high=None,
            reference_ms=None,
            candidate_ms=None,
            max_error=None,
            rounds=(0.0,) * repeats,
            repeats=repeats,
            seed=seed,
            environment=environment(),
        )
    pairs = [pair for round_ in rounds for pair in round_]
    speedups = tuple(geometric_mean([ratio(pair) for pair in round_]) for round_ in rounds)
    speedup = interval(speedups)
    reason = suspicion(speedup.median, [pair.candidate.cost for pair in pairs])
    return Measurement(
        problem=problem.name,
        correct=True,
        reason=reason,
        flagged=bool(reason),
        speedup=speedup.median,
        low=speedup.low,
        high=speedup.high,
        reference_ms=milliseconds([[pair.baseline.cost.cpu for pair in round_] for round_ in rounds]),
        candidate_ms=milliseconds([[pair.candidate.cost.cpu for pair in round_] for round_ in rounds]),
        max_error=max(pair.candidate.error for pair in pairs),
        rounds=speedups,
        repeats=repeats,
        seed=seed,
        environment=environment(),
    )


def run(
    source: str,
    problem: Problem,
    rng: np.random.Generator,
    repeats: int,
    timeout_s: float,
    launch: Launch,
    stop: int | None,
) -> Sequence[Sequence[Pair]]:
    """`repeats` rounds of one pair per timed case, after the checks and one round to warm up. Raises Refused."""
    if len(source.encode()) > SOURCE_BYTES:
        raise Refused(f"the source is longer than {SOURCE_BYTES} bytes")
    with ExitStack() as stack:
        expect = stack.enter_context(oracle(problem))
        candidate = stack.enter_context(worker(launch, timeout_s, stop))
        candidate.load(source)
        for case in problem.checked:
            inputs = problem.generate(case, rng)
            judge(candidate, problem, inputs, expect(inputs))
        baseline = stack.enter_context(worker(launch, timeout_s, stop))
        baseline.load(shipped(problem.baseline))
        rounds = []
        for number in range(1 + repeats):
            drawn = [problem.generate(case, rng) for case in problem.timed]
            rounds.append([pair(baseline, candidate, problem, i, expect(i), number % 2 == 0) for i in drawn])
        return rounds[1:]


def pair(
    baseline: Worker, candidate: Worker, problem: Problem, inputs: Inputs, expected: Array, candidate_first: bool
) -> Pair:
    """Both on the same inputs, neither beside the other; the order alternates over the rounds so that neither always
    finds warm caches. Raises Refused.
    """
    theirs = judge(candidate, problem, inputs, expected) if candidate_first else None
    ours = judge_baseline(baseline, problem, inputs, expected)
    candidate.require_rest()
    return Pair(ours, theirs or judge(candidate, problem, inputs, expected))


def judge_baseline(kernel: Worker, problem: Problem, inputs: Inputs, expected: Array) -> Judged:
    try:
        return judge(kernel, problem, inputs, expected)
    except Refused as refusal:
        raise BenchUnavailable(f"the baseline of {problem.name} failed, nothing was measured: {refusal}") from None


def judge(kernel: Worker, problem: Problem, inputs: Inputs, expected: Array) -> Judged:
    """One call whose output is right. Raises Refused."""
    output, cost = kernel.call(inputs)
    comparison = compare(output, expected, atol=problem.atol, rtol=problem.rtol)
    if comparison.fault:
        raise Refused(comparison.fault)
    if cost.cpu <= 0:
        raise Refused("it took no CPU time")
    return Judged(cost, comparison.error)


def suspicion(speedup: float, costs: Sequence[Cost]) -> str:
    """Why a right and fast candidate belongs in quarantine, or nothing."""
    if speedup > INCREDIBLE:
        return f"{speedup:.3g} times as fast as the baseline: more than {INCREDIBLE:g} is looked at by a person"
    idle = median(cost.idle / cost.wall for cost in costs)
    if idle > IDLE_SHARE:
        return f"idle for {idle:.0%} of the time it took to answer: its CPU time is not the whole work"
    return ""


def ratio(pair: Pair) -> float:
    return pair.baseline.cost.cpu / pair.candidate.cost.cpu


def milliseconds(rounds: Sequence[Sequence[int]]) -> float:
    """Geometric mean over the cases of the median over the rounds; nanoseconds in."""
    return geometric_mean([median(case) / 1e6 for case in zip(*rounds, strict=True)])
