"""Whether a task's own evaluator can be started at all, found out before anything is recorded."""

import tempfile
from pathlib import Path

from sia_events.shared.items import TaskError
from sia_events.shared.packages import PACKAGES
from sia_events.shared.ports import Job, Sandbox
from sia_events.shared.task import Task, evaluator_file

# Loaded and not run: what it does with outputs can only be seen with outputs. What fails otherwise than for want
# of a module may well be right when there is something to judge.
PROBE = """\
import runpy, sys
sys.path += sys.argv[2:]
try:
    runpy.run_path(sys.argv[1], run_name="trial")
except ImportError as error:
    sys.exit(f"{type(error).__name__}: {error}")
except BaseException:
    pass
"""


async def require_loadable(task: Task, sandbox: Sandbox, packages: Path | None = None) -> None:
    """Load the task's evaluate.py in a box, where it will run. Raises TaskError when what it imports is missing.

    `packages` is a folder of what it may import beside the standard library, as a plain task's may.
    """
    file = evaluator_file(task)
    if file is None:
        return
    with tempfile.TemporaryDirectory(prefix="sia-trial-") as work:
        reads = {"/task/evaluate.py": file}
        if packages:
            reads[PACKAGES] = packages
        argv = ("python", "-I", "-c", PROBE, "/task/evaluate.py", *([PACKAGES] if packages else []))
        job = Job(argv, Path(work), reads, limits=task.limits)
        outcome = await sandbox.run(job)
    if outcome.status != "ok":
        why = outcome.stderr.decode(errors="replace").strip()[-300:] or outcome.status
        raise TaskError(
            f"{file}: does not run: {why}. It runs on a bare interpreter: "
            "the standard library, and in a plain folder what reference/requirements.txt lists."
        )
