"""SIA's command line in ours, as a table; what cannot be said in ours is refused in words."""

from dataclasses import dataclass

import pytest

from sia_events.sia_spelling import Lookups, Misspelt, named, spoken, translate


@dataclass(frozen=True)
class Profile:
    model: str
    backend: str = ""
    reference: tuple[str, str | None] | None = None


METAS = {
    "default-meta": Profile("anthropic/claude-haiku-4-5-20251001", "claude"),
    "kimi": Profile("nebius/moonshotai/Kimi-K2.6", "openhands"),
    "own-loop": Profile("openai/gpt-5", "pydantic-ai"),
}
TARGETS = {
    "default-target": Profile("anthropic/claude-haiku-4-5-20251001"),
    "mine": Profile("openrouter/anthropic/claude-haiku-4.5", reference=("/agents/mine", "main.py")),
    "file": Profile("instant/first", reference=("/agents/one.py", None)),
}
LOOKUPS = Lookups(lambda name: f"/sia/tasks/{name}", METAS.__getitem__, TARGETS.__getitem__)
CLAUDE = "--set backend=claude --set meta_model=anthropic/claude-haiku-4-5-20251001 "
CLAUDE += "--set feedback_model=anthropic/claude-haiku-4-5-20251001"
HAIKU = "--target-model anthropic/claude-haiku-4-5-20251001"


def opening(task: str = "/sia/tasks/gpqa", run: str = "run_1", generations: int = 2, lever: str = "harness") -> str:
    return f"run {task} --run {run} --generations {generations} --candidates 1 --lever {lever}"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--task gpqa --max_gen 5 --run_id 1", f"{opening(generations=4)} {CLAUDE} {HAIKU}"),
        ("run --task gpqa", f"{opening()} {CLAUDE} {HAIKU}"),
        ("--task=gpqa --run_id=7", f"{opening(run='run_7')} {CLAUDE} {HAIKU}"),
        ("run --task_dir ./mine --max_gen 1", f"{opening('./mine', generations=1)} {CLAUDE} {HAIKU}"),
        ("--task gpqa --focus weights", f"{opening(lever='weights')} {CLAUDE} {HAIKU}"),
        (
            "--task gpqa --backend builtin --task_model instant/first",
            f"{opening()} --set backend=builtin --target-model instant/first",
        ),
        (
            "--task gpqa --backend openhands --meta_model gemini/gemini-3.1-pro-preview --task_model haiku",
            f"{opening()} --set backend=openhands --set meta_model=google/gemini-3.1-pro-preview "
            f"--set feedback_model=google/gemini-3.1-pro-preview {HAIKU}",
        ),
        (
            "--task gpqa --meta-agent-profile kimi --target-agent-profile mine",
            f"{opening()} --set backend=openhands --set meta_model=nebius/moonshotai/Kimi-K2.6 "
            "--set feedback_model=nebius/moonshotai/Kimi-K2.6 "
            "--target-model openrouter/anthropic/claude-haiku-4.5 --reference /agents/mine --entry main.py",
        ),
        (
            "--task gpqa --meta-agent-profile own-loop --target-agent-profile file --task_model openai/gpt-5",
            f"{opening()} --set backend=agentic --set meta_model=openai/gpt-5 --set feedback_model=openai/gpt-5 "
            "--target-model openai/gpt-5 --reference /agents/one.py",
        ),
        (
            "--task gpqa --set backend=agentic --set=meta_model=openai/gpt-5 --set alpha=0.01",
            f"{opening()} --set feedback_model=anthropic/claude-haiku-4-5-20251001 {HAIKU} "
            "--set backend=agentic --set=meta_model=openai/gpt-5 --set alpha=0.01",
        ),
        ("--task gpqa --sandbox docker", f"{opening()} {CLAUDE} {HAIKU} --sandbox bubblewrap"),
        ("--task gpqa --sandbox none", f"{opening()} {CLAUDE} {HAIKU} --sandbox bubblewrap"),
        ("--task gpqa --sandbox process", f"{opening()} {CLAUDE} {HAIKU} --sandbox process"),
        ("--task gpqa --json --colour red", f"{opening()} {CLAUDE} {HAIKU} --json --colour red"),
        (
            "--task gpqa --no-web --web-port 1 --web-host 0.0.0.0 --log-level DEBUG --training_sandbox modal",
            f"{opening()} {CLAUDE} {HAIKU}",
        ),
    ],
)
def test_each_command_of_sias_has_one_of_ours(theirs: str, ours: str):
    assert spoken(theirs.split())
    assert " ".join(translate(theirs.split(), LOOKUPS).argv) == ours


@pytest.mark.parametrize(
    "ours",
    ["run words", "run words --sandbox process", "run --backend direct words", "show run_1", "--help", "", "runs"],
)
def test_a_command_of_ours_is_left_alone(ours: str):
    assert not spoken(ours.split())


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("--max_gen 3", "give one of --task NAME and --task_dir FOLDER"),
        ("--task gpqa --task_dir x", "give one of"),
        ("--task gpqa --max_gen 0", "--max_gen takes a whole number from 1, not '0'"),
        ("--task gpqa --max_gen many", "--max_gen takes a whole number"),
        ("--task gpqa --run_id one", "--run_id takes a whole number, not 'one'"),
        ("--task gpqa --focus both", "--focus takes harness or weights, not 'both'"),
        ("--task gpqa --task_model llama", "whose model is 'llama'.*provider/model"),
        ("--task", "--task needs a value"),
    ],
)
def test_what_cannot_be_translated_is_refused_in_words(theirs: str, told: str):
    with pytest.raises(Misspelt, match=told):
        translate(theirs.split(), LOOKUPS)


@pytest.mark.parametrize(
    ("flags", "noted"),
    [
        ("", "--max_gen 3 counts the first agent, --generations 2 those after it"),
        ("--max_gen 1", "--generations 1 those after it; that is the fewest there are"),
        ("", "--meta-agent-profile not given: SIA's default-meta: claude, anthropic/claude-haiku"),
        ("", "--target-agent-profile not given: SIA's default-target"),
        ("--sandbox none", "agent code never runs as you here"),
        ("--sandbox docker", "instead of docker"),
        ("--no-web", "--no-web: of no effect"),
        ("--focus weights", "updated here by the trainer"),
        ("--meta-agent-profile own-loop", "the backend agentic, a tool loop of our own, stands for it"),
    ],
)
def test_a_difference_is_told(flags: str, noted: str):
    notes = translate(["--task", "gpqa", *flags.split()], LOOKUPS).notes
    assert any(noted in note for note in notes), notes


@pytest.mark.parametrize(
    ("model", "provider", "ours"),
    [
        ("haiku", "anthropic", "anthropic/claude-haiku-4-5-20251001"),
        ("claude-opus-4-1", None, "anthropic/claude-opus-4-1"),
        ("gpt-5", None, "openai/gpt-5"),
        ("gemini-3.1-pro", None, "google/gemini-3.1-pro"),
        ("gemini/gemini-3.1-pro", "gemini", "google/gemini-3.1-pro"),
        ("anthropic/claude-haiku-4.5", "openrouter", "openrouter/anthropic/claude-haiku-4.5"),
        ("openai/gpt-oss-120b", "tinker", "tinker/openai/gpt-oss-120b"),
        ("openrouter/meta/llama", None, "openrouter/meta/llama"),
    ],
)
def test_a_model_of_sias_is_named_by_whose_it_is(model: str, provider: str | None, ours: str):
    assert named(model, provider) == ours
