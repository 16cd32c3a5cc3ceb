"""SIA's command line in ours: `sia --task gpqa --max_gen 5 --run_id 1` becomes `sia run FOLDER …`, with notes."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

# SIA's flags: whether each takes a value. Ours, and mistaken ones, pass through to where they are understood.
FLAGS = {
    "--task": True,
    "--task_dir": True,
    "--max_gen": True,
    "--run_id": True,
    "--meta-agent-profile": True,
    "--target-agent-profile": True,
    "--meta_model": True,
    "--task_model": True,
    "--backend": True,
    "--sandbox": True,
    "--focus": True,
    "--training_sandbox": True,
    "--log-level": True,
    "--no-web": False,
    "--web-port": True,
    "--web-host": True,
}
# Those that ours may have too, or may come to have: they alone do not make a command SIA's.
SHARED = ("--backend", "--sandbox", "--log-level")
MAX_GEN, RUN_ID = "3", "1"
# What SIA calls a model by when nothing is said of its provider.
FAMILIES = {"claude": "anthropic", "gemini": "google", "gpt": "openai", "o1": "openai", "o3": "openai"}
# SIA's own name for its default model, and the same with its date, as its default target profile has it.
ALIASES = {"haiku": "claude-haiku-4-5-20251001"}
PROVIDERS = {"gemini": "google"}
BACKENDS = {"claude": "claude", "openhands": "openhands", "pydantic-ai": "agentic"}
SANDBOXES = {
    "none": "agent code never runs as you here: it runs in bubblewrap (--sandbox process is what SIA's none was)",
    "docker": "agent code runs in bubblewrap, which needs no daemon, instead of docker",
}
META, TARGET = "default-meta", "default-target"


class Misspelt(Exception):
    """A command in SIA's spelling that cannot be done as asked; nothing was written."""


class MetaProfile(Protocol):
    """A profile of the meta- and feedback-agent."""

    @property
    def backend(self) -> str: ...

    @property
    def model(self) -> str: ...


class TargetProfile(Protocol):
    """A profile of the target agent. `reference` is the first agent's path and program, None for the task's own."""

    @property
    def model(self) -> str: ...

    @property
    def reference(self) -> tuple[str, str | None] | None: ...


@dataclass(frozen=True)
class Lookups:
    """Where names of SIA's stand: its tasks' folders and its profiles. Each raises for a name that it does not know."""

    task: Callable[[str], str]
    meta: Callable[[str], MetaProfile]
    target: Callable[[str], TargetProfile]


@dataclass(frozen=True)
class Translated:
    """The same command in our words, and what a person should know of the differences."""

    argv: tuple[str, ...]
    notes: tuple[str, ...]


def spoken(argv: Sequence[str]) -> bool:
    """Whether a command line is in SIA's spelling: `run`, or no verb at all, with a flag that only SIA has."""
    if not argv or (argv[0] != "run" and not argv[0].startswith("-")):
        return False
    return any(word.partition("=")[0] in FLAGS.keys() - set(SHARED) for word in argv)


def translate(argv: Sequence[str], lookups: Lookups) -> Translated:
    """The command in our spelling. What is not SIA's is passed on as it stands. Raises Misspelt."""
    said, rest = _parse(argv[1:] if argv and argv[0] == "run" else argv)
    if ("--task" in said) == ("--task_dir" in said):
        raise Misspelt("give one of --task NAME and --task_dir FOLDER")
    notes: list[str] = []
    task = lookups.task(said["--task"]) if "--task" in said else said["--task_dir"]
    out = ["run", task, "--run", f"run_{_number(said, '--run_id', RUN_ID)}"]
    wanted = _number(said, "--max_gen", MAX_GEN)
    generations = max(1, wanted - 1)
    out += ["--generations", str(generations), "--candidates", "1"]
    more = "" if wanted > 1 else "; that is the fewest there are"
    notes.append(
        f"--max_gen {wanted} counts the first agent, --generations {generations} those after it{more}; "
        "--candidates 1: one a generation, as in SIA"
    )
    focus = _one_of(said, "--focus", ("harness", "weights"), "harness")
    out += ["--lever", focus]
    if focus == "weights":
        notes.append("--focus weights: updated here by the trainer, on the task's train split, with no outside service")
    out += [*_models(said, lookups, notes, _set_by(rest)), *rest]
    if "--sandbox" in said:
        box = said["--sandbox"]
        out += ["--sandbox", "bubblewrap" if box in SANDBOXES else box]
        notes += [f"--sandbox {box}: {SANDBOXES[box]}"] if box in SANDBOXES else []
    for flag in ("--training_sandbox", "--log-level", "--no-web", "--web-port", "--web-host"):
        if flag in said:
            notes.append(f"{flag}: of no effect, there is no such part in a run here")
    return Translated(tuple(out), tuple(notes))


