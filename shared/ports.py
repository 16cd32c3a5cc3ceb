"""The seams to the world: what a service may ask for, as Protocols and the plain values that cross them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from sia_events.shared.record import Draft, Record


class Clock(Protocol):
    def now(self) -> datetime:
        """The time of day, UTC, for stamps and the end of tokens: nothing is ordered or decided by it."""
        ...


class Blobs(Protocol):
    """Bodies by content: a digest is the lower-case hex SHA-256 of the bytes."""

    async def put(self, body: bytes) -> str:
        """Store `body`, return its digest. Storing the same bytes twice is one blob."""
        ...

    async def get(self, digest: str) -> bytes:
        """The bytes of `digest`. Raises BlobMissing, or BlobCorrupt when they no longer hash to their name."""
        ...


class BlobMissing(Exception):
    """No blob of that digest."""


class BlobCorrupt(Exception):
    """A blob's bytes no longer match its digest."""


class Bus(Protocol):
    """The stream of records: the authority on what happened."""

    async def append(self, run: str, drafts: Sequence[Draft]) -> Sequence[Record]:
        """Append `drafts` to `run`, all or none, at the next positions; returns the records as stored.

        Idempotent by record id for ever: drafts that are there already are returned as first stored and
        nothing is written. A first event RunBranched goes on behind that position of its parent. Raises RunExists
        when drafts that open a run meet one of that name, NoSuchPosition for a branch from nowhere, BusFull when the
        stream refuses more, BusUnreachable when it does not answer: then what was written is unknown, append again.
        Raises RunIncomplete where the run has lost records and has later ones.
        """
        ...

    async def history(self, run: str) -> Sequence[Record]:
        """Every record of `run` in position order; for a branch its parent's first records, then its own."""
        ...

    async def runs(self) -> Sequence[str]:
        """Names of all runs on the stream, in no particular order."""
        ...

    async def serve(
        self,
        service: str,
        types: Sequence[str],
        answer: Callable[[Record], Awaitable[None]],
        run: str | None = None,
        at_once: int = 1,
    ) -> None:
        """Hand each record of those types to `answer`, at least once, in order a run, until cancelled.

        With `run` only that run's records. A record counts as handled when `answer` returns; a raise brings it
        again after a delay, a bounded number of times, and then becomes a `ServiceFailed` of that run. Above one,
        `at_once` records of a run may be out together: they are begun in order, and a later one may end first. Behind
        ProviderAway it is not brought again: whoever raised it has waited and tried already.
        """
        ...

    async def again(self, run: str, service: str) -> None:
        """Have those who serve `service` for all runs be handed the records of `run` once more, from the first on.

        What was given up on gets its tries again; what was answered is answered already. An answer under way is begun
        anew. Returns before anything is handed out.
        """
        ...

    async def trace(self, envelope: "Envelope") -> None:
        """Append one envelope of high-volume lines; returns when it is on disk."""
        ...

    async def traces(self, run: str, kind: str, key: str | None) -> Sequence["Envelope"]:
        """All envelopes of one run, kind and key (None: of every key), in the order they were first appended."""
        ...

    def traced(self, run: str, kind: str, key: str) -> AsyncIterator[Sequence["Envelope"]]:
        """What `traces` has, if anything, and then what comes, some at a time and each once, until cancelled."""
        ...

    def feed(self, name: str, batch: int = 500) -> AsyncIterator["Feed"]:
        """Everything on the streams, in order, in batches; `name` keeps the place. Ack a batch to move on.

        What is no record becomes a `ServiceFailed` of its run once, and is left out. One reader a name at a time.
        """
        ...

    async def lag(self, name: str) -> int:
        """How many messages on the streams the feed `name` has not acked."""
        ...

    async def rewind(self, name: str) -> None:
        """Let the feed `name` begin again at the first message, the next time it is read."""
        ...


# The two kinds of history, records and traces, which are the names of their streams unless these are cut in several.
StreamName = Literal["SIA", "SIA_TRACE"]


@dataclass(frozen=True)
class Stored:
    """A message as it stands on a stream; `kind` is what its subject says: a record's type, or a trace's kind.

    `made_good` is None but for a record that was put back: then how many messages of its run were lost by then.
    """

    sequence: int
    run: str
    kind: str
    body: bytes
    made_good: int | None = None


@dataclass(frozen=True)
class StreamSize:
    """How full a stream is. `limit` is in bytes, None where it has none; `lag` is what the recorder has not copied."""

    stream: str
    messages: int
    bytes: int
    limit: int | None
    lag: int | None


