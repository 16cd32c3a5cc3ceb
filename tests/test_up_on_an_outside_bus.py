"""Services that `sia up` started on an outside bus hold no home, and are found by `sia down` all the same."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sia_events import serving
from sia_events.errors import Unusable
from sia_events.shared.settings import Settings


@pytest.mark.parametrize(("older", "found"), [(0.0, True), (9.0, False)])
def test_down_ends_what_up_noted_and_no_later_process_of_its_number(tmp_path: Path, older: float, found: bool):
    settings = Settings(home=tmp_path)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    born = serving.born(psutil.Process(process.pid)) - older
    (tmp_path / serving.STARTED).write_text(json.dumps({"pid": process.pid, "born": born, "purpose": "serve"}))
    try:
        if found:
            with pytest.raises(Unusable, match=str(process.pid)):
                serving.up(settings)
        assert serving.down(settings) == {"pid": process.pid if found else None}
        assert (process.poll() is not None) == found
    finally:
        process.kill()
        process.wait()
