"""The built-in task `denoise`: what its data promises, what its evaluator lets through, and what its agent does."""

import hashlib
import json
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from given import recorded
from story import asked, proposed, started
from test_sia_tasks import BOXED, judged
from writing import writing_room

from sia_events.infra.instant import InstantModels
from sia_events.infra.memory import MemoryBlobs
from sia_events.infra.sandbox import Bubblewrap
from sia_events.shared.calls import decode_call
from sia_events.shared.events import AttemptRequested, ExecutionLogged, Scored
from sia_events.shared.ports import Chat, Choice, Text
from sia_events.shared.registration import register, requirements
from sia_events.shared.run import fold
from sia_events.shared.service import Work
from sia_events.shared.task import answer_key, find_task, plain_splits, public_files
from sia_events.shared.tree import load_tree, store_tree
from sia_events.target_runner.service import target_runner

Rows = dict[str, list[float]]

TASK = find_task("denoise")
DATA = TASK.path / "data"
DIGESTS = {
    "public/train.csv": "372f37b80b359511f51089cfadc3afd0dda0dd7cad571c628a0d28ea2fd5abad",
    "private/test.csv": "aa460e50ada611b542fb00295fcad8799a8c6896946ddbec8834aef0d5c170c4",
}
BEST = {"transform": "thinned-log", "rank": 20, "own": 0.5}


def module(name: str) -> ModuleType:
    """A program of the task's, imported without leaving bytecode in the task's folder, which is shipped as it is."""
    found = ModuleType(Path(name).stem)
    exec(compile((TASK.path / name).read_text(), str(TASK.path / name), "exec"), vars(found))
    return found


EVALUATE, MAKE = module("evaluate.py"), module("make_data.py")
AGENT = module("reference/reference_target_agent.py")
GENES, TRAIN = EVALUATE.read(DATA / "public/train.csv")
_, TEST = EVALUATE.read(DATA / "private/test.csv")
NONE = {name: values[0] for name, values in AGENT.SETTINGS.items()}


def smoothed(**recipe: Any) -> Rows:
    rows = AGENT.denoised([list(row) for row in TRAIN.values()], {**NONE, **recipe})
    return dict(zip(TRAIN, rows, strict=True))


@pytest.fixture(scope="module")
def best() -> Rows:
    return smoothed(**BEST)


def written(folder: Path, rows: Mapping[str, Sequence[float]]) -> Path:
    file = folder / "denoised.csv"
    lines = [["id", *GENES], *([cell, *map(repr, row)] for cell, row in rows.items())]
    file.write_text("".join(",".join(line) + "\n" for line in lines))
    return file


