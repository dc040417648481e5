"""The engine: one live model that takes on candidate after candidate in place."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergesearch import memory
from mergesearch.checkpoints import Form, Pool, floating_tensors, parameters
from mergesearch.checkpoints.lowrank import LowRank
from mergesearch.engine import kernels
from mergesearch.engine.gguf.form import FileForm
from mergesearch.engine.plan import DTYPES, Job, form_of, plan
from mergesearch.engine.served import Served
from mergesearch.errors import CandidateError, CutError, UserError
from mergesearch.recipe import Recipe

# sets of merges that are kept: one for each group of a recipe and for each set of methods that came up lately
_MERGE_SETS = 64


class Engine:
    """One live model that stays loaded and takes on candidate after candidate in place.

    >>> from mergesearch import Engine, Pool, Recipe
    >>> models = {"order": "zoo:order", "letters": "zoo:letters"}
    >>> engine = Engine(Pool.load("zoo:base", models, device="cpu"), "float32")
    >>> data = {"base": "zoo:base", "models": models, "out_dtype": "float32",
    ...         "rules": [{"method": "ties", "parameters": {"density": 0.5}}]}
    >>> seconds = engine.load(Recipe.from_data(data, "my recipe"))
    >>> engine.model.config.num_hidden_layers
    4

    `model` is one object for the engine's lifetime, so that whoever scores it may hold on to it. A recipe with layer
    stacking changes what is inside: its configuration, its depth, its tensors. A stack's tensors that are passed
    through unchanged are the parents' own memory, not copies: do not write to them.

    What one candidate has in common with the one before it is not merged again; statistics of the parents are kept.

    Args:
        pool: the aligned parents.
        dtype: the dtype of the candidates, a recipe's `out_dtype`.
        compiled: when kernels are compiled: "background", "now" (before their first use) or "never"; None: in the
            background where candidates are large enough for it to pay.
        kept: the most bytes of the parents' statistics that some methods keep between candidates; None: a quarter of
            what is free.
        served: the form that candidates are scored in; None: as they are merged.
        filed: the form of the file that an export has beside the merge; None: there is none.
    """

    def __init__(
        self,
        pool: Pool,
        dtype: str,
        compiled: kernels.When | None = None,
        kept: int | None = None,
        served: Served | None = None,
        filed: FileForm | None = None,
    ):
        parents = len(pool.models) + 1
        self.runner: kernels.Runner = kernels.runner_for(pool.parameters, parents, pool.device, compiled, kept)
        self._identities: dict[tuple[str, int], Any] = {}
        self._merges: dict[tuple[str, int], tuple[Any, kernels.TensorMerge]] = {}
        self._merge_sets: OrderedDict[Any, kernels.MergeSet] = OrderedDict()
        self._versions: dict[str, int] = {}
        self.pool = pool
        self.dtype = dtype
        self.served: Served | None = served
        self.filed: FileForm | None = filed
        self.model: nn.Module = pool.new_model(DTYPES[dtype])
        self._form: Form | None = pool.form
        self._stack: Any = None
        self._live = parameters(self.model)
        self._shared: set[str] = set()

    @torch.no_grad()
    def load(self, recipe: Recipe) -> float:
        """Makes the live model the recipe's candidate and returns the seconds it took.

        A tensor that the architecture keeps in another dtype (say a router in float32) is rounded to that dtype.

        Raises:
            UserError: the recipe does not fit the pool.
            CandidateError: the merge came out with NaN or infinity; the live model is then half merged, and the next
                call overwrites it.
            CutError: a parent's file was cut short since the pool was loaded.
        """
        self.pool.mapped.check()
        if recipe.out_dtype != self.dtype:
            raise UserError(f"recipe {recipe.id} has out_dtype {recipe.out_dtype}, the live model is {self.dtype}")
        started = time.perf_counter()
        held = self._form if recipe.stack == self._stack else None
        form = held or form_of(recipe, self.pool)
        jobs = plan(recipe, self.pool, form)
        # what is served in another form is no parent's memory
        sources = _sources(jobs, self.pool) if recipe.stack is not None and self.served is None else {}
        if held is None:
            self._rebuild(form, jobs, sources, recipe.stack)
        self._share(sources)
        self._write([job for job in jobs if job.piece.live not in self._shared], recipe.seed)
        return time.perf_counter() - started

    def rebuild(self, recipe: Recipe) -> float:
        """Likewise, of a recipe that was a candidate before: nobody is there to note what it fails of now.

        Raises:
            UserError, CandidateError, CutError: as above; CandidateError also for whatever else goes wrong.
        """
        try:
            return self.load(recipe)
        except (UserError, CandidateError, CutError, OSError):
            raise
        except Exception as error:
            if memory.ran_out(error):
                raise
            raise CandidateError(f"recipe {recipe.id} cannot be merged once more ({error})") from error

    @contextlib.contextmanager
    def as_merged(self) -> Iterator[None]:
        """Within it candidates are as they are merged, and not in the form that they are served in."""
        served, self.served = self.served, None
        self._forget(served)
        try:
            yield
        finally:
            self.served = served
            self._forget(served)

    def _forget(self, served: Served | None) -> None:
        """Every tensor is made anew, where there are two forms of it."""
        if served is not None:
            self._identities = {}

    def identity(self, recipe: Recipe) -> str:
        """Equal for recipes that do the same to every tensor, however their rules are cut."""
        jobs = plan(recipe, self.pool, form_of(recipe, self.pool))
        random = any(job.step.method.random for job in jobs)
        told = [(job.info.name, job.step.identity, job.base, job.parents) for job in jobs]
        return hashlib.sha256(repr((told, recipe.seed if random else None)).encode()).hexdigest()[:16]

    def _write(self, jobs: Sequence[Job], seed: int) -> None:
        """Merges the tensors that are not yet what they should be, those of one step together."""
        identities: dict[tuple[str, int], Any] = {}
        steps: dict[str, list[tuple[Job, kernels.TensorMerge]]] = {}
        touched = {name for name, tensor in self._live.items() if tensor._version != self._versions.get(name)}
        for job in jobs:
            merge, place = self._merge(job, seed), (job.piece.live, job.piece.offset)
            identities[place] = (job.step.identity, merge.operands.names, merge.operands.masks)
            if job.piece.live in touched or self._identities.get(place) != identities[place]:
                steps.setdefault(job.step.identity, []).append((job, merge))
        self._identities = {}  # nothing is certain, should this fail
        for step in steps.values():
            how = step[0][0].step
            self.runner.run(
                kernels.MethodCall(how.method, how.parameters), self._merge_set([merge for _, merge in step])
            )
        if self.served is not None:
            written = {job.piece.live for step in steps.values() for job, _ in step}
            for name in written & self.served.layers(self.model).keys():
                self._live[name].copy_(self.served.taken_back(self._live[name]))
        self._identities = identities
        self._versions = {name: tensor._version for name, tensor in self._live.items()}

    def _merge(self, job: Job, seed: int) -> kernels.TensorMerge:
        """What makes a tensor: the same object as for the candidate before, where it is made of the same."""
        place = (job.piece.live, job.piece.offset)
        operands = job.operands(self.pool, seed)
        named = (operands.names, operands.masks, job.step.statistics)
        held = self._merges.get(place)
        if held is None or held[0] != named:
            held = self._merges[place] = (
                named,
                kernels.TensorMerge(operands, job.piece.view(self._live), job.info.name),
            )
        return held[1]

    def _merge_set(self, merges: list[kernels.TensorMerge]) -> kernels.MergeSet:
        """The set of these merges, kept for the next candidate that has the same."""
        key = tuple(map(id, merges))
        if key not in self._merge_sets:
            self._merge_sets[key] = kernels.MergeSet(merges)
        self._merge_sets.move_to_end(key)
        while len(self._merge_sets) > _MERGE_SETS:
            self._merge_sets.popitem(last=False)
        return self._merge_sets[key]

    def _rebuild(self, form: Form, jobs: Sequence[Job], sources: Mapping[str, Tensor], stack: Any) -> None:
        """Puts a model of another form into the live model's place, as yet without the candidate's weights."""
        self._form = None  # nothing to go on from, should this fail
        for tensor in self._live.values():
            tensor.data = tensor.data.new_empty(0)
        self._live, self._shared, self._identities = {}, set(), {}
        self._merges.clear()
        self._merge_sets.clear()
        dtype = DTYPES[self.dtype]
        devices = self.pool.devices.stacked(form.layout.prefix, form.origins or range(form.layout.layers))
        tensors = {
            name: sources[name]
            if name in sources and sources[name].dtype == dtype and devices.holds(name, sources[name])
            else torch.empty(blank.shape, dtype=dtype, device=devices.of(name))
            for name, blank in floating_tensors(form.blueprint.blank()).items()
        }
        built = form.blueprint.build({**tensors, **self.pool.constants_of(form)}, dtype, devices)
        self.model.__dict__.clear()
        self.model.__dict__.update(built.__dict__)
        self._live = parameters(self.model)
        self._form, self._stack = form, stack

    def _share(self, sources: Mapping[str, Tensor]) -> None:
        """Lets the tensors in `sources` be the parents' memory, and gives those that were it memory of their own."""
        if sources or self._shared:
            self._merges.clear()  # views of tensors that get other memory
            self._merge_sets.clear()
        for name, tensor in self._live.items():
            source = sources.get(name)
            if source is not None and (source.dtype, source.device) == (tensor.dtype, tensor.device):
                tensor.data = source
                self._shared.add(name)
                self._versions.pop(name, None)
            elif name in self._shared:
                tensor.data = torch.empty_like(tensor)
                self._shared.discard(name)


def _origin_tensor(job: Job, pool: Pool) -> Tensor | None:
    """The live tensor of the job's first parent that the candidate's live tensor is made of; None where that parent's
    files hold it in parts."""
    return pool.parent(job.step.models[0]).live.get(pool.form.layout.named[job.parents[0]].live)


def _sources(jobs: Iterable[Job], pool: Pool) -> dict[str, Tensor]:
    """The candidate's live tensors that are one parent's live tensor passed through unchanged, with that tensor."""
    origins: dict[str, list[Tensor | None]] = {}
    for job in jobs:
        origin = _origin_tensor(job, pool) if job.step.copies else None
        # a parent that is held as factors has no memory to share
        origins.setdefault(job.piece.live, []).append(None if isinstance(origin, LowRank) else origin)
    return {
        name: first
        for name, (first, *others) in origins.items()
        if first is not None and all(other is first for other in others)
    }
