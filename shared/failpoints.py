"""Named points at which a test may have this process killed, as a crash or a power cut would."""

import os
import signal

VARIABLE = "SIA_FAIL_AT"


def reach(point: str) -> None:
    """Die here, without any clean-up, when the environment names this point; else nothing."""
    if os.environ.get(VARIABLE) == point:
        os.kill(os.getpid(), signal.SIGKILL)