def results(folder: Path, rows: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return EVALUATE.judged(written(folder, rows), DATA)


def each(rows: Rows, change: Callable[[float], float]) -> Rows:
    return {cell: [change(value) for value in row] for cell, row in rows.items()}


def test_cells_and_genes_of_both_files_agree_and_their_bytes_are_those_that_were_made():
    assert [f"g{n:03d}" for n in range(300)] == GENES
    assert list(TRAIN) == list(TEST) == [f"c{n:03d}" for n in range(300)]
    assert {len(row) for row in (*TRAIN.values(), *TEST.values())} == {300}
    assert {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in DIGESTS} == DIGESTS
    assert sum((DATA / name).stat().st_size for name in DIGESTS) < 400_000


def test_one_molecule_in_ten_is_held_out_and_every_gene_is_seen_in_train():
    held, seen = (sum(map(sum, rows.values())) for rows in (TEST, TRAIN))
    assert abs(held / (held + seen) - 0.1) < 4 * math.sqrt(0.09 / (held + seen))
    assert all(any(column) for column in zip(*TRAIN.values(), strict=True))
    assert all(any(row) for row in TEST.values()), "the error of a cell is set against that of its train counts"


def test_dealing_loses_no_molecule_and_leaves_out_what_train_never_saw(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MAKE, "CELLS", 5)
    monkeypatch.setattr(MAKE, "GENES", 4)
    counts = np.array([[0, 0, 0, 0, 3, 900]] * 4 + [[0, 1, 7, 50, 0, 900]] * 4)
    train, test = MAKE.dealt(counts)
    total = train + test
    assert total.shape[0] == 5 and (train.sum(0) > 0).all()
    assert {tuple(row[-2:]) for row in total.tolist()} == {(3, 900), (0, 900)}
    again = MAKE.dealt(counts)
    assert (again[0] == train).all() and (again[1] == test).all()
    assert MAKE.table(train).splitlines()[1] == ",".join(["c000", *map(str, train[0])])


def test_the_held_out_counts_are_the_answer_key_and_no_agent_sees_them():
    key = answer_key(TASK)
    assert key and key.file == "test.csv" and key.ids == tuple(TEST)
    assert {name: len(ids) for name, ids in plain_splits(TASK).items()} == {"dev": 75, "gate": 150, "test": 75}
    assert set(public_files(TASK, "whole")) == {"task.md", "train.csv"}


def test_agent_and_evaluator_need_no_package():
    asked_for = requirements(TASK)
    assert asked_for is not None and not [line for line in asked_for.decode().splitlines() if line[:1] != "#"]


def test_the_data_comes_with_its_origin_and_licence():
    notice = (TASK.path / "NOTICE").read_text()
    assert "Copyright (c) 2025 scverse" in notice and "make_data.py" in notice and "10x Genomics" in notice


def test_counts_as_they_are_score_nothing_in_every_cell(tmp_path: Path):
    told = results(tmp_path, TRAIN)
    assert set(told["items"]) == set(TEST) and set(told["items"].values()) == {0.0}
    assert [EVALUATE.noise_removed(TRAIN[cell], TRAIN[cell], TEST[cell]) for cell in TEST] == [0.0] * len(TEST)


def test_the_held_out_molecules_themselves_score_one_in_every_cell(tmp_path: Path):
    # As many molecules as train has, as the task asks for.
    told = results(tmp_path, each(TEST, lambda count: 9 * count))
    assert "error" not in told and told["likelihood"] == pytest.approx(1)
    assert list(told["items"].values()) == pytest.approx([1.0] * len(TEST))


def test_the_best_recipe_that_was_found_removes_a_third_of_the_noise(tmp_path: Path, best: Rows):
    told = results(tmp_path, best)
    assert "error" not in told and 0.35 < told["noise removed"] < 0.45
    assert told["likelihood"] > EVALUATE.LIKELIHOOD + 0.03
    assert min(told["items"].values()) > EVALUATE.WORST


def test_the_likelihood_that_is_asked_is_half_of_what_components_of_square_roots_have():
    roots = EVALUATE.likelihood(TRAIN, smoothed(transform="sqrt", rank=10), TEST)
    assert pytest.approx(roots / 2, abs=0.003) == EVALUATE.LIKELIHOOD


def test_a_cell_that_is_worse_than_twice_the_error_of_doing_nothing_counts_as_that():
    elsewhere = [float(count == 0) for count in TEST["c000"]]
    assert EVALUATE.noise_removed(TRAIN["c000"], elsewhere, TEST["c000"]) == EVALUATE.WORST == -1


def scaled_to_nothing(rows: Rows) -> Rows:
    return each(rows, lambda value: 1e-6 * value)


def dumped_on_a_gene(rows: Rows) -> Rows:
    """A quarter more molecules, all of them in the gene that has the fewest."""
    rare = min(range(len(GENES)), key=lambda gene: sum(row[gene] for row in rows.values()))
    return {cell: [*row[:rare], row[rare] + 0.25 * sum(row), *row[rare + 1 :]] for cell, row in rows.items()}


def raised_to_a_power(rows: Rows) -> Rows:
    raised = each(rows, lambda value: value**1.1)
    return {cell: [value * sum(rows[cell]) / sum(row) for value in row] for cell, row in raised.items()}


@pytest.mark.parametrize(
    ("game", "why"),
    [
        (scaled_to_nothing, "1e-06 times the molecules of train"),
        (dumped_on_a_gene, "it was dumped on"),
        (raised_to_a_power, "small counts were squeezed out"),
    ],
)
def test_what_makes_the_error_smaller_without_denoising_is_worth_nothing(
    tmp_path: Path, best: Rows, game: Callable[[Rows], Rows], why: str
):
    gamed = game(best)
    told = results(tmp_path, gamed)
    assert why in told["error"] and set(told["items"].values()) == {0.0}
    errors = [[EVALUATE.noise_removed(TRAIN[c], rows[c], TEST[c]) for c in TEST] for rows in (best, gamed)]
    assert sum(errors[1]) > sum(errors[0]) - 1e-9, "by the error alone it would pay, or cost nothing"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "denoised.csv cannot be read"),
        ("", "denoised.csv is no table of numbers"),
        ("id,a,b\nc000,1,2\n", "the columns of denoised.csv are not those of train.csv"),
        ("{header}c000{row}", "denoised.csv has 1 of the 300 cells, and 0 that are unknown"),
        ("{rows}c000{row}", "denoised.csv lists a cell twice"),
        ("{rows}c999{row}", "has 300 of the 300 cells, and 1 that are unknown"),
        ("{header}c000,1,2\n{rest}", "cell c000 has 2 of 300 genes"),
        ("{header}c000,x{row}", "denoised.csv is no table of numbers: could not convert"),
        ("{header}c000{minus}{rest}", "cell c000 has a count that is negative or not finite"),
        ("{header}c000{nan}{rest}", "cell c000 has a count that is negative or not finite"),
    ],
)
def test_a_broken_output_is_worth_nothing_and_the_results_say_why(tmp_path: Path, text: str | None, why: str):
    rows = written(tmp_path, TRAIN).read_text()
    header, first, rest = rows.split("\n", 2)
    row = first.removeprefix("c000") + "\n"
    parts = {"rows": rows, "header": header + "\n", "row": row, "rest": rest}
    parts |= {"minus": ",-1" + ",1" * 299 + "\n", "nan": ",nan" + ",1" * 299 + "\n"}
    file = tmp_path / "denoised.csv"
    file.unlink() if text is None else file.write_text(text.format(**parts))
    told = EVALUATE.judged(file, DATA)
    assert why in told["error"] and set(told["items"].values()) == {0.0}, told["error"]


