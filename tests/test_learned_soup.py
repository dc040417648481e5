from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.soups import TargetLosses
from support.tiny_models import make_model

from mergesearch.engine.live import Engine
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Rule
from mergesearch.schema import validate
from mergesearch.search.soup import adam
from mergesearch.search.soup.adam import hold_apart, learn, parent_scales, step_seconds
from mergesearch.search.soup.coefficients import Block, Coefficients
from mergesearch.search.soup.learning import minibatch, size
from mergesearch.search.soup.settings import SoupSettings

DOCUMENTS = {"one": list(range(16)), "two": list(range(8))}
LEARN, STOP = hold_apart(DOCUMENTS, 0.25, 0)
GROUPS = [Block((0, 0)), Block((1, 1))]
SETTINGS = SoupSettings(steps=30, learning_rate=0.1, documents=8, look_every=5, patience=99)


def bold(name, model):
    """Task vectors that change what the model says."""
    if name != "base":
        generator = torch.Generator().manual_seed(ord(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))


class Case:
    def __init__(self, tiny, cells="recipe", wanted=(0.7, 0.3), **options):
        pool = tiny.load()
        self.engine = Engine(pool, "float32")
        self.coefficients = Coefficients(tiny.recipe(), pool.infos, cells, **options)
        self.wanted = self.coefficients.full(0) + np.array(wanted)
        self.engine.load(self.coefficients.recipe(self.wanted))
        self.losses = TargetLosses(self.engine.model, DOCUMENTS, sharpness=3.0)

    def learn(self, settings=SETTINGS, start=0.4, **options):
        return learn(
            self.coefficients,
            self.coefficients.full(start),
            self.engine,
            self.losses,
            settings,
            **{"seed": 0, "documents": LEARN, "validation": STOP, **options},
        )

    def score(self, documents):
        with torch.no_grad():
            return -sum(float(loss.mean()) for loss in self.losses.loss(documents).values())


@pytest.fixture
def tiny(tiny_pool):
    return tiny_pool("llama", models=2, edit=bold)


@pytest.mark.parametrize(
    ("cells", "parameterisation"),
    [("recipe", "free"), (GROUPS, "free"), (GROUPS, "softmax")],
    ids=["recipe", "group", "softmax"],
)
def test_it_finds_a_mix_known_by_construction(tiny, cells, parameterisation):
    case = Case(tiny, cells, parameterisation=parameterisation)
    asked = [p.requires_grad for p in case.engine.model.parameters()]
    learned = case.learn()
    assert np.abs(learned.values - case.wanted).max() < 0.05
    assert learned.recipe.id == case.coefficients.recipe(learned.values).id
    assert all(p.grad is None for p in case.engine.model.parameters())
    # left without, as torch is, a model generates at half the speed
    assert [p.requires_grad for p in case.engine.model.parameters()] == asked and all(asked)
    assert not any(module.training for module in case.engine.model.modules())


def test_without_documents_held_apart_all_are_learned_from_and_all_steps_taken(tiny):
    told = []
    case = Case(tiny)
    learned = case.learn(documents=DOCUMENTS, validation={}, spent=told.append)
    assert np.abs(learned.values - case.wanted).max() < 0.05
    assert learned.note == "all 30 steps" and [look["validation"] for look in learned.history] == [None] * 7
    # the start's losses, which say what each task's count, on a quarter; then nothing but the steps
    settings = SETTINGS.model_copy(update={"validation": 0})
    assert sum(told) == learned.documents == 4 + 2 + 3 * 30 * 16
    assert settings.usual_cost("expected", 0, [16, 8]) == learned.documents
    few = settings.model_copy(update={"validation_documents": 1})
    assert few.usual_cost("expected", 0, [16, 8]) == case.learn(few, documents=DOCUMENTS, validation={}).documents