@dataclass(frozen=True)
class Consumer:
    """Who is handed records of a run: how many wait, how many are out unanswered; `up` while somebody asks for more."""

    name: str
    waiting: int
    out: int
    up: bool


class Streams(Protocol):
    """The streams as they are kept, message by message, for those who verify or mend them, or carry a run elsewhere."""

    def histories(self) -> Sequence[str]:
        """The streams that hold history."""
        ...

    def holding(self, stream: StreamName, run: str) -> str:
        """Which of them has the run's records, or its traces: all of a run's stand in one."""
        ...

    async def runs(self) -> Sequence[str]:
        """Every run that any of them names, whether or not anything of it can be read."""
        ...

    def messages(self, stream: StreamName, run: str) -> AsyncIterator[Stored]:
        """What can be read of a run, in the stream's order. A message that its server finds damaged is left out."""
        ...

    def traced(self, run: str) -> AsyncIterator["Traced"]:
        """What can be read among the run's traces, of every kind, whether or not it is an envelope."""
        ...

    def envelopes(self, run: str) -> AsyncIterator[tuple[int, "Envelope"]]:
        """The run's envelopes that can be read, of every kind, with their sequences."""
        ...

    async def counted(self, stream: StreamName, run: str) -> int:
        """How many messages of the run its server counts; those that it no longer can read among them."""
        ...

    async def first(self, stream: str) -> int:
        """The sequence before which the stream has let everything go by its age; 1 where it never did."""
        ...

    async def lost(self, stream: str) -> tuple[int, Sequence[int]]:
        """The stream's last sequence, and those up to it that nothing can be read of: nobody deletes a message.

        What went by its age was not lost.
        """
        ...

    async def sizes(self, feed: str) -> Sequence[StreamSize]:
        """Every stream of ours, with how far the reader of `feed` is behind on those that it reads."""
        ...

    async def begin_behind(self, stream: str, sequence: int) -> None:
        """Have a stream that was lost, and has no message yet, count on from there: rows of tables go by sequence."""
        ...

    async def consumers(self) -> Sequence[Consumer]:
        """Every consumer of records."""
        ...

    async def copied(self, stream: str, feed: str) -> int:
        """The sequence up to which the reader of `feed` has acked."""
        ...

    async def step_back(self, stream: str, feed: str, sequence: int) -> None:
        """Let `feed` go on behind `sequence`, the next time it is read, where it has come further."""
        ...

    async def check_whole(self, run: str) -> None:
        """Raises RunIncomplete where records of the run are lost and later ones stand: nothing can be appended then."""
        ...

    async def put_back(self, lost: Sequence[tuple[int, "Envelope"]]) -> None:
        """Append envelopes that the stream has lost, with their sequences; a second time changes nothing."""
        ...

    async def restore(self, run: str, records: Sequence[Record]) -> int:
        """Put the run's own records, from its first on, where they belong, byte for byte; those there are left alone.

        Returns how many were missing. Raises RunExists where the run has another record at one of their positions.
        """
        ...


class RunExists(Exception):
    """A run of that name was opened by somebody else."""


class NoSuchPosition(Exception):
    """A branch from a position that its parent does not have."""


class BusUnreachable(Exception):
    """The bus does not answer; whether the last append was written is unknown until it does."""


class BusFull(Exception):
    """The stream is at its limit and refuses to drop history."""


@dataclass(frozen=True)
class Envelope:
    """A bundle of high-volume lines of one run: model calls, agent steps, training steps, log lines.

    `key` groups lines that are read back together (for model calls: the attempt). `lines` are JSON objects.
    """

    run: str
    kind: Literal["model_call", "step", "training", "log"]
    key: str
    lines: tuple[bytes, ...]


@dataclass(frozen=True)
class Traced:
    """A message among a run's traces: its envelope, or None and `why` it is none.

    `in_place_of` is the sequence of an envelope that was lost, where this one was put back for it.
    """

    sequence: int
    envelope: Envelope | None
    why: str = ""
    in_place_of: int | None = None


@dataclass(frozen=True)
class Feed:
    """One batch for the recorder: `first`..`last` are stream sequences, the same on every redelivery of the batch."""

    stream: str
    first: int
    last: int
    records: tuple[Record, ...]
    envelopes: tuple[tuple[int, Envelope], ...]
    ack: Callable[[], Awaitable[None]]


