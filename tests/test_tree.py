"""Trees of files as content: the same files are the same digest, and nothing leads out of the folder."""

import os
from pathlib import Path, PurePosixPath

import pytest

from sia_events.infra.memory import MemoryBlobs
from sia_events.shared.ports import BlobMissing
from sia_events.shared.tree import DEEPEST, TreeRefused, load_tree, read_tree, store_tree, write_tree

FILES = {"target_agent.py": b"print(1)\n", "prompts/system.txt": "ä".encode(), "empty": b""}


async def test_a_tree_comes_back_as_it_was_stored():
    blobs = MemoryBlobs()
    assert await load_tree(blobs, await store_tree(blobs, FILES)) == FILES


async def test_a_trees_digest_does_not_depend_on_the_order_of_its_files():
    blobs = MemoryBlobs()
    assert await store_tree(blobs, FILES) == await store_tree(blobs, dict(reversed(FILES.items())))


async def test_a_renamed_file_and_a_changed_byte_are_other_trees():
    blobs = MemoryBlobs()
    digests = [await store_tree(blobs, {name: body}) for name, body in (("a", b"1"), ("b", b"1"), ("a", b"2"))]
    assert len(set(digests)) == 3


async def test_a_tree_with_a_missing_file_cannot_be_loaded():
    blobs = MemoryBlobs()
    digest = await store_tree(blobs, FILES)
    other = MemoryBlobs()
    await other.put(await blobs.get(digest))
    with pytest.raises(BlobMissing):
        await load_tree(other, digest)


def test_what_is_written_is_read_back(tmp_path: Path):
    write_tree(FILES, tmp_path / "new")
    assert read_tree(tmp_path / "new") == FILES


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../up", "", "."])
def test_a_path_out_of_the_tree_is_refused_before_anything_is_written_there(path: str, tmp_path: Path):
    inner = tmp_path / "inner"
    with pytest.raises(TreeRefused):
        write_tree({path: b"x"}, inner)
    assert not list(tmp_path.rglob("*"))


def test_a_link_in_a_folder_is_refused_and_named(tmp_path: Path):
    (tmp_path / "way_out").symlink_to("/etc/passwd")
    with pytest.raises(TreeRefused, match="way_out"):
        read_tree(tmp_path)


def test_a_link_to_a_folder_is_refused_too(tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("x")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/sub").symlink_to("../outside")
    with pytest.raises(TreeRefused, match="sub"):
        read_tree(tmp_path / "tree")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TreeRefused, match="pipe"):
        read_tree(tmp_path)


def test_too_many_files_and_too_many_bytes_are_refused(tmp_path: Path):
    write_tree({f"f{n}": b"12345" for n in range(5)}, tmp_path)
    with pytest.raises(TreeRefused, match="more than 4 files"):
        read_tree(tmp_path, max_files=4)
    with pytest.raises(TreeRefused, match="24 bytes"):
        read_tree(tmp_path, max_bytes=24)
    assert len(read_tree(tmp_path, max_files=5, max_bytes=25)) == 5


def test_folders_nested_too_deep_are_refused_with_the_limit(tmp_path: Path):
    write_tree({"/".join(["d"] * (DEEPEST - 1) + ["f"]): b"x"}, tmp_path / "most")
    assert len(read_tree(tmp_path / "most")) == 1
    (tmp_path / "more" / "/".join(["d"] * (DEEPEST + 1))).mkdir(parents=True)
    with pytest.raises(TreeRefused, match=f"more than {DEEPEST} folders are in one another, the outermost is d$"):
        read_tree(tmp_path / "more")


def test_files_come_in_the_order_of_their_paths_and_no_folder_is_an_empty_tree(tmp_path: Path):
    names = ["a/b", "a/b.c", "a.b", "a-b/c", "b/a/c", "b/a.c"]
    write_tree({name: name.encode() for name in names}, tmp_path)
    assert list(read_tree(tmp_path)) == [path.as_posix() for path in sorted(map(PurePosixPath, names))]
    assert read_tree(tmp_path / "none") == {}
