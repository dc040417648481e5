"""A small run as its user meets it afterwards: from Python, as a page, as frames, in optuna-dashboard.

The examples in the docstrings of public names make the run, in the order in which they build on each other.
"""

from __future__ import annotations

import doctest
import importlib
import io
import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import yaml
from support.browsers import chromium
from support.commands import mergesearch

import mergesearch as package
from mergesearch.commands import doctor
from mergesearch.commands.dashboard import Dashboard, look, serving
from mergesearch.commands.examples import kept_examples, pick
from mergesearch.commands.page import is_over, watch
from mergesearch.errors import StorageError, UserError
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore
from mergesearch.results import frames
from mergesearch.results.loading import Run
from mergesearch.search.store import open_run

# those that run something come before those that need what it left
ORDER = ["Config", "Rule", "Recipe", "Pool", "Engine", "SearchSpace", "CandidateError", "UserError", "run_search",
         "load_run", "Record", "Run", "OpenedRun", "score", "Scores", "merge"]  # fmt: skip
WITHOUT = {"__version__"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the examples were run; `tiny` is the run folder that they leave."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("examples")
    os.chdir(folder)
    failed = []
    try:
        for name in ORDER:
            thing = getattr(package, name)
            module = importlib.import_module(thing.__module__)
            examples = doctest.DocTestFinder(recurse=False).find(thing, name, module=module, globs={})
            for example in examples:
                said = io.StringIO()
                done = doctest.DocTestRunner().run(example, out=said.write)
                assert done.attempted, f"{name} has no example"
                failed += [said.getvalue()] * bool(done.failed)
        assert failed == []
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    return home / "tiny"


@pytest.fixture(scope="module")
def reported(run: Path) -> str:
    """What the report said that was also written as a page; its configuration names a task of the report's own."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["report"]["tasks"] = [{"task": "zoo_numbers", "metric": "acc", "limit": 4}]
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = mergesearch("report", run, "--examples", 4, "--documents", 6, "--html", run.parent / "page.html")
    assert done.status == 0, done.err
    return done.out


def test_every_public_name_has_an_example(home: Path) -> None:
    assert set(ORDER) | WITHOUT == set(package.__all__)


def test_the_report_writes_a_page(run: Path, reported: str) -> None:
    text = (run.parent / "page.html").read_text(encoding="utf-8")
    assert "documents of its holdout" not in text
    assert ('id="verdict"' in text and "Documents on which the winner and the best single model differ" in text) or (
        kept_examples(package.load_run(run).folder) == []
    )
    # the run noted which kinds of tensors its models have
    assert "zoo_numbers (acc, 4 documents)" in text and "attention" in text
    assert "zoo_numbers" in reported


def test_a_report_lays_another_run_beside(run: Path, reported: str, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    done = mergesearch("report", run, "--examples", 4, "--documents", 6, "--html", out, "--beside", run)
    assert done.status == 0, done.err
    text = out.read_text(encoding="utf-8")
    assert '<body class="several">' in text and 'id="run1-contenders"' in text
    assert text.count('<h3 class="of">tiny</h3>') == 2 * text.count("<section ")


def test_a_second_report_asks_nothing_again(run: Path, reported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergesearch.engine.live import Engine

    def load(*_: object) -> float:
        raise AssertionError("nothing is to be built")

    monkeypatch.setattr(Engine, "load", load)
    again = mergesearch("report", run, "--examples", 4, "--documents", 6)
    assert again.status == 0 and again.out == reported


def test_tasks_of_the_report_are_refused_before_anything_is_scored(run: Path, reported: str) -> None:
    for task, why in (("zoo_letters", "the search scores on"), ("zoo_leters", "unknown task")):
        done = mergesearch("report", run, "--task", task)
        assert done.status == 2 and why in done.err
    done = mergesearch("report", run, "--beside", run)
    assert done.status == 2 and "--html" in done.err


def test_watching_ends_with_the_run(run: Path, reported: str, tmp_path: Path) -> None:
    looks: list[Run] = []
    watch(run, tmp_path / "page.html", 5, looks.append, wait=lambda _: pytest.fail("the run is over"))
    assert len(looks) == 1 and is_over(looks[0])
    assert 'http-equiv="refresh"' not in (tmp_path / "page.html").read_text(encoding="utf-8")
    done = mergesearch("watch", run, "--html")
    assert done.status == 0 and (run / "page.html").is_file() and "zoo_letters" in done.out


def test_watching_looks_again_while_trials_are_left(run: Path, tmp_path: Path) -> None:
    config, _ = open_run(run)
    other = tmp_path / "run"
    other.mkdir()
    grown = config.model_copy(update={"search": config.search.model_copy(update={"trials": 9}), "output": str(other)})
    (other / "config.yaml").write_text(grown.to_yaml(), encoding="utf-8")
    for file in (*run.glob("study.db*"), run / "documents.json"):  # its log too, as long as somebody has it open
        (other / file.name).write_bytes(file.read_bytes())
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        text = (other / "page.html").read_text(encoding="utf-8")
        assert '<meta http-equiv="refresh" content="60">' in text
        # its worker has ended, although there would be something to do
        assert "stopped with budget left" in text and "is being searched" not in text
        if len(waits) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(other, other / "page.html", 60, lambda _: None, wait)
    assert waits == [60, 60]


def test_a_search_from_python_ends_as_the_command_does(home: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    before = package.load_run("tiny").config
    line = f'echo "$MERGESEARCH_EVENT $MERGESEARCH_STATUS" >> {told}'
    opened = package.run_search(before.model_copy(update={"output": str(tmp_path / "run"), "on_end": line}))
    assert told.read_text(encoding="utf-8") == "end 0\n"
    best = opened.best()
    assert best is not None and opened.kinds == {"loglikelihood": "tries"} and set(best.by_lm_eval) == {"zoo_letters"}


def test_frames_and_their_files(run: Path, reported: str, tmp_path: Path) -> None:
    opened = package.load_run(run)
    documents, report = opened.documents(), opened.report()
    for frame, columns in ((documents, frames.DOCUMENT_COLUMNS), (report, frames.REPORT_COLUMNS)):
        assert {name: str(kind) for name, kind in frame.dtypes.items()} == {n: k for n, (k, _) in columns.items()}
    trials = opened.frame()
    told = {column.replace("zoo_letters", frames.TASK): str(kind) for column, kind in trials.dtypes.items()}
    # the front is of a run with several objectives
    assert told == {name: kind for name, (kind, _) in frames.TRIAL_COLUMNS.items() if name != "front"}
    assert list(told) == [name for name in frames.TRIAL_COLUMNS if name != "front"]
    search = documents[(documents["side"] == "search") & (documents["trial"] == 2)]
    (record,) = (record for record in opened.records if record.number == 2)
    assert search["value"].mean() == pytest.approx(record.scores["zoo_letters"].value)
    assert set(documents["side"]) == {"search", "holdout"}
    assert set(report["measure"]) == {"objective", "zoo_letters", "zoo_numbers"} and report["winner"].any()
    for what, whole in (("documents", documents), ("report", report), ("trials", opened.frame())):
        for form in frames.FORMATS:
            out = tmp_path / f"{what}.{form}"
            done = mergesearch("table", run, "--of", what, "--format", form, "--out", out)
            assert done.status == 0, done.err
            back = {"csv": pandas.read_csv, "jsonl": lambda f: pandas.read_json(f, lines=True),
                    "parquet": pandas.read_parquet}[form](out)  # fmt: skip
            assert list(back.columns) == list(whole.columns) and len(back) == len(whole)
            number = next(name for name, kind in whole.dtypes.items() if str(kind) == "float64")
            assert back[number].sum() == pytest.approx(whole[number].sum())
    lines = mergesearch("table", run, "--of", "report", "--format", "jsonl").out.splitlines()
    assert len(lines) == len(report) and json.loads(lines[0])["measure"] == "objective"
    first = mergesearch("table", run, "--format", "jsonl", "--top", 1, "--sort", "trial").out.splitlines()
    assert [json.loads(line)["trial"] for line in first] == [0]
    wrong = mergesearch("table", run, "--of", "documnets")
    assert wrong.status == 2 and "documents" in wrong.err
    with pytest.raises(UserError, match="ending"):
        frames.write(report, tmp_path / "report.xls")


def test_the_dashboard_shows_names_parameters_notes_and_artifacts(run: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    with serving(run, port=0, every=3600) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            _dashboard(f"http://127.0.0.1:{server.server_port}", package.load_run(run))
        finally:
            server.shutdown()


def _dashboard(address: str, opened: Run) -> None:
    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"{address}{path}", timeout=60) as answer:
            return answer.read()

    (summary,) = json.loads(get("/api/studies"))["study_summaries"]
    study = json.loads(get(f"/api/studies/{summary['study_id']}"))
    assert summary["study_name"] == "tiny" and study["objective_names"] == ["objective"]
    trials = study["trials"]
    assert len(trials) == len(opened.records)
    for trial, record in zip(trials, opened.records, strict=True):
        assert trial["values"] == [pytest.approx(record.objective)]
        names = {attribute["key"]: attribute["value"] for attribute in trial["user_attrs"]}
        assert names["name"] == (record.name or record.method)
        assert record.recipe_id is not None and record.recipe_id in names["recipe"]
        params = {each["name"] for each in trial["params"]}
        assert {"method", "weight order", "weight letters"} <= params
        assert "zoo_letters" in trial["note"]["body"] and "rules:" in trial["note"]["body"]
        files = {artifact["filename"]: artifact["artifact_id"] for artifact in trial["artifacts"]}
        assert set(files) == {"recipe.yaml", "documents.npz"}
    stored = get(f"/artifacts/{summary['study_id']}/{trials[0]['trial_id']}/{files_of(trials[0])['recipe.yaml']}")
    assert b"task_arithmetic" in stored
    # the parents were told together; the copy has when each was scored
    ends = [trial["datetime_complete"] for trial in trials[:3]]
    assert ends == sorted(set(ends))
    assert b"<html" in get("/dashboard/")


def test_a_browser_shows_the_dashboard(run: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    with chromium() as browser, serving(run, port=0, every=3600) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{address}/api/studies", timeout=60) as answer:
            (summary,) = json.loads(answer.read())["study_summaries"]
        study = f"{address}/dashboard/studies/{summary['study_id']}"
        shown, errors = browser.new_page(), []
        shown.set_default_timeout(180_000)
        shown.on("pageerror", lambda error: errors.append(str(error)))
        try:
            # the study's pages: its metric by name, what the run came to, and a trial with its note and artifacts
            for page, texts in (
                (study, ("objective", "tiny")),
                (f"{study}/note", ("document evaluations",)),
                (f"{study}/trials?numbers=0", ("zoo_letters", "rules:", "recipe.yaml", "documents.npz")),
            ):
                shown.goto(page)
                for text in texts:
                    shown.wait_for_selector(f"text={text}", state="attached")
        finally:
            server.shutdown()
        assert errors == []


def test_the_dashboard_tells_what_has_come_since_and_survives_a_storage_that_is_away(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna_dashboard")
    dashboards = "mergesearch.commands.dashboard"
    shown = Dashboard(run, tmp_path)
    monkeypatch.setattr(f"{dashboards}._note_of_run", lambda _: "more than before")
    shown.refresh()
    (study,) = shown.mirror.storage.get_all_studies()
    assert "more than before" in str(study.system_attrs)
    looks: list[int] = []
    over = threading.Event()

    def refresh() -> None:
        looks.append(len(looks))
        if len(looks) == 3:
            over.set()
        raise StorageError("away") if len(looks) == 1 else UserError("no run folder")

    look(refresh, over, 0.001)
    assert looks == [0, 1, 2]


def files_of(trial: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {artifact["filename"]: artifact["artifact_id"] for artifact in trial["artifacts"]}


def test_the_doctor_says_what_there_is() -> None:
    done = mergesearch("doctor")
    assert done.status == 0
    for label in ("mergesearch: ", "libraries: torch ", "memory: ", "storage: ", "compiler: ", "dashboard: "):
        assert label in done.out


def test_the_doctor_names_what_every_extra_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    developers = {"parity", "real", "bench", "docs", "release", "test", "dev"}
    extras = set(pyproject["project"]["optional-dependencies"]) - developers
    named = {extra for extra in extras for feature in doctor.FEATURES if f"mergesearch[{extra}]" in feature.install}
    assert named == extras
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    said = dict(doctor.report())
    assert said["track: wandb"] == "missing (pip install 'mergesearch[wandb]')" and "g++" in said["compiler"]


def test_examples_are_of_both_kinds_and_all_tasks() -> None:
    def scores(quiz: list[float], bits: list[float]) -> Scores:
        import numpy as np

        tasks = {"quiz": TaskScore(0, None, 4, "acc"), "bits": TaskScore(0, None, 4, "loss", higher_is_better=False)}
        values = {"quiz": quiz, "bits": bits}
        return Scores(tasks, {t: DocumentScores([0, 1, 2, 3], np.array(v), "mean") for t, v in values.items()})

    ours, theirs = scores([1, 0, 1, 1], [1.0, 2.0, 3.0, 4.0]), scores([0, 1, 0, 1], [1.0, 2.5, 2.0, 9.0])
    picked = pick(ours, theirs, 10)
    # one task after another; in each the largest gain first, then a loss; equal documents are left out
    assert picked == [("quiz", 0), ("bits", 3), ("quiz", 1), ("bits", 2), ("quiz", 2), ("bits", 1)]
    assert pick(ours, theirs, 3) == picked[:3]
