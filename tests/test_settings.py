"""Settings of a process: variables over the file over the defaults, each mistake named where it stands."""

from pathlib import Path

import pytest

from sia_events.errors import Unusable
from sia_events.run_settings import merged
from sia_events.shared.events import Budget, Learning, RunSettings
from sia_events.shared.settings import Settings, SettingsError, load_settings
from sia_events.terminal import Wrong, pairs


def test_with_nothing_set_all_is_kept_under_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings({}) == Settings(home=tmp_path / ".sia")


def test_a_variable_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path):
    (tmp_path / "config.toml").write_text('model_threads = 3\nnats_url = "nats://file:4222"\n')
    found = load_settings({"SIA_HOME": str(tmp_path), "SIA_NATS_URL": "nats://variable:4222"})
    assert (found.model_threads, found.nats_url, found.log_dsn) == (3, "nats://variable:4222", None)


def test_another_file_can_be_named(tmp_path: Path):
    (tmp_path / "mine.toml").write_text("model_threads = 5\n")
    found = load_settings({"SIA_HOME": str(tmp_path), "SIA_CONFIG": str(tmp_path / "mine.toml")})
    assert found.model_threads == 5


def test_the_home_is_absolute_however_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert load_settings({"SIA_HOME": "here"}).home == tmp_path / "here"


def test_an_empty_variable_is_an_unset_one(tmp_path: Path):
    assert load_settings({"SIA_HOME": str(tmp_path), "SIA_NATS_URL": "", "SIA_MODEL_THREADS": ""}).nats_url is None


def test_variables_of_other_purposes_are_left_alone(tmp_path: Path):
    environ = {"SIA_HOME": str(tmp_path), "SIA_FAIL_AT": "x", "SIA_NATS_SERVER": "/bin/nats-server", "PATH": "/bin"}
    assert load_settings(environ) == Settings(home=tmp_path)


@pytest.mark.parametrize("value", ["0", "65", "two", "1.5"])
def test_a_bad_variable_is_named(value: str, tmp_path: Path):
    with pytest.raises(SettingsError, match="SIA_MODEL_THREADS"):
        load_settings({"SIA_HOME": str(tmp_path), "SIA_MODEL_THREADS": value})


@pytest.mark.parametrize(
    ("text", "named"),
    [("model_threads = 0", "model_threads"), ("thread = 2", "thread"), ("nats_url = [", "config.toml")],
)
def test_a_bad_line_of_the_file_is_named_with_the_file(text: str, named: str, tmp_path: Path):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(SettingsError) as raised:
        load_settings({"SIA_HOME": str(tmp_path)})
    assert named in str(raised.value) and "config.toml" in str(raised.value)


def test_tables_keep_traces_for_as_long_as_the_streams_at_least(tmp_path: Path):
    def kept(days: str, of_tables: str) -> int | None:
        environ = {"SIA_HOME": str(tmp_path), "SIA_TRACE_DAYS": days, "SIA_TRACE_TABLE_DAYS": of_tables}
        return load_settings(environ).days_in_tables

    assert [kept("", ""), kept("7", ""), kept("7", "7"), kept("7", "30"), kept("7", "0")] == [None, 7, 7, 30, None]
    assert kept("", "0") is None
    with pytest.raises(SettingsError, match=r"SIA_TRACE_TABLE_DAYS: .*the streams keep traces for 7 days"):
        kept("7", "6")
    with pytest.raises(SettingsError, match=r"SIA_TRACE_TABLE_DAYS: .*the streams keep traces for ever"):
        kept("", "6")


def test_loading_settings_writes_nothing(tmp_path: Path):
    load_settings({"SIA_HOME": str(tmp_path / "new")})
    assert not list(tmp_path.iterdir())


def test_settings_of_a_run_are_changed_one_by_one():
    changed = merged(RunSettings(), {"lever": "weights", "alpha": 0.01})
    assert (changed.lever, changed.alpha) == ("weights", 0.01)
    assert changed.generations == RunSettings().generations


def test_a_field_wins_over_the_setting_that_it_is_of_in_whichever_order_they_are_said():
    whole, part = ("budget", {"usd": 1, "calls": 2}), ("budget.calls", 3)
    for said in ((whole, part), (part, whole)):
        assert merged(RunSettings(), dict(said)).budget == Budget(usd=1, calls=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lver": "weights"}, "did you mean lever"),
        ({"learning.lrr": 1e-3}, "did you mean learning.lr"),
        ({"learning.zzz": 1}, "there are: learning.lr, learning.rank"),
        ({"seed.lr": 1}, "did you mean seed"),
        ({"learnin.lr": 1}, "did you mean learning.lr"),
        ({"learning.lr": 5}, "setting learning.lr: Input should be less than or equal to 1, not 5"),
        ({"learning.reduction": "median"}, "setting learning.reduction"),
        ({"learning": 3}, "setting learning"),
        ({"zzz": 1}, "there are: generations"),
        ({"alpha": 0.5}, "setting alpha: .* not 0.5"),
        ({"lever": "brute force"}, "setting lever"),
        ({"generations": "many"}, "setting generations"),
        ({"generations": True}, "setting generations"),
    ],
)
def test_a_bad_setting_of_a_run_is_named_with_what_was_given(changes: dict[str, object], message: str):
    with pytest.raises(Unusable, match=message):
        merged(RunSettings(), changes)


def test_a_field_of_a_setting_is_named_with_a_dot_and_the_others_stay():
    before = RunSettings(learning=Learning(kl=0.2), budget=Budget(calls=9))
    changed = merged(before, {"learning.lr": 1e-3, "learning.max_lag": 2, "budget.usd": 4.0})
    assert changed.learning == Learning(kl=0.2, lr=1e-3, max_lag=2) and changed.budget == Budget(calls=9, usd=4.0)
    assert merged(before, {"budget": {"usd": 1.0}, "budget.calls": 3}).budget == Budget(usd=1.0, calls=3)
    assert before.learning == Learning(kl=0.2)


def test_set_takes_dotted_names_of_letters_alone():
    assert pairs(["learning.lr=0.001", "lever=weights"]) == {"learning.lr": 0.001, "lever": "weights"}
    for wrong in ("learning.=1", ".lr=1", "learning..lr=1", "Learning.lr=1", "learning.lr"):
        with pytest.raises(Wrong, match="KEY=VALUE"):
            pairs([wrong])


@pytest.mark.parametrize("depth", [11, 900, 5000])
def test_set_refuses_a_value_that_nests_deeper_than_any_setting(depth: int):
    for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        with pytest.raises(Wrong, match="--set seed: its value has more than 10 lists or objects in one another"):
            pairs([f"seed={value}"])
    with pytest.raises(Wrong, match="--set seed: "):
        pairs(["seed=" + "[" * 5000])


def test_set_takes_a_key_once_and_a_setting_beside_a_field_of_it():
    for first, second in (("seed=1", "seed=9"), ("seed=1", "seed=1"), ("learning.lr=1", "learning.lr=2")):
        with pytest.raises(Wrong, match=f"--set {first} and --set {second}: say .* once"):
            pairs([first, "alpha=0.01", second])
    assert pairs(['budget={"usd": 1}', "budget.calls=3"]) == {"budget": {"usd": 1}, "budget.calls": 3}


def test_a_number_that_python_does_not_read_is_text_to_set():
    assert pairs(["seed=" + "9" * 5000, "lever=[["]) == {"seed": "9" * 5000, "lever": "[["}
