"""Pyright over the package laid out as users get it, since it does not see through the map of an editable install."""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Lay the folders down under their package names, as links, and check that."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "sia_events"
        package.mkdir()
        for file in (ROOT / folders["sia_events"]).iterdir():
            (package / file.name).symlink_to(file)
        for name, folder in folders.items():
            if name != "sia_events":
                (package / name.removeprefix("sia_events.")).symlink_to(ROOT / folder)
        settings = Path(scratch) / "pyrightconfig.json"
        settings.write_text(
            '{"include": ["sia_events"], "exclude": ["**/candidates", "**/reference", "**/template_agent.py"], '
            '"typeCheckingMode": "standard", "pythonVersion": "3.11"}'
        )
        command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(settings)]
        return subprocess.run(command, cwd=scratch).returncode


if __name__ == "__main__":
    sys.exit(main())
