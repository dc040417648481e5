from __future__ import annotations

import math

import pytest

pytest.importorskip("lm_eval")

import torch
from support.evaluate_tiny import make_model, make_tokenizer, metric, write_task, write_tasks

from mergesearch.config import TaskConfig
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.losses import MIX, Losses
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import load

EVERY = {
    "tiny_choice": "acc",
    "tiny_shots": "acc",
    "tiny_fixed": "acc_norm",
    "tiny_last": "perplexity",
    "tiny_zero": "acc",
    "tiny_copy": "exact_match,word",
    "tiny_passages": "bits_per_byte",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tasks(folder)
    write_task(
        folder,
        "tiny_odd",
        data="choice",
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="choices",
        doc_to_target="question",
        metric_list=[metric("acc")],
    )
    return folder


def scorer_of(folder, names, model):
    tasks = load([TaskConfig(task=name, metric=EVERY.get(name)) for name in names], [str(folder / "tasks")])
    documents = {task.label: range(task.size) for task in tasks}
    return Scorer(model, make_tokenizer(), tasks, documents, batch_size=4, scoring="lm_eval"), documents


@pytest.fixture(scope="module")
def scored(folder):
    model = make_model(0)
    scorer, documents = scorer_of(folder, EVERY, model)
    scorer.score()
    return scorer, {label: list(ids) for label, ids in documents.items()}, model


def counted(missed, kind, mean=None):
    """What minus a log-probability counts, by the definitions."""
    right = math.exp(-missed)
    return {
        "cross_entropy": missed,
        "expected": 1 - right,
        "mixed": 1 - right + MIX * (missed if mean is None else mean),
    }[kind]


@pytest.mark.parametrize("kind", ["cross_entropy", "expected", "mixed"])
def test_losses_are_those_of_lm_evals_own_answers(scored, kind):
    scorer, documents, model = scored
    found = Losses(scorer, model, batch_size=5, kind=kind).loss(documents)
    for document in scorer.documents():
        requests, doc = document.requests, document.requests[0].doc
        if document.leaf.OUTPUT_TYPE == "multiple_choice":
            answers = torch.tensor([request.resps[0][0] for request in requests], dtype=torch.float64)
            lengths = [len(choice) if document.task.metric == "acc_norm" else 1 for choice in doc["choices"]]
            wanted = -(answers / torch.tensor(lengths)).log_softmax(0)[doc["answer"]].item()
            wanted = counted(wanted, kind)
        elif document.leaf.OUTPUT_TYPE == "loglikelihood":
            wanted = -requests[0].resps[0][0] / len(doc["last"].encode())
        elif document.leaf.OUTPUT_TYPE == "loglikelihood_rolling":
            wanted = -requests[0].resps[0] / len(doc["text"].encode()) / math.log(2)
        else:
            wanted = copied(model, doc, kind)
        loss = found[document.task.label][document.number].item()
        assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-4), (document.task.label, document.number)


@torch.no_grad()
def copied(model, doc, kind):
    """The target after the prompt, and the blank line that ends an answer; one token a byte."""
    tokenizer = make_tokenizer()
    prompt, target = tokenizer.encode(doc["prompt"]), tokenizer.encode(f" {doc['target']}\n\n")
    logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    missed = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")
    return missed.mean().item() if kind == "cross_entropy" else counted(missed.sum().item(), kind, missed.mean().item())


def entropy(logprobs):
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def test_entropies_are_those_of_the_models_own_answers(scored):
    """Of the choices, of the first token of an answer, of every token of a text, whatever is right."""
    scorer, documents, model = scored
    found = Losses(scorer, model, batch_size=5, kind="entropy").loss(documents)
    tokenizer = make_tokenizer()
    for document in scorer.documents():
        requests, doc = document.requests, document.requests[0].doc
        kind = document.leaf.OUTPUT_TYPE
        if kind == "multiple_choice":
            answers = torch.tensor([request.resps[0][0] for request in requests], dtype=torch.float64)
            lengths = [len(choice) if document.task.metric == "acc_norm" else 1 for choice in doc["choices"]]
            wanted = entropy((answers / torch.tensor(lengths)).log_softmax(0))
        elif kind == "generate_until":
            logits = model(torch.tensor([tokenizer.encode(doc["prompt"])])).logits[0, -1]
            wanted = entropy(logits.log_softmax(-1))
        elif kind == "loglikelihood_rolling":
            tokens = [tokenizer.eos_token_id, *tokenizer.encode(doc["text"])]
            if len(tokens) > model.config.max_position_embeddings:
                continue
            wanted = entropy(model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)).mean()
        else:
            continue
        loss = found[document.task.label][document.number].item()
        assert loss == pytest.approx(wanted.item(), rel=1e-4, abs=1e-4), (document.task.label, document.number)


