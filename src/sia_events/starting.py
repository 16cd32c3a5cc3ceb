"""What a run is checked and made ready for before anything of it is recorded: its first agent, packages and splits."""

import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from sia_events.errors import Unusable
from sia_events.shared.events import RunSettings
from sia_events.shared.packages import folder, listed
from sia_events.shared.providers import FREE, TRAINED, split_model, trainable
from sia_events.shared.registration import ENTRY, reference_files, requirements
from sia_events.shared.settings import Settings
from sia_events.shared.task import Task, split_sizes
from sia_events.shared.tree import TreeRefused, read_tree
from sia_events.trainer.base_model import lacks

REFERENCE = "reference_target_agent.py"
TALK_CHARACTERS = 600
# A name as PEP 508 has it, its extras, and versions or a marker; no address and no path: what is there is built, and
# building runs its code here, which pip's --only-binary does not prevent.
PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]/]*\])?\s*\(?\s*([<>=!~;][^/@]*)?")


def first_agent(task: Task, given: Path | None, entry: str | None = None) -> Mapping[str, bytes]:
    """The harness a run starts from: the task's reference agent, or the file or folder that was given instead.

    A folder's program is `entry`, else target_agent.py, else SIA's reference_target_agent.py; it goes in as
    target_agent.py beside the other files. Raises TaskError or Unusable.
    """
    if given is None:
        return reference_files(task)
    asked = requirements(task)
    files = {"requirements.txt": asked} if asked else {}
    if given.is_file():
        return {**files, ENTRY: given.read_bytes()}
    if not given.is_dir():
        raise Unusable(f"--reference {given}: neither a file nor a folder; nothing was written")
    try:
        files = {**files, **read_tree(given)}
    except TreeRefused as refused:
        raise Unusable(f"--reference {given}: {refused}; nothing was written") from refused
    names = [entry] if entry else [ENTRY, REFERENCE]
    found = next((name for name in names if name in files), None)
    if found is None:
        raise Unusable(f"--reference {given}: no {' or '.join(names)} in it; nothing was written")
    return {**files, ENTRY: files[found]}


def suited(task: Task, wanted: RunSettings) -> tuple[RunSettings, tuple[str, ...]]:
    """The settings as the task allows them, and what a person has to know of it. Raises Unusable.

    On a plain task weights are learned from whole attempts, so it has to tell one's worth from another's.
    """
    if task.splits:
        return wanted, ()
    sizes = split_sizes(task)
    if task.evaluator == "kernel":
        _require_bench(task)
        held = f"{task.name}: every attempt's kernel is measured anew, on inputs that are drawn then"
    elif sizes:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        held = f"{task.name}: a plain task folder; every attempt answers all items, of which count: {counts}"
    else:
        if wanted.lever not in ("auto", "harness"):
            raise Unusable(
                f"{task.path}: --lever {wanted.lever} would learn from the very figure that it is judged by: no answer "
                "key with ids was found in data/private, so nothing is held out. Add one (docs/coming-from-sia.md), or "
                "take --lever harness. Nothing was written"
            )
        held = (
            f"{task.name}: SCORE IS NOT HELD OUT: no answer key with ids was found in data/private, so dev, gate and "
            "test are the same set and one figure. No gain on it can be shown to be real, and none is accepted. "
            "docs/coming-from-sia.md says what to add"
        )
        return wanted.model_copy(update={"lever": "harness"}), (f"{held}; only the harness can change",)
    if wanted.lever == "auto" and not trainable(wanted.target_model):
        wanted = wanted.model_copy(update={"lever": "harness"})
    if wanted.lever == "harness":
        return wanted, (f"{held}; only the harness can change",)
    rollouts = f"weights are learned from {wanted.rollout_samples} whole attempts at a time, by what counts as dev"
    return wanted, (f"{held}; {rollouts}",)


def require_learnable(settings: Settings, wanted: RunSettings) -> None:
    """Raises Unusable where the weights lever may be pulled on a model that could not be learned on.

    Its rollouts would be paid for first. Under `auto` the weights of a model that somebody else hosts are left alone;
    under a control they are not.
    """
    model = wanted.target_model
    provider = settings.providers.get(split_model(model)[0])
    if wanted.lever == "harness" or provider is None or provider.kind in FREE:
        return
    if not trainable(model):
        if wanted.lever != "auto":
            raise Unusable(
                f"--lever {wanted.lever} would train {model}, whose weights are not ours: who hosts it takes no "
                "adapters and tells no token ids, without which not even cloning or dpo can learn. Nothing was "
                f"written. Take --lever harness, or a --target-model of {' or '.join(f'{name}/' for name in TRAINED)}"
            )
    elif not settings.nats_url and (lacking := lacks(settings.home, model)):
        raise Unusable(
            f"--lever {wanted.lever} trains {model}, and {lacking}; or take --lever harness. Nothing was written"
        )


def require_backend(wanted: RunSettings) -> None:
    """Raises Unusable where TRL is to learn, and is not installed beside us."""
    if wanted.learning.backend == "trl" and find_spec("trl") is None:
        raise Unusable("learning.backend=trl needs TRL, which is not installed: pip install 'sia-events[trl]'")


def _require_bench(task: Task) -> None:
    """Raises Unusable where the task's kernels could not be measured on this machine."""
    from sia_events.kernel_bench.problems import PROBLEMS  # numpy is slow to import, and few tasks come here

    if task.kernel not in PROBLEMS:
        there = ", ".join(PROBLEMS)
        raise Unusable(f"{task.path / 'task.toml'}: no kernel problem {task.kernel!r}; there are: {there}")
    if sys.platform != "linux" or find_spec("torch") is None:
        raise Unusable(f"{task.name}: kernels are measured on Linux, with torch: pip install 'sia-events[model]'")


async def lay_down(home: Path, asked: bytes | None) -> Path | None:
    """The folder of packages that a requirements.txt lists, installed once for all runs; None where it lists none.

    Wheels only: nothing is built, so nothing of a package runs here. Raises Unusable with what pip said.
    """
    if asked is None or not listed(asked):
        return None
    if strange := [line for line in listed(asked) if not PACKAGE.fullmatch(line)]:
        raise Unusable(f"requirements.txt: {strange[0]!r} is no package of an index by name; nothing was installed")
    target = folder(home, asked)
    if target.is_dir():
        return target
    print(f"laying down {', '.join(listed(asked))} in {target}, once for all runs", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="new-"))
    try:
        options = (
            "--target",
            str(scratch / "site"),
            "--only-binary",
            ":all:",
            "--disable-pip-version-check",
            "--quiet",
        )
        command = (sys.executable, "-m", "pip", "install", *options, "--", *listed(asked))
        # Elsewhere than here: pip takes a file of a package's name for the package.
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=scratch)
        if done.returncode:
            raise Unusable(
                f"packages of requirements.txt could not be installed, nothing was kept: "
                f"{done.stderr.strip()[-TALK_CHARACTERS:]}. Mend the list or the network, then give the same command."
            )
        (scratch / "site").chmod(0o755)
        if not target.is_dir():  # somebody was quicker
            (scratch / "site").rename(target)
        return target
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