def test_linear_and_each_tensor(tiny):
    case = Case(tiny, method="linear")
    learned = case.learn()
    assert np.abs(learned.values / learned.values.sum() - case.wanted).max() < 0.05
    case = Case(tiny, "tensor")
    learned = case.learn(SETTINGS.model_copy(update={"steps": 15}))
    assert learned.history[-1]["validation"] < 0.25 * learned.history[0]["validation"]


class Unsure(TargetLosses):
    """The entropy of what the model says of each token, whatever is right."""

    kind = "entropy"

    def walk(self, documents, take, undo=lambda: None):
        for label, ids in documents.items():
            logprobs = self._logits(torch.stack([self.tokens[label][n] for n in ids])).log_softmax(-1)
            take(label, list(ids), -(logprobs.exp() * logprobs).sum(-1).mean(-1))


def louder(name, model):
    """Model a is thrice as sure of what the base says."""
    if name == "a":
        with torch.no_grad():
            for parameter, own in zip(model.parameters(), make_model().parameters(), strict=True):
                parameter.copy_(own)
            model.lm_head.weight.mul_(3.0)


def test_entropy_makes_sure_of_what_is_right_and_of_what_is_wrong_alike(tiny_pool):
    """One soup, judged twice: where the base leans to the right answer it helps, and where it leans away it harms."""
    case = Case(tiny_pool("llama", models=2, edit=louder), wanted=(0.0, 0.0), low=0.0, high=[1.0, 0.0])
    losses = case.losses = Unsure(case.engine.model, DOCUMENTS, sharpness=8.0)
    right = {n: shares.argmax(-1) for n, shares in losses.wanted["one"].items()}
    wrong = {n: shares.argmin(-1) for n, shares in losses.wanted["one"].items()}

    def missed(answers):
        with torch.no_grad():
            tokens = torch.stack([losses.tokens["one"][n] for n in answers])
            logits = losses._logits(tokens).flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, torch.stack(list(answers.values())).flatten()).item()

    case.engine.load(case.coefficients.recipe(case.coefficients.full([0.3, 0.0])))
    before = missed(right), missed(wrong)
    learned = case.learn(start=[0.3, 0.0])
    case.engine.load(learned.recipe)
    assert learned.history[-1]["validation"] < learned.history[0]["validation"]
    assert learned.values[0, 0] > 0.4
    assert missed(right) < before[0] and missed(wrong) > before[1]


def test_the_cost_is_stated(tiny):
    told = []
    learned = Case(tiny).learn(SoupSettings(steps=10, documents=4, look_every=5, learning_rate=0.05), spent=told.append)
    assert sum(told) == learned.documents == 3 * size(STOP) + 10 * 3 * 8
    assert [look["step"] for look in learned.history] == [0, 5, 10]


@pytest.mark.parametrize("at", [3, 9])
def test_after_a_kill_it_goes_on_and_ends_the_same(tiny, tmp_path, at, monkeypatch):
    monkeypatch.setattr(adam, "SAVE_EVERY", 2)
    settings = SETTINGS.model_copy(update={"steps": 10})
    whole = Case(tiny).learn(settings)
    case, steps = Case(tiny), []

    def killed():
        steps.append(None)
        if len(steps) > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.learn(settings, state=tmp_path / "s.json", stop=lambda: killed() or False)
    assert all(p.grad is None for p in case.engine.model.parameters())
    again = Case(tiny).learn(settings, state=tmp_path / "s.json")
    assert again.values.tolist() == whole.values.tolist()
    assert (again.history, again.documents, again.note) == (whole.history, whole.documents, whole.note)
    told = []
    assert Case(tiny).learn(settings, state=tmp_path / "s.json", spent=told.append).values.tolist() == (
        whole.values.tolist()
    )
    assert told == [whole.documents]


