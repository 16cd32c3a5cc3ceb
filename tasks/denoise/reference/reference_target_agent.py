"""A first agent for `denoise`: lets the model change a recipe, setting by setting, and does what the recipe says.

The model alone decides: nothing is tried out here. Standard library only, linear algebra included.
"""

import argparse
import csv
import json
import math
import os
import random
import urllib.request
from collections.abc import Callable, Sequence
from operator import mul
from pathlib import Path
from typing import Any

Row = list[float]
Matrix = list[Row]
Recipe = dict[str, Any]

# Every setting with its values; the first of each leaves the counts as they are.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "transform": ("none", "sqrt", "log", "thinned-log"),
    "rank": (0, 2, 5, 10, 20, 50),
    "neighbours": (0, 5, 15, 30),
    "own": (0.0, 0.25, 0.5),
}
CHANGES = 3
# Each value of each setting by a letter of its own, one token to a model; the last letter is to leave the recipe alone.
LETTERS = dict(zip("ABCDEFGHIJKLMNOPQ", ((name, value) for name in SETTINGS for value in SETTINGS[name]), strict=True))
ENOUGH = chr(ord("A") + len(LETTERS))
# What never changes comes first: a model reads a beginning that prompts share but once.
QUESTION = "\n".join(
    (
        "A recipe denoises RNA counts of single cells. What may be changed in it:",
        *(f"{letter} {name} {value}" for letter, (name, value) in LETTERS.items()),
        f"{ENOUGH} nothing",
        "",
        "The recipe now: {recipe}. The best change?",
    )
)
COMPONENTS, SPARE, PASSES = 10, 4, 4
TRAIN_DEPTH = 9  # train has that many molecules for each of the held-out ones


