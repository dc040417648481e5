"""Where a command holds what it works on: chosen from the files' headers and from what is free, alike for all verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergesearch import crashes, disks
from mergesearch.checkpoints import Pool, Survey, choose_device
from mergesearch.commands.inputs import PROVISIONAL, scorer_of
from mergesearch.commands.probe import learns
from mergesearch.config import Config
from mergesearch.config.served import is_filed
from mergesearch.engine.gguf.form import FileForm
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import DTYPES
from mergesearch.engine.residency import MODES, Holding, Needs, needs_of, residency
from mergesearch.engine.served import Served
from mergesearch.engine.streaming import can_stream
from mergesearch.errors import UserError
from mergesearch.evaluate.batch_size import MOST, Appetite, Length, appetite, longest, sample, settle
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import Task
from mergesearch.recipe import Recipe
from mergesearch.results.loading import BATCH_SIZE, RESIDENCY, batch_size_of
from mergesearch.search.strategies.learned_soup import settings_of

Documents = Mapping[str, Sequence[int]]
# the longest of all requests, beside the longest of a few
_LONGER = 1.25


def survey_of(config: Config) -> Survey:
    """What the headers of a configuration's models say; `UserError` says what keeps them from being merged."""
    crashes.explain()
    return Survey(config.base_model, config.models, config.trust_remote_code, config.tokenizer)


def survey_of_recipe(recipe: Recipe, trust_remote_code: bool = False, weights_alone: bool = False) -> Survey:
    """The same of a recipe's models; one without base is built like its first model."""
    crashes.explain()
    return Survey(recipe.base, recipe.models, trust_remote_code, recipe.tokenizer, weights_alone)


def holding_of(
    config: Config,
    survey: Survey,
    length: Length | None = None,
    settled: Mapping[str, Any] | None = None,
    documents: Documents | None = None,
) -> Holding:
    """Where the pool of a configuration is held.

    Args:
        config: the run's configuration.
        survey: of its models.
        length: of the longest requests; None where nothing is scored.
        settled: what a study noted of its memory: workers hold parents alike where they can, as sums over a tensor are
            added up in another order on the host than on a GPU.
        documents: the search documents by task, where soups may be learned on them.

    Raises:
        UserError: no such device, `pinned` without a GPU.
    """
    settled = settled or {}
    needs = needs_of(survey, DTYPES[config.dtype])
    device = choose_device(config.device).type
    if length is not None:
        taken = _appetite(config, survey, length, device, documents)
        needs = _with_scoring(needs, taken, batch_size_of(config, settled), device)
    if config.memory == "auto" and settled.get(RESIDENCY) in MODES and device != "cpu":
        noted = residency(needs, config.device, settled[RESIDENCY])
        if noted.fits:
            return noted
    return residency(needs, config.device, config.memory)


def winners_room(config: Config, survey: Survey) -> str | None:
    """A sentence where the winner's files have no room under the run folder by now; a night may change that."""
    size, free = needs_of(survey, DTYPES[config.dtype]).candidate, disks.free(config.folder)
    if size <= free:
        return None
    return (
        f"the winner will take {size / 2**30:.1f} GiB, and {config.folder} has {free / 2**30:.1f} GiB left: free some "
        "before the run ends, or set output to another disk"
    )


def alone(config: Config, survey: Survey, length: Length, settled: Mapping[str, Any]) -> Needs:
    """What one model takes that is scored as it is: the last one of a survey."""
    needs, device = needs_of(survey, DTYPES[config.dtype]), choose_device(config.device).type
    needs = replace(needs, parents=0, made=0, pinned=0)
    taken = _appetite(config, survey, length, device, None)
    return _with_scoring(needs, taken, batch_size_of(config, settled), device)


def alike(needs: Needs) -> Needs:
    """What a pool takes whose parents all have the same tensors."""
    return replace(needs, parents=min(needs.parents, 2 * needs.candidate), made=0, pinned=0)