Rows = Literal["JSONEachRow", "Parquet"]


class Log(Protocol):
    """The queryable copy of the streams (ClickHouse). Writes are idempotent; a write returns when it is on disk."""

    async def append(self, records: Sequence[Record], token: str) -> None:
        """Insert `records`; the same `token` again inserts nothing."""
        ...

    async def append_traces(self, envelopes: Sequence[tuple[int, Envelope]], token: str) -> None:
        """Insert envelopes with their stream sequences; model calls are rows of `model_calls`, the rest of `trace`."""
        ...

    async def records(self, run: str) -> Sequence[Record]:
        """The run's own records (not its parent's) in position order, each once."""
        ...

    async def wires(self, run: str) -> Sequence[tuple[int, bytes]]:
        """The same unread: positions, and the bytes that stand there."""
        ...

    async def runs(self) -> Sequence[str]:
        """Names of all runs, by the time of their first record."""
        ...

    async def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Sequence[Mapping[str, Any]]:
        """Rows of a read-only statement, as mappings."""
        ...

    async def select(self, sql: str, form: Rows) -> bytes:
        """What somebody's own SELECT finds, in that format; whatever else `sql` may be is refused before it is run."""
        ...

    async def clear(self) -> None:
        """Empty the tables, so that they can be rebuilt from the stream."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What one job may use; every figure is a hard limit."""

    wall_s: float = 600.0
    cpu_s: float = 600.0
    memory_mb: int = 512
    processes: int = 64
    file_mb: int = 64
    open_files: int = 256
    output_bytes: int = 1_000_000


@dataclass(frozen=True)
class Job:
    """One program to run away from everything else.

    `argv[0]` "python" means the platform's interpreter. `reads` maps a path inside to a host path, read-only;
    `work` is the one writable host folder, seen inside as /work, where the program starts. `socket` is the host
    path of the gateway's unix socket; inside it is reached as http://127.0.0.1:8080. `env` is the whole environment
    beside PATH, HOME and LANG.
    """

    argv: tuple[str, ...]
    work: Path
    reads: Mapping[str, Path] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    socket: Path | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `status` names the limit that ended it, if one did; output is cut at the limit's size.

    `lost_connections` counts the job's requests that the gateway lost: it could not be reached, ended the connection
    without a reply, or broke down with status 500. Their number is the platform's word, and not the job's.
    """

    status: Literal["ok", "crash", "timeout", "cpu", "memory", "processes", "disk"]
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    seconds: float
    lost_connections: int = 0


class Sandbox(Protocol):
    async def run(self, job: Job) -> Outcome:
        """Run the job to its end or to its limit; when this returns no process of it is left.

        Cancelling kills the whole tree. Raises SandboxUnavailable when the box cannot be built.
        """
        ...


class SandboxUnavailable(Exception):
    """The box cannot be built on this machine; the message says why and how to mend it."""


@dataclass(frozen=True)
class Chat:
    """One chat completion. `messages`, `tools`, `tool_choice` and `response_format` are OpenAI's; a trailing assistant
    message is continued.

    What is None is left to the provider; `max_tokens` is always a limit.
    """

    model: str
    adapter: str | None
    messages: Sequence[Mapping[str, Any]]
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    max_tokens: int = 128
    stop: Sequence[str] = ()
    seed: int = 0
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    response_format: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Choice:
    """One choice call: which of `choices` continues the conversation (each may carry an additive bias, in nats)."""

    model: str
    adapter: str | None
    messages: Sequence[Mapping[str, Any]]
    choices: Sequence[str]
    bias: Sequence[float] | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """A text whose likelihood is asked for, in token ids: nothing is drawn, at temperature 1 and without a bias."""

    model: str
    adapter: str | None
    prompt: Sequence[int]
    completion: Sequence[int]


class Models(Protocol):
    """Whatever answers model calls. `adapter` is the digest of a LoRA adapter's blob, or None for the base.

    Every method raises ModelFailed. A stream is one call: what it hands out adds up to what `chat` would return.
    """

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        """OpenAI's chat.completion object; `prompt_token_ids`, `token_ids` and log-probs where the engine has them."""
        ...

    def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        """OpenAI's chat.completion.chunk objects, the last of them with `usage`."""
        ...

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        """{choice, index, logprobs, raw, prompt_token_ids, choice_token_ids, usage}."""
        ...

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        """Of each token of the completion, in nats. An engine that cannot tell fails with kind unsupported."""
        ...


