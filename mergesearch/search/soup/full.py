"""What RegMean and Fisher averaging go by, measured in full: a matrix for each layer, a number for each parameter.

Beside `closed_forms`, which reduces both papers to one coefficient for each model and tensor. Here what was measured
goes into files that the recipe names, and the methods `regmean` and `fisher` make the checkpoint of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergesearch.checkpoints import parameters
from mergesearch.checkpoints.measured import MeasuredWriter
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import Job, plan
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.losses import Losses
from mergesearch.methods.informed import regmean
from mergesearch.search.soup.closed_forms import (
    MOST_BYTES,
    InputGrams,
    Spent,
    each_model,
    grams_of,
    linear_layers,
    load_model_alone,
    portions,
    squared_gradients,
)
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.learning import Documents, size


class Measuring(Protocol):
    """What the functions below have in common: they write the statistics of each model on its documents."""

    def __call__(
        self,
        writer: MeasuredWriter,
        coefficients: Coefficients,
        engine: Engine,
        losses: Losses,
        documents: Mapping[str, Documents],
        *,
        spent: Spent = ...,
    ) -> None: ...


def measure_fisher(
    writer: MeasuredWriter,
    coefficients: Coefficients,
    engine: Engine,
    losses: Losses,
    documents: Mapping[str, Documents],
    *,
    spent: Spent = lambda count: None,
) -> None:
    """The diagonal of each model's empirical Fisher information, document by document, its mean over all elements 1.

    Matena and Raffel 2022, arXiv:2111.09832, with the gradients of the right answer's loss, and not of answers drawn
    from the model. Losses of different tasks have no common measure, hence the division.

    Args:
        documents: for each model those that it is good at.
        spent: told the cost in document evaluations, 3 for each document.

    Raises:
        UserError: a model without documents.
        CandidateError: gradients that are no finite numbers.
    """
    for number, (model, own) in enumerate(each_model(coefficients, documents, losses)):
        jobs = load_model_alone(coefficients, engine, number)
        sums: dict[str, Tensor] = {}

        def add(job: Job, squares: Tensor, sums: dict[str, Tensor] = sums) -> None:
            held = sums.get(job.info.name)
            # squares are the hook's own, so they may be kept
            sums[job.info.name] = squares.clone() if held is None else held.add_(squares)

        squared_gradients(engine.model, losses, own, jobs, add)
        spent(3 * size(own))
        total = sum(float(s.sum(dtype=torch.float64)) for s in sums.values())
        if not 0 < total < float("inf"):
            raise CandidateError(f"the Fisher information of {model} is no finite number above 0")
        mean = total / sum(s.numel() for s in sums.values())
        for name in sorted(sums):
            writer.add(model, [name], sums.pop(name) / mean)


def measure_inputs(
    writer: MeasuredWriter,
    coefficients: Coefficients,
    engine: Engine,
    losses: Losses,
    documents: Mapping[str, Documents],
    *,
    most_bytes: int = MOST_BYTES,
    spent: Spent = lambda count: None,
) -> None:
    """The Gram matrix of each linear layer's inputs in each model, per token. Jin et al. 2023, arXiv:2212.09849.

    Args:
        documents: for each model those that it is good at; with their right answers.
        most_bytes: of Gram matrices at a time; the documents are passed through as often as that takes.
        spent: told the cost in document evaluations, 1 for each document and pass.

    Raises:
        UserError: a model without documents.
        CandidateError: activations that are no finite numbers.
    """
    for number, (model, own) in enumerate(each_model(coefficients, documents, losses)):
        jobs = _whole(load_model_alone(coefficients, engine, number))
        layers = {n: m for n, m in linear_layers(engine.model).items() if n in jobs}
        for some in portions(layers, most_bytes):
            grams = grams_of(engine.model, losses, own, {name: layers[name] for name in some})
            spent(size(own))
            _write(writer, model, jobs, layers, grams)


@torch.no_grad()
def measure_merged_inputs(
    writer: MeasuredWriter,
    coefficients: Coefficients,
    engine: Engine,
    losses: Losses,
    documents: Mapping[str, Documents],
    *,
    spent: Spent = lambda count: None,
) -> None:
    """As `measure_inputs`, the inputs of each decoder layer being what the merged layers below it make of them.

    Nguyen et al., "RegMean++", 2025, arXiv:2508.03121: layer by layer, each model's own layer is run on what the merged
    model gives it, its linear layers are merged by RegMean (alpha 0.9), and the merged layer gives the next one its
    inputs. What is no linear layer of a decoder layer is averaged. Hidden states of all documents are held, [tokens,
    width] for each.

    Args:
        documents: for each model those that it is good at; with their right answers.
        spent: told the cost in document evaluations, 3 for each document: once through what is averaged, once through
            the models' layers and once through the merged ones.

    Raises:
        UserError: a model without documents, a model whose decoder layers are called in a way that is not known.
        CandidateError: activations that are no finite numbers.
    """
    engine.load(coefficients.template)  # the plain average
    jobs = _whole(plan(coefficients.template, engine.pool))
    linear = {n: m for n, m in linear_layers(engine.model).items() if n in jobs}
    own_of = dict(each_model(coefficients, documents, losses))
    stack = _decoder_layers(engine)
    batches = {model: _captured(engine.model, stack, losses, own) for model, own in own_of.items()}
    spent(sum(map(size, own_of.values())))
    live = parameters(engine.model)
    prefix = engine.pool.form.layout.prefix
    for number, layer in enumerate(stack):
        inside = {n: job for n, job in jobs.items() if n.startswith(f"{prefix}{number}.")}
        mine = {n: m for n, m in linear.items() if n in inside}
        averages = {n: live[n].clone() for n in inside}
        grams_by: dict[str, dict[str, Tensor]] = {}
        for model, of in batches.items():
            for name, job in inside.items():
                live[name].copy_(engine.pool.models[model].tensors[job.info.name])
            with InputGrams(mine) as grams:
                for batch in of:
                    grams.mask = batch.mask
                    batch.run(layer, number)
            grams_by[model] = grams.per_token()
            _write(writer, model, inside, mine, grams_by[model])
        for name, average in averages.items():
            live[name].copy_(_merged(inside[name], mine.get(name), engine, grams_by) if name in mine else average)
        for of in batches.values():
            for batch in of:
                batch.hidden = batch.run(layer, number)
    spent(2 * sum(map(size, own_of.values())))


def _merged(job: Job, layer: nn.Module | None, engine: Engine, grams: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """A layer's weights by RegMean, as the recipe's method will make them."""
    pool = engine.pool
    base = pool.base.tensors[job.info.name].float()
    models = [pool.models[model].tensors[job.info.name].float() for model in grams]
    return regmean(base, models, statistics=[_stated(of[job.piece.live], layer) for of in grams.values()])


def _stated(gram: Tensor, layer: nn.Module | None) -> Tensor:
    """As the method takes it: with a dimension more where the weights are (in, out)."""
    return gram[None] if isinstance(layer, Conv1D) else gram


def _whole(jobs: Sequence[Job]) -> dict[str, Job]:
    return {job.piece.live: job for job in jobs if job.piece.whole}


def _write(
    writer: MeasuredWriter,
    model: str,
    jobs: Mapping[str, Job],
    layers: Mapping[str, nn.Module],
    grams: Mapping[str, Tensor],
) -> None:
    """Each Gram matrix once, for all layers with these inputs."""
    alike: dict[int, list[str]] = {}
    for name, gram in grams.items():
        if not bool(gram.isfinite().all()):
            raise CandidateError(f"the activations of {model} are no finite numbers")
        alike.setdefault(id(gram), []).append(name)
    for names in alike.values():
        writer.add(model, [jobs[name].info.name for name in names], _stated(grams[names[0]], layers[names[0]]))


# --- decoder layers, one after another ------------------------------------------------------------------------------


class _Batch:
    """Some documents on their way through the layers, and what each layer is called with beside them."""

    def __init__(self, mask: Tensor):
        self.mask = mask
        self.hidden: Any = None
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def run(self, layer: nn.Module, number: int) -> Tensor:
        """What the layer makes of the hidden states."""
        args, kwargs = self.calls[number]
        made = layer(self.hidden, *args, **kwargs)
        return made[0] if isinstance(made, tuple) else made


def _decoder_layers(engine: Engine) -> list[nn.Module]:
    place = engine.pool.form.layout.prefix.rstrip(".")
    return list(engine.model.get_submodule(place))  # type: ignore[arg-type]


def _captured(model: Any, stack: Sequence[nn.Module], losses: Losses, documents: Documents) -> list[_Batch]:
    """The batches as they come to the first layer, and how each layer is called."""
    batches: list[_Batch] = []

    def hook(number: int) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise UserError(
                    f"RegMean++ does not know how layer {number} of {type(model).__name__} is called: leave it out"
                )
            if number == 0:
                batches[-1].hidden = args[0]
            batches[-1].calls.append((args[1:], kwargs))

        return take

    handles = [layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in enumerate(stack)]
    try:
        for ids, mask in losses.gold_sequences(documents):
            batches.append(_Batch(mask))
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            if len(batches[-1].calls) != len(stack):
                raise UserError("RegMean++ needs decoder layers that run once each, in order: leave it out")
    finally:
        for handle in handles:
            handle.remove()
    return batches