def _appetite(config: Config, survey: Survey, length: Length, device: str, documents: Documents | None) -> Appetite:
    soup = settings_of(config)
    by_gradient = documents is not None and soup.optimizer == "adam" and learns(config, documents)
    return appetite(
        survey.form.blueprint.config,
        DTYPES[config.dtype].itemsize,
        length,
        device,
        packed=config.scoring == "auto",
        documents=soup.batch_size if by_gradient else 0,
        largest=max((tensor.numel() for tensor in survey.tensors["base_model"].values()), default=0),
        checkpointing=soup.checkpointing,
    )


def _with_scoring(needs: Needs, taken: Appetite, rows: int | None, device: str) -> Needs:
    return replace(
        needs, row=taken.row, scoring=max(taken.packed, taken.learning), rows=rows, most=MOST.get(device, PROVISIONAL)
    )


def length_of(config: Config, survey: Survey, tasks: Sequence[Task], documents: Documents) -> Length:
    """The longest requests, by those about a few documents of each task; no weights are needed for that."""
    few = {label: sample(list(ids)) for label, ids in documents.items()}
    plain = config.by_lm_eval
    found = longest(scorer_of(plain, survey.blank, survey.tokenizer, tasks, few))
    if all(len(few[label]) == len(ids) for label, ids in documents.items()):
        return found
    return Length(int(_LONGER * found.scored), int(_LONGER * found.generated))


def merging_of(recipe: Recipe, survey: Survey, device: str = "auto") -> tuple[Holding, bool]:
    """(where `merge` holds a recipe's models, whether it writes the result tensor by tensor); as for `holding_of`."""
    on_host = choose_device(device).type == "cpu"
    streams = on_host and can_stream(recipe, Pool.outline(survey))
    needs = needs_of(survey, DTYPES[recipe.out_dtype])
    # what is streamed is never in memory as a whole
    needs = replace(needs, candidate=0, parents=needs.made) if streams else needs
    return residency(needs, device, "mapped" if on_host else "auto"), streams


def held(holding: Holding) -> Holding:
    """The same, if it fits, scoring apart: that asks for less at once where memory runs out.

    Raises:
        UserError: it does not, in one sentence.
    """
    if holding.possible:
        return holding
    raise UserError(
        f"what this needs does not fit into memory: {holding}: use fewer or smaller models, a smaller batch_size, "
        "another device, or a machine with more memory"
    )


def load_pool(config: Config, survey: Survey | None = None, holding: Holding | None = None) -> Pool:
    """The parents of a configuration, read to where they are held; `UserError` says what keeps them from being merged.

    Args:
        survey: of its models, if there is one already.
        holding: where they are held; None: as their size alone says.
    """
    survey = survey or survey_of(config)
    return pool_of(survey, holding or holding_of(config, survey), config.allow_unrelated)


def pool_of(survey: Survey, holding: Holding, allow_unrelated: bool = False) -> Pool:
    """Parents, read to where they are held.

    Raises:
        UserError: there is no room for them, or what keeps them from being merged.
    """
    fitting = held(holding)
    return Pool.read(survey, fitting.devices, fitting.mode, allow_unrelated)


def engine_of(pool: Pool, dtype: str, holding: Holding, score_as: str | None = None) -> Engine:
    """An engine that keeps no more between candidates than there is room for, of candidates in the form that they are
    served in; where that is a file, as they are merged.

    Raises:
        UserError: that form cannot be had here.
    """
    filed = FileForm(score_as) if is_filed(score_as) else None
    served = Served(score_as) if score_as and not filed else None
    return Engine(pool, dtype, kept=holding.kept, served=served, filed=filed)


def check_written(form: str | None, survey: Survey) -> None:
    """Refuses models that no file of a form can hold, before their weights are read.

    Raises:
        UserError: why.
    """
    if is_filed(form):
        FileForm(form).check(survey.blank)


def settled_with(config: Config, scorer: Scorer, holding: Holding, settled: Mapping[str, Any]) -> dict[str, Any]:
    """What a study notes of its memory, and what its scorer goes by: a batch size that is still to be found is tried.

    Args:
        scorer: of the engine's live model.
        holding: where the pool is held.
        settled: what was noted before.
    """
    rows = batch_size_of(config, settled)
    if rows is None:
        rows = settle(scorer, holding.rows)
    return {**settled, RESIDENCY: settled.get(RESIDENCY, holding.mode), BATCH_SIZE: rows}
