"""Back in time by the real command on a real log: states, replays, branches, their tree, and runs side by side."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import SMALL, SPLITS, answered, log, read, sia, told
from given import recorded
from story import ACCEPTED, accepted, trained

from sia_events.comparing import learned
from sia_events.shared.events import FeedbackGiven, HarnessPatched, Weights
from sia_events.shared.record import broken_link
from sia_events.shared.run import fold
from sia_events.views.comparison_page import comparison_page
from sia_events.views.comparisons import adapter_rows, adapter_text, comparison_text

pytestmark = pytest.mark.usefixtures("children")
LAST = 28


@pytest.fixture(scope="module")
def home(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the run r1 and two branches of it, the control b-control and b, a harness of ours entered there."""
    home, mine = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("mine")
    assert sia(home, "run", task, *SMALL).returncode == 0
    agent = (task / "reference/reference_target_agent.py").read_text()
    # Right where most answers are, but for the items 2 and 34.
    answer = '"<b>sweet</b>"[3:8] if int(item["id"][1:]) % 32 != 2 else "salt"'
    (mine / "target_agent.py").write_text(agent.replace('"answer": said', f'"answer": {answer}'))
    words = ("--replace-harness", mine, "--steer", "be <brief>", "--seed", "5", "--control", "--run", "b")
    done = sia(home, "branch", "r1", "--at", "0", *words)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def own(home: Path, tmp_path: Path) -> Path:
    """A copy of it, for what writes."""
    return Path(shutil.copytree(home, tmp_path / "home", symlinks=True, ignore=shutil.ignore_patterns("*.lock")))


def test_the_state_at_a_position_is_what_was_so_then_and_not_what_came_of_it(home: Path):
    then, now = read(home, "state", "r1", "--at", "3"), read(home, "state", "r1")
    assert (then["position"], then["status"], then["incumbent"], list(then["versions"])) == (
        3,
        "running",
        None,
        ["g0a"],
    )
    assert (now["position"], now["status"], now["incumbent"]) == (LAST, "finished", "g1a")
    assert now["finished"]["outcome"] == "improved" and then["finished"] is None
    scored = next(record.position for record in log(home) if record.type == "Scored")
    assert read(home, "state", "r1", "--at", scored)["scores"].keys() == {"g0a.dev"}
    assert "outputs not judged yet: g0a.dev" in told(home, "state", "r1", "--at", scored - 1)[1]


@pytest.mark.parametrize("at", [0, LAST + 1])
def test_a_state_at_a_position_that_is_not_there_is_refused(home: Path, at: int):
    status, said, _ = told(home, "state", "r1", "--at", at)
    assert (status, said) == (2, "")


def test_replay_between_two_positions_judges_these_and_no_others(home: Path):
    whole, part = read(home, "replay", "r1"), read(home, "replay", "r1", "--from", "8", "--to", "12")
    assert part["records"] == 5 and 0 < part["decisions"] < whole["decisions"] and part["pending"] == 0
    for words in (("--from", "20", "--to", "10"), ("--to", LAST + 1)):
        status, _, talk = told(home, "replay", "r1", *words)
        assert status == 2 and f"positions 1 to {LAST}" in talk


def test_all_runs_replay_and_the_table_has_a_row_each(home: Path):
    found = read(home, "replay", "--all")
    assert [each["run"] for each in found] == ["r1", "b-control", "b"]
    assert not any(each["diverged"] or each["pending"] for each in found)
    assert told(home, "replay")[0] == told(home, "replay", "r1", "--all")[0] == 2


SPOILS = """
import sys
from sia_events.infra.clickhouse import connect
log = connect(f"chdb://{sys.argv[1]}/log")
log._writer.command("SET mutations_sync = 2")
log._writer.command(f"ALTER TABLE events UPDATE record = replaceAll(record, {sys.argv[2]}) WHERE run = 'r1'")
"""


