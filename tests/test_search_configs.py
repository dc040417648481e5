"""Every file of configs/search, run in small: two models, two tasks, a handful of documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from mergesearch import config
from mergesearch.commands import holding, inputs
from mergesearch.commands import run as run_command
from mergesearch.commands.check import preview
from mergesearch.commands.export import export_adapter, export_trial
from mergesearch.commands.merge import merge_recipe
from mergesearch.commands.report import report_run
from mergesearch.commands.run import Session, prepare
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe
from mergesearch.recipe import read as read_recipe
from mergesearch.results.loading import load_run
from mergesearch.results.record import Record
from mergesearch.results.table import render
from mergesearch.search import store
from mergesearch.search.soup.settings import SoupSettings

FOLDER = Path(__file__).parent.parent / "configs" / "search"
# the first two models, and the first two tasks measured by accuracy: cheap, and every strategy takes them
WHOLE = config.read(FOLDER / "auto.yaml")
MODELS = list(WHOLE.models)[:2]
TASKS = [task.task for task in WHOLE.tasks if task.metric == "acc"][:2]
SMALL = [
    f"models={ {name: WHOLE.models[name] for name in MODELS} }",
    f"tasks={[{'task': task, 'metric': 'acc', 'limit': 2} for task in TASKS]}",
    "dtype=float32",
    "device=cpu",
    "search.defaults=false",
    "search.learned_soup.steps=1",
    "search.learned_soup.documents=1",
    "search.learned_soup.validation_documents=2",
    "search.learned_soup.candidates=3",
]
# what is set besides, for each file
TRIALS = {
    "auto": 4,
    "grow": 4,
    "greedy_soup": 5,
    "study-cmaes": 4,
    "random_control": 2,
    "racing": 4,
    "closed_forms_full": 3,
}
OVERRIDES = {
    "guard": [f"guard.0.task={TASKS[0]}", "guard.0.metric=null", "guard.0.limit=null", "guard.0.max_drop=0.0"],
    "documents": ["search.documents=17", "search.strategy=[greedy_soup, study]"],
}


@pytest.fixture(scope="module")
def shared() -> Any:
    """Parents and tasks are read once, and storages wait for no disk."""
    held: dict[str, Any] = {}

    def in_memory(url: str) -> optuna.storages.BaseStorage:
        Path(url.removeprefix("sqlite:///")).write_text("in memory", encoding="utf-8")  # an empty one would be a loss
        return held.setdefault(url, optuna.storages.InMemoryStorage())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_local_storage", in_memory)
        patch.setattr(run_command, "load_pool", _once(holding.load_pool))
        patch.setattr(run_command, "load_tasks", _once(inputs.load_tasks))
        yield


def _once(load: Callable[[config.Config], Any]) -> Callable[..., Any]:
    kept: list[Any] = []

    def loaded(settings: config.Config, *_: Any) -> Any:
        if not kept:
            kept.append(load(settings))
        return kept[0]

    return loaded


def run(name: str, folder: Path) -> tuple[Session, list[Record]]:
    overrides = [*SMALL, f"output={folder}", f"search.trials={TRIALS.get(name, 2)}", *OVERRIDES.get(name, [])]
    session = prepare(config.read(FOLDER / f"{name}.yaml", overrides))
    session.search.run()
    return session, load_run(folder).records


def strategies(session: Session) -> list[str]:
    return [trial.strategy for trial in session.search.history().trials][4:]


def recipes(found: list[Record]) -> list[Recipe]:
    return [Recipe.from_data(dict(r.recipe or {}), "test") for r in found if not r.name]


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_each_file_runs(name: str, tmp_path: Path, shared: Any) -> None:
    if name == "served":
        pytest.importorskip("torchao")
    if name == "served_file":
        pytest.importorskip("llama_cpp", reason="needs the extra gguf, which compiles llama.cpp for many minutes")
    session, found = run(name, tmp_path / "run")
    assert {r.state for r in found} <= {"complete", "pruned"}, [r.error for r in found if r.error]
    assert [r.name for r in found[:4]] == ["base", *MODELS, "average"]
    assert len(found) > 4 or name == "baselines"
    assert render(found, "md").count("\n") == len(found) + 1
    assert "cost: " in "\n".join(load_run(tmp_path / "run").words)
    CHECKS.get(name, lambda session, found, folder: None)(session, found, tmp_path / "run")


def test_check_looks_at_the_runs_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        preview(FOLDER / "random.yaml", [f"search.warm_start={tmp_path}"])


def _baselines(session: Session, found: list[Record], folder: Path) -> None:
    export_trial(folder, folder.parent / "out", "0")
    card = (folder.parent / "out" / "README.md").read_text()
    assert '--include_path "$(mergesearch zoo)/tasks"' in card  # the package's tasks are elsewhere on another machine


def _auto(session: Session, found: list[Record], folder: Path) -> None:
    assert list(dict.fromkeys(strategies(session))) == ["sweep", "learned_soup", "greedy_soup", "study"]
    assert any("greedy soup" in line for line in load_run(folder).words)


def _greedy_soup(session: Session, found: list[Record], folder: Path) -> None:
    assert set(strategies(session)) == {"random", "greedy_soup"}


def _learned(session: Session, found: list[Record], folder: Path) -> None:
    config = session.config
    counts = [len(session.folder.search_documents()[task.task]) for task in config.tasks]
    soup, models = config.search.key("learned_soup", SoupSettings), len(config.models)
    for trial in session.search.history().trials[4:]:
        of_soup = trial.strategy == "learned_soup"  # at most what `mergesearch check` says
        most = soup.cost(trial.key["loss"], models, counts) if of_soup else soup.closed_form_cost(models, counts)
        assert 0 < trial.learning_documents <= most


def _full_forms(session: Session, found: list[Record], folder: Path) -> None:
    """Each recipe names what was measured, and makes the same bytes in the export and from its file alone."""
    _learned(session, found, folder)
    for record, strategy in zip(found[4:], strategies(session), strict=True):
        recipe = Recipe.from_data(dict(record.recipe or {}), "test")
        assert recipe.statistics is not None and set(recipe.statistics.documents) == set(MODELS)
        assert recipe.methods == ["fisher" if strategy == "fisher_full" else "regmean"]
        if strategy == "regmean_plus":  # no other way than regmean_full
            continue
        out = [folder.parent / f"{how}-{record.number}" for how in ("exported", "merged")]
        export_trial(folder, out[0], str(record.number))
        merge_recipe(read_recipe(out[0] / "recipe.yaml"), out[1], "cpu")
        assert (out[0] / "model.safetensors").read_bytes() == (out[1] / "model.safetensors").read_bytes()
    assert len(list((folder / "statistics").iterdir())) == len(found) - 4
    refused = [*SMALL, f"output={folder.parent / 'other'}", "space.methods=[regmean]"]
    with pytest.raises(UserError, match=r"space.methods names regmean.*one that measures them"):
        preview(FOLDER / "random.yaml", refused)


def _control(session: Session, found: list[Record], folder: Path) -> None:
    # the first is equal to a baseline, and counts for nothing
    assert strategies(session) == ["study"] * 3 + ["random_control"] * 2


def _pareto(session: Session, found: list[Record], folder: Path) -> None:
    marked = [r.number for r in found if r.front]
    assert marked and "front" in render(found, "md").splitlines()[0]
    out = folder.parent / "out"
    export_trial(folder, out, str(marked[-1]))
    assert (out / "model.safetensors").is_file()


def _control_points(session: Session, found: list[Record], folder: Path) -> None:
    for trial in session.search.study.get_trials()[4:]:
        assert all(f"depth{n}.attention.task_arithmetic.weight.{MODELS[0]}" in trial.params for n in range(3))


def _split(session: Session, found: list[Record], folder: Path) -> None:
    assert all("split" in t.params for t in session.search.study.get_trials()[4:])


def _groups(session: Session, found: list[Record], folder: Path) -> None:
    for recipe in recipes(found):
        assert recipe.rules[0].components == ("embedding", "norm")
        assert recipe.rules[0].parameters == {"weight": 0.0}


def _grow(session: Session, found: list[Record], folder: Path) -> None:
    # one is equal to another that was scored, and counts for nothing
    assert [len(r.rules) for r in recipes(found)] == [1, 1, 6, 6, 6]


def _stack(session: Session, found: list[Record], folder: Path) -> None:
    assert all(4 <= len(r.stack) <= 8 for r in recipes(found))


def _guard(session: Session, found: list[Record], folder: Path) -> None:
    assert all(TASKS[0] in t.constraints for t in session.search.study.get_trials())


def _documents(session: Session, found: list[Record], folder: Path) -> None:
    assert len(found) < 12 and sum(s.documents for r in found for s in r.scores.values()) >= 17


def _adapters(session: Session, found: list[Record], folder: Path) -> None:
    # of rank 1 it cannot be exact: what is missing is said of the weights and of the scores
    out = folder.parent / "out"
    _, notes = export_adapter(folder, out, str(found[-1].number), 1)
    assert (out / "adapter_model.safetensors").is_file() and (out / "recipe.yaml").is_file()
    assert "ranks 1 to 1" in notes[0] and "missing by length" in notes[0]
    assert [note.partition(" ")[0] for note in notes[1:]] == [task.task for task in session.config.tasks]
    assert all("the adapter" in note and "the candidate" in note for note in notes[1:])
    assert notes[0] in (out / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        export_adapter(folder, out)


def _served(session: Session, found: list[Record], folder: Path) -> None:
    """The export has both forms, and the report the winner's figures in both."""
    session.export_best()
    assert (folder / "best" / "int8" / "model.safetensors").is_file()
    assert "pretrained=int8" in (folder / "best" / "README.md").read_text(encoding="utf-8")
    report = report_run(folder, finalists=1, documents=1)
    (told,) = [note for note in report.notes if "as served in int8 (and as merged, in float32)" in note]
    assert all(f"{task} " in told for task in TASKS)


CHECKS: dict[str, Callable[[Session, list[Record], Path], None]] = {
    "adapters": _adapters,
    "served": _served,
    "baselines": _baselines,
    "auto": _auto,
    "greedy_soup": _greedy_soup,
    "learned_soup": _learned,
    "learned_soup-cmaes": _learned,
    "closed_forms": _learned,
    "closed_forms_full": _full_forms,
    "random_control": _control,
    "pareto": _pareto,
    "control_points": _control_points,
    "split": _split,
    "groups": _groups,
    "grow": _grow,
    "stack": _stack,
    "guard": _guard,
    "documents": _documents,
}