def test_after_a_stop_it_may_go_on(tiny, tmp_path):
    settings, left = SETTINGS.model_copy(update={"steps": 12}), [7]

    def stop():
        left[0] -= 1
        return left[0] < 0

    part = Case(tiny).learn(settings, state=tmp_path / "s.json", stop=stop)
    assert part.note == "stopped from outside" and part.history[-1]["step"] == 5 and part.history[-1]["kept"]
    steps = []
    at_the_look = Case(tiny).learn(settings, stop=lambda: steps.append(None) or len(steps) > 5)
    assert part.values.tolist() == at_the_look.values.tolist()
    assert json.loads((tmp_path / "s.json").read_text())["step"] == 7
    whole = Case(tiny).learn(settings)
    assert Case(tiny).learn(settings, state=tmp_path / "s.json").values.tolist() == whole.values.tolist()


def test_a_state_of_something_else_is_refused(tiny, tmp_path):
    Case(tiny).learn(SoupSettings(steps=1), state=tmp_path / "s.json")
    with pytest.raises(UserError, match="other settings"):
        Case(tiny).learn(SoupSettings(steps=1), seed=1, state=tmp_path / "s.json")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(UserError, match="no state"):
        Case(tiny).learn(SoupSettings(steps=1), state=tmp_path / "s.json")


def test_steps_that_lead_away_end_it_with_what_was_kept(tiny):
    case = Case(tiny)
    settings = SETTINGS.model_copy(update={"learning_rate": 3.0, "look_every": 1, "patience": 3})
    learned = case.learn(settings, start=case.wanted)
    assert learned.note == "worse at 3 looks in a row, at step 3"
    assert [look["kept"] for look in learned.history] == [True, False, False, False]
    assert learned.values.tolist() == case.wanted.tolist()


def test_a_loss_that_is_no_number_ends_with_what_was_kept(tiny):
    case = Case(tiny)
    case.losses.breaks_at = 20
    learned = case.learn()
    assert "no finite number" in learned.note and len(learned.history) > 1
    assert np.isfinite(learned.values).all() and learned.history[-1]["kept"]
    with torch.no_grad():
        case.engine.load(learned.recipe)
        case.losses.calls, case.losses.breaks_at = 0, 99
        found = {label: float(loss.mean()) for label, loss in case.losses.loss(STOP).items()}
    assert found == pytest.approx(learned.history[-1]["losses"])
    case.losses.calls, case.losses.breaks_at = 0, 1
    with pytest.raises(CandidateError, match="start"):
        case.learn()


def test_frozen_tensors_stay_and_the_others_learn(tiny):
    rule = Rule(components=("embedding", "norm"), method="task_arithmetic", parameters={"weight": 0.0})
    case = Case(tiny, "tensor", frozen=[rule])
    learned = case.learn(SETTINGS.model_copy(update={"steps": 10}))
    assert learned.recipe.rules[0] == rule
    assert learned.history[-1]["validation"] < learned.history[0]["validation"]


def test_a_gain_within_noise_is_no_small_unit(tiny):
    case = Case(tiny)
    noise = torch.tensor([0.1, -0.1]).repeat(200)

    class Flat:
        """The base's loss is 1, each model's less by 1e-4 and noise of 0.1."""

        asked = 0

        def known(self, documents):
            return documents

        def loss(self, documents):
            self.asked += 1
            return {"one": torch.ones(400) if self.asked == 1 else 1 - 1e-4 + noise}

    scales = parent_scales(case.coefficients, case.engine, Flat(), {"one": list(range(400))})
    assert scales["one"] == pytest.approx(2 * 0.1 / 20, rel=1e-3)


def test_frozen_and_bounded_weights(tiny):
    low, high = np.array([[0.2, -1.0], [-1.0, -1.0]]), np.array([[0.2, 0.25], [2.0, 2.0]])
    learned = Case(tiny, GROUPS, low=low, high=high).learn(SETTINGS.model_copy(update={"steps": 20}))
    assert learned.values[0, 0] == 0.2 and learned.values[0, 1] <= 0.25
    case = Case(tiny, GROUPS, low=[[0.4], [-1.0]], high=[[0.4], [2.0]])
    learned = case.learn(SETTINGS.model_copy(update={"steps": 5}))
    assert (learned.values[0] == 0.4).all() and (learned.values[1] != 0.4).all()
    with pytest.raises(UserError, match="frozen"):
        Case(tiny, low=0.4, high=0.4).learn()


