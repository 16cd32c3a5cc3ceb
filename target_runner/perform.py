"""Runs one attempt: lays down harness and data, starts the agent in the sandbox, takes over what it wrote."""

import asyncio
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from sia_events.shared.calls import AWAY, GivenAgain, ModelCall, decode_call, encode_call, journal_key, spent
from sia_events.shared.events import AttemptFailed, AttemptRequested, Event, ExecutionLogged, FailureKind
from sia_events.shared.failpoints import reach
from sia_events.shared.outage import fails_alone
from sia_events.shared.packages import PACKAGES, PackagesMissing, environment
from sia_events.shared.ports import Job, Limits, Outcome, ProviderAway
from sia_events.shared.registration import ENTRY, REQUIREMENTS, decode_task, repeated
from sia_events.shared.run import Run
from sia_events.shared.service import Work
from sia_events.shared.tree import TreeRefused, load_tree, read_tree, remove_tree, store_tree, write_tree
from sia_events.target_runner.logged import log_lines
from sia_events.target_runner.states import with_states

DATA_LEFT_IN_WORK = 64_000_000
TOKEN_MARGIN_S = 60.0  # a box takes time to start and to end
HELD_UP_S = 10.0  # longer than a stream on a disk with room takes to put a call on record


async def attempt(work: Work, asked: AttemptRequested) -> Sequence[Event]:
    """Start the version's agent on the split; its outputs and every model call it made go into the record.

    The agent gets its harness and the split's public data read-only, one writable folder, the gateway and a token
    for this attempt. Nothing it says about itself is evidence: calls and exit are recorded by the platform. Raises
    ProviderAway where a model was waited for in vain: that tells nothing of any version. Where that happens again and
    the provider answers others, the attempt has failed. Raises GatewayAway where not all of its calls are on record.
    """
    run, ports = work.run, work.ports
    version, task = run.versions[asked.version], run.task
    assert task is not None, "an attempt is asked behind its task"
    limits = decode_task(await ports.blobs.get(task.spec)).limits
    harness = await load_tree(ports.blobs, version.harness)
    if ENTRY not in harness:
        return [_failed(asked, "crash", f"the harness has no {ENTRY}")]
    try:
        packages = environment(ports.home, harness.get(REQUIREMENTS))
    except PackagesMissing as missing:
        first = await load_tree(ports.blobs, task.reference)
        if first.get(REQUIREMENTS) == harness[REQUIREMENTS]:
            raise  # this machine's lack: the run was started with that list
        # Nothing is installed because an agent's author, which may be a model, names it.
        return [_failed(asked, "crash", str(missing))]
    data = await load_tree(ports.blobs, task.datasets[asked.split])
    if asked.samples > 1 or asked.items:
        data["items.jsonl"] = repeated(data["items.jsonl"], asked.samples, asked.items)
    data = await with_states(work, asked, data)
    scratch = ports.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="attempt-", dir=scratch))
    try:
        for name, files in (("agent", harness), ("data", data), ("work", {})):
            (folder / name).mkdir()
            write_tree(files, folder / name)
        expires = ports.clock.now() + timedelta(seconds=limits.wall_s + TOKEN_MARGIN_S)
        claims = _claims(run, asked, expires)
        token = ports.door.token(claims)
        outcome = await ports.sandbox.run(
            _job(folder, packages, ports.door.socket, token, version.weights.model, limits)
        )
        reach("target_runner after running an agent")
        overslept = ports.clock.now() >= expires
        # Told as lost already, or by a token that opens nothing any more.
        held = 0.0 if overslept or outcome.lost_connections else await ports.door.held_up(token)
        await log_lines(work, asked.attempt, outcome, token)
        recorded = await _recorded(work, asked.attempt)
        calls, paid = _each_once(recorded), _paid(recorded)
        unanswered = [call for call in calls if call.error and call.start == claims["start"]]
        if away := [call for call in unanswered if call.fault in AWAY]:
            gone = ProviderAway(f"{asked.attempt} had no answer from {away[0].model}: {away[0].error}")
            if not await fails_alone(work, gone, claims):
                raise gone
            paid = _paid(await _recorded(work, asked.attempt))
            return [_failed(asked, "infrastructure", f"{gone}. Its provider answers others: it is given up", paid)]
        if trouble := _trouble(asked, outcome, unanswered, overslept, held):
            detail = await ports.blobs.put(outcome.stderr[-20_000:]) if outcome.stderr else None
            return [trouble.model_copy(update={"detail": detail, **spent(paid)})]
        try:
            outputs = read_tree(folder / "work", max_bytes=DATA_LEFT_IN_WORK)
        except TreeRefused as refused:
            return [_failed(asked, "invalid_output", str(refused), paid)]
    finally:
        # The disk takes milliseconds over it, for which nobody waits.
        asyncio.get_running_loop().run_in_executor(None, remove_tree, folder)
    if not outputs:
        return [_failed(asked, "empty_reply", "the agent ended well and wrote nothing", paid)]
    return [
        ExecutionLogged(
            attempt=asked.attempt,
            version=asked.version,
            split=asked.split,
            outputs=await store_tree(ports.blobs, outputs),
            trajectory=await ports.blobs.put(await _trajectory(work, asked.attempt, claims["start"], calls)),
            **spent(paid),
            seconds=round(outcome.seconds, 3),
        )
    ]


