"""SIA's profile and provider files: read by name or path, mapped to our words, refused by file and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from sia_events.profiles import (
    Places,
    as_toml,
    find_bundled,
    places,
    read_meta,
    read_target,
    table_row,
)
from sia_events.shared.providers import Provider
from sia_events.sia_spelling import BACKENDS, Misspelt

PROVIDER = {
    "provider_id": "mine",
    "name": "Mine",
    "client_kind": "openai",
    "base_url": "http://127.0.0.1:9/v1",
    "api_key_env": "MY_KEY",
}
META = {"profile_id": "m", "name": "M", "agent_impl": "openhands", "model": "big", "provider_id": "mine"}
TARGET = {"profile_id": "t", "name": "T", "model": "small", "provider_id": "mine", "agent_reference": "default"}


@pytest.fixture
def at(tmp_path: Path) -> Places:
    """Folders with one good file of each kind, and no package of SIA's."""
    for folder, name, body in (("profiles", "m", META), ("profiles", "t", TARGET), ("providers", "mine", PROVIDER)):
        write(tmp_path / folder / f"{name}.json", body)
    return Places(tmp_path / "profiles", tmp_path / "providers", None, None)


def write(file: Path, body: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(body if isinstance(body, str) else json.dumps(body))
    return file


def test_a_profile_of_the_users_is_read_by_name_and_by_path(at: Places):
    by_name, by_path = read_meta("m", at), read_meta(str(at.profiles / "m.json"), at)
    assert by_name == by_path
    assert (by_name.model, by_name.backend, by_name.own) == ("mine/big", "openhands", True)
    assert read_target("t", at).model == "mine/small"


def test_its_provider_is_a_row_of_our_table(at: Places):
    found = read_meta("m", at).provider
    assert found
    name, row = table_row(found)
    assert Provider.model_validate(row).key_env == "MY_KEY"
    assert as_toml(name, row) == (
        'providers.mine = { kind = "openai", base_url = "http://127.0.0.1:9/v1", key_env = "MY_KEY" }'
    )


@pytest.mark.parametrize(("source", "entry"), [("one.py", None), ("several", "main.py")])
def test_a_reference_of_the_users_is_found_beside_its_profile(at: Places, source: str, entry: str | None):
    write(at.profiles / "one.py", "pass")
    write(at.profiles / "several/main.py", "pass")
    write(at.profiles / "t.json", {**TARGET, "agent_reference": {"source": source, "entrypoint": "main.py"}})
    assert read_target("t", at).reference == (str(at.profiles / source), entry)


def test_sias_default_profiles_need_no_package(at: Places):
    assert read_meta("default-meta", at).model == "anthropic/claude-haiku-4-5-20251001"
    assert read_target("default-target", at).model == "anthropic/claude-haiku-4-5-20251001"


@pytest.mark.parametrize(
    ("file", "body", "told"),
    [
        ("profiles/m.json", {**META, "temprature": 1}, r"profiles/m\.json: unknown field 'temprature'; known: "),
        ("profiles/m.json", {**META, "modl": "x"}, r"m\.json: unknown field 'modl'; did you mean model\?"),
        ("profiles/m.json", {**META, "agent_impl": "codex"}, r"m\.json: agent_impl: .*'codex'"),
        ("profiles/m.json", {k: v for k, v in META.items() if k != "model"}, r"m\.json: model: Field required"),
        ("profiles/m.json", {**META, "model": 3}, r"m\.json: model: .*string.*not 3"),
        ("profiles/m.json", {**META, "model": ""}, r"m\.json: model: .*at least 1 character"),
        ("profiles/m.json", {**META, "agent_impl": "claude"}, r"m\.json: agent_impl claude speaks to .*anthropic only"),
        (
            "profiles/m.json",
            {**META, "provider_id": "mini"},
            r"no provider 'mini'; did you mean mine\?; there are: mine",
        ),
        ("profiles/m.json", "{", r"m\.json: does not read as JSON"),
        ("profiles/m.json", "[]", r"m\.json: the whole: "),
        ("providers/mine.json", {**PROVIDER, "key": "sk-1"}, r"providers/mine\.json: unknown field 'key'"),
        ("providers/mine.json", {**PROVIDER, "client_kind": "cohere"}, r"mine\.json: client_kind: .*'cohere'"),
    ],
)
def test_a_faulty_file_is_refused_by_name_and_field(at: Places, file: str, body: Any, told: str):
    write(at.profiles.parent / file, body)
    with pytest.raises(Misspelt, match=told):
        read_meta("m", at)


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ({"source": "gone.py"}, r"t\.json: agent_reference\.source: .*gone\.py is not there"),
        ({"source": "x", "lang": "py"}, r"t\.json: unknown field 'agent_reference\.lang'"),
        ("mine", r"t\.json: agent_reference"),
    ],
)
def test_a_faulty_reference_is_refused(at: Places, reference: Any, told: str):
    write(at.profiles / "t.json", {**TARGET, "agent_reference": reference})
    with pytest.raises(Misspelt, match=told):
        read_target("t", at)


def test_an_unknown_profile_is_answered_with_those_there_are(at: Places):
    with pytest.raises(Misspelt, match=r"no profile 'mm'; .*there are: m, t, or give a \.json file"):
        read_meta("mm", at)


def test_places_are_sias_own_variables():
    found = places({"SIA_PROFILES_DIR": "/a", "SIA_PROVIDERS_DIR": "/b", "SIA_TASKS_DIR": "/c"})
    assert (found.profiles, found.providers, found.tasks) == (Path("/a"), Path("/b"), Path("/c"))


def test_a_package_that_is_unpacked_and_not_installed_is_found_around_its_tasks(sia_package: Path):
    assert places({"SIA_TASKS_DIR": str(sia_package / "tasks")}).package == sia_package


def test_every_profile_that_sia_brings_is_read(at: Places, sia_package: Path):
    bundled = Places(at.profiles, at.providers, None, sia_package)
    files = sorted((sia_package / "defaults/profiles").glob("*.json"))
    assert len(files) == 11
    for file in files:
        read = read_target if "agent_reference" in json.loads(file.read_text()) else read_meta
        profile = read(file.stem, bundled)
        assert profile.provider and not profile.own
        assert profile.model.startswith(table_row(profile.provider)[0] + "/")
        Provider.model_validate(table_row(profile.provider)[1])
        assert profile.backend in {"", *BACKENDS}


def test_sias_tasks_are_found_by_name(at: Places, sia_package: Path, tmp_path: Path):
    bundled = Places(at.profiles, at.providers, None, sia_package)
    assert find_bundled("gpqa", bundled) == str(sia_package / "tasks/gpqa")
    (tmp_path / "mine/gpqa/data").mkdir(parents=True)
    assert find_bundled("gpqa", Places(at.profiles, at.providers, tmp_path / "mine", sia_package)).startswith(
        str(tmp_path)
    )
    with pytest.raises(Misspelt, match=r"--task gpka: no such task; did you mean gpqa\?; there are: gpqa, lawbench, "):
        find_bundled("gpka", bundled)
    with pytest.raises(Misspelt, match=r"pip install --no-deps --target FOLDER sia-agent==0\.6\.0"):
        find_bundled("gpqa", at)
