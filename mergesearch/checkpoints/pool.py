"""The pool: the base and its models, and what the candidates made of them look like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergesearch import memory
from mergesearch.checkpoints.checkpoint import Checkpoint, Form
from mergesearch.checkpoints.devices import Devices
from mergesearch.checkpoints.files import Header, Watched, locate
from mergesearch.checkpoints.layout import Layout
from mergesearch.checkpoints.loading import META, Blueprint, floating_tensors, load_model
from mergesearch.checkpoints.lora import apply_adapter, check_adapter
from mergesearch.checkpoints.mapped import MappedReader, PinnedReader
from mergesearch.checkpoints.measured import MeasuredFiles
from mergesearch.checkpoints.parents import Reader
from mergesearch.checkpoints.stacking import stacked_config
from mergesearch.checkpoints.survey import BASE_KEY, Survey
from mergesearch.checkpoints.tokenizers import load_tokenizer
from mergesearch.errors import UserError
from mergesearch.recipe import BASE, TOWER, Measured, TensorInfo

Residency = Literal["device", "pinned", "mapped"]


@dataclass
class Pool:
    """The base and all models, aligned: the same tensor names and shapes in each.

    >>> from mergesearch import Pool
    >>> pool = Pool.load("zoo:base", {"order": "zoo:order", "letters": "zoo:letters"}, device="cpu")
    >>> pool.layers, list(pool.models)
    (4, ['order', 'letters'])

    Attributes:
        base: the shared pretrained checkpoint.
        models: the fine-tuned checkpoints by name.
        form: what a candidate without layer stacking looks like.
        tokenizer: the result's tokenizer; None where the weights alone can be merged.
        tokenizers: each model's own, by name; those that have none have the base's.
        tokenizer_source: what chose it: `base`, `union` or a model's name.
        constants: the base's tensors that are not floating, by live name.
        notes: what a reader of the result should know, a sentence each.
        device: where a candidate's inputs go, and all of it where `parts` is empty.
        mapped: the files that tensors are read from when they are needed; to be checked before each merge.
        parts: the devices of a candidate that is split, see `Devices`.
        files: for the base and each model the tensors of its own files, an adapter's for an adapter.
        tokens: what was decided about the tokenizer, in a sentence.
    """

    base: Checkpoint
    models: dict[str, Checkpoint]
    form: Form
    tokenizer: Any
    tokenizers: Mapping[str, Any]
    device: torch.device
    tokenizer_source: str = BASE
    trust_remote_code: bool = False
    constants: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mapped: Watched = field(default_factory=Watched, repr=False)
    parts: Mapping[str, torch.device] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Header]] = field(default_factory=dict, repr=False)
    tokens: str = ""
    _measured: dict[str, MeasuredFiles] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        base: str | None,
        models: Mapping[str, str],
        *,
        device: str = "auto",
        trust_remote_code: bool = False,
        allow_unrelated: bool = False,
        tokenizer: str = BASE,
        residency: Residency = "device",
        weights_alone: bool = False,
    ) -> Pool:
        """Reads, checks and aligns the base and the models.

        Args:
            base: a folder, a hub id, `zoo:NAME`, or one of these `+` an adapter; None where the models have none, and
                the first of them stands in for it.
            models: the same by name; an adapter alone lies over the base.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            trust_remote_code: run code from the folders.
            allow_unrelated: let a model through whose task vector is as large as the base.
            tokenizer: `base`: every vocabulary must equal the base's; `union` or a model's name: embeddings and head
                are aligned by token.
            weights_alone: let parents without a tokenizer through, which then cannot be scored: the pool has none.
            residency: where the parents' tensors are: on `device`, in pinned host memory, or in their files, mapped
                into memory (adapters are read all the same). Candidates are always on `device`.

        Raises:
            UserError: anything that keeps them from being merged, with the model and the tensor.
        """
        devices = Devices(choose_device(device))
        with _enough_memory(len(models)):
            survey = Survey(base, models, trust_remote_code, tokenizer, weights_alone)
        return cls.read(survey, devices, residency, allow_unrelated)

    @classmethod
    def read(
        cls, survey: Survey, devices: Devices, residency: Residency = "device", allow_unrelated: bool = False
    ) -> Pool:
        """Reads the tensors of parents whose headers were read.

        Args:
            survey: what the headers say.
            devices: where candidates live, and the parents where `residency` is "device".
            residency, allow_unrelated: as for `load`.

        Raises:
            UserError: NaN, infinity or unrelated models, files that cannot be read, too little memory.
        """
        kinds = {"device": Reader, "pinned": PinnedReader, "mapped": MappedReader}
        with _enough_memory(len(survey.names)):
            read = kinds[residency](survey, devices, allow_unrelated).read()
        return cls(**_told(survey), **read, device=devices.main, parts=devices.parts)

    @classmethod
    def outline(cls, survey: Survey) -> Pool:
        """The pool as its files' headers describe it: its tensors are on the meta device, and none was read.

        For whatever asks for names, shapes, layers, rules and the tokenizer.
        """
        parents = {
            where: Checkpoint(source.reference, source.path, survey.tensors[where])
            for where, source in survey.sources.items()
        }
        for parent in parents.values():
            parent.tensors = survey.form.layout.views(parent.live)
        models = {name: parents[f"models.{name}"] for name in survey.names}
        return cls(parents[BASE_KEY], models, survey.form, device=META, **_told(survey))

    @property
    def devices(self) -> Devices:
        """Where a candidate's tensors live."""
        return Devices(self.device, self.parts)

    @property
    def infos(self) -> list[TensorInfo]:
        """Layer and component of each tensor of a candidate without stacking that rules cover unless they say so: of
        the language model."""
        return [info for info in self.form.layout.infos if info.component != TOWER]

    @property
    def layers(self) -> int:
        """The number of decoder layers of each parent."""
        return self.form.layout.layers

    @property
    def parameters(self) -> int:
        """How many numbers one candidate has."""
        return sum(tensor.numel() for tensor in self.base.tensors.values())

    def parent(self, name: str) -> Checkpoint:
        """The model of that name, or the base for `base`."""
        return self.base if name == BASE else self.models[name]

    def measured(self, stated: Measured) -> MeasuredFiles:
        """The statistics that a recipe names, opened and checked once.

        Raises:
            UserError: they are not there, or others than the recipe names.
        """
        key = f"{stated.folder} {stated.sha256} {stated.kind}"
        if key not in self._measured:
            self._measured[key] = MeasuredFiles(stated)
        return self._measured[key]

    def stacked(self, origins: Sequence[int]) -> Form:
        """What a candidate looks like whose layer r is made of the parents' layers `origins[r]`.

        Raises:
            UserError: layers that the parents do not have.
        """
        for origin in origins:
            if not 0 <= origin < self.layers:
                raise UserError(f"the stack names layer {origin}, but the models have layers 0 to {self.layers - 1}")
        blueprint = self.form.blueprint
        config = stacked_config(blueprint.config, origins)
        stacked = Blueprint(blueprint.model_class, config, blueprint.conversions, blueprint.generation)
        return Form(stacked, Layout.of(stacked.blank()), tuple(origins))

    def new_model(self, dtype: torch.dtype) -> nn.Module:
        """A live model with the base's weights, on the pool's devices."""
        blank = floating_tensors(self.form.blueprint.blank())
        empty = {n: torch.empty(t.shape, dtype=dtype, device=self.devices.of(n)) for n, t in blank.items()}
        model = self.form.blueprint.build({**empty, **self.constants_of(self.form)}, dtype, self.devices)
        live = floating_tensors(model)
        with torch.no_grad():
            for piece in self.form.layout.pieces:
                piece.view(live).copy_(self.base.tensors[piece.name])
        return model

    def constants_of(self, form: Form) -> dict[str, Tensor]:
        """Copies of the base's tensors that are not floating, by their live names in a candidate of that form."""
        copies = {}
        for name, tensor in self.constants.items():
            layer, _, inside = name.removeprefix(form.layout.prefix).partition(".")
            if form.origins is None or not name.startswith(form.layout.prefix):
                copies[name] = tensor.clone()
                continue
            for number, origin in enumerate(form.origins):
                if str(origin) == layer:
                    copies[f"{form.layout.prefix}{number}.{inside}"] = tensor.clone()
        return copies


