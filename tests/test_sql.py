"""SQL on a real log by the real command: every query of docs/sql.md runs, and nothing that writes does."""

import json
import re
from pathlib import Path

import pytest
from command import AGENT, SMALL, read, sia, small_task, told

PAGE = (Path(__file__).parent.parent / "docs/sql.md").read_text()
QUERIES = dict(re.findall(r"^## (.+?)\n.*?^```sql\n(.*?)^```", PAGE, re.M | re.S))
pytestmark = pytest.mark.usefixtures("children")


@pytest.fixture(scope="module")
def home(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the finished run r1 and a branch of it that has just been opened."""
    home = tmp_path_factory.mktemp("home")
    assert sia(home, "run", task, *SMALL).returncode == 0
    assert sia(home, "branch", "r1", "--at", "0", "--seed", "7", "--run", "b", "--no-go").returncode == 0
    return home


def test_the_page_has_ten_queries():
    assert len(QUERIES) == 10


@pytest.mark.parametrize("question", QUERIES)
def test_a_query_of_the_page_finds_rows(home: Path, question: str):
    found = read(home, "sql", QUERIES[question])
    # Nothing was given up on here: test_dead_letters.py asks where something was.
    assert found or "give up" in question


def test_the_page_names_the_views_that_there_are(home: Path):
    listed = [row["table"] for row in read(home, "sql")]
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == listed
    for view in listed:
        assert read(home, "sql", f"SELECT count() AS rows FROM {view}")[0].keys() == {"rows"}


def test_answers_are_those_of_the_run(home: Path):
    first, second = read(home, "sql", "SELECT * FROM versions WHERE run = 'r1' ORDER BY generation")
    assert (first["version"], first["lever"], first["verdict"]) == ("g0a", "first", "accepted")
    assert (second["version"], second["parent"], second["gate"]) == ("g1a", "g0a", pytest.approx(0.75))
    runs = {row["run"]: row for row in read(home, "sql", "SELECT * FROM runs")}
    assert runs["r1"]["status"] == "finished" and (runs["b"]["parent"], runs["b"]["records"]) == ("r1", 11)
    (branch,) = read(home, "sql", QUERIES["Where do branches part from their parents, and what is different in them?"])
    assert (branch["run"], branch["at"], json.loads(branch["overrides"])) == ("b", 10, {"seed": 7})
    shown = read(home, "show", "r1")["cost"]
    (paid,) = read(home, "sql", "SELECT sum(calls) AS calls FROM costs WHERE run = 'r1'")
    assert paid["calls"] == shown["model_calls"]


def test_what_agents_said_can_be_asked_for_also_of_one_that_crashed(tmp_path: Path):
    task = small_task(tmp_path / "task")
    # Gate and test have twelve items, dev has eight: the agent is run well once, and then breaks off.
    talking = "    print('item', item['id'], file=sys.stderr)\n"
    agent = AGENT.replace("item = json.loads(line)\n", f"item = json.loads(line)\n    {talking}")
    crash = "\nif sum(1 for _ in open(f'{data}/items.jsonl')) == 12: raise SystemExit('no more')\n"
    (task / "reference/reference_target_agent.py").write_text(agent + crash)
    assert "no first agent runs" in sia(tmp_path / "home", "run", task, *SMALL).stderr
    (counted,) = read(tmp_path / "home", "sql", "SELECT count() AS lines FROM trace WHERE kind = 'log'")
    assert counted["lines"] > 0
    said = {
        row["attempt"]: row["said"]
        for row in read(
            tmp_path / "home", "sql", "SELECT attempt, groupArray(text) AS said FROM logs WHERE run = 'r1' GROUP BY 1"
        )
    }
    assert len(said["g0a.dev"]) == 8 and said["g0a.dev"][0].startswith("item i")
    crashed = [lines for attempt, lines in said.items() if not attempt.endswith(".dev")]
    assert crashed and all(len(lines) == 13 and lines[-1] == "no more" for lines in crashed)


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE events",
        "CREATE TABLE t (a Int8) ENGINE = Memory",
        "INSERT INTO trace (run) VALUES ('x')",
        "INSERT INTO FUNCTION file('FILE', 'CSV', 'a Int8') VALUES (1)",
        "SELECT 1 INTO OUTFILE 'FILE'",
        "SELECT 1) INTO OUTFILE 'FILE' --",
        "SELECT 1; DROP TABLE events",
        "SELECT 1; SELECT 2 INTO OUTFILE 'FILE'",
        "SELECT 1; INSERT INTO FUNCTION file('FILE', 'CSV', 'a Int8') SELECT 1",
        "SELECT 1); SELECT 2 INTO OUTFILE 'FILE' --",
        "SELECT 1 SETTINGS readonly = 0",
        "SET readonly = 0",
        "ALTER TABLE events DELETE WHERE 1",
        "KILL QUERY WHERE 1",
        "EXPLAIN AST SELECT 1",
        "EXPLAIN SELECT 1",
        "SELEC",
        "",
    ],
)
def test_what_writes_or_is_no_select_is_refused(home: Path, query: str, tmp_path: Path):
    status, said, talk = told(home, "sql", query.replace("FILE", str(tmp_path / "file")))
    assert (status, said) == (2, "") and talk.startswith("sia: ")
    assert not (tmp_path / "file").exists()
    assert read(home, "sql", "SELECT max(position) AS last FROM events WHERE run = 'r1'") == [{"last": 28}]


def test_a_parquet_file_holds_what_the_query_found(home: Path, tmp_path: Path):
    file = tmp_path / "scores.parquet"
    query = "SELECT run, version, split, value, n FROM scores ORDER BY position"
    status, said, talk = told(home, "sql", query, "--parquet", file)
    assert (status, said) == (0, f"{file}\n"), talk
    assert read(home, "sql", f"SELECT * FROM file('{file}', Parquet)") == read(home, "sql", query)
    assert told(home, "sql", "--parquet", file)[0] == 2
    status, _, talk = told(home, "sql", query, "--parquet", tmp_path / "nowhere" / "file")
    assert status == 2 and "cannot be written: No such file" in talk


def test_a_string_that_is_no_text_is_shown_all_the_same(home: Path):
    assert read(home, "sql", "SELECT unhex('41FF') AS bytes") == [{"bytes": "A\ufffd"}]


def test_a_table_for_people_cuts_long_cells_and_keeps_to_one_line_a_row(home: Path):
    text = told(home, "sql", "SELECT position, record FROM events WHERE run = 'r1' ORDER BY position LIMIT 3")[1]
    lines = text.splitlines()
    assert len(lines) == 4 and lines[0].split() == ["position", "record"] and all("…" in line for line in lines[1:])
    assert told(home, "sql", "SELECT 1 AS one WHERE 0")[1] == "no rows\n"