def named(model: str, provider: str | None = None) -> str:
    """A model of SIA's as provider/model. Raises Misspelt where nothing says whose it is."""
    if provider is not None:
        prefix, _, bare = model.partition("/")
        own = PROVIDERS.get(provider, provider)
        # An SDK's routing prefix is no part of the provider's name for the model.
        return f"{own}/{bare if bare and prefix == provider else ALIASES.get(model, model)}"
    prefix, slash, bare = model.partition("/")
    if slash:
        return f"{PROVIDERS.get(prefix, prefix)}/{bare}"
    full = ALIASES.get(model, model)
    for family, owner in FAMILIES.items():
        if full.startswith(family):
            return f"{owner}/{full}"
    raise Misspelt(f"whose model is {model!r}? Write it as provider/model, e.g. openrouter/{model}")


def _models(said: dict[str, str], lookups: Lookups, notes: list[str], taken: Set[str]) -> list[str]:
    """The roles' models and the backend: what is said outright, else the profile's.

    Of settings that are `taken`, by a --set of the command's own, nothing is said: --set takes each but once.
    """
    out: list[str] = []
    backend = said.get("--backend")
    meta_model = named(said["--meta_model"]) if "--meta_model" in said else None
    if "--meta-agent-profile" in said or not (backend == "builtin" or (backend and meta_model)):
        profile = lookups.meta(said.get("--meta-agent-profile", META))
        backend, meta_model = backend or BACKENDS[profile.backend], meta_model or profile.model
        if profile.backend == "pydantic-ai" and backend == "agentic":
            notes.append("agent_impl pydantic-ai: the backend agentic, a tool loop of our own, stands for it")
        if "--meta-agent-profile" not in said:
            notes.append(f"--meta-agent-profile not given: SIA's {META}: {backend}, {meta_model}")
    settings = {"backend": backend}
    if meta_model and backend != "builtin":
        settings |= {"meta_model": meta_model, "feedback_model": meta_model}
    for key, value in settings.items():
        out += [] if key in taken else ["--set", f"{key}={value}"]
    if "--task_model" in said and "--target-agent-profile" not in said:
        return [*out, "--target-model", named(said["--task_model"])]
    profile = lookups.target(said.get("--target-agent-profile", TARGET))
    model = named(said["--task_model"]) if "--task_model" in said else profile.model
    if "--target-agent-profile" not in said:
        notes.append(f"--target-agent-profile not given: SIA's {TARGET}: {model}")
    out += ["--target-model", model]
    if profile.reference:
        path, entry = profile.reference
        out += ["--reference", path, *(["--entry", entry] if entry else [])]
    return out


def _set_by(words: Sequence[str]) -> set[str]:
    """The settings that --set names in these words."""
    assignments = [after for word, after in pairwise(words) if word == "--set"]
    assignments += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return {assignment.partition("=")[0] for assignment in assignments}


def _parse(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({SIA's flag: value}, everything else in its order). The last of a flag counts, as in argparse."""
    said: dict[str, str] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag not in FLAGS:
            rest.append(word)
        elif not FLAGS[flag]:
            said[flag] = ""
        elif equals:
            said[flag] = value
        else:
            try:
                said[flag] = next(left)
            except StopIteration:
                raise Misspelt(f"{flag} needs a value") from None
    return said, rest


def _number(said: dict[str, str], flag: str, default: str) -> int:
    text = said.get(flag, default)
    if not text.isascii() or not text.isdigit() or (flag == "--max_gen" and int(text) < 1):
        raise Misspelt(f"{flag} takes a whole number{' from 1' if flag == '--max_gen' else ''}, not {text!r}")
    return int(text)


def _one_of(said: dict[str, str], flag: str, known: Sequence[str], default: str) -> str:
    value = said.get(flag, default)
    if value not in known:
        raise Misspelt(f"{flag} takes {' or '.join(known)}, not {value!r}")
    return value
