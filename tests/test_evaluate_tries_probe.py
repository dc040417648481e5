"""The check of packed scoring: in float32 a packed pass that is wrong, in half precision one that is less exact."""

from __future__ import annotations

import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from support.tiny_models import make_model

from mergesearch.evaluate.tries import continuous, packed, probe
from mergesearch.evaluate.tries.generation import Prompt
from mergesearch.evaluate.tries.precision import head_in_float32, in_float32
from mergesearch.evaluate.tries.trie import Query, arrange

WINDOW = 12


def build(architecture: str = "llama", dtype: str = "float32", **config):
    sizes = {"vocab_size": 97, "max_position_embeddings": 128, "hidden_size": 32, **config}
    model = make_model(architecture, **sizes)
    with torch.no_grad():  # far from uniform: a wrong mask or position shows
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    return model.to(getattr(torch, dtype))


def requests(count: int = 24) -> list[Query]:
    rng = random.Random(3)
    tokens = lambda n: [rng.randrange(3, 97) for _ in range(n)]  # noqa: E731
    shots, queries = tokens(20), []
    while len(queries) < count:
        context = [*(shots if len(queries) % 8 else []), *tokens(rng.randint(4, 14))]
        for _ in range(4):
            targets = tokens(rng.randint(1, 4))
            inputs = [*context, *targets[:-1]]
            queries.append(Query(np.array(inputs, dtype=np.int32), np.array(targets, dtype=np.int32)))
    return queries


def deaf(model, monkeypatch):
    """The model takes a packed pass's mask and does not look at it."""
    forward = model.forward

    def listening_to_nothing(input_ids=None, attention_mask=None, **kwargs):
        mask = None if attention_mask is None or attention_mask.ndim == 4 else attention_mask
        return forward(input_ids=input_ids, attention_mask=mask, **kwargs)

    listening_to_nothing.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", listening_to_nothing)


class TestRefused:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_mask_that_is_ignored(self, dtype, monkeypatch):
        model = build(dtype=dtype)
        assert probe.packing(model, requests(), 512).fault is None
        deaf(model, monkeypatch)
        assert "in float32 differ from those of plain sequences" in probe.packing(model, requests(), 512).fault

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_window_that_is_ignored(self, dtype, monkeypatch):
        model = build("mistral", dtype, sliding_window=WINDOW)
        assert probe.packing(model, requests(), 512).fault is None
        monkeypatch.setattr(packed, "sliding_window", lambda model: (None, False))
        assert "in float32 differ" in probe.packing(model, requests(), 512).fault
        # requests within the window are scored right, and taken
        short = [query for query in requests() if len(query.inputs) <= WINDOW]
        assert len(short) > 1 and probe.packing(model, short, 512).fault is None

    def test_a_packed_pass_that_is_less_exact(self, monkeypatch):
        """Right in float32, and in bfloat16 further from it than the plain pass is."""
        model = build(dtype="bfloat16")
        run = probe.PackRunner.__call__

        def noisy(self, pack):
            logits = run(self, pack)
            if logits.dtype == torch.float32 and model.dtype == torch.float32:
                return logits
            generator = torch.Generator().manual_seed(len(pack.tokens))
            return logits + 0.2 * logits.float().std() * torch.randn(logits.shape, generator=generator)

        monkeypatch.setattr(probe.PackRunner, "__call__", noisy)
        assert "further from float32 than those of plain sequences" in probe.packing(model, requests(), 512).fault

    def test_what_is_no_number_is_left_open(self):
        model = build()
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
        with pytest.raises(probe.Undecided):
            probe.packing(model, requests(), 512)


class TestSample:
    def test_real_requests_of_all_lengths_with_their_neighbours(self):
        queries = requests(200)
        chosen = probe.sample(queries, 400)
        assert all(any(each is query for query in queries) for each in chosen)
        lengths = [len(each.inputs) for each in chosen]
        assert max(lengths) == max(len(query.inputs) for query in queries)
        assert sum(lengths) <= 400 and 8 <= len(chosen) <= 24 and min(lengths) < 16
        shared = max((a.inputs[:20] == b.inputs[:20]).all() for a in chosen for b in chosen if a is not b
                     and min(len(a.inputs), len(b.inputs)) > 20)  # fmt: skip
        assert shared

    def test_a_single_request_gets_another_that_leaves_it(self):
        one, other = probe.sample(requests()[:1], 100)
        assert len(one.inputs) == len(other.inputs) and (one.inputs != other.inputs).any()


