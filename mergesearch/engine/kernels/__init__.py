"""Fast paths of the merge methods: each equals the plain definition in `mergesearch.methods`.

symbols: a method run once on symbols shows its elementwise part and its statistics. recording: what that shows, kept.
program: the elementwise part as a function over blocks. code: the same as typed operations; native, device: those in
C++ and in Triton. compiled: when they are built; built: what was, on disk; platforms: where. launch, double_buffer:
many tensors in one call. tables, orders, parent_statistics: what is kept of the parents between candidates, and
decompositions, kept_files: of their matrices, on disk too. factored, joint: adapters that are not expanded. runner:
all of it.
"""

from __future__ import annotations

import torch

from mergesearch import memory
from mergesearch.engine.kernels.compiled import WORTH_COMPILING, WORTH_WAITING, Compiler, When
from mergesearch.engine.kernels.decompositions import Decompositions
from mergesearch.engine.kernels.double_buffer import SIZE as BUFFER
from mergesearch.engine.kernels.kept_files import KeptFiles
from mergesearch.engine.kernels.launch import MergeSet, TensorMerge
from mergesearch.engine.kernels.operands import Operands
from mergesearch.engine.kernels.parent_statistics import Statistics
from mergesearch.engine.kernels.recording import MethodCall
from mergesearch.engine.kernels.runner import DEVICE_BLOCK, Runner

__all__ = [
    "WORKING",
    "WORTH_COMPILING",
    "WORTH_WAITING",
    "Compiler",
    "Decompositions",
    "KeptFiles",
    "MergeSet",
    "MethodCall",
    "Operands",
    "Runner",
    "Statistics",
    "TensorMerge",
    "When",
    "runner_for",
]


# on a CUDA device: two buffers for parents that lie elsewhere, and a block's temporaries
WORKING: int = 2 * BUFFER + 8 * 4 * DEVICE_BLOCK


def runner_for(
    parameters: int, parents: int, device: torch.device, compiled: When | None = None, kept: int | None = None
) -> Runner:
    """A runner for candidates of that many parameters made of that many parents (the base counts).

    Small statistics are kept up to a fiftieth of what the parents take in 16 bits (64 MiB at least), those of the
    tensors' own shape up to `kept` bytes, and so what is kept of matrices, on disk besides; None: a quarter of the
    device's free memory.
    """
    usual: When = "now" if parameters >= WORTH_WAITING or device.type == "cuda" else "background"
    when = compiled or (usual if parameters >= WORTH_COMPILING else "never")
    limit = max(64 * 2**20, parameters * parents * 2 // 50)
    most = memory.free(device) // 4 if kept is None else kept
    return Runner(Statistics(limit, most), Compiler(when), decompositions=Decompositions(most, KeptFiles.usual()))
