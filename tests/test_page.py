"""The page of a run: what stands in it and in which order, and that a browser draws it whatever the names are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from support.browsers import chromium
from support.pages import DOCUMENTS, HOSTILE, KINDS, subject

from mergesearch.evaluate.expected import Expected
from mergesearch.recipe import Recipe, TensorInfo, single_rule
from mergesearch.results.page import curves, marks
from mergesearch.results.page.anatomy import anatomy_of, tensors_of
from mergesearch.results.page.build import page, write
from mergesearch.results.page.contenders import differences
from mergesearch.results.page.curves import points
from mergesearch.results.page.depth import grid, recipes
from mergesearch.results.page.subject import Subject
from mergesearch.results.page.tradeoffs import pareto, tradeoffs

NOW = datetime(2026, 1, 2, 12, 0)
SECTIONS = [
    "verdict", "compared", "progress", "tasks", "depth", "parameters", "tradeoffs", "luck", "cost", "guards",
    "failures", "recipe", "trials", "machine",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("night"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("hostile"), HOSTILE)


class Texts(HTMLParser):
    """The texts of a page by where they stand: scripts apart."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag == "section":
            self.ids.append(given.get("id") or "")
        self._script = (given.get("id") or "") if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def _read(text: str) -> Texts:
    texts = Texts()
    texts.feed(text)
    return texts


def _pictures(texts: Texts) -> list[dict[str, Any]]:
    return json.loads(texts.scripts["pictures"])


def test_the_sections_stand_in_their_order_in_one_small_file(plain: Subject) -> None:
    text = page([plain], NOW)
    texts = _read(text)
    assert texts.ids == SECTIONS
    assert len(text.encode()) < 6 * 2**20
    assert plain.report is not None and plain.report.sentence in texts.text
    outside = texts.text + texts.scripts.get("", "")
    assert not re.search(r"https?://", outside), "nothing outside the library names an address"
    assert "default-src 'none'" in text and "<img" not in text and "<iframe" not in text
    for shown in ("best single model", "plain average", "best default", "made NaN", "kept", "cost: 3 trials"):
        assert shown in texts.text
    assert plain.contenders["winner"].recipe is not None
    assert Recipe.from_data(dict(plain.contenders["winner"].recipe), "it").to_yaml().strip() in texts.text
    keys = [picture["key"] for picture in _pictures(texts)]
    assert len(keys) == len(set(keys)) and {"shared-progress", "run0-contenders", "run0-task0", "run0-luck"} <= set(
        keys
    )


def _colored(value: Any, under: bool = False) -> Any:
    """A picture with colours in place of their names; a name that page.js does not know fails."""
    if isinstance(value, str) and under and value.startswith("@"):
        assert value in marks.NAMES
        return "#123456"
    if isinstance(value, list):
        return [_colored(item, under) for item in value]
    if isinstance(value, dict):
        colored = ("color", "fillcolor", "bgcolor", "bordercolor", "colorscale")
        return {key: _colored(item, key in colored) for key, item in value.items()}
    return value


def test_every_picture_is_one_that_plotly_takes(hostile: Subject) -> None:
    pictures = _pictures(_read(page([hostile], NOW)))
    assert len(pictures) >= 7
    for picture in pictures:
        for view in picture["views"]:
            figure = go.Figure(_colored(view["data"]), _colored(view["layout"]))
            assert figure.data
            shown = json.dumps([view["data"], view["layout"]])
            assert "<script" not in shown and 'alert(\\"1\\")</' not in shown


def test_names_are_harmless(hostile: Subject) -> None:
    text = page([hostile], NOW)
    texts = _read(text)
    assert texts.tags.count("script") == _read(page([hostile], NOW)).tags.count("script")
    assert '<script>alert("1")' not in text
    # to the letter, where a name is a text
    assert HOSTILE in texts.text and "49" not in re.findall(r"\{\{ 7\*7 \}\}|49%", texts.text)
    for data in texts.scripts.values():
        assert "<script" not in data or "createElement" in data
    assert {"pictures", "library", "run0-depth-data", "run0-tradeoffs-data"} <= texts.scripts.keys()