async def recorded_calls(work: Work, attempt: str) -> list[ModelCall]:
    """The attempt's model calls, earlier tries' too, in an order that does not depend on which reply came first.

    Each call is there once, whatever was recorded of it: with its last reply, or with its last error for want of one.
    """
    return _each_once(await _recorded(work, attempt))


async def _trajectory(work: Work, attempt: str, start: str, calls: Sequence[ModelCall]) -> bytes:
    """The answered calls, a line each; those whose replies this `start` was not given are marked.

    A program that asks otherwise each time it is started (by a clock, say) has nothing of what another start was told.
    """
    answered = [call for call in calls if call.reply is not None]
    given = {(call.digest, call.n) for call in answered if call.start == start}
    if len(given) < len(answered):
        envelopes = await work.ports.bus.traces(work.run.name, "step", journal_key(attempt))
        told = (msgspec.json.decode(line, type=GivenAgain) for envelope in envelopes for line in envelope.lines)
        given |= {(again.digest, again.n) for again in told if again.start == start}
    marked = (replace(call, other_start=(call.digest, call.n) not in given) for call in answered)
    return b"\n".join(map(encode_call, marked))


async def _recorded(work: Work, attempt: str) -> list[ModelCall]:
    envelopes = await work.ports.bus.traces(work.run.name, "model_call", journal_key(attempt))
    return [decode_call(line) for envelope in envelopes for line in envelope.lines]


def _each_once(recorded: Sequence[ModelCall]) -> list[ModelCall]:
    answered_last = sorted(recorded, key=lambda call: call.reply is not None)
    calls = {(call.digest, call.n): call for call in answered_last}.values()
    return sorted(calls, key=lambda call: (call.item or "", call.digest, call.n))


def _paid(recorded: Sequence[ModelCall]) -> list[ModelCall]:
    """Each call once, and the replies that broke off and whose request was sent again: they were paid for too."""
    calls = _each_once(recorded)
    counted = {id(call) for call in calls}
    return [*calls, *(call for call in recorded if call.error and call.completion_tokens and id(call) not in counted)]


def _claims(run: Run, asked: AttemptRequested, expires: datetime) -> Mapping[str, Any]:
    """All that the gateway is to believe of the attempt."""
    weights = run.versions[asked.version].weights
    return {
        "run": run.name,
        "attempt": asked.attempt,
        "start": secrets.token_hex(8),
        "version": asked.version,
        "model": weights.model,
        "adapter": weights.adapter,
        "sample": asked.sampled,
        "seed": asked.seed,
        "expires": expires.timestamp(),
        "any_model": run.settings.any_model_name,
        "calls": run.settings.attempt_calls,
    }


def _job(folder: Path, packages: Path | None, socket: Path, token: str, model: str, limits: Limits) -> Job:
    base = "http://127.0.0.1:8080"
    env: Mapping[str, str] = {
        "OPENAI_BASE_URL": f"{base}/v1",
        "OPENAI_API_KEY": token,
        "ANTHROPIC_BASE_URL": base,
        "ANTHROPIC_API_KEY": token,
        "SIA_MODEL": model,
    }
    reads = {"/agent": folder / "agent", "/data": folder / "data"}
    if packages:
        env, reads = {**env, "PYTHONPATH": PACKAGES}, {**reads, PACKAGES: packages}
    return Job(
        argv=("python", f"/agent/{ENTRY}", "--dataset_dir", "/data", "--working_dir", "/work"),
        work=folder / "work",
        reads=reads,
        env=env,
        socket=socket,
        limits=limits,
    )


def _trouble(
    asked: AttemptRequested, outcome: Outcome, unanswered: Sequence[ModelCall], overslept: bool, held: float
) -> AttemptFailed | None:
    """What went wrong, if anything; a model that could not answer is our failure, whatever the agent made of it.

    So is a reply that was `held` back for so many seconds until it was on record.
    """
    if over := [call for call in unanswered if call.fault == "budget"]:
        return _failed(asked, "budget", f"a model call was not made: {over[0].error}")
    if unanswered:
        return _failed(asked, "infrastructure", f"{len(unanswered)} model calls had no answer: {unanswered[0].error}")
    if outcome.lost_connections:
        lost = f"the gateway lost {outcome.lost_connections} requests: it was not there, or went away or broke down"
        return _failed(asked, "infrastructure", f"{lost} before it replied")
    if overslept:
        # The box's time stands still while the machine sleeps, the token's does not: calls may have been refused.
        return _failed(asked, "infrastructure", "its token ran out early: the machine slept, or its clock leapt")
    if held > HELD_UP_S:
        waited = f"a reply waited {held:.0f} s to be put on record: the stream was away, or its disk slow or full"
        return _failed(asked, "infrastructure", waited)
    if outcome.status == "ok":
        return None
    if outcome.status == "timeout":
        return _failed(asked, "timeout", f"still running after {outcome.seconds:.0f} s; ended")
    said = outcome.stderr.strip() or outcome.stdout.strip()
    last = said.decode(errors="replace").splitlines()[-1:] or [""]
    named = f"exit status {outcome.exit_code}" if outcome.status == "crash" else f"its {outcome.status} limit"
    return _failed(asked, "crash", f"ended by {named}: {last[0][:300]}")


def _failed(asked: AttemptRequested, kind: FailureKind, message: str, calls: Sequence[ModelCall] = ()) -> AttemptFailed:
    return AttemptFailed(
        attempt=asked.attempt,
        version=asked.version,
        split=asked.split,
        kind=kind,
        message=message,
        **spent(calls),
    )
