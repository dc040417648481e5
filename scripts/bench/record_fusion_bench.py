"""Record what fusion-bench 0.2.33 gives for the methods that mergekit lacks, as tests/data/fusion_bench.npz.

    python -m venv fb && fb/bin/pip install fusion-bench==0.2.33
    fb/bin/python scripts/bench/record_fusion_bench.py tests/data/fusion_bench.npz

It runs in an environment of its own, where mergesearch is not installed, and calls the package, in float64. Each case
holds its inputs, `NAME/d` (models, out, in), and for each method its merged task vector.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

# name -> models, out, in, scale of the task vectors
CASES = {"wide": (3, 12, 20, 0.1), "tall": (4, 24, 10, 0.1), "square": (2, 16, 16, 0.1), "small": (3, 9, 14, 1e-3)}


def merged(d: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each method's merged task vector of the models' task vectors, (models, out, in)."""
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.knots import knots_utils
    from fusion_bench.method.singular_value_calibration import utils as svc
    from fusion_bench.method.tall_mask import utils as tall
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    from fusion_bench.method.ties_merging import ties_merging_utils as ties
    from fusion_bench.method.wudi import wudi

    vectors = [{"w": one.clone()} for one in d]
    zero = torch.zeros_like(d[0])
    found = {"tsv": TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, accelerator=torch.device("cpu"))["w"]}
    found["iso"] = iso_utils.iso_c([{"w": one.clone()} for one in d], accelerator="cpu")["w"]
    for share in (0.8, 0.5):
        found[f"iso_cts {share}"] = iso_utils.iso_cts(vectors, share, accelerator="cpu")["w"]
    for alpha in (0.1, 1.0):
        found[f"svc {alpha}"] = svc.subspace_consistency_spectral_calibration_accelerated(
            zero, list(d), d.sum(0), alpha, torch.device("cpu")
        )
    u, s, parts = knots_utils.subspace_alignment(list(d))
    turned = torch.stack([(s[:, None] * v).flatten() for v in parts])
    for percent in (80, 50):
        found[f"knots {percent}"] = u @ ties.ties_merging(turned, percent, "mean").reshape(len(s), -1)
    for scale in (0.2, 0.4, 0.6):
        masks = [tall.generate_task_masks(d, one, zero, d.sum(0), scale) for one in d]
        for votes in (1, 2):
            kept = torch.stack(masks).sum(0) >= votes
            found[f"consensus {scale} {votes}"] = d.sum(0) * kept
    found["wudi"] = wudi.wudi_merging([{"w": one.clone()} for one in d], accelerator="cpu", iter_num=400)["w"].detach()
    return found


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    torch.set_default_dtype(torch.float64)
    kept: dict[str, Any] = {"version": np.array(importlib.metadata.version("fusion-bench"))}
    for seed, (name, (count, out, inner, scale)) in enumerate(CASES.items()):
        d = scale * torch.randn(count, out, inner, generator=torch.Generator().manual_seed(seed))
        kept[f"{name}/d"] = d.numpy()
        with contextlib.redirect_stdout(io.StringIO()):
            kept |= {f"{name}/{method}": value.numpy() for method, value in merged(d).items()}
    np.savez_compressed(file, **kept)


if __name__ == "__main__":
    main()