def test_entropies_need_no_answers(folder):
    scorer, documents = scorer_of(folder, ["tiny_odd"], make_model(0))
    losses = Losses(scorer, make_model(0), kind="entropy")
    assert losses.known(documents) == {"tiny_odd": list(documents["tiny_odd"])}
    assert all(0 < loss < 10 for loss in losses.loss(documents)["tiny_odd"].tolist())


def test_gradients_of_entropies_against_finite_differences(folder):
    names = ["tiny_choice", "tiny_copy", "tiny_passages"]
    model = make_model(0).double()
    scorer, _ = scorer_of(folder, names, model)
    with torch.no_grad():  # a token of zeros has no direction, and the norm after it none of its own
        table = model.get_input_embeddings()
        table.weight.add_(0.3 * torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(1)))
        table.padding_idx = None
    losses, some = Losses(scorer, model, kind="entropy"), {name: [0, 1] for name in names}
    generator = torch.Generator().manual_seed(0)
    weights = [p.requires_grad_() for p in model.parameters()]
    ways = [torch.randn(w.shape, generator=generator, dtype=torch.float64) * 1e-2 for w in weights]

    def total():
        return sum(part.sum() for part in losses.loss(some).values())

    total().backward()
    slope = sum((w.grad * way).sum() for w, way in zip(weights, ways, strict=True)).item()
    ends, h = [], 1e-2
    with torch.no_grad():
        for step in (h, -2 * h):
            for w, way in zip(weights, ways, strict=True):
                w.add_(way * step)
            ends.append(total().item())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-2)


def test_any_order_and_any_batch_give_the_same(scored):
    scorer, _, model = scored
    losses = Losses(scorer, model, batch_size=3)
    some = losses.loss({"tiny_choice": [7, 2, 3], "tiny_copy": [5]})
    losses.batch_size = 1
    for label, ids in (("tiny_choice", [7, 2, 3]), ("tiny_copy", [5])):
        alone = torch.stack([losses.loss({label: [number]})[label][0] for number in ids])
        assert torch.allclose(some[label], alone, rtol=1e-4)
    assert some["tiny_choice"].dtype == torch.float32


def test_gradients_flow_and_the_head_sees_only_what_it_needs(scored):
    scorer, _, model = scored
    rows = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    parameter = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    try:
        Losses(scorer, model).loss({"tiny_choice": [0]})["tiny_choice"].sum().backward()
        assert parameter.grad.abs().sum() > 0
    finally:
        handle.remove()
        model.zero_grad()
    choices = next(d for d in scorer.documents()).requests
    assert rows == [sum(len(request.args[1].encode()) for request in choices)]


def test_out_of_memory_halves_and_forgets(scored):
    scorer, _, model = scored
    losses, taken, undone = Losses(scorer, model, batch_size=4), [], []

    def take(label, ids, found):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("too much")
        taken.extend(ids)

    losses.walk({"tiny_choice": range(5)}, take, lambda: undone.append(None))
    assert sorted(taken) == list(range(5)) and len(undone) == 2 and losses.batch_size == 1

    def never(*_):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(CandidateError, match="one document at a time"):
        losses.walk({"tiny_choice": [0]}, never)


def test_tasks_share_batches_within_so_many_tokens(scored, monkeypatch):
    """The same losses and gradients, in fewer passes over the weights; with no room for it, a task at a time."""
    scorer, everything, model = scored
    documents = {label: ids[:2] for label, ids in everything.items()}

    def taken(tokens):
        monkeypatch.setattr("mergesearch.evaluate.losses.MOST_TOKENS", tokens)
        found, batches = {}, []

        def take(pairs, losses):
            batches.append({label for label, _ in pairs})
            found.update(zip(pairs, losses.tolist(), strict=True))

        with torch.no_grad():
            Losses(scorer, model).walk_together(documents, take)
        return found, batches

    together, batches = taken(1_000_000)
    assert batches == [set(documents)]
    apart, batches = taken(1)
    assert all(len(tasks) == 1 for tasks in batches)
    with torch.no_grad():
        losses = Losses(scorer, model).loss(documents)
    wanted = {(label, n): float(x) for label, ids in documents.items() for n, x in zip(ids, losses[label], strict=True)}
    assert together == pytest.approx(wanted, rel=1e-4) and apart == pytest.approx(wanted, rel=1e-4)


def test_a_task_without_known_answers_is_named(folder):
    model = make_model(0)
    scorer, _ = scorer_of(folder, ["tiny_choice", "tiny_odd"], model)
    with pytest.raises(UserError, match="task 'tiny_odd': its documents do not tell the right answer"):
        Losses(scorer, model)


def test_a_document_of_others_is_refused(scored):
    scorer, _, model = scored
    with pytest.raises(UserError, match="document 99 is not among"):
        Losses(scorer, model).loss({"tiny_choice": [99]})
