"""What a list of packages may name: packages of an index, whose wheels are unpacked and whose code is not run here."""

import os
from pathlib import Path

import pytest

from sia_events.errors import Unusable
from sia_events.shared.environment import plain
from sia_events.shared.plain import deal, keep_only
from sia_events.starting import PACKAGE, lay_down


@pytest.mark.parametrize("line", ["numpy", "numpy>=1.26,<3", "scikit-learn[x]==1.5", "a.b_c; python_version < '3.12'"])
def test_a_package_of_an_index_is_one(line: str):
    assert PACKAGE.fullmatch(line)


@pytest.mark.parametrize(
    "line", ["evil @ file:///tmp/evil", "git+https://host/x", "./here", "-r more.txt", "a @ http://x"]
)
async def test_an_address_or_a_path_is_refused_before_anything_is_installed(line: str, tmp_path: Path):
    with pytest.raises(Unusable, match="no package of an index by name; nothing was installed"):
        await lay_down(tmp_path, line.encode())
    assert not os.listdir(tmp_path)


def test_blank_lines_of_a_key_are_no_answers():
    body = b"id,label\n\na,1\n\nb,2\n\n"
    assert keep_only("key.csv", body, {"b"}) == b"id,label\nb,2\n"


def test_who_does_not_know_the_key_cannot_tell_which_items_count():
    ids = [f"i{n}" for n in range(100)]
    assert deal(ids, b"one") == deal(ids, b"one") != deal(ids, b"another")


@pytest.mark.parametrize("name", ["NVIDIA_API_KEY", "HF_TOKEN", "SIA_MY_KEY", "SIA_LOG_DSN", "CUDA_PASSWORD"])
def test_what_is_called_like_a_secret_stays_here(name: str):
    assert plain({name: "secret"}) == {}