class TestPrecision:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe", "gemma2"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_layer_by_layer_is_the_whole_in_float32(self, architecture, dtype):
        model = build(architecture, dtype)
        tokens = torch.arange(3, 40)[None]
        before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.named_parameters()}
        with torch.no_grad():
            rounded = model(tokens).logits
            wide = []
            for whole in (True, False):
                with in_float32(model, whole):
                    wide.append(model(tokens).logits)
            assert torch.equal(model(tokens).logits, rounded)
            exact = build(architecture, dtype).float()(tokens).logits
        assert torch.equal(wide[0], exact) and torch.equal(wide[1], exact)
        assert wide[0].dtype == torch.float32 and not torch.equal(exact, rounded.float())
        # the very tensors are back: an engine holds views of them
        assert before == {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.named_parameters()}

    def test_tensors_come_back_after_a_fault(self):
        model = build(dtype="bfloat16")
        for whole in (True, False):
            with pytest.raises(IndexError), in_float32(model, whole):
                model(torch.tensor([[5000]]))
            assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("architecture", ["llama", "gemma2"])
    def test_a_head_in_float32_makes_sums_more_exact(self, architecture):
        model, queries = build(architecture, "bfloat16"), requests()
        narrow, wide, plain = probe.distances(model, queries, 512)
        assert wide.logits.mean() < narrow.logits.mean() and wide.sums.mean() < plain.sums.mean()
        passes = arrange(queries, 512, 512)
        with torch.no_grad(), head_in_float32(model):
            assert model(torch.arange(5)[None]).logits.dtype == torch.float32
        answers = packed.log_likelihoods(model, passes, wide_head=True)
        assert answers != packed.log_likelihoods(model, passes)
        assert model(torch.arange(5)[None]).logits.dtype == torch.bfloat16

    def test_a_head_on_a_device_of_its_own_keeps_what_moves_its_input(self):
        """Of a split model accelerate's hook stands before the head."""
        model, moved = build(dtype="bfloat16"), []

        class Moving(AlignDevicesHook):
            def pre_forward(self, module, *args, **kwargs):
                moved.append(module)
                return super().pre_forward(module, *args, **kwargs)

        add_hook_to_module(model.lm_head, Moving(execution_device="cpu", io_same_device=True))
        before = dict(model.lm_head.__dict__)
        for dtype in (torch.float32, torch.float32):
            with torch.no_grad(), head_in_float32(model):
                assert model(torch.arange(5)[None]).logits.dtype == dtype
        assert len(moved) == 2
        after = model.lm_head.__dict__
        assert all(after[name] is before[name] for name in ("forward", "_old_forward"))
        with torch.no_grad():
            assert model(torch.arange(5)[None]).logits.dtype == torch.bfloat16
        assert len(moved) == 3


class TestMemory:
    def test_of_a_sequence_only_the_rows_of_its_targets_are_held(self):
        query = max(requests(), key=lambda query: len(query.inputs))
        rows = probe._plain(build(), query)
        assert rows.shape == (len(query.targets), 97)
        assert rows.untyped_storage().nbytes() == rows.numel() * 4

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
    )
    def test_where_there_is_no_room_to_try_lm_evals_way_is_left(self, error, monkeypatch):
        def full(*_):
            raise error

        monkeypatch.setattr(probe, "in_float32", full)
        assert "too little memory" in probe.packing(build(), requests(), 512).fault
        prompts = [query.inputs for query in requests()]
        assert "too little memory" in probe.generation_fault(build(), prompts, 0)


@pytest.mark.parametrize(
    ("by_rounding", "count", "looks"),
    [(True, 400, 2), (False, 400, 1), (True, 4, 1)],
    ids=["again", "wrong", "no more"],
)
def test_few_requests_do_not_refuse_by_chance(by_rounding, count, looks, monkeypatch):
    """What rounding says of few requests is asked of more, where there are more; what is wrong is refused at once."""
    seen = []

    def packing(model, queries, limit):
        seen.append(len(queries))
        return probe.Packing("too far" if len(seen) == 1 or not by_rounding else None, by_rounding=by_rounding)

    monkeypatch.setattr(probe, "_packing", packing)
    found = probe.packing(build(), requests(count), 512)
    assert len(seen) == looks and seen == sorted(set(seen))
    assert (found.fault is None) is (looks > 1)


@pytest.mark.parametrize("right", [True, False])
def test_continuous_batching_is_compared_in_float32(right, monkeypatch):
    model = build(dtype="bfloat16")
    seen = []

    class Decoder:
        """Answers in the order in which it is asked; a wrong one, as it likes."""

        def __init__(self, model, *_):
            self.model = model

        def decode(self, batch, stops, *_):
            seen.append(self.model.dtype)
            return [([7], False)] * len(getattr(batch, "prompts", batch))

    class Wrong(Decoder):
        def decode(self, batch, stops, *_):
            return [([8], False) for _ in super().decode(batch, stops)]

    monkeypatch.setattr(type(model), "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(continuous, "GreedyDecoder", Decoder)
    monkeypatch.setattr(continuous, "ContinuousDecoder", Decoder if right else Wrong)
    stops = SimpleNamespace(ends=[0], shortened=lambda most: None)
    prompts = [Prompt(number, query.inputs) for number, query in enumerate(requests(8))]
    _, why = continuous.choose(model, prompts, stops, 0, 4)
    assert (why == "its texts in float32 are others") is not right
    assert seen[0] == torch.float32 and model.dtype == torch.bfloat16
    assert not right or seen[-1] == torch.bfloat16  # what is timed is the model as it is