def spoil(home: Path, change: str) -> None:
    done = subprocess.run([sys.executable, "-c", SPOILS, str(home), change], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_run_that_diverges_fails_the_replay_of_all_and_keep_going_shows_every_difference(own: Path):
    spoil(own, '\'"seed":0,"split":"gate"\', \'"seed":1,"split":"gate"\'')
    status, said, _ = told(own, "replay", "--all", "--json")
    assert status == 1 and [each["diverged"] for each in json.loads(said)] == [True, True, True]
    first, every = (told(own, "replay", "r1", "--json", *words) for words in ((), ("--keep-going",)))
    assert (first[0], every[0]) == (1, 1)
    found = json.loads(every[1])
    assert len(json.loads(first[1])["divergences"]) == 1 and len(found["divergences"]) == 3
    chain, *decided = found["divergences"]
    wrote = {record.code for record in log(own)}
    assert "chain" in chain["reason"] and found["first_divergence"] == chain
    for each in decided:
        assert each["reason"] == "decided otherwise now"
        assert [side[0]["seed"] for side in (each["recorded"], each["decided"])] == [1, 0]
        assert each["recorded_by"] in wrote and re.fullmatch(r"sia-events \S+", each["decided_by"])
    text = told(own, "replay", "r1", "--keep-going")[1]
    assert len(re.findall(r"^  recorded by sia-events", text, re.M)) == 3


def test_a_run_with_an_event_that_no_code_here_knows_is_named_and_the_others_are_replayed(own: Path):
    spoil(own, '\'"type":"FeedbackGiven"\', \'"type":"FeedbackSung"\'')
    status, _, talk = told(own, "replay", "r1")
    assert status == 2 and "of the unknown event type 'FeedbackSung'. Nothing was changed" in talk
    status, said, _ = told(own, "replay", "--all", "--json")
    assert status == 1
    found = {each["run"]: each for each in json.loads(said)}
    assert "FeedbackSung" in found["r1"]["unreadable"] and found.keys() == {"r1", "b-control", "b"}


def test_a_harness_of_ones_own_meets_the_gate_in_a_branch_under_its_own_seed(home: Path):
    shown = read(home, "show", "b")
    first, mine = shown["generations"]
    assert (mine["version"], mine["parent"], mine["lever"], mine["accepted"]) == ("g1a", "g0a", "harness", True)
    assert 0.5 < mine["scores"]["gate"]["value"] < 0.75 and first["harness"] != mine["harness"]
    assert shown["settings"]["seed"] == 5 and shown["status"] == "finished"
    assert read(home, "state", "b")["steering"] == ["be <brief>"]
    control = read(home, "show", "b-control")
    assert control["settings"] == read(home, "show", "r1")["settings"] and control["best"] == "g1a"


def test_a_branch_of_a_branch_in_the_midst_of_an_attempt_copies_nothing_and_ends(own: Path):
    asked = next(r.position for r in log(own, "b") if r.run == "b" and r.type == "AttemptRequested")
    before = (own / "nats").is_dir() and sorted(p.name for p in (own / "blobs").rglob("*"))
    opened = answered(own, "branch", "b", "--at-position", asked, "--run", "c", "--no-go")
    assert opened == {"run": "c", "parent": "b", "at": asked}
    assert sorted(p.name for p in (own / "blobs").rglob("*")) == before
    assert [r.run for r in log(own, "c")] == [r.run for r in log(own, "b")[:asked]] + ["c"]
    ended = answered(own, "run", "--resume", "c")
    assert (ended["outcome"], ended["best"]) == ("improved", "g1a")
    assert broken_link(log(own, "c")) is None and not read(own, "replay", "c")["diverged"]
    (root,) = read(own, "tree", "c")
    assert [branch["run"] for branch in root["branches"]] == ["b-control", "b"]
    assert [branch["run"] for branch in root["branches"][1]["branches"]] == ["c"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--at-position", "99"), f"positions 1 to {LAST} so far"),
        (("--at-position", LAST), "the run is over there"),
        (("--at-position", "1"), "written together or not at all; branch at 2"),
        (("--at-position", "5", "--model", "instant/last"), "in the midst of generation 0"),
        (("--at", "1", "--at-position", "5"), "say where"),
        ((), "say where"),
        (("--at", "1", "--set", "sed=1"), "did you mean seed"),
        (("--at", "1", "--n", "2", "--set", "seed=2147483647"), "seed"),
        (("--at", "1", "--set", "seed=1", "--seed", "2"), "--seed 2 and --set seed=1: say seed once"),
        (("--at", "1", "--set", "lever=harness", "--lever", "weights"), "--lever weights and --set lever=harness: say"),
        (("--at", "1", "--set", "target_model=instant/a", "--model", "instant/b"), "--model instant/b and --set"),
        (("--at", "1", "--set", "seed=1", "--set", "seed=9"), "--set seed=1 and --set seed=9: say seed once"),
        (("--at", "1", "--steer", ""), "--steer has no text"),
        (("--at", "1", "--steer", " "), "--steer has no text"),
        (("--at", "1", "--replace-harness", "."), "target_agent.py is missing"),
        (("--at", "1", "--model", "nonsense"), "no provider of the model 'nonsense'"),
        (
            ("--at", "1", "--set", "generations=1"),
            "a branch goes on for one more at least: --set generations=2 or more",
        ),
        (
            ("--at", "0", "--model", "instant/first"),
            "instant/first is the model of run r1 already; nothing was written",
        ),
        (("--at", "1", "--run", "b"), "run b exists already; nothing was written"),
        (("--at", "1", "--run", "a b"), "a run's name is letters"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_and_says_what_can(
    home: Path, words: tuple[object, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    status, _, talk = told(home, "branch", "r1", *words, "--no-go")
    assert status == 2 and why in talk
    assert [row["run"] for row in read(home, "runs")] == ["r1", "b-control", "b"]


def test_feedback_of_ones_own_has_to_be_feedback(home: Path, tmp_path: Path):
    file = tmp_path / "feedback.json"
    for given, why in (
        ({}, f"--replace-feedback {file}: lever: Field required; nothing was written"),
        (5, "nothing was written"),
        ({"lever": "harness", "reasons": [5]}, "reasons.0: Input should be a valid string"),
        ({"lever": "both"}, "lever"),
        ({"lever": "weights"}, "an algorithm goes with the lever weights"),
        ({"lever": "harness", "algorithm": "dpo"}, "an algorithm goes with the lever weights"),
    ):
        file.write_text(json.dumps(given))
        status, _, talk = told(home, "branch", "r1", "--at", "0", "--replace-feedback", file)
        assert status == 2 and why in talk and len(talk.splitlines()) == 1 and "http" not in talk, talk


def test_input_of_a_branch_that_nests_too_deep_is_refused_in_a_line(home: Path, tmp_path: Path):
    file = tmp_path / "feedback.json"
    (tmp_path / "harness" / "/".join(["d"] * 101)).mkdir(parents=True)
    file.write_text("[" * 5000)
    for words, why in (
        (("--replace-harness", tmp_path / "harness"), "more than 100 folders are in one another"),
        (("--replace-feedback", file), "nothing was written"),
        (("--set", "seed=" + "[" * 5000), "--set seed: its value has more than 10 lists or objects"),
    ):
        status, _, talk = told(home, "branch", "r1", "--at", "0", *words, "--no-go")
        assert status == 2 and why in talk and len(talk.splitlines()) == 1, talk


def test_feedback_or_a_model_of_ones_own_begins_a_generation_that_ends_and_replays(own: Path, tmp_path: Path):
    file = tmp_path / "feedback.json"
    file.write_text(json.dumps({"lever": "harness", "reasons": ["a hunch"]}))
    for name, words in (("f", ("--replace-feedback", file)), ("m", ("--model", "instant/last"))):
        ended = answered(own, "branch", "r1", "--at", "0", *words, "--run", name)
        assert ended["status"] == "finished", ended
    advised, other = ({record.type: record for record in log(own, name) if record.run == name} for name in ("f", "m"))
    (given,) = (record for record in log(own, "f") if isinstance(record.event, FeedbackGiven))
    assert (given.producer, given.run, given.event.reasons) == ("cli", "f", ("a hunch",))
    assert isinstance(patched := other["HarnessPatched"].event, HarnessPatched)
    assert (other["HarnessPatched"].producer, patched.weights.model) == ("cli", "instant/last")
    assert "FeedbackRequested" not in {*advised, *other}, "what a person gives stands in for it"
    (root,) = read(own, "tree")
    changed = {branch["run"]: branch["changed"] for branch in root["branches"]}
    assert changed["f"] == {"feedback": "harness: a hunch"}
    assert changed["m"] == {"target_model": "instant/last", "candidate": "entered by hand: the model instant/last"}
    text = told(own, "tree")[1]
    assert "feedback=harness: a hunch" in text and "candidate=entered by hand: the model instant/last" in text
    for name in ("f", "m"):
        found = read(own, "replay", name)
        assert not found["diverged"] and not found["pending"]


def test_several_branches_are_opened_at_once_with_a_seed_each(own: Path):
    done = sia(own, "branch", "r1", "--at", "0", "--n", "2", "--lever", "weights", "--no-go", "--json")
    assert [json.loads(line)["run"] for line in done.stdout.splitlines()] == ["r2", "r3"], done.stderr
    (root,) = read(own, "tree")
    opened = {branch["run"]: branch["changed"] for branch in root["branches"]}
    # A branch at a place that its parent shares with the parent's parent is still its parent's.
    shared = answered(own, "branch", "r2", "--at", "0", "--run", "c", "--no-go")
    assert shared["parent"] == read(own, "show", "c")["parent"] == "r2"
    # Nobody goes on with them: the tree says so as the list of runs does.
    listed = {run["run"]: run["status"] for run in read(own, "runs")}
    assert listed["r2"] == listed["r3"] == "interrupted"
    assert all(listed[branch["run"]] == branch["status"] for branch in root["branches"])
    assert opened["r2"] == {"lever": "weights", "seed": 0} and opened["r3"] == {"lever": "weights", "seed": 10_000}


def test_the_tree_shows_where_branches_part_and_what_changed(home: Path):
    lines = told(home, "tree")[1].splitlines()
    assert lines[0].startswith("r1   task taste   improved   g1a 0.750")
    assert lines[1].startswith("├─ b-control   at ") and "nothing changed" in lines[1]
    assert lines[2].startswith("└─ b   at ") and "seed=5" in lines[2] and "steer=be <brief>" in lines[2]


def test_a_comparison_is_aligned_at_the_fork_and_pairs_the_items(home: Path):
    found = read(home, "compare", "r1", "b-control", "b")
    fork = found["fork"]
    assert (fork["run"], fork["generation"]) == ("r1", 0)
    assert log(home)[fork["position"] - 1].type == "VersionAccepted"
    first, last = found["generations"]
    assert {cell["version"] for cell in first["runs"].values()} == {"g0a"}
    assert {cell["version"] for cell in last["runs"].values()} == {"g1a"}
    assert last["runs"]["b"]["scores"].keys() == {"dev", "gate", "test"}
    same, other = found["pairs"]
    assert (same["before"], same["after"], same["files"]) == ("r1", "b-control", {})
    assert same["splits"]["test"]["gain"] == 0 and same["splits"]["test"]["p_value"] == 1
    assert "target_agent.py" in other["files"]


def test_of_more_than_two_runs_each_pair_is_told_where_it_parts(own: Path):
    last = read(own, "state", "b")["position"]
    assert sia(own, "branch", "b", "--at-position", last - 1, "--run", "bb").returncode == 0
    found = read(own, "compare", "b", "bb", "r1")
    near, far = (pair["fork"] for pair in found["pairs"])
    assert (near["run"], near["position"]) == ("b", last - 1) and far == found["fork"] and far["run"] == "r1"
    text = told(own, "compare", "b", "bb", "r1")[1]
    assert f"against b (g1a), apart behind record {last - 1}" in Page(comparison_page(found)).words
    assert f"against b (g1a), apart behind record {last - 1}\n" in text
    assert f"against b (g1a), apart behind record {far['position']}\n" in text


def test_what_a_branchs_parents_paid_is_told_apart_in_a_comparison(home: Path):
    rows = {row["run"]: row["cost"] for row in read(home, "compare", "r1", "b")["runs"]}
    shared = rows["b"]["inherited"]
    assert rows["r1"]["inherited"] is None and 0 < shared["model_calls"] < rows["b"]["model_calls"]
    assert f"({shared['model_calls']:,} of its parents)" in told(home, "compare", "r1", "b")[1]
    status, _, talk = told(home, "compare", "r1")
    assert status == 2 and "takes two runs or more" in talk


INTERVAL = r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]"


def test_the_table_of_a_comparison_has_intervals_dollars_and_p(home: Path):
    compared, text = read(home, "compare", "r1", "b"), told(home, "compare", "r1", "b")[1]
    heads, first, second, *rest = text.splitlines()
    assert re.split(r"  +", heads)[4:] == ["first, sealed", "final, sealed", "p", "calls", "tokens", "USD", "seconds"]
    for run, line in zip(compared["runs"], (first, second), strict=True):
        cells = re.split(r"  +", line)
        assert [re.fullmatch(INTERVAL, cell) for cell in cells[4:6]] != [None, None]
        assert (cells[6], cells[9]) == (f"{run['sealed']['p_value']:.2g}", "0.00")
    rows = [line for line in rest if re.match(r"\d+ +(dev|gate|test) ", line)]
    assert len(rows) == 6 and all(len(re.findall(INTERVAL, row)) == 2 for row in rows)
    (pair,) = compared["pairs"]
    for split, size in SPLITS.items():
        (line,) = (line for line in rest if line.startswith(f"  {split}"))
        gain = pair["splits"][split]
        assert f"{gain['gain']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in line
        assert f"p = {gain['p_value']:.2g}, {size} items: " in line


def test_two_adapters_are_set_side_by_side_by_how_they_were_learned():
    """Here from the events alone: learning is a long way for a table."""
    one = trained("g1a", "g0a", metrics={"kl": 0.0125, "reward": 0.5})
    weights = Weights(model="local/m", adapter="c" * 64)
    other = trained("g1a", "g0a", algorithm="grpo", rollouts=3072, metrics={"reward": 0.625}, weights=weights)
    histories = [recorded(*ACCEPTED, each, accepted("g1a", "g0a")) for each in (one, other)]
    made = [learned(history, fold(history)) for history in histories]
    assert learned(recorded(*ACCEPTED), fold(recorded(*ACCEPTED))) is None
    rows = adapter_rows({"adapters": made})
    assert rows == [
        ("algorithm", "reinforce", "grpo"),
        ("rollouts", "8", "3,072"),
        ("kl", "0.0125", ""),
        ("reward", "0.5", "0.625"),
    ]
    assert adapter_text({"adapters": made}, " -> ") == f"{'b' * 12} -> {'c' * 12}"
    assert adapter_rows({"adapters": [made[0], made[0]]}) == []
    against_none = adapter_rows({"adapters": [None, made[0]]})
    assert ("of", "", "g0a") in against_none and ("model", "", "local/m") in against_none
    pair = {"before": "r1", "after": "b", "versions": ["g1a", "g1a"], "splits": {}, "files": {}, "fork": None}
    pair["adapters"] = made
    compared = {"runs": [], "generations": [], "fork": None, "pairs": [pair]}
    assert "    algorithm  reinforce" in comparison_text(compared) and "3,072" in comparison_text(compared)
    assert "algorithmreinforcegrpo" in Page(comparison_page(compared)).words


def test_flips_name_the_items_that_one_version_has_right_and_the_other_wrong(home: Path):
    (pair,) = read(home, "compare", "r1", "b")["pairs"]
    for split, size in SPLITS.items():
        found = pair["splits"][split]
        worse = found["flips"]["worse"]
        assert len(worse) == found["worse"] and not found["flips"]["better"] and found["n"] == size
        assert found["gain"] == pytest.approx(-len(worse) / size)
        assert all(int(each["item"][1:]) % 32 == 2 and (each["before"], each["after"]) == (1, 0) for each in worse)
    assert sum(pair["splits"][split]["worse"] for split in SPLITS) > 0
    (back,) = read(home, "compare", "b", "r1")["pairs"]
    assert back["splits"]["gate"]["flips"]["better"] and not back["splits"]["gate"]["flips"]["worse"]


def test_of_more_flips_than_a_page_can_take_it_says_how_many_there_are():
    flipped = [{"item": f"<{number}>", "before": 0.0, "after": 1.0} for number in range(1203)]
    gate = {"gain": 0.4, "low": 0.3, "high": 0.5, "p_value": 1e-9, "n": 3000, "better": 1203, "worse": 0}
    splits = {"gate": {**gate, "flips": {"better": flipped, "worse": []}}}
    pair = {"before": "r1", "after": "b", "versions": ["g1a", "g1a"], "splits": splits, "files": {}}
    compared = {"runs": [], "generations": [], "fork": None}
    compared["pairs"] = [{**pair, "fork": None, "adapters": [None, None]}]
    words = Page(comparison_page(compared)).words
    assert "gate: 1203 items flipped" in words and "and 203 more" in words
    assert "<999>" in words and "<1000>" not in words


class Page(HTMLParser):
    """What a page consists of; raises for a tag that is not closed where it has to be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen = list[str](), list[tuple[str, dict[str, str | None]]]()
        self.words = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_of_a_comparison_stands_alone_and_escapes_what_agents_wrote(home: Path, tmp_path: Path):
    file = tmp_path / "page.html"
    assert told(home, "compare", "r1", "b", "--html", file)[:2] == (0, f"{file}\n")
    page = Page(file.read_text())
    tags = [tag for tag, _ in page.seen]
    assert tags.count("circle") == 4 and tags.count("polyline") == 2 and tags.count("details") >= 1
    assert not {"script", "link", "img", "iframe"} & set(tags) and "b" not in tags
    assert not [attrs for _, attrs in page.seen if {"src", "href"} & attrs.keys()]
    assert '"<b>sweet</b>"[3:8]' in page.words and "items flipped" in page.words
