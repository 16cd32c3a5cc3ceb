"""Who may import whom, and which file knows which vendor."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
SERVICES = {
    "meta_svc",
    "target_runner",
    "evaluator",
    "feedback_svc",
    "trainer",
    "kernel_bench",
    "model_gateway",
    "event_log",
}
VENDORS = {
    "faststream": "infra/nats",
    "nats": ("infra/nats", "src/sia_events/raw_engines"),
    "clickhouse_connect": "infra/clickhouse",
    "chdb": ("infra/chdb", "src/sia_events/raw_engines"),
    "eventsourcing": "src/sia_events/raw_engines",
    "obstore": "infra/blobs",
    "transformers": ("local_model/", "trainer/hugging_face", "trainer/trl_loss", "src/sia_events/learning_bench"),
    "peft": ("trainer/hugging_face", "src/sia_events/learning_bench"),
    "trl": ("trainer/trl_loss", "src/sia_events/learning_bench"),
    "tokenizers": ("local_model/", "trainer/trl_loss"),
    "itsdangerous": "model_gateway/token",
    "openai": "infra/providers/",
    "anthropic": "infra/providers/anthropic",
    "google": "infra/providers/google",
    "litellm": "infra/providers/litellm",
    "httpx2": "infra/providers/",
    "aiohttp": ("infra/providers/connections", "infra/engine_http"),
    "claude_agent_sdk": "infra/claude",
    "matplotlib": "src/sia_events/experiment",
}
"""The files that may import a vendor, by the beginning of their path."""


def sources() -> list[Path]:
    """Every module of the package, by its path from the root; what only runs inside a sandbox apart."""
    found = [path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")]
    found = [path for path in found if not {"candidates", "reference"} & set(path.parts)]
    return [path.relative_to(ROOT) for path in found if path.name not in ("template_agent.py", "relay.py")]


def imports(path: Path) -> set[str]:
    """Absolute names imported anywhere in a module, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def ours(path: Path) -> set[str]:
    """Folders of ours that a module imports; the package's own face is `sia_events`."""
    parts = [name.split(".") for name in imports(path) if name.split(".")[0] == "sia_events"]
    return {
        part[1] if len(part) > 1 and f"sia_events.{part[1]}" in FOLDERS else "sia_events"
        for part in parts
        if len(part) > 1
    }


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_inwards(path: Path):
    folder = path.parts[0]
    if folder == "src":
        return
    allowed = {folder, "shared"}
    if folder == "trainer":
        allowed.add("local_model")
    if folder in ("meta_svc", "feedback_svc"):
        allowed.add("agents")
    assert ours(path) <= allowed, f"{path} imports {sorted(ours(path) - allowed)}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_no_folder_is_imported_by_its_bare_name(path: Path):
    bare = {name.split(".")[0] for name in imports(path)} & {Path(folder).name for folder in FOLDERS.values()} - {
        "sia_events"
    }
    assert not bare, f"{path} imports {bare} from the checkout; write sia_events.{min(bare)}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_one_file_knows_each_vendor(path: Path):
    roots = {name.split(".")[0] for name in imports(path)}
    for vendor, owner in VENDORS.items():
        assert vendor not in roots or path.as_posix().startswith(owner), f"{path} imports {vendor}"


def test_decisions_import_no_input_or_output():
    for path in sources():
        pure = path.name in ("decide.py", "gate.py", "lever.py", "algorithm.py", "search.py", "rollouts.py", "grade.py")
        pure = pure or path.as_posix() == "shared/archive.py"
        if pure or "algorithms" in path.parts:
            roots = {name.split(".")[0] for name in imports(path)}
            assert not roots & {"asyncio", "os", "pathlib", "subprocess", "tempfile", "time", "httpx"}, path


def test_the_command_line_starts_without_the_heavy_parts():
    heavy = ("torch", "transformers", "chdb", "nats", "faststream", "clickhouse_connect", "scipy", "httpx", "pydantic")
    program = f"import sys; import sia_events.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_a_module_does_nothing():
    """No file is written, no socket opened, no process started by importing what the composition root imports."""
    program = (
        "import sys; seen = []\n"
        "watched = ('open', 'socket.connect', 'socket.bind', 'subprocess.Popen', 'os.mkdir')\n"
        "def hook(name, args):\n"
        "    reads = name == 'open' and (args[1] in ('r', 'rb', None) or 'pycache' in str(args[0]))\n"
        "    if name in watched and not reads:\n"
        "        seen.append((name, str(args[0])))\n"
        "import faststream.nats, clickhouse_connect, scipy.stats, uvicorn, httpx, rich.live, obstore\n"
        "sys.addaudithook(hook)\n"
        "import sia_events.app\n"
        "print(seen)"
    )
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
