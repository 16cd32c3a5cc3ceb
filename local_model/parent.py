"""A child's tie to its parent: when the parent is gone, however it died, the child ends too."""

import os
import sys
import threading


def end_with_parent() -> None:
    """From now on, end this process at once when stdin closes; the parent holds the other end of that pipe.

    A pipe and not a process-death signal, because the kernel closes it on every system and even after SIGKILL.
    """

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
