"""The learned soup: mixing coefficients by gradient on the search documents.

Wortsman et al., "Model soups", 2022, arXiv:2203.05482, section 2, learn them for the whole model and for each layer by
the cross-entropy on held-out documents. Here each step makes the candidate with the engine, so that what is learned is
an ordinary recipe, and what was judged best is, bit for bit, what is exported.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mergesearch.engine.live import Engine
from mergesearch.engine.plan import plan
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.losses import Losses
from mergesearch.search.soup.cmaes import search
from mergesearch.search.soup.coefficients import Coefficients, InnerProducts
from mergesearch.search.soup.early_stopping import EarlyStopping
from mergesearch.search.soup.learning import (
    SAVE_EVERY,
    Documents,
    LearningStep,
    Look,
    Score,
    SoupResult,
    StateFile,
    Stepped,
    fingerprint,
    hold_apart,
    minibatch,
    size,
)
from mergesearch.search.soup.settings import MEASURED, SoupSettings

log: logging.Logger = logging.getLogger(__name__)

# a task's losses are divided by its loss at the start, but by no less than this: what is learned already stays small
_LEAST_SCALE = 0.1
# the last step's learning rate, as a share of the first's
_LAST_RATE = 0.1
# why learning ended where it may go on
STOPPED = "stopped from outside"
# of the state on disk
_FORMAT = 3


def learn(
    coefficients: Coefficients,
    start: np.ndarray,
    engine: Engine,
    losses: Losses | None,
    settings: SoupSettings,
    *,
    seed: int,
    documents: Documents,
    validation: Documents,
    weights: Mapping[str, float] | None = None,
    scales: Mapping[str, float] | None = None,
    score: Score | None = None,
    state: Path | None = None,
    again: bool = False,
    spent: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = log.info,
    stepped: Stepped = lambda step: None,
) -> SoupResult:
    """The latest weights that Adam passes through which do not do worse on the validation documents than the best that
    it passed through, the start included, see `EarlyStopping`.

    A step draws `settings.documents` documents of every task, and lowers sum_t v_t mean(loss_t) / scale_t / sum_t v_t
    with v the tasks' weights. scale_t says how much of a task's loss counts as much as how much of another's: `scales`,
    or else the start's mean loss on the validation documents (0.1 at least). The same figure on all validation
    documents decides what is kept.

    With `optimizer: cmaes` the same weights are searched by `score` on all documents, see `cmaes.search`.

    Args:
        coefficients: what is learned.
        start: the first weights, [cells, models]; moved into the coefficients' range.
        engine: its live model becomes the candidate of every step; the last one's afterwards.
        losses: of all the documents; None where `score` is all that is needed.
        seed: draws documents and candidates.
        documents, validation: to learn on and to choose by, for each task; see `hold_apart`. Documents whose right
            answer is unknown are left out. With nothing to choose by, all steps are taken.
        weights: of the tasks in the objective; equal ones by default.
        scales: what each task's loss is divided by, see `parent_scales`.
        score: of the live model on some documents, the more the better.
        state: a file for where it stands. A call with the same arguments goes on from it, and ends as it would have.
        again: whether the start was learned on the same documents: it is kept unless others are better beyond noise.
        spent: told how many document evaluations each step cost; on going on, first those of the earlier calls.
        stop: asked before every step; true ends it with what is kept so far, and a later call may go on.
        say: told in a few words what is unusual.
        stepped: told after every step how far it is.

    Raises:
        UserError: the start does not fit, no documents, a state of other settings.
        CandidateError: the start itself has no finite loss, or out of memory with one document at a time.
    """
    start = coefficients.limit(coefficients.full(0.0) + start)
    if settings.optimizer == "cmaes":
        if score is None:
            raise UserError("optimizer cmaes needs a score to search by: give one, or use adam")
        everything = {label: sorted([*documents[label], *validation.get(label, ())]) for label in documents}
        return search(coefficients, start, engine, score, settings, seed, everything, state, spent, stop, say, stepped)
    if not coefficients.free.any():
        raise UserError("every weight of the learned soup is frozen: free some of them")
    if losses is None:
        raise UserError("optimizer adam needs losses to learn by: give them, or use cmaes")
    stopping = EarlyStopping(settings.patience, again=again)
    run = _Run(coefficients, engine, losses, settings, seed, shares_of(weights, documents), spent, stopping)
    run.documents = _all_known(losses, documents)
    run.validation = _all_known(losses, validation) if validation else {}
    run.scales = dict(scales or {})
    # without the scales, which another device measures a little differently: the state has those it began with
    identity = fingerprint(coefficients, start, settings, seed, run.documents, run.validation, run.shares, _FORMAT)
    file = StateFile(state, identity)
    try:
        return run.learn(start, file, stop, say, stepped)
    finally:
        engine.model.eval()


def parent_scales(
    coefficients: Coefficients,
    engine: Engine,
    losses: Losses,
    documents: Documents,
    spent: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """For each task how much lower the best single model's loss is than the base's: the unit that `scale: parents` has
    in the objective, for losses. A gain within noise counts as two of its standard errors, so that its task does not
    drown the others; a task on which no model is better keeps the base's loss.

    It costs a forward pass of the documents for the base and each model: a part of the search documents will do.
    """
    documents = _all_known(losses, documents)
    count = len(coefficients.models)
    rows = [np.zeros(count), *np.eye(count)]
    losses_of = []
    whole = Coefficients(coefficients.template, engine.pool.infos)
    for row in rows:
        engine.load(whole.recipe(row[None]))
        with torch.no_grad():
            losses_of.append({label: loss.double().cpu() for label, loss in losses.loss(documents).items()})
        spent(size(documents))
    base, *models = losses_of
    scales = {}
    for label in documents:
        gains = max((base[label] - model[label] for model in models), key=lambda gains: float(gains.mean()))
        gain, noise = float(gains.mean()), float(gains.std(correction=0)) / math.sqrt(len(gains))
        scales[label] = max(gain, 2 * noise) if gain > 0 else max(float(base[label].mean()), _LEAST_SCALE)
    return scales


def step_seconds(
    coefficients: Coefficients,
    start: np.ndarray,
    engine: Engine,
    losses: Losses,
    settings: SoupSettings,
    documents: Documents,
) -> float:
    """The seconds that a document evaluation takes in learning, on one step after a smaller one that is no measure.

    Nothing is learned; the live model is the start's candidate afterwards.
    """
    start = coefficients.limit(coefficients.full(0.0) + start)
    seconds, taken = 0.0, 0
    try:
        for few in (1, settings.documents):
            run = _Run(
                coefficients,
                engine,
                losses,
                settings.model_copy(update={"documents": few}),
                0,
                shares_of(None, documents),
                lambda count: None,
                EarlyStopping(settings.patience),
                documents=documents,
                raw=coefficients.raw(start),
                scales=dict.fromkeys(documents, 1.0),
            )
            begun = time.perf_counter()
            run._gradient()
            seconds, taken = time.perf_counter() - begun, run.cost
    finally:
        engine.model.eval()
    return seconds / max(1, taken)


def shares_of(weights: Mapping[str, float] | None, documents: Documents) -> dict[str, float]:
    """The tasks' weights, equal ones by default, as shares of their sum."""
    chosen = {label: (weights or {}).get(label, 1.0) for label in documents}
    return {label: weight / sum(chosen.values()) for label, weight in chosen.items()}