@dataclass
class Chooser:
    """The `Models` port: chooses the letters that it is told, and keeps what it was asked."""

    letters: Sequence[str]
    asked: list[Choice] = field(default_factory=list)

    async def chat(self, call: Chat) -> Mapping[str, Any]:
        raise AssertionError("the agent chooses, it does not chat")

    async def stream(self, call: Chat) -> AsyncIterator[Mapping[str, Any]]:
        yield await self.chat(call)

    async def choose(self, call: Choice) -> Mapping[str, Any]:
        self.asked.append(call)
        index = list(call.choices).index(f" {self.letters[len(self.asked) - 1]}")
        return {**await InstantModels().choose(call), "choice": call.choices[index], "index": index}

    async def logprobs(self, text: Text) -> tuple[float, ...]:
        raise AssertionError("no log-probs are asked for")


async def attempted(home: Path, model: Chooser, state: Mapping[str, Any] | None = None) -> Mapping[str, bytes]:
    """What the reference agent wrote, in a box; `state` is the recipe that it starts from."""
    async with writing_room(home, model, sandbox=Bubblewrap()) as ports:
        told = await register(TASK, ports.blobs, MemoryBlobs(), 8)
        if state:
            files = await load_tree(ports.blobs, told.datasets["dev"])
            files["state/g0a/recipe.json"] = json.dumps(state).encode()
            told = told.model_copy(update={"datasets": {"dev": await store_tree(ports.blobs, files)}})
        first = proposed().model_copy(update={"harness": told.reference})
        records = recorded(told, started(), first, asked("g0a", "dev"))
        request = records[-1].event
        assert isinstance(request, AttemptRequested)
        work = Work(fold(records), records[-1], ports)
        (event,) = await target_runner.performs[AttemptRequested](work, request)
        assert isinstance(event, ExecutionLogged), event
        calls = (await ports.blobs.get(event.trajectory)).splitlines()
        # Whole attempts are rollouts: no call of theirs is about one cell.
        assert [decode_call(line).item for line in calls] == [None] * len(model.asked)
        return await load_tree(ports.blobs, event.outputs)


@BOXED
async def test_the_agent_does_what_the_model_says_and_the_evaluator_scores_it(tmp_path: Path):
    model = Chooser("DIQ")
    outputs = await attempted(tmp_path, model)
    assert json.loads(outputs["recipe.json"]) == {**NONE, **BEST}
    assert {call.temperature for call in model.asked} == {0.0}
    offered = [[choice.strip() for choice in call.choices] for call in model.asked]
    assert offered == [list("BCDFGHIJLMNPQR"), list("FGHIJLMNPQR"), list("LMNPQR")]
    told = await judged(TASK, outputs, tmp_path)
    assert isinstance(told, Scored) and told.score.n == 75 and 0.3 < told.score.value < 0.45


@BOXED
async def test_a_start_from_a_state_goes_on_from_its_recipe(tmp_path: Path):
    model = Chooser("HR")
    outputs = await attempted(tmp_path, model, {**NONE, "transform": "sqrt", "rank": 50})
    assert json.loads(outputs["recipe.json"]) == {**NONE, "transform": "sqrt", "rank": 10}
    shown = model.asked[0].messages[0]["content"]
    assert "The recipe now: transform sqrt, rank 50, neighbours 0, own 0.0." in shown
    assert [choice.strip() for choice in model.asked[0].choices] == list("ACDEFGHILMNPQR")


@BOXED
async def test_an_agent_that_changes_nothing_scores_nothing(tmp_path: Path):
    outputs = await attempted(tmp_path, Chooser("R"))
    told = await judged(TASK, outputs, tmp_path)
    assert isinstance(told, Scored) and set(told.items) == {0.0}


def test_a_state_that_is_no_recipe_is_refused(tmp_path: Path):
    (tmp_path / "state/g0a").mkdir(parents=True)
    (tmp_path / "state/g0a/recipe.json").write_text(json.dumps({**NONE, "rank": 3}))
    with pytest.raises(ValueError, match="not in tuple"):
        AGENT.first_recipe(tmp_path)
