"""Every fact the system can record, in the order a run lives through them, and the small values they carry."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Lever = Literal["harness", "weights"]
LeverPolicy = Literal["auto", "harness", "weights", "alternate", "random"]
Search = Literal["line", "best-of-k", "archive"]
Split = Literal["train", "dev", "gate", "test"]
FailureKind = Literal["infrastructure", "budget", "timeout", "crash", "invalid_output", "empty_reply", "truncated"]
BackendName = Literal["builtin", "direct", "agentic", "claude", "openhands"]
Algorithm = Literal["reinforce", "grpo", "rloo", "ppo", "entropic", "cloning", "dpo"]
Autonomy = Literal["full", "approve-weights", "approve-each"]


@dataclass(frozen=True)
class Names:
    """What a field of a fact names by digest: a blob, or the manifest of a tree (shared/tree.py)."""

    what: Literal["blob", "tree"]


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), Names("blob")]
Tree = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), Names("tree")]


class Value(BaseModel):
    """Part of an event: immutable, no unknown fields, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Event(BaseModel):
    """A fact, past tense. Built without clock and without chance; large things are referred to by digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Weights(Value):
    """A base model and, maybe, an adapter (the digest of its packed folder)."""

    model: str
    adapter: Tree | None = None


class Estimate(Value):
    """A mean over n items with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int = Field(ge=1)


class Comparison(Value):
    """A paired comparison on the same items: mean gain, its interval, the p-value of no difference."""

    gain: float
    low: float
    high: float
    p_value: float
    n: int
    better: int
    worse: int


class Sealed(Value):
    """The test split, scored once at the end for the first and the final version."""

    first: Estimate
    final: Estimate
    comparison: Comparison


class Budget(Value):
    """Hard limits over all roles together; None is no limit. `tokens` are prompt and completion tokens."""

    usd: float | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    calls: int | None = Field(default=None, gt=0)


