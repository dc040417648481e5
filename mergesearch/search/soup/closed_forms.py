"""Starting points without search: Fisher-weighted averaging and RegMean, one coefficient for each model and cell.

Both papers give every parameter (Fisher) or every input dimension of a layer (RegMean) a weight of its own. Here they
are reduced to one coefficient for each model and cell, so that the result is an ordinary recipe: of the paper's optimum
what is left is the best one along the task vectors. That is a restriction, and with large cells a strong one: with one
cell for everything and normalised Fishers, Fisher weighting is the plain average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergesearch.checkpoints import parameters
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import Job, plan
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.losses import Losses
from mergesearch.search.soup.coefficients import Coefficients, gradients_apart
from mergesearch.search.soup.learning import Documents, size

Spent = Callable[[int], None]

# what Gram matrices may take at a time; with more layers the documents are passed through again
MOST_BYTES = 2 << 30


class Averaging(Protocol):
    """What `fisher` and `regmean` have in common: the weights, float64 [C, K], that documents of each model give."""

    def __call__(
        self,
        coefficients: Coefficients,
        engine: Engine,
        losses: Losses,
        documents: Mapping[str, Documents],
        *,
        spent: Spent = ...,
    ) -> np.ndarray: ...


def own_documents(documents: Documents, scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, list[int]]]:
    """For each model the documents of the tasks that it is the best single model on; all documents where it is of none.

    Args:
        scores: of each model on each task, the more the better.
    """
    scored = [model for model in scores if set(documents) <= set(scores[model])]
    best = {label: max(scored, key=lambda model: scores[model][label]) for label in documents} if scored else {}
    own_of = {}
    for model in scores:
        own = {label: list(ids) for label, ids in documents.items() if best.get(label) == model}
        own_of[model] = own or {label: list(ids) for label, ids in documents.items()}
    return own_of


def fisher(
    coefficients: Coefficients,
    engine: Engine,
    losses: Losses,
    documents: Mapping[str, Documents],
    *,
    normalize: bool = True,
    spent: Spent = lambda count: None,
) -> np.ndarray:
    """Fisher-weighted averaging: each model's weight in a cell is its share of the models' diagonal Fisher there.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", 2022, arXiv:2111.09832, equation 2, summed over
    the cell. The Fisher is the empirical one: squared gradients, document by document, of the loss of the right answer
    and not of answers drawn from the model.

    Args:
        documents: for each model those that it is good at, see `own_documents`.
        normalize: divide each model's Fisher by its sum over all cells, as losses of different tasks have no common
            measure.
        spent: told the cost in document evaluations, 3 for each document.

    Returns:
        float64, [cells, models], positive, each cell's sum 1: for linear, and for task_arithmetic the same average.

    Raises:
        UserError: a model without documents.
        CandidateError: gradients that are no finite numbers.
    """
    fishers = np.zeros(coefficients.shape)
    for number, (model, own) in enumerate(each_model(coefficients, documents, losses)):
        fishers[:, number] = _fisher_of(coefficients, engine, losses, number, own)
        spent(3 * size(own))
        if not np.isfinite(fishers[:, number]).all():
            raise CandidateError(f"the Fisher information of {model} is no finite number")
    if normalize:
        fishers = fishers / np.maximum(fishers.sum(0, keepdims=True), np.finfo(np.float64).tiny)
    total = fishers.sum(1, keepdims=True)
    shares = np.divide(fishers, total, out=np.full_like(fishers, 1 / fishers.shape[1]), where=total > 0)
    return coefficients.limit(shares)


def _fisher_of(
    coefficients: Coefficients, engine: Engine, losses: Losses, number: int, documents: Documents
) -> np.ndarray:
    """[cells] sums of squared gradients of one model, the mean over documents."""
    jobs = load_model_alone(coefficients, engine, number)
    sums = torch.zeros(coefficients.shape[0], dtype=torch.float64, device=engine.pool.device)

    def add(job: Job, squares: Tensor) -> None:
        total = squares.sum(dtype=torch.float64)
        sums[coefficients.cell_of[job.info.name]] += total.to(sums.device)

    squared_gradients(
        engine.model, losses, documents, [job for job in jobs if job.info.name in coefficients.cell_of], add
    )
    return sums.cpu().numpy() / max(1, size(documents))


def squared_gradients(
    model: nn.Module,
    losses: Losses,
    documents: Documents,
    jobs: Sequence[Job],
    take: Callable[[Job, Tensor], None],
) -> None:
    """Gives the squares of each document's gradients of the right answer's loss, as `_squares_of` does."""
    whole, losses.batch_size = losses.batch_size, 1  # the square of a sum is no sum of squares
    try:
        with _squares_of(model, jobs, take), torch.enable_grad():
            losses.walk(documents, lambda label, ids, loss: loss.sum().backward())
    finally:
        losses.batch_size = whole


@contextmanager
def _squares_of(model: nn.Module, jobs: Sequence[Job], take: Callable[[Job, Tensor], None]) -> Iterator[None]:
    """Gives each backward pass's squared gradients, float32 and tensor by tensor, and frees the gradients at once."""
    live = parameters(model)
    pieces: dict[str, list[Job]] = {}
    for job in jobs:
        pieces.setdefault(job.piece.live, []).append(job)

    def hook(name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def squared(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                for job in pieces[name]:
                    take(job, job.piece.view({name: gradient.contiguous()}).float().square())

        return squared

    trained = [name for name in pieces if isinstance(live[name], nn.Parameter)]
    with gradients_apart(model):
        handles = [live[name].requires_grad_().register_post_accumulate_grad_hook(hook(name)) for name in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def regmean(
    coefficients: Coefficients,
    engine: Engine,
    losses: Losses,
    documents: Mapping[str, Documents],
    *,
    alpha: float = 0.9,
    most_bytes: int = MOST_BYTES,
    spent: Spent = lambda count: None,
) -> np.ndarray:
    """RegMean: the c of a cell that minimise sum_k sum_W || X_k (W(c) - W_k) ||_F^2 over its linear layers W.

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", 2023, arXiv:2212.09849, section 3,
    with W(c) = base + sum_j c_j (W_j - base) in the place of any matrix: a system of K equations for each cell. For
    linear the c of a cell sum to 1. X_k are the layer's inputs in model k, [tokens, inputs], on prompts with their
    right answers; each model's Gram matrix counts per token, off its diagonal times `alpha`, as in the paper.

    Cells without linear layers, such as norms and embeddings, get the plain average, as in the paper. Fused weights
    that are no linear layer (experts of a mixture) do not count.

    Args:
        documents: for each model those that it is good at, see `own_documents`.
        most_bytes: of Gram matrices at a time; the documents are passed through as often as that takes.
        spent: told the cost in document evaluations, 1 for each document and pass.

    Returns:
        float64, [cells, models], any sign.

    Raises:
        UserError: a model without documents.
        CandidateError: activations that are no finite numbers.
    """
    cells, count = coefficients.shape
    left, right = np.zeros((cells, count, count)), np.zeros((cells, count))
    for number, (model, own) in enumerate(each_model(coefficients, documents, losses)):
        jobs = {job.piece.live: job for job in load_model_alone(coefficients, engine, number) if job.piece.whole}
        layers = {n: m for n, m in linear_layers(engine.model).items() if n in jobs}
        for some in portions(layers, most_bytes):
            grams = grams_of(engine.model, losses, own, {name: layers[name] for name in some})
            spent(size(own))
            for name, gram in grams.items():
                cell = coefficients.cell_of[jobs[name].info.name]
                products = _products(jobs[name], engine, coefficients.models, gram, alpha, layers[name])
                left[cell] += products
                right[cell] += products[:, number]
        if not np.isfinite(left).all():
            raise CandidateError(f"the activations of {model} are no finite numbers")
    rows = [_solve(a, b, coefficients.method == "linear") for a, b in zip(left, right, strict=True)]
    return coefficients.limit(np.stack(rows))


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers by the live name of their weights, those of the head apart: it may be the embedding."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, kinds) and m is not head}


def _inputs(layer: Any) -> int:
    return layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1]


def portions(layers: Mapping[str, nn.Module], most: int) -> Iterator[list[str]]:
    """Names of layers whose Gram matrices fit together, in order; one alone may be larger."""
    some: list[str] = []
    taken = 0
    for name, layer in layers.items():
        need = 4 * _inputs(layer) ** 2
        if some and taken + need > most:
            yield some
            some, taken = [], 0
        some.append(name)
        taken += need
    if some:
        yield some


def grams_of(model: Any, losses: Losses, documents: Documents, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """X^T X of each layer's inputs per token, float32, [inputs, inputs]; layers that are given the same inputs have one
    tensor."""
    with InputGrams(layers) as grams, torch.no_grad():
        for ids, mask in losses.gold_sequences(documents):
            grams.mask = mask
            model(input_ids=ids, attention_mask=mask)
    return grams.per_token()


class InputGrams:
    """Adds up X^T X of layers' inputs while the model runs, those of padding left out; a context manager.

    Attributes:
        mask: the attention mask of the batch that runs, [documents, longest]; to be set before each.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self._layers = layers
        homes = {name: next(m.parameters()).device for name, m in layers.items()}  # a model may be split
        self._grams = {name: torch.zeros(_inputs(m), _inputs(m), device=homes[name]) for name, m in layers.items()}
        # whose inputs a layer has: those of the layer that ran before it, where they are the same tensor
        self._owner: dict[str, str] = {}
        self._before: tuple[str, Any] = ("", None)
        self._handles: list[Any] = []
        self._tokens = 0

    @property
    def mask(self) -> Tensor:
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self._mask = mask
        self._tokens += int(mask.sum())

    def __enter__(self) -> InputGrams:
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._before = ("", None)

    def per_token(self) -> dict[str, Tensor]:
        """What was added up, divided by the number of tokens."""
        owners = {name: self._grams[name] / max(1, self._tokens) for name in self._grams if name not in self._owner}
        return {name: owners[self._owner.get(name, name)] for name in self._grams}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            first, seen = self._before
            if seen is args[0] and self._owner.setdefault(name, first) == first:
                return
            if name in self._owner:
                raise CandidateError(f"{name} shares its inputs with other layers in some passes and not in all")
            self._before = (name, args[0])
            inputs, mask = args[0].float(), self._mask
            whole = inputs.shape[:2] == mask.shape
            rows = inputs[mask.bool().to(inputs.device)] if whole else inputs.reshape(-1, inputs.shape[-1])
            self._grams[name].addmm_(rows.T, rows)

        return take


@torch.no_grad()
def _products(
    job: Job, engine: Engine, models: Sequence[str], gram: Tensor, alpha: float, layer: nn.Module
) -> np.ndarray:
    """[K, K]  tr(T_i G T_j^T)  of the task vectors T, [outputs, inputs], of one layer."""
    shrunk = alpha * gram
    shrunk.diagonal().copy_(gram.diagonal())
    pool = engine.pool
    base = pool.base.tensors[job.info.name].to(gram.device, torch.float32)
    vectors = [pool.models[model].tensors[job.info.name].to(gram.device, torch.float32) - base for model in models]
    if isinstance(layer, Conv1D):
        vectors = [vector.T for vector in vectors]
    products = np.zeros((len(models), len(models)))
    for i, one in enumerate(vectors):
        through = one @ shrunk
        for j in range(i, len(vectors)):
            products[i, j] = products[j, i] = float((through * vectors[j]).sum(dtype=torch.float64))
    return products


def _solve(left: np.ndarray, right: np.ndarray, sums_to_one: bool) -> np.ndarray:
    """The c with left c = right, the one nearest to the plain average where several are; with sum 1 if asked."""
    count = len(right)
    average = np.full(count, 1 / count)
    if not left.any():
        return average
    if not sums_to_one:
        return average + np.linalg.lstsq(left, right - left @ average, rcond=1e-7)[0]
    # directions that leave the sum as it is
    free = np.linalg.svd(np.ones((1, count)))[2][1:].T
    moved = np.linalg.lstsq(free.T @ left @ free, free.T @ (right - left @ average), rcond=1e-7)[0]
    return average + free @ moved


def load_model_alone(coefficients: Coefficients, engine: Engine, number: int) -> list[Job]:
    """Makes the live model one of the models; the plan of its tensors."""
    alone = np.zeros((1, len(coefficients.models)))
    alone[0, number] = 1.0
    recipe = Coefficients(coefficients.template, engine.pool.infos, method="linear").recipe(alone)
    engine.load(recipe)
    return plan(recipe, engine.pool)


def each_model(
    coefficients: Coefficients, documents: Mapping[str, Documents], losses: Losses
) -> Iterator[tuple[str, dict[str, list[int]]]]:
    for model in coefficients.models:
        own = losses.known(documents.get(model, {}))
        if not size(own):
            raise UserError(f"model {model!r} has no documents with a known right answer: give it some of any task")
        yield model, own
