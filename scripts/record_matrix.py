"""Records the per-document scores of a finished run that raced nothing, for simulating races.

python scripts/record_matrix.py results/quickstart tests/data/raced.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mergesearch.evaluate.scores import load_documents
from mergesearch.search.store import RunFolder, read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    _, records, objective = read_records(arguments.run)
    assert objective is not None, "the run has not scored its baselines yet"
    complete = sorted((r for r in records if r.objective is not None), key=lambda r: (r.name is None, r.number))
    documents = [load_documents(RunFolder(arguments.run).documents(record.number)) for record in complete]
    tasks = list(objective.weights)
    values = {task: np.stack([found[task].values for found in documents]) for task in tasks}
    factors = objective.factors(complete[0].scores)
    np.savez_compressed(
        arguments.out,
        tasks=np.array(tasks),
        aggregations=np.array([documents[0][task].aggregation for task in tasks]),
        factors=np.array([factors[task] for task in tasks]),
        baselines=np.array(sum(record.name is not None for record in complete)),
        **{task: _small(found) for task, found in values.items()},
    )


def _small(values: np.ndarray) -> np.ndarray:
    """In as few bytes as hold the values: yes and no as bytes, others as float32."""
    return values.astype(np.uint8) if np.isin(values, (0.0, 1.0)).all() else values.astype(np.float32)


if __name__ == "__main__":
    main()
