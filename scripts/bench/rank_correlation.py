"""How well a figure on the search documents ranks candidates, against their accuracy on the holdout.

    python -m scripts.bench.rank_correlation                        # prints the section that is in results/scoring.md
    python -m scripts.bench.rank_correlation --matrix matrix.npz    # of another recording, see record_matrix.py

Over recorded candidates: the accuracy, the mean probability of the right choice (gold_prob), the mean of its logarithm
(gold_logprob), and the accuracy with gold_prob as a tie-break, each on random choices of so many search documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau, spearmanr

from scripts.bench.shared import tables

MATRIX = Path(__file__).parents[2] / "tests" / "data" / "zoo_matrix.npz"
SIZES = (25, 50, 100, 200)
FIGURES = ("acc", "gold_prob", "gold_logprob", "acc, ties by gold_prob")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", type=Path, default=MATRIX)
    parser.add_argument("--draws", type=int, default=100)
    arguments = parser.parse_args()
    print(section(arguments.matrix, arguments.draws))


def section(path: Path, draws: int = 100) -> str:
    """The part of results/scoring.md on rank correlations."""
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files}
    tasks = [str(task) for task in arrays["tasks"] if f"{task}.gold" in arrays]
    first, random = int(arrays["baselines"]), int(arrays["random"])
    sets = {f"{random} at random": slice(first, first + random)}
    sets[f"{len(arrays[tasks[0]]) - first - random} of TPE"] = slice(first + random, None)
    names = [f"{figure} ({kind})" for figure in FIGURES for kind in ("S", "K")]
    lines = [
        "## Rank correlation with the accuracy on the holdout",
        "",
        f"    python -m scripts.bench.rank_correlation --draws {draws}",
        "",
        f"Candidates of {path.name}; Spearman's rho (S) and Kendall's tau-b (K), means over {draws} random choices of "
        "search documents; the last size is all of them, once.",
        "",
    ]
    rows = []
    for task in tasks:
        for name, which in sets.items():
            parts = (arrays[task][which], arrays[f"{task}.gold"][which], arrays[f"{task}.holdout"][which])
            for documents, values in _rows(*(part.astype(float) for part in parts), draws):
                rows.append([task, name, documents, *(f"{v:.2f}" for v in values)])
    return "\n".join([*lines, *tables.table(("task", "candidates", "documents", *names), rows)])


def _rows(acc: np.ndarray, gold: np.ndarray, holdout: np.ndarray, draws: int) -> Iterator[tuple[int, list[float]]]:
    """(documents, correlations) from [candidates, documents] of each."""
    truth, total = holdout.mean(axis=1), acc.shape[1]
    rng = np.random.default_rng(0)
    for size in (*(size for size in SIZES if size < total), total):
        chosen = [rng.permutation(total)[:size] for _ in range(draws if size < total else 1)]
        found = [_correlations(acc[:, ids], gold[:, ids], truth) for ids in chosen]
        yield size, np.nanmean(found, axis=0).tolist()


def _correlations(acc: np.ndarray, gold: np.ndarray, truth: np.ndarray) -> list[float]:
    right, probability = acc.mean(axis=1), np.exp(gold).mean(axis=1)
    figures = (right, probability, gold.mean(axis=1), right + probability / (2 * acc.shape[1]))
    if any(np.ptp(figure) == 0 for figure in figures):
        return [np.nan] * len(figures) * 2  # all alike: no rank at all
    return [test(figure, truth).statistic for figure in figures for test in (spearmanr, kendalltau)]


if __name__ == "__main__":
    main()