def _told(survey: Survey) -> dict[str, Any]:
    """The fields of a pool that no tensor is read for."""
    return {
        "tokenizer": survey.tokenizer,
        "tokenizers": {name: survey.tokenizers[f"models.{name}"] for name in survey.names},
        "tokenizer_source": survey.chosen,
        "trust_remote_code": survey.trust,
        "notes": tuple(survey.notes),
        "files": {BASE: survey.files(BASE_KEY), **{name: survey.files(f"models.{name}") for name in survey.names}},
        "tokens": survey.decision,
    }


@contextlib.contextmanager
def _enough_memory(models: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not memory.ran_out(error):
            raise
        raise UserError(memory.too_little(f"a pool of the base and {models} models")) from None


def choose_device(device: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` names on this machine.

    Raises:
        UserError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}: use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device is {device!r}: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise UserError(f"device is {device!r}, but this machine has {count} CUDA devices: use auto or cpu")
    return chosen


def load_reference(
    reference: str, base: str, where: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A checkpoint as a live model on the CPU with its tokenizer; an adapter alone is laid over `base`.

    Raises:
        UserError: as `load_model` and `Pool.load` do.
    """
    source, below = locate(reference, where), locate(base, BASE_KEY)
    folders = [f for f in (source.adapter, source.folder, below.folder if source.folder is None else None) if f]
    tokenizer = next((t for t in (load_tokenizer(f, where, trust_remote_code) for f in folders) if t is not None), None)
    if tokenizer is None:
        raise UserError(f"{where}: {reference} has no tokenizer that transformers can load: add the tokenizer's files")
    model = load_model(source.folder or folders[-1], where, None if source.adapter else dtype, trust_remote_code)
    for adapter in ([below.adapter] if source.folder is None else []) + [source.adapter]:
        if adapter is not None:
            check_adapter(adapter, where)
            model = apply_adapter(model, adapter, where)
    if source.adapter:
        for parameter in model.parameters():  # not the model: a rotary embedding's frequencies stay float32
            parameter.data = parameter.data.to(dtype)
    return model, tokenizer