def test_checkpointing_gives_the_same(tiny_pool):
    settings = SoupSettings(steps=4, look_every=2, learning_rate=0.05)
    for architecture in ("llama", "gpt2"):
        tiny = tiny_pool(architecture, architecture, models=2, edit=bold)
        one = Case(tiny).learn(settings)
        case = Case(tiny)
        other = case.learn(settings.model_copy(update={"checkpointing": True}))
        assert np.allclose(one.values, other.values, atol=1e-6)
        modules = list(case.engine.model.modules())
        assert not any(module.training or getattr(module, "gradient_checkpointing", False) for module in modules)


def test_cma_es_finds_the_same(tiny, tmp_path):
    settings = SoupSettings(optimizer="cmaes", candidates=60)
    case, scored = Case(tiny), []

    def score(documents):
        scored.append(size(documents))
        if len(scored) == 30:
            raise KeyboardInterrupt
        return case.score(documents)

    with pytest.raises(KeyboardInterrupt):
        case.learn(settings, score=score, state=tmp_path / "s.json")
    learned = case.learn(settings, score=score, state=tmp_path / "s.json")
    assert len(scored) == settings.candidates + 1  # one was cut off: each that was scored is kept
    assert np.abs(learned.values - case.wanted).max() < 0.1
    assert set(scored) == {size(DOCUMENTS)} and learned.documents == settings.candidates * size(DOCUMENTS)
    assert case.learn(settings, score=case.score).values.tolist() == learned.values.tolist()


def test_the_scale_of_the_parents(tiny):
    case = Case(tiny, wanted=(1.0, 0.0))
    scales = parent_scales(case.coefficients, case.engine, case.losses, STOP)
    case.engine.load(case.coefficients.recipe(case.coefficients.full(0)))
    base = {label: float(loss.mean()) for label, loss in case.losses.loss(STOP).items()}
    # the first model is what the documents are made by
    assert scales == pytest.approx(base, rel=1e-3)


def test_documents_are_drawn_evenly():
    assert not set(LEARN["one"]) & set(STOP["one"]) and len(STOP["one"]) == 4
    drawn = [minibatch(LEARN, step, 4, 0)["one"] for step in range(3)]
    assert sorted(number for part in drawn for number in part) == LEARN["one"]
    assert minibatch(LEARN, 1, 4, 0) == minibatch(LEARN, 1, 4, 0) != minibatch(LEARN, 1, 4, 1)


def test_what_is_refused(tiny):
    case = Case(tiny)
    with pytest.raises(UserError, match="needs a score"):
        case.learn(SoupSettings(optimizer="cmaes"))
    with pytest.raises(UserError, match="known right answer"):
        case.learn(validation={"one": [], "two": [1]})
    with pytest.raises(UserError, match="needs 2"):
        hold_apart({"one": [3]}, 0.5, 0)
    with pytest.raises(UserError, match=r"learning_rate is 0: it must be in \(0, inf\)"):
        validate(SoupSettings, {"learning_rate": 0}, "search.learned_soup")


def test_every_step_is_told_and_a_step_alone_can_be_timed(tiny):
    told = []
    learned = Case(tiny).learn(stepped=told.append)
    assert [(each.step, each.of) for each in told] == [(n, 30) for n in range(31)]
    assert told[-1].loss == learned.history[-1]["validation"] and told[4].loss == told[0].loss
    by_score = SETTINGS.model_copy(update={"optimizer": "cmaes", "candidates": 6})
    told.clear()
    case = Case(tiny)
    case.learn(by_score, score=case.score, stepped=told.append)
    assert [(each.step, each.of) for each in told] == [(n, 6) for n in range(1, 7)]
    assert [each.score for each in told] == sorted(each.score for each in told)
    seconds = step_seconds(case.coefficients, case.coefficients.full(0.4), case.engine, case.losses, SETTINGS, LEARN)
    assert seconds > 0 and case.losses.batch_size == 16
