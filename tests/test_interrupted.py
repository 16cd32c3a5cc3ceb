"""A run is ended by SIGTERM however it was started."""

import signal
import subprocess
import sys
from typing import Any

import pytest

FOLLOWING = """
import asyncio, signal
from sia_events.following import interrupt

async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, interrupt)
    print("up", flush=True)
    try:
        await asyncio.sleep(20)
    finally:
        print("ended in order", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("inherited", [signal.SIG_IGN, signal.default_int_handler])
def test_sigterm_ends_what_a_shell_started_in_the_background_too(inherited: Any):
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWING],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, inherited),
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "ended in order\n" and process.returncode
