"""Scores denoised counts by the molecules that were held out: a score a cell, 0 for counts as they are, 1 for perfect.

Per cell the mean squared error of log(1 + 10,000 · share of the cell's molecules) against the held-out ones, e, is set
against that of the train counts as they are, e₀: 1 − e/e₀ (molecular cross-validation: Batson, Royer and Webber,
bioRxiv 786269; normalised as in the denoising task of Open Problems in Single-Cell Analysis). It has no lower end, so
it is cut at −1, twice the error of doing nothing: no cell alone is to carry the mean, and what simple methods do to
their worst cell is above it.

This error alone can be had without denoising: it does not see a matrix scaled to nothing, rewards a cell's molecules
dumped into a gene that nobody expects any in, and counts raised to a power. What fails one of these gates is worth 0 in
every cell: molecules in all; each gene's share of them; the likelihood of the held-out molecules.
"""

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Counts = Mapping[str, Sequence[float]]

WORST = -1.0
MOLECULES = (0.5, 2.0)  # of those in train
# A gene's share may be twice that in train, and this more: what is dumped up to there gains nothing, and what is
# expected of a logarithm moves the commonest gene of a cell by as much.
SHARE, MORE_SHARE = 2.0, 0.1
# Half of what ten principal components of the square roots reach (0.490).
LIKELIHOOD = 0.245


class Refused(Exception):
    """The output is no denoised matrix, or not a fair one."""


def read(path: Path) -> tuple[list[str], dict[str, list[float]]]:
    """(genes, counts by cell). Raises Refused where the file is no such table."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row]
            table = {row[0]: [float(value) for value in row[1:]] for row in rows}
    except OSError as error:
        raise Refused(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise Refused(f"{path.name} is no table of numbers: {error}") from error
    if len(table) < len(rows):
        raise Refused(f"{path.name} lists a cell twice")
    return header[1:], table


def read_denoised(path: Path, genes: Sequence[str], train: Counts) -> dict[str, list[float]]:
    """The output, as many cells and genes as train has. Raises Refused."""
    named, denoised = read(path)
    if named != genes:
        raise Refused(f"the columns of {path.name} are not those of train.csv")
    if denoised.keys() != train.keys():
        known = len(denoised.keys() & train.keys())
        raise Refused(
            f"{path.name} has {known} of the {len(train)} cells, and {len(denoised) - known} that are unknown"
        )
    for cell, row in denoised.items():
        if len(row) != len(genes):
            raise Refused(f"cell {cell} has {len(row)} of {len(genes)} genes")
        if not all(math.isfinite(value) and value >= 0 for value in row):
            raise Refused(f"cell {cell} has a count that is negative or not finite")
    return denoised


def check(genes: Sequence[str], train: Counts, denoised: Counts) -> None:
    """Raises Refused where molecules appeared, vanished, or went to one gene."""
    ratio = sum(map(sum, denoised.values())) / sum(map(sum, train.values()))
    if not MOLECULES[0] <= ratio <= MOLECULES[1]:
        raise Refused(f"{ratio:.3g} times the molecules of train: between {MOLECULES[0]} and {MOLECULES[1]} may be")
    for gene, before, after in zip(genes, shares(train), shares(denoised), strict=True):
        if after > SHARE * before + MORE_SHARE:
            raise Refused(f"gene {gene} has {after:.2%} of a cell's molecules, {before:.2%} in train: it was dumped on")


def shares(counts: Counts) -> list[float]:
    """Each gene's share of a cell's molecules, the mean over cells."""
    rows = [[value / (sum(row) or 1.0) for value in row] for row in counts.values()]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def logs(row: Sequence[float]) -> list[float]:
    size = sum(row) or 1.0
    return [math.log1p(1e4 * value / size) for value in row]


def noise_removed(train: Sequence[float], denoised: Sequence[float], test: Sequence[float]) -> float:
    """A cell's score: 1 − e/e₀, cut at −1."""
    target = logs(test)
    error, at_first = (math.dist(logs(row), target) ** 2 for row in (denoised, train))
    return max(WORST, 1 - error / at_first)


def poisson(expected: Counts, test: Counts) -> float:
    """Negative log-likelihood of the test counts, less what does not depend on `expected`, which has their total."""
    factor = sum(map(sum, test.values())) / sum(map(sum, expected.values()))
    pairs = ((value * factor, k) for cell, row in test.items() for value, k in zip(expected[cell], row, strict=True))
    return sum(value - k * math.log(value + 1e-6) for value, k in pairs)


def likelihood(train: Counts, denoised: Counts, test: Counts) -> float:
    """How likely the held-out molecules of `test`'s cells are: 0 as by the train counts, 1 as by themselves."""
    least, most = poisson({cell: train[cell] for cell in test}, test), poisson(test, test)
    return (least - poisson({cell: denoised[cell] for cell in test}, test)) / (least - most)


def judged(output: Path, data: Path) -> dict[str, object]:
    """What goes into results.json. `data` has the test counts of those cells alone that are to be scored."""
    genes, train = read(data / "public/train.csv")
    _, test = read(data / "private/test.csv")
    try:
        denoised = read_denoised(output, genes, train)
        check(genes, train, denoised)
        likely = likelihood(train, denoised, test)
        if likely < LIKELIHOOD:
            raise Refused(f"likelihood {likely:.3f}, at least {LIKELIHOOD} is asked: small counts were squeezed out")
    except Refused as refused:
        return {"noise removed": 0.0, "error": str(refused), "items": dict.fromkeys(test, 0.0)}
    items = {cell: noise_removed(train[cell], denoised[cell], row) for cell, row in test.items()}
    return {"noise removed": sum(items.values()) / len(items), "likelihood": likely, "items": items}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gen-dir", type=Path, required=True)
    folder = parser.parse_args().gen_dir
    results = judged(folder / "denoised.csv", Path(__file__).resolve().parent / "data")
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
