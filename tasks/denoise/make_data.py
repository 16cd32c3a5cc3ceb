"""Derives data/public/train.csv and data/private/test.csv from scanpy's file of 700 blood cells; run once.

    python make_data.py 10x_pbmc68k_reduced.h5ad data

The file lies in the wheel of scanpy 1.11.5, in scanpy/datasets; reading it takes h5py, nothing of scanpy. The results
ship with the task. Molecules are dealt to train and test as in Batson, Royer and Webber, "Molecular cross-validation
for single-cell RNA-seq" (bioRxiv 786269, 2019).
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CELLS, GENES = 300, 300
KEPT_IN_TRAIN = 0.9
SEED = 0


def counts_of(path: Path) -> NDArray[np.int64]:
    """Molecules [700 cells, 765 genes]: the file's raw values are log(1 + 10,000 · count / n_counts), to 3 decimals.

    With n_counts of some thousands a count moves them by more than their rounding, so every count comes back exactly.
    """
    import h5py  # pyright: ignore[reportMissingImports]  # what this package does not install: nothing else needs it

    with h5py.File(path) as file:
        logs, genes, ends = (np.asarray(file[f"raw.X/{part}"]) for part in ("data", "indices", "indptr"))
        sizes = np.asarray(file["obs"])["n_counts"].astype(float)
        shape = tuple(int(size) for size in file["raw.X"].attrs["h5sparse_shape"])
    cells = np.repeat(np.arange(shape[0]), np.diff(ends))
    found = np.zeros(shape, dtype=np.int64)
    found[cells, genes] = np.rint(np.expm1(logs.astype(float)) * sizes[cells] / 1e4)
    return found


def dealt(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, test): some cells, their commonest genes, each molecule in train with that probability, else in test."""
    random = np.random.RandomState(SEED)
    some = counts[np.sort(random.permutation(len(counts))[:CELLS])]
    some = some[:, np.sort(np.argsort(-some.sum(0), kind="stable")[:GENES])]
    train = random.binomial(some, KEPT_IN_TRAIN)
    seen = train.sum(0) > 0
    return train[:, seen], (some - train)[:, seen]


def table(counts: NDArray[np.int64]) -> str:
    """CSV: a line a cell, its id first."""
    lines = [["id", *(f"g{gene:03d}" for gene in range(counts.shape[1]))]]
    lines += [[f"c{cell:03d}", *map(str, row)] for cell, row in enumerate(counts.tolist())]
    return "".join(",".join(line) + "\n" for line in lines)


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    for place, part in zip(("public/train.csv", "private/test.csv"), dealt(counts_of(source)), strict=True):
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_text(table(part), encoding="utf-8")
        print(f"{part.shape} cells and genes, {part.sum()} molecules: {target / place}", file=sys.stderr)