def test_figures_of_the_page_are_those_of_the_run(plain: Subject) -> None:
    assert plain.report is not None and plain.objective is not None
    by_what = {line["what"]: line for line in differences(plain)}
    winner = plain.contenders["winner"]
    (row,) = (row for row in plain.report.sections[0].rows if row.trial == plain.report.winner_trial)
    for comparison in row.compared:
        line = by_what[comparison.reference]
        assert line["holdout"]["value"] == f"{comparison.difference.value:+.4f}"
        assert line["verdict"] == comparison.verdict
        other = plain.contenders[comparison.reference]
        on_search = plain.objective.value(winner.scores) - plain.objective.value(other.scores)
        assert line["search"]["value"] == f"{on_search:+.4f}"
    figure = plain.search.figure(winner.number, "bits")
    assert figure is not None and figure.low is not None and figure.high is not None
    assert figure.low < figure.value == winner.scores["bits"].value < figure.high
    held = plain.holdout.figure(winner.number)
    assert held is not None and row.holdout is not None and held.value == pytest.approx(row.holdout.value)
    assert by_what["best default"]["holdout"]["value"] and by_what["best default"]["verdict"] == ""


def test_what_the_report_says_the_page_says(plain: Subject) -> None:
    assert plain.report is not None
    for section in plain.report.sections[:3]:
        for row in section.rows:
            assert plain.holdout.figure(row.trial, section.name) == row.holdout


def test_no_candidate_is_compared_on_other_documents_than_the_report_asked(plain: Subject) -> None:
    assert plain.report is not None
    default = plain.contenders["best default"].number
    assert plain.holdout.difference(plain.report.winner_trial, default) is not None
    # as if a report with more documents had been cut off since
    fewer = tuple(replace(section, documents=DOCUMENTS - 1) for section in plain.report.sections)
    cut = replace(plain, report=replace(plain.report, sections=fewer))
    assert cut.holdout.difference(plain.report.winner_trial, default) is None
    assert cut.holdout.figure(default) == plain.holdout.figure(default)