Wire = Literal["anthropic", "responses"]


class Native(Protocol):
    """A provider that speaks one of the gateway's wires itself: its requests and replies pass through untranslated."""

    @property
    def wires(self) -> frozenset[Wire]: ...

    async def forward(self, wire: Wire, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The provider's reply to `body`, whose model is the provider's own name for it."""
        ...

    def forward_stream(self, wire: Wire, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        """The provider's stream events, in its own terms."""
        ...


FailedCall = Literal[
    "refused", "no_key", "unknown_model", "rate_limited", "timeout", "unavailable", "garbage", "unsupported"
]


class ModelFailed(Exception):
    """The model could not answer. `status` is an HTTP status: 4xx the request's fault, 5xx or 429 the provider's.

    `retry_after` is how many seconds the provider asked us to wait.
    """

    def __init__(
        self, status: int, message: str, kind: FailedCall = "unavailable", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.retry_after = retry_after


@dataclass(frozen=True)
class Brief:
    """What an LLM agent is asked to write: a harness, starting from a scratch copy of `files`.

    `key`, "ROLE.VERSION", names its model calls in the journal, so that a repeated handler pays for none of them again.
    `data` are public files that it may look at. `turns` bounds an agent that takes many steps.
    """

    run: str
    role: Literal["meta", "feedback"]
    key: str
    model: str
    prompt: str
    files: Mapping[str, bytes]
    data: Mapping[str, bytes] = field(default_factory=dict)
    turns: int = 20
    seed: int = 0

    def claims(self, start: str, expires: datetime) -> dict[str, Any]:
        """What a token for the brief's model calls says; `start` names one of the starts that the brief may take."""
        return {
            "run": self.run,
            "attempt": self.key,
            "start": start,
            "version": self.key.partition(".")[2],
            "role": self.role,
            "model": self.model,
            "adapter": None,
            "sample": False,
            "seed": self.seed,
            "expires": expires.timestamp(),
        }


@dataclass(frozen=True)
class Writing:
    """What came of a brief: the whole tree, a note on what was changed and why, and the trajectory (JSON lines)."""

    files: Mapping[str, bytes]
    note: str
    trajectory: bytes


class BudgetSpent(Exception):
    """The run's budget does not cover the next model call; it was not made, and what was paid for before is kept."""


class ProviderAway(Exception):
    """A model's provider did not answer for as long as anybody waits for one, or does not take the key.

    What was answered before is recorded, and whoever goes on pays for none of it again.
    """


class GatewayAway(Exception):
    """The gateway does not answer, or could not put on record what it was asked: nothing is known of whom it kept."""


class ModelAway(Exception):
    """No reply came, through no fault of the agent's. Calls answered before are recorded and are not made again."""


class WritingFailed(Exception):
    """The agent wrote nothing that can be used; the message says what it did instead. `trajectory` is what is kept."""

    def __init__(self, message: str, trajectory: bytes = b"") -> None:
        super().__init__(message)
        self.trajectory = trajectory


class Backend(Protocol):
    """A way to have a harness written by an LLM."""

    async def write(self, brief: Brief, ports: "Ports") -> Writing:
        """Raises WritingFailed for the agent's own doing, and BudgetSpent; anything else is ours, and tried again."""
        ...


class Door(Protocol):
    """Where the gateway can be reached by an attempt, and the tokens it takes."""

    @property
    def socket(self) -> Path: ...

    def token(self, claims: Mapping[str, Any]) -> str:
        """A signed token for one attempt; the gateway trusts its claims and nothing else."""
        ...

    async def held_up(self, token: str) -> float:
        """Seconds that the token's holder waited for a record of its calls, at most; told when all are on record.

        Raises GatewayAway.
        """
        ...


@dataclass(frozen=True)
class Ports:
    """What `app.py` hands a service. `private` is None for every service but the evaluator.

    `backends` are the LLM agents there are, by name. `boxed` turns a worker's argv and its scratch folder into a
    command line that runs it in a box; None where runs are driven without one. `trainer_usd_per_hour` is the price of
    the machine that learns; None where it has none.
    """

    bus: Bus
    blobs: Blobs
    sandbox: Sandbox
    clock: Clock
    door: Door
    home: Path
    private: Blobs | None = None
    threads: int = 2
    trainer_usd_per_hour: float | None = None
    boxed: Callable[[Sequence[str], Path], Sequence[str]] | None = None
    backends: Mapping[str, Backend] = field(default_factory=dict)