def _all_known(losses: Losses, documents: Documents) -> dict[str, list[int]]:
    known = losses.known(documents)
    none = next((label for label, ids in known.items() if not ids), None)
    if none is not None or not known:
        raise UserError(
            f"task {none!r}: no document with a known right answer to learn by or to choose by: raise limit"
        )
    return known


@dataclass
class _Run:
    """One learning under way; what `data` returns is all that it needs to go on."""

    coefficients: Coefficients
    engine: Engine
    losses: Losses
    settings: SoupSettings
    seed: int
    shares: dict[str, float]
    spent: Callable[[int], None]
    stopping: EarlyStopping
    documents: Documents = field(default_factory=dict)
    validation: Documents = field(default_factory=dict)
    raw: Tensor = field(default_factory=lambda: torch.zeros(0))
    moments: tuple[Tensor, Tensor] | None = None
    step: int = 0
    cost: int = 0
    scales: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    passed: Tensor = field(default_factory=lambda: torch.zeros(0))  # the sum of the weights since the last look
    note: str = ""

    # --- the course of it --------------------------------------------------------------------------------------

    def learn(
        self, start: np.ndarray, file: StateFile, stop: Callable[[], bool], say: Callable[[str], None], stepped: Stepped
    ) -> SoupResult:
        self._begin(start, file, say)
        stepped(self._so_far())
        optimizer = self._optimizer()
        with _checkpointing(self.engine.model, self.settings.checkpointing):
            while not self.note:
                if stop():
                    file.save(self._data(optimizer))
                    return self._learned(STOPPED)
                self._go(optimizer, say)
                stepped(self._so_far())
                if self.note or self.step % SAVE_EVERY == 0:
                    file.save(self._data(optimizer))
        return self._learned(self.note)

    def _so_far(self) -> LearningStep:
        return LearningStep(self.step, self.settings.steps, self.history[-1]["validation"] if self.history else None)

    def _begin(self, start: np.ndarray, file: StateFile, say: Callable[[str], None]) -> None:
        saved = file.load()
        if saved is not None:
            self._restore(saved)
            self.spent(self.cost)
            say(f"going on at step {self.step} of {self.settings.steps}")
            return
        self.raw = self.coefficients.raw(start)
        self.engine.load(self.coefficients.recipe(start))
        most = self.settings.validation_documents
        looked = self.validation or hold_apart(self.documents, MEASURED, self.seed, most)[1]
        losses = self._losses_of(looked)
        if not _finite(losses):
            raise CandidateError(
                f"the start of the learned soup has losses that are no finite numbers: {_means(losses)}"
            )
        self.scales = {label: self.scales.get(label, max(loss, _LEAST_SCALE)) for label, loss in _means(losses).items()}
        self._weigh()
        self._note_look(losses if self.validation else {}, start)
        file.save(self._data(self._optimizer()))

    def _go(self, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> None:
        """One step, and a look where one is due; `note` says that it was the last."""
        try:
            gradient = self._gradient()
            self._move(optimizer, gradient)
            self.step += 1
            self.passed = self.passed + self.raw
            last = self.step >= self.settings.steps
            if self.step % self.settings.look_every == 0 or last:
                self._look()
        except _NotFinite as error:
            self.note = f"ended at step {self.step}: {error}; what was kept so far stands"
            say(self.note)
            return
        if self.stopping.over:
            self.note = f"worse at {self.stopping.worse} looks in a row, at step {self.step}"
        elif last:
            self.note = f"all {self.step} steps"

    def _gradient(self) -> Tensor:
        """d(loss)/d(raw) on the step's documents, at the raw numbers as they are."""
        values = self.coefficients.values(self.raw)
        recipe = self.coefficients.recipe(values)
        self._load(recipe)
        drawn = minibatch(self.documents, self.step, self.settings.documents, self.seed)
        cells, shape = self.coefficients.cell_of, self.coefficients.shape
        turned: np.ndarray = np.any(self.coefficients.free, axis=1)
        jobs = [
            job
            for job in plan(recipe, self.engine.pool)
            if (cell := cells.get(job.info.name)) is not None and turned[cell]
        ]
        factors = {label: self.shares[label] / self.scales[label] / len(ids) for label, ids in drawn.items()}
        with InnerProducts(cells, shape, jobs, self.engine.model, self.engine.pool) as products, torch.enable_grad():

            def take(pairs: Sequence[tuple[str, int]], losses: Tensor) -> None:
                bad = [
                    label for (label, _), fine in zip(pairs, torch.isfinite(losses).tolist(), strict=True) if not fine
                ]
                if bad:
                    raise _NotFinite(f"the loss of task {bad[0]!r} is no finite number")
                (losses * losses.new_tensor([factors[label] for label, _ in pairs])).sum().backward()
                products.commit()

            self.losses.walk_together(drawn, take, products.undo)
            taken = products.take()
        self._pay(3 * size(drawn))
        if not np.isfinite(taken).all():
            raise _NotFinite("the gradient is no finite number")
        return self.coefficients.pull_back(taken, self.raw)

    def _move(self, optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
        rate = self.settings.learning_rate * _decay(self.step, self.settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.raw.grad = gradient
        optimizer.step()
        self.raw.grad = None
        self.raw.copy_(
            self.coefficients.within(self.coefficients.decayed(self.raw, min(1.0, rate * self.settings.decay)))
        )

    def _look(self) -> None:
        since = self.step - (self.looks[-1].step if self.looks else 0)
        # a mean of equal numbers need not be that number: frozen weights stay what they are
        values = self.coefficients.limit(
            self.coefficients.values(self.passed / since if self.settings.average else self.raw)
        )
        self._load(self.coefficients.recipe(values))
        losses = self._losses_of(self.validation)
        if not _finite(losses):
            raise _NotFinite("a validation loss is no finite number")
        self._note_look(losses, values)

    def _load(self, recipe: Any) -> None:
        try:
            self.engine.load(recipe)
        except CandidateError as error:
            raise _NotFinite(str(error)) from error

    def _note_look(self, losses: Mapping[str, np.ndarray], values: np.ndarray) -> None:
        loss = self.stopping.loss(losses) if losses else None
        kept = self.stopping.look(losses, values)
        look = {"step": self.step, "documents": self.cost, "validation": loss, "losses": _means(losses), "kept": kept}
        self.history.append(look)
        self.looks.append(Look(self.step, values, losses))
        self.passed = torch.zeros_like(self.raw)

    @torch.no_grad()
    def _losses_of(self, documents: Documents) -> dict[str, np.ndarray]:
        """The live model's loss on each of some documents."""
        losses_of = self.losses.loss(documents)
        self._pay(size(documents))
        return {label: each.double().cpu().numpy() for label, each in losses_of.items()}

    def _weigh(self) -> None:
        shares = self.shares if self.validation else {}
        self.stopping.factors = {label: share / self.scales[label] for label, share in shares.items()}

    def _pay(self, count: int) -> None:
        self.cost += count
        self.spent(count)

    # --- what it needs to go on --------------------------------------------------------------------------------

    def _optimizer(self) -> torch.optim.Adam:
        optimizer = torch.optim.Adam([self.raw], lr=self.settings.learning_rate)
        if self.moments is not None:
            first, second = self.moments
            taken = torch.tensor(float(self.step))
            optimizer.state[self.raw] = {"step": taken, "exp_avg": first, "exp_avg_sq": second}
        return optimizer

    def _data(self, optimizer: torch.optim.Adam) -> dict[str, Any]:
        kept = optimizer.state.get(self.raw)
        return {
            "raw": self.raw.tolist(),
            "moments": [kept[key].tolist() for key in ("exp_avg", "exp_avg_sq")] if kept else None,
            "stopping": self.stopping.data(),
            "looks": [look.data() for look in self.looks],
            "passed": self.passed.tolist(),
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def _restore(self, data: Mapping[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, data[name])
        self.raw = torch.tensor(data["raw"], dtype=torch.float64)
        self.passed = torch.tensor(data["passed"], dtype=torch.float64)
        self.looks = [Look.of_data(look) for look in data["looks"]]
        self._weigh()
        self.stopping.restore(data["stopping"])
        if data["moments"]:
            first, second = (torch.tensor(moment, dtype=torch.float64) for moment in data["moments"])
            self.moments = (first, second)

    def _learned(self, note: str) -> SoupResult:
        kept = self.stopping.kept
        assert kept is not None
        recipe = self.coefficients.recipe(kept)
        return SoupResult(kept, recipe, self.history, self.cost, note, self.looks, self.scales)


_PLAIN = ("step", "cost", "scales", "history", "note")


class _NotFinite(Exception):
    """The candidate has no loss or no gradient; it ends with what is kept so far."""


def _means(losses: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {label: float(each.mean()) for label, each in losses.items()}


def _finite(losses: Mapping[str, np.ndarray]) -> bool:
    return all(np.isfinite(each).all() for each in losses.values())


def _decay(step: int, steps: int) -> float:
    return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Activations of each decoder layer are computed again in the backward pass; afterwards as it was.

    As `gradient_checkpointing_enable(use_reentrant=False)` does it, but transformers' layers heed that in training mode
    alone, and dropout inside must stay off.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    if wanted and not layers:
        raise UserError(f"{type(model).__name__} has no activation checkpointing: set checkpointing to false")
    before = [dict(layer.__dict__) for layer in layers]
    for layer in layers:
        layer.__dict__["_gradient_checkpointing_func"] = partial(_without_training, layer)
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            for name in ("_gradient_checkpointing_func", "gradient_checkpointing", "training"):
                layer.__dict__.pop(name, None)
                layer.__dict__.update({name: was[name]} if name in was else {})


def _without_training(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    def run(*given: Any) -> Any:
        layer.training = False
        try:
            return forward(*given)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False)


__all__ = ["SoupResult", "hold_apart", "learn", "parent_scales", "step_seconds"]