def test_a_name_stands_above_all_lines_that_share_it(plain: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [("base", 0.1), ("code", 0.52), ("average", 0.5), ("ties 0.2", 0.54), ("best", 0.9)]
    monkeypatch.setattr("mergesearch.results.page.curves._references", lambda _: there)
    lines, notes = curves._lines(plain, 0.0, 1.0)  # pyright: ignore[reportPrivateUsage]
    assert len(lines) == len(there)
    assert [(note["text"], note["y"]) for note in notes] == [
        ("base", 0.1), ("average, code, ties 0.2", 0.54), ("best", 0.9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("at_work", "over", "said"),
    [(True, False, "night is being searched"), (False, False, "night stopped with budget left"), (False, True, "")],
)
def test_the_page_says_whether_anybody_is_at_work(plain: Subject, at_work: bool, over: bool, said: str) -> None:
    text = _read(page([replace(plain, at_work=at_work, over=over)], NOW)).text
    (made,) = (line for line in text.splitlines() if line.startswith("made "))
    assert made.endswith(f" · {said}" if said else "12:00")


def test_the_table_has_what_ranks_go_by(plain: Subject) -> None:
    assert plain.scored[0].expected is None
    first, *others = plain.run.records
    known = replace(first, expected=Expected(0.25, 0.4, -0.5, 1.0, 0.1), front=True)
    texts = _read(page([replace(plain, run=replace(plain.run, records=(known, *others)))], NOW))
    table = texts.text[texts.text.index("Every trial") :]
    assert "\nfront" not in _read(page([plain], NOW)).text
    assert re.search(r"rank\s*front\s*trial\s*objective\s*expected", table) and "0.2500" in table
    assert "what is expected of a candidate" in table


def test_the_curve_counts_what_was_spent(plain: Subject) -> None:
    found = points(plain)
    assert [point.record.number for point in found] == [n for n in range(16) if n != 7]
    assert found[-1].documents == sum(trial.documents for trial in plain.trials)
    # a worker is at a trial for two minutes of three
    assert found[-1].hours == pytest.approx(len(plain.trials) * 2 / 60)
    best = [point.best for point in found if point.best is not None]
    assert best == sorted(best) and best[-1] == max(r.objective for r in plain.scored if not r.infeasible)


def test_a_run_without_scores_or_report_has_a_page_too(tmp_path: Path) -> None:
    bare = subject(tmp_path / "bare", trials=0, reported=False)
    early = Subject(run=bare.run, trials=bare.trials, verdict="Nothing yet.")
    texts = _read(page([early], NOW, refresh=60))
    assert texts.ids == SECTIONS and "There is no report on the holdout yet" in texts.text
    empty = Subject(run=type(bare.run)(tmp_path, bare.run.config, (), None, ()), trials=(), verdict="Nothing yet.")
    text = page([empty], NOW)
    assert "Nothing is scored yet" in text and _pictures(_read(text)) == []


def test_two_runs_stand_beside_each_other(plain: Subject, tmp_path: Path) -> None:
    other = subject(tmp_path / "other", trials=4)
    texts = _read(page([plain, other], NOW))
    assert texts.ids == SECTIONS and texts.text.count("What a recipe takes from each model") == 1
    keys = [picture["key"] for picture in _pictures(texts)]
    assert "run1-contenders" in keys and keys.count("shared-progress") == 1
    (progress,) = (picture for picture in _pictures(texts) if picture["key"] == "shared-progress")
    assert [trace["name"] for trace in progress["views"][0]["data"] if trace["mode"] == "lines"] == ["night", "night"]


def test_the_file_is_written_whole_or_not_at_all(plain: Subject, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("before")
    write(out, [plain])
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [out]


def test_a_recipe_by_depth() -> None:
    models = {"math": "m", "code": "c"}
    rules = [
        {"layers": (0, 1), "components": ["attention"], "method": "ties",
         "parameters": {"weight": {"math": 1.0, "code": 0.5}, "density": 0.25}},
        {"method": "linear", "parameters": {"weight": [0.5, 0.125]}},
    ]  # fmt: skip
    found = grid(Recipe.from_data({"base": "b", "models": models, "rules": rules}, "it"), KINDS)
    assert found.models == ("math", "code") and found.edges == (0, 2, 4)
    assert found.rows == ("embedding, mlp, norm", "attention")
    math, code = found.values["weight"]
    assert math == [[0.5, 0.5], [1.0, 0.5]] and code[1] == [0.5, 0.125]
    assert found.values["density"][0] == [[None, None], [0.25, None]]
    whole = grid(Recipe(base="b", models=models, rules=single_rule("ties", density=0.5)), KINDS)
    assert (whole.rows, whole.edges) == (("embedding, attention, mlp, norm",), (0, 4))
    slerp = grid(Recipe(base="b", models=models, rules=single_rule("slerp", t=0.5)), {})
    assert slerp.values == {}


def test_the_anatomy_of_a_model_names_its_kinds_of_tensors() -> None:
    infos = [TensorInfo("embed.weight", 0, "embedding", ()), TensorInfo("norm.weight", 3, "norm", ())]
    infos += [
        TensorInfo(f"layers.{n}.{c}.weight", n, k, ())
        for n in range(4)
        for c, k in (("attn", "attention"), ("mlp", "mlp"))
    ]
    assert anatomy_of(infos) == KINDS
    recipe = Recipe(base="b", models={"m": "m"}, rules=single_rule("ties"))
    assert {info.name for info in tensors_of(KINDS, recipe)} == {info.name for info in infos}


def test_a_page_has_room_for_the_best_recipes_alone(plain: Subject) -> None:
    every = recipes(plain)
    assert every[0]["trial"] == plain.contenders["winner"].number
    assert len(every) == len({record.recipe_id for record in plain.scored})
    assert len(recipes(plain, room=len(json.dumps(every[0])) + 10)) == 1


def test_the_front() -> None:
    assert pareto([[1, 2], [2, 1], [1, 1], [2, 1]]) == [True, True, False, True]


def test_trade_offs_are_of_all_candidates(plain: Subject) -> None:
    found = tradeoffs(plain)
    assert found is not None and len(found["labels"]) == len(plain.scored) == len(found["values"][0])
    assert found["kinds"].count("winner") == 1 and any(found["front"])


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def test_a_browser_draws_it_at_any_width_and_theme(
    browser: Any, hostile: Subject, plain: Subject, tmp_path: Path
) -> None:
    files = [tmp_path / "hostile.html", tmp_path / "beside.html"]
    write(files[0], [hostile])
    write(files[1], [plain, hostile])
    for number, (width, theme) in enumerate([(1280, "light"), (400, "dark"), (1280, "dark"), (400, "light")]):
        file = files[number // 2]
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        shown = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        shown.on("console", lambda message, said=said: said.append(f"{message.type}: {message.text}"))
        shown.on("pageerror", lambda error, said=said: said.append(str(error)))
        shown.on("dialog", lambda dialog, said=said: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        shown.on("request", lambda request, asked=asked: asked.append(request.url))
        shown.goto(file.as_uri())
        # no function is waited for: the page forbids to evaluate text
        shown.wait_for_selector("html[data-drawn='yes']", state="attached", timeout=120_000)
        assert said == [] and asked == [file.as_uri()]
        # nothing is wider than the window, every place for a picture has one with something in it
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            shown.evaluate("[...document.querySelectorAll('.plot')].filter(p => !p.querySelector('.main-svg')).length")
            == 0
        )
        assert _overlapping(shown) == []
        # what the tables of figures say is seen without scrolling
        cut = "c => c.getBoundingClientRect().right > document.documentElement.clientWidth"
        assert shown.evaluate(f"[...document.querySelectorAll('.wide td')].filter({cut}).length") == 0
        marks_of = "p => p.querySelectorAll('.point, .js-line, .hm, .heatmaplayer image, .bars path').length"
        assert shown.evaluate(f"[...document.querySelectorAll('.plot')].filter(p => !({marks_of})(p)).length") == 0
        light = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light == (theme == "light")
        ink = shown.evaluate("document.querySelector('.plot text').style.fill")
        assert ink == ("rgb(22, 25, 29)" if theme == "light" else "rgb(233, 236, 240)")
        if number == 0:
            _used(shown)
        context.close()


def _overlapping(shown: Any) -> list[str]:
    """Pictures that are wider than their place, with both widths in pixels."""
    return shown.evaluate("""[...document.querySelectorAll('.plot')].flatMap(p => [...p.querySelectorAll('.main-svg')]
        .filter(s => s.getBoundingClientRect().width > p.clientWidth + 1)
        .map(s => `${p.closest('.picture').id}: ${s.getBoundingClientRect().width} in ${p.clientWidth}`))""")


def _used(shown: Any) -> None:
    """What a reader can do: choose a recipe, other tasks, hours, an order of the table, copy the recipe."""
    options = shown.locator("#run0-depth option").all_inner_texts()
    shown.select_option(
        "#run0-depth select", index=next(n for n, text in enumerate(options) if text.startswith("base"))
    )
    assert shown.inner_text("#run0-depth .words") == "task_arithmetic, lambda 1"
    shown.select_option("#run0-depth select", index=next(n for n, text in enumerate(options) if "ties 0.2" in text))
    assert shown.locator("#run0-depth .plot").count() == 2 and _overlapping(shown) == []
    shown.select_option("#run0-tradeoffs select.x", index=1)
    assert "lower is better" in shown.inner_html("#run0-tradeoffs .xtitle")
    shown.click("#progress .views button:nth-child(2)")
    assert shown.text_content("#progress .plot .xtitle") == "hours at work"
    shown.click("#trials thead th:nth-child(2) button")
    assert shown.inner_text("#trials tbody tr:first-child td:nth-child(2)") == "15"
    shown.click("#recipe .copy")
    shown.wait_for_selector("#recipe .copy:not(:text-is('Copy'))")
    shown.click(".example summary")
    assert "five" in shown.inner_text(".example .pair")
