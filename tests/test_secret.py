"""The secret that attempt tokens are signed with: drawn once, the same for everybody who starts here, never empty."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import pytest
from command import SMALL, log, sia
from test_gateway import CLAIMS

from sia_events.model_gateway.token import TokenDoor, TokenRefused, keep_secret, read_token
from sia_events.shared.settings import SettingsError

STARTS = 8


@pytest.mark.parametrize("left", [b"", b"\n", b" \n"])
def test_an_empty_secret_is_refused_with_what_to_do_and_left_as_it_is(tmp_path: Path, left: bytes):
    (file := tmp_path / "gateway.secret").write_bytes(left)
    with pytest.raises(SettingsError, match=r"gateway\.secret: empty, .*anybody could sign\. .*Delete it"):
        keep_secret(tmp_path, None)
    assert file.read_bytes() == left
    file.unlink()
    assert keep_secret(tmp_path, None).strip()


def test_a_run_that_meets_an_empty_secret_calls_no_model_and_goes_on_when_it_is_deleted(tmp_path: Path, task: Path):
    (tmp_path / "gateway.secret").touch()
    refused = sia(tmp_path, "run", task, "--run", "r1", *SMALL)
    assert refused.returncode == 2 and "gateway.secret: empty" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and not [r for r in log(tmp_path) if r.type == "ExecutionLogged"]
    (tmp_path / "gateway.secret").unlink()
    resumed = sia(tmp_path, "run", "--resume", "r1")
    assert resumed.returncode == 0, resumed.stderr


def test_what_is_signed_with_nothing_opens_nothing(tmp_path: Path):
    forged = TokenDoor(Path(), "").token(CLAIMS)
    with pytest.raises(TokenRefused):
        read_token(forged, keep_secret(tmp_path, None), datetime(2026, 1, 1, tzinfo=UTC))


def test_a_secret_that_is_given_is_the_secret_and_none_is_drawn(tmp_path: Path):
    assert keep_secret(tmp_path, "given") == "given" and not os.listdir(tmp_path)


def test_those_who_start_at_the_same_moment_share_one_secret_and_leave_nothing_beside_it(tmp_path: Path):
    meet = Barrier(STARTS)

    def start(_: int) -> str:
        meet.wait()
        return keep_secret(tmp_path, None)

    with ThreadPoolExecutor(STARTS) as pool:
        (secret,) = set(pool.map(start, range(STARTS)))
    assert len(secret) >= 32 and os.listdir(tmp_path) == ["gateway.secret"]
