"""`sia` with a witness beside it; of a build that is broken first, where WITNESS_BROKEN names one."""

import os
import sys
from pathlib import Path

import broken_builds
import witness

from sia_events.cli import main

witness.attend(Path(os.environ["WITNESS_TOLD"]), Path(os.environ["WITNESS_PASSED"]))
if broken := os.environ["WITNESS_BROKEN"]:
    broken_builds.BUILDS[broken]()
main(sys.argv[1:])