class Learning(Value):
    """How weights are learned from rollouts, whatever the algorithm; a field that an algorithm has no use for is idle.

    Credit: `terminal` gives every call of an attempt the advantage of the whole attempt; `per-step` compares calls that
    were made in the same state, on what was rewarded from there on, `discount` a call; PPO's critic then values calls,
    and no longer actions. Reduction: the mean over each
    sample's tokens (`sample`, GRPO's own), over all tokens of the batch (`token`, DAPO's) or a sum over a `constant`
    (Dr. GRPO's). `kl` weighs the distance from the base model, not from the last adapter, in nats. `kl_stop` ends
    learning at that mean distance from the policy that made the rollouts. `max_lag`: rollouts of up to so many adapters
    back are learned from too. A sample whose mean |log ratio| a token passes `max_ratio` is masked, and counted.

    `backend`: whose trainer makes the update; what TRL has no way to learn is learned by ours, and said. `hold_out`: of
    so many of the items nothing is learned; every `look_every` steps, and behind the last, their samples tell what
    reward the new weights can expect. Once that was below its best for `patience` looks, learning ends; the weights of
    the best look are the update. `targets`: the layers that a fresh adapter changes, by the end of their names, or all
    linear ones. `recompute` trades a third more time for the memory of activations; None: for large models.
    """

    lr: float = Field(default=5e-4, gt=0, le=1)
    rank: int = Field(default=16, ge=1, le=512)
    scale: float = Field(default=2.0, gt=0)
    batch_prompts: int = Field(default=24, ge=1)
    updates: int = Field(default=1, ge=1, le=16)
    clip: float = Field(default=1.0, gt=0)
    kl: float = Field(default=0.0, ge=0)
    kl_stop: float | None = Field(default=None, gt=0)
    entropy: float = Field(default=0.0, ge=0)
    reduction: Literal["sample", "token", "constant"] = "sample"
    credit: Literal["terminal", "per-step"] = "terminal"
    discount: float = Field(default=1.0, gt=0, le=1)
    trace: float = Field(default=0.95, ge=0, le=1)
    best_of: int = Field(default=1, ge=1)
    margin: float = Field(default=0.0, ge=0)
    beta: float = Field(default=0.1, gt=0)
    leave_one_out: bool = False
    max_lag: int = Field(default=0, ge=0)
    max_ratio: float = Field(default=5.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Literal["ours", "trl"] = "ours"
    hold_out: float = Field(default=0.0, ge=0, le=0.5)
    look_every: int = Field(default=4, ge=1)
    patience: int = Field(default=2, ge=1)
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    recompute: bool | None = None


class Probe(Value):
    """Proof that an adapter reached the sampler: log-probs of fixed texts by the learner and by whoever serves it.

    `apart` is the largest difference of a token's log-prob between the two, `moved` the largest between the served
    adapter and what it started from: an adapter that never arrived has `moved` = 0.
    """

    texts: int
    tokens: int
    apart: float
    moved: float


class RolloutSource(Value):
    """Where logged rollouts lie: one attempt's calls and rewards. `lag`: how many adapters it is behind the parent."""

    attempt: str
    version: str
    trajectory: Digest
    rewards: Digest
    lag: int = 0


class WholeAttempt(Value):
    """A rollout that is a whole attempt, as those of a task without items are: its calls share the `reward`.

    Attempts of one `group` began alike. The reward is the attempt's score, turned so that more is better. `lag`: how
    many adapters it is behind the parent.
    """

    attempt: str
    version: str
    group: str
    trajectory: Digest
    reward: float
    lag: int = 0


class Start(Value):
    """An archived state that candidates, or groups of rollouts, start from, with the terms of PUCT that chose it.

    It is what `version` wrote on dev; with `attempt`, what that rollout of the version wrote.
    `share` is how many of them do. `reward` is its own dev score, turned so that more is better, `value` that of its
    best child where it has one; `visits` counts how often it or a descendant was started from, `expansions` how often
    any version was. `scale` is the spread of rewards in the archive. `puct` follows from them
    (shared/archive.py).
    """

    version: str
    share: int = Field(ge=1)
    reward: float
    value: float
    prior: float
    visits: int
    expansions: int
    scale: float
    puct: float
    attempt: str | None = None

    @property
    def state(self) -> str:
        """What the state is told by."""
        return self.attempt or self.version


# A run draws with its seed and, in a generation, with the sum of the two: runs whose seeds lie closer than a run has
# generations may draw alike, and count as no repeats of one another. Attempts that are siblings lie further apart.
SEEDS_APART = 10_000


class RunSettings(Value):
    """What a run was asked to do; a branch changes some of it."""

    generations: int = Field(default=3, ge=0, le=1000)
    candidates: int = Field(default=3, ge=1, le=26)
    lever: LeverPolicy = "auto"
    search: Search = "line"
    seed: int = Field(default=0, ge=0, lt=2**31)
    target_model: str = "local/smollm2-135m-instruct"
    sandbox: Literal["bubblewrap", "process"] = "bubblewrap"
    algorithm: Algorithm | Literal["auto"] = "auto"
    rollout_items: int = Field(default=512, ge=1)
    rollout_samples: int = Field(default=8, ge=2, le=64)
    epochs: int = Field(default=1, ge=1, le=10)
    learning: Learning = Learning()
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    plateau_gain: float = Field(default=0.03, ge=0)
    attempt_tries: int = Field(default=3, ge=1, le=10)
    backend: BackendName = "builtin"
    meta_model: str | None = None
    feedback_model: str | None = None
    any_model_name: bool = False
    attempt_calls: int | None = Field(default=None, ge=1)
    turns: int = Field(default=20, ge=1, le=200)
    prompt_tokens: int = Field(default=24_000, ge=2_000)
    budget: Budget = Budget()
    autonomy: Autonomy = "full"
    pause_on_gain: float | None = Field(default=None, gt=0)
    pause_after_failures: int = Field(default=10, ge=0)
    pause_usd_per_minute: float | None = Field(default=None, gt=0)


class Written(Value):
    """How an LLM agent came to what it wrote: its prompt, its own trajectory and its note, by digest; and what it took.

    `usd` is None where nobody knows the model's price, here and in what attempts took.
    """

    backend: BackendName
    model: str
    prompt: Digest
    trajectory: Digest
    note: Digest
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = 0.0


class Evidence(Value):
    """What a lever and an algorithm were chosen on: figures of the log, each of them recomputable from it.

    `rewards` counts the incumbent's rollouts, or where it has none its dev items, as `rewards_of` says, in ten equal
    bins of their reward (the score, turned so that more is better), lowest first; `reward_mean` and `reward_skew`
    (third standardised moment) are of the same. `calls_an_item` is of dev; where a task has no items, of an attempt.
    `seconds_of` and `usd_of` are what a try of each lever took so far, in the mean.
    """

    incumbent: str
    dev_score: float | None
    invalid_rate: float
    skew: float
    last_harness_gain: float | None
    last_weights_gain: float | None
    harness_tries: int
    weights_tries: int
    generations_left: int
    failures: dict[str, int] = {}
    rewards: tuple[int, ...] = ()
    reward_mean: float | None = None
    reward_skew: float | None = None
    rewards_of: Split = "dev"
    calls_an_item: float | None = None
    seconds_of: dict[str, float] = {}
    usd_of: dict[str, float | None] = {}


class TaskRegistered(Event):
    """A task was checked and its data laid down: public data a split, answers with the evaluator only.

    `whole`: it has no items to ask one by one, so a rollout is a whole attempt, scored on what dev is scored on.
    """

    type: Literal["TaskRegistered"] = "TaskRegistered"
    task: str
    title: str
    metric: str
    maximize: bool
    spec: Digest
    datasets: dict[str, Tree]
    answers: Digest
    judge: Tree | None = None
    reference: Tree
    sizes: dict[str, int]
    floor: float | None
    whole: bool = False


class RunStarted(Event):
    """Somebody asked for a better agent."""

    type: Literal["RunStarted"] = "RunStarted"
    settings: RunSettings
    code: str


class AgentProposed(Event):
    """The meta-agent wrote a first version."""

    type: Literal["AgentProposed"] = "AgentProposed"
    version: str
    candidate: int
    harness: Tree
    weights: Weights
    reason: str
    written: Written | None = None


class AttemptRequested(Event):
    """A version is owed a run on a split, each item `samples` times; above one, replies are drawn at temperature 1.

    In a search, rollouts of an item start from what one of the `starts` wrote, dealt round the items. On a task without
    items a whole attempt is one rollout: those of a `group` start alike, and replies are drawn at temperature 1. In a
    search a version's other attempts start there from the best state there was when it came.
    """

    type: Literal["AttemptRequested"] = "AttemptRequested"
    attempt: str
    version: str
    split: Split
    tries: int = 0
    items: int | None = None
    samples: int = 1
    seed: int
    starts: tuple[Start, ...] = ()
    group: str | None = None

    @property
    def sampled(self) -> bool:
        """Whether these are rollouts: replies are drawn at temperature 1, whatever is asked for."""
        return self.samples > 1 or self.group is not None


class ExecutionLogged(Event):
    """The target agent ran to its end: what it wrote, and every model call it made, by digest."""

    type: Literal["ExecutionLogged"] = "ExecutionLogged"
    attempt: str
    version: str
    split: Split
    outputs: Tree
    trajectory: Digest
    calls: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    usd: float | None = 0.0


class AttemptFailed(Event):
    """An attempt gave no outputs to score.

    `infrastructure` is ours and tried again, `budget` is tried again once there is more of it; the rest is the
    candidate's own. Calls and tokens are those of all its tries so far; 0 where an `ExecutionLogged` before it has told
    of them.
    """

    type: Literal["AttemptFailed"] = "AttemptFailed"
    attempt: str
    version: str
    split: Split
    kind: FailureKind
    message: str
    detail: Digest | None = None
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = 0.0


class KernelMeasured(Event):
    """A kernel was checked on fresh inputs and timed outside its own process.

    `rounds` are the speed-ups of the repeats in their order, each 0 where the kernel is wrong; `speedup`, `low` and
    `high` are their median and 20th and 80th percentile. `flagged`: in quarantine until a person has looked.
    """

    type: Literal["KernelMeasured"] = "KernelMeasured"
    attempt: str
    version: str
    problem: str
    correct: bool
    speedup: float
    low: float
    high: float
    flagged: bool
    reason: str
    rounds: tuple[float, ...] = ()


class Scored(Event):
    """The evaluator judged an attempt over all items of its split, in the split's order.

    `items` are per-item scores, `failures` counts items by class of failure, `skew` is the share of the most
    common answer, `rewards` points at per-sample rewards, the higher the better (train split only: its answers are
    open).
    """

    type: Literal["Scored"] = "Scored"
    attempt: str
    version: str
    split: Split
    score: Estimate
    items: tuple[float, ...]
    failures: dict[str, int]
    skew: float
    rewards: Digest | None = None


class VersionAccepted(Event):
    """The gate let a candidate through: it is the incumbent now."""

    type: Literal["VersionAccepted"] = "VersionAccepted"
    version: str
    over: str | None
    comparison: Comparison | None
    reason: str


class VersionRejected(Event):
    """The candidate did not show a real gain; the incumbent stays."""

    type: Literal["VersionRejected"] = "VersionRejected"
    version: str
    over: str | None
    comparison: Comparison | None
    reason: str


class FeedbackRequested(Event):
    """A generation is closed and another is owed: somebody must read what happened and pick a lever."""

    type: Literal["FeedbackRequested"] = "FeedbackRequested"
    generation: int
    incumbent: str


class FeedbackGiven(Event):
    """The feedback agent picked a lever for the next generation, with its reasons and its evidence.

    `references` are ids of records that it rests on, `expected_gain` is in units of the task's metric, towards better.
    """

    type: Literal["FeedbackGiven"] = "FeedbackGiven"
    generation: int
    incumbent: str
    lever: Lever
    algorithm: str | None
    reasons: tuple[str, ...]
    evidence: Evidence
    references: tuple[str, ...] = ()
    expected_gain: float | None = None
    written: Written | None = None


class HarnessPatchRequested(Event):
    """The next generation changes the harness: K candidates are wanted.

    They start from `parent`; where `starts` names archived versions, of which `parent` is the first, from those.
    """

    type: Literal["HarnessPatchRequested"] = "HarnessPatchRequested"
    generation: int
    parent: str
    candidates: int
    seed: int
    starts: tuple[Start, ...] = ()


class HarnessPatched(Event):
    """A candidate with another harness, and its parent's weights or, where the gate refused these, the incumbent's."""

    type: Literal["HarnessPatched"] = "HarnessPatched"
    version: str
    generation: int
    candidate: int
    parent: str
    harness: Tree
    weights: Weights
    edits: tuple[str, ...]
    reason: str
    written: Written | None = None


class WeightUpdateRequested(Event):
    """The next generation changes the weights: learn from these rollouts of the incumbent, and from `older` ones.

    They are one attempt's, of many items, with a reward each; of a task without items they are `whole` attempts.
    """

    type: Literal["WeightUpdateRequested"] = "WeightUpdateRequested"
    generation: int
    parent: str
    algorithm: str
    trajectory: Digest | None = None
    rewards: Digest | None = None
    epochs: int
    seed: int
    learning: Learning = Learning()
    older: tuple[RolloutSource, ...] = ()
    whole: tuple[WholeAttempt, ...] = ()


class WeightsUpdated(Event):
    """A candidate with another adapter and its parent's harness.

    `counts` says what became of the rollouts: learned from, or left out and why. `manifest` is the digest of the
    adapter's own: base, parent, algorithm, data, metrics. `backend` names whose trainer made it: "trl 1.16.0", or
    "ours" with the reason why it was not TRL's where that was asked for.

    It cost `seconds`, from the rollouts to the proof, of which the learner computed `metrics["cpu_seconds"]`. `usd` is
    what these were worth where the machine that learns has a price an hour; None where it has none, so is one's own.
    """

    type: Literal["WeightsUpdated"] = "WeightsUpdated"
    version: str
    generation: int
    parent: str
    harness: Tree
    weights: Weights
    algorithm: str
    rollouts: int
    metrics: dict[str, float]
    seconds: float
    counts: dict[str, int] = {}
    probe: Probe | None = None
    manifest: Digest | None = None
    backend: str = "ours"
    usd: float | None = None


class ProposalFailed(Event):
    """A lever had no candidate to offer this generation."""

    type: Literal["ProposalFailed"] = "ProposalFailed"
    generation: int
    parent: str
    lever: Lever
    reason: str


class ApprovalRequested(Event):
    """A person has to say yes before this goes on."""

    type: Literal["ApprovalRequested"] = "ApprovalRequested"
    subject: str
    reason: str


class ApprovalGiven(Event):
    """A person said yes."""

    type: Literal["ApprovalGiven"] = "ApprovalGiven"
    subject: str
    by: str


class ApprovalRefused(Event):
    """A person said no."""

    type: Literal["ApprovalRefused"] = "ApprovalRefused"
    subject: str
    by: str
    reason: str


class RunPaused(Event):
    """Nothing new is begun until the run is resumed."""

    type: Literal["RunPaused"] = "RunPaused"
    reason: str


class RunResumed(Event):
    """The run goes on."""

    type: Literal["RunResumed"] = "RunResumed"
    reason: str


class RunSteered(Event):
    """A person said something that the next feedback must read."""

    type: Literal["RunSteered"] = "RunSteered"
    text: str


class BudgetChanged(Event):
    """The limits are other ones from here on."""

    type: Literal["BudgetChanged"] = "BudgetChanged"
    budget: Budget


class BudgetExhausted(Event):
    """The next call would pass a limit; it was not made."""

    type: Literal["BudgetExhausted"] = "BudgetExhausted"
    limit: Literal["usd", "minutes", "tokens", "calls"]
    allowed: float
    spent: float


class ServiceFailed(Event):
    """A service gave up on a record after its last try: the dead letter, with the payload kept."""

    type: Literal["ServiceFailed"] = "ServiceFailed"
    service: str
    failed: str | None
    sequence: int
    error: str
    payload: Digest
    tries: int


class LetterDropped(Event):
    """A person gave up what a dead letter is about: its service is not asked for an answer again."""

    type: Literal["LetterDropped"] = "LetterDropped"
    letter: str
    by: str
    reason: str


class RunBranched(Event):
    """This run goes on from a position of its parent with some settings changed; nothing is copied."""

    type: Literal["RunBranched"] = "RunBranched"
    parent: str
    at: int
    generation: int
    overrides: dict[str, JsonValue]
    settings: RunSettings
    code: str


class RunCancelled(Event):
    """A person ended the run."""

    type: Literal["RunCancelled"] = "RunCancelled"
    reason: str


class RunFinished(Event):
    """The end: the best version, the sealed scores, and in plain words what it came to."""

    type: Literal["RunFinished"] = "RunFinished"
    outcome: Literal["improved", "no proven gain", "failed"]
    best: str | None
    sealed: Sealed | None
    reason: str


EVENTS: dict[str, type[Event]] = {
    name: kind
    for name, kind in list(globals().items())
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
}


def event_schema() -> dict[str, Any]:
    """JSON Schema of every event's data, by type; the type itself stands in the record around it."""
    schemas = {name: kind.model_json_schema() for name, kind in EVENTS.items()}
    for schema in schemas.values():
        del schema["properties"]["type"]
    return schemas