def choose(recipe: Recipe, letters: Sequence[str]) -> str:
    """The letter that the model chooses."""
    now = ", ".join(f"{name} {value}" for name, value in recipe.items())
    body = {
        "model": os.environ["SIA_MODEL"],
        "messages": [
            {"role": "user", "content": QUESTION.format(recipe=now)},
            {"role": "assistant", "content": "The best change is"},
        ],
        "choices": [f" {letter}" for letter in letters],
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{os.environ['OPENAI_BASE_URL']}/choice",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    with urllib.request.urlopen(request) as response:
        return letters[json.load(response)["index"]]


def edited(recipe: Recipe, ask: Callable[[Recipe, Sequence[str]], str] = choose) -> Recipe:
    """The recipe with up to CHANGES settings changed as the model says, one at a time, none of them twice."""
    left = set(recipe)
    for _ in range(CHANGES):
        offered = [letter for letter, (name, value) in LETTERS.items() if name in left and recipe[name] != value]
        letter = ask(recipe, [*offered, ENOUGH])
        if letter == ENOUGH:
            break
        name, value = LETTERS[letter]
        recipe = {**recipe, name: value}
        left.remove(name)
    return recipe


def first_recipe(data: Path) -> Recipe:
    """That of an archived solution to start from, where there is one; else one that changes nothing."""
    for file in sorted(data.glob("state/*/recipe.json")):
        recipe = json.loads(file.read_text())
        return {name: values[values.index(recipe[name])] for name, values in SETTINGS.items()}
    return {name: values[0] for name, values in SETTINGS.items()}


def denoised(counts: Matrix, recipe: Recipe) -> Matrix:
    """Expected counts, as many in a cell as were counted in it."""
    sizes = [sum(row) for row in counts]
    plain = [transformed(row, size, recipe["transform"]) for row, size in zip(counts, sizes, strict=True)]
    smooth = plain
    if recipe["neighbours"]:
        smooth = averaged(smooth, recipe["neighbours"])
    if recipe["rank"]:
        smooth = low_rank(smooth, recipe["rank"])
    own = recipe["own"]
    rows = [
        [back(max(0.0, own * x + (1 - own) * y), recipe["transform"]) for x, y in zip(*pair, strict=True)]
        for pair in zip(plain, smooth, strict=True)
    ]
    return [[value * size / (sum(row) or 1.0) for value in row] for row, size in zip(rows, sizes, strict=True)]


def transformed(row: Row, size: float, transform: str) -> Row:
    if transform == "thinned-log":
        seen = {count: thinned_log(int(count), size / TRAIN_DEPTH) for count in set(row)}
        return [seen[count] for count in row]
    shares = [1e4 * count / size for count in row]
    if transform == "none":
        return shares
    return [math.sqrt(share) if transform == "sqrt" else math.log1p(share) for share in shares]


def thinned_log(count: int, size: float) -> float:
    """What log(1 + 10,000 · share) is expected to be of what a cell of that size has held out.

    Each molecule of train stands for one in TRAIN_DEPTH: the mean over a binomial, not the logarithm of its mean.
    """
    kept = 1 / TRAIN_DEPTH
    probability = (1 - kept) ** count
    total = 0.0
    for k in range(1, count + 1):
        probability *= (count - k + 1) / k * kept / (1 - kept)
        total += probability * math.log1p(1e4 * k / size)
    return total


def back(value: float, transform: str) -> float:
    """The inverse of a transform."""
    if transform == "sqrt":
        return value * value
    return math.expm1(value) if transform.endswith("log") else value


def averaged(rows: Matrix, count: int) -> Matrix:
    """Each cell's mean with the cells nearest to it in the first principal components, `count` with itself."""
    centred, _ = centre(rows)
    axes = principal(centred, COMPONENTS)
    places = [[dot(row, axis) for axis in axes] for row in centred]
    near = [sorted(range(len(rows)), key=lambda other: math.dist(places[other], place))[:count] for place in places]
    return [[sum(column) / count for column in zip(*(rows[cell] for cell in cells), strict=True)] for cells in near]


def low_rank(rows: Matrix, rank: int) -> Matrix:
    """The rows as their mean and `rank` principal components have them."""
    centred, mean = centre(rows)
    axes = principal(centred, rank)
    genes = transposed(axes)
    places = [[dot(row, axis) for axis in axes] for row in centred]
    return [[m + dot(place, gene) for m, gene in zip(mean, genes, strict=True)] for place in places]


def principal(centred: Matrix, rank: int) -> Matrix:
    """About the first `rank` principal axes, orthonormal rows, by randomised subspace iteration.

    Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv 0909.4061), algorithm 4.4; its projection
    is kept as it is, `rank` + SPARE wide, and cut by the size of each axis' part in the rows.
    """
    draw = random.Random(0)
    columns = transposed(centred)
    axes = [[draw.gauss(0, 1) for _ in columns] for _ in range(rank + SPARE)]
    for _ in range(PASSES):
        places = [[dot(row, axis) for row in centred] for axis in axes]
        axes = orthonormal([[dot(place, column) for column in columns] for place in places])
    return axes[:rank]


def orthonormal(vectors: Matrix) -> Matrix:
    """Gram and Schmidt's, each vector cleared of the earlier ones."""
    found: Matrix = []
    for vector in vectors:
        for axis in found:
            part = dot(vector, axis)
            vector = [x - part * y for x, y in zip(vector, axis, strict=True)]
        length = math.sqrt(dot(vector, vector)) or 1.0
        found.append([x / length for x in vector])
    return found


def centre(rows: Matrix) -> tuple[Matrix, Row]:
    mean = [sum(column) / len(rows) for column in transposed(rows)]
    return [[x - m for x, m in zip(row, mean, strict=True)] for row in rows], mean


def transposed(rows: Matrix) -> Matrix:
    return [list(column) for column in zip(*rows, strict=True)]


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(map(mul, one, other))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    arguments = parser.parse_args()

    with (arguments.dataset_dir / "train.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    recipe = edited(first_recipe(arguments.dataset_dir))
    (arguments.working_dir / "recipe.json").write_text(json.dumps(recipe))
    matrix = denoised([[float(count) for count in row[1:]] for row in rows], recipe)
    with (arguments.working_dir / "denoised.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows([row[0], *(f"{value:.5g}" for value in line)] for row, line in zip(rows, matrix, strict=True))


if __name__ == "__main__":
    main()
