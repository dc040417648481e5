"""Whether an architecture can be scored in packs: decided by trying it on the live model, not from a list.

Two questions about a few of the run's own requests. In float32, does the packed pass give the logits of plain
sequences? A wrong mask or position, or a window that is left out, shows there, where nothing is rounded away. And in
the model's own dtype, is the packed pass no further from float32 than the plain pass, whose figures are lm-eval's? In
bfloat16 both are far from it, and far from each other: how far the two are apart says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mergesearch.evaluate.tries.generation import GreedyDecoder, Prompt, PromptBatch
from mergesearch.evaluate.tries.packed import PackRunner, picked
from mergesearch.evaluate.tries.precision import head_in_float32, in_float32, is_exact
from mergesearch.evaluate.tries.trie import Passes, Query, arrange

# What rounding alone may do to a row of logits, as a share of their spread, where only the order of sums differs.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6}
# of real requests, this many tokens and requests are tried, and never fewer than two
_TOKENS = {"cpu": 768, "cuda": 8192}
_REQUESTS = 24
_ANCHORS = 8
# where rounding seems to speak against packs, so many times as many are tried: few requests may say so by chance
_LOOKS = (1, 4)
# a mean that is further from float32 counts where it is so by this share, and by so many standard errors; one row alone
# may be this many times as far as the furthest plain one, of a few rows so many times
_MORE, _ERRORS, _FURTHEST, _FURTHEST_OF_FEW = 0.1, 2.0, 2.0, 3.0


class Undecided(Exception):
    """The model's weights give no finite logits, so nothing can be compared."""


@dataclass(frozen=True)
class Packing:
    """What was found.

    Attributes:
        fault: why packs cannot be used, in a few words; None where they can.
        wide_head: whether the head has to compute in float32 for that.
        by_rounding: whether the fault is one of rounding, which few requests may show by chance.
    """

    fault: str | None
    wide_head: bool = False
    by_rounding: bool = False


@dataclass(frozen=True, eq=False)
class Distances:
    """How far a pass is from the plain one in float32.

    Attributes:
        logits: float64, [requests]; of logits as a share of their spread, the mean over a request's rows.
        furthest: the largest distance of one row.
        sums: float64, [requests]; of the summed log-likelihood, nats.
    """

    logits: np.ndarray
    furthest: float
    sums: np.ndarray


def packing(model: Any, queries: Sequence[Query], limit: int) -> Packing:
    """Whether token tries can be used with a model, and how.

    Args:
        model: a causal LM in evaluation mode.
        queries: of the run; a few of them are tried.
        limit: the most tokens of one forward pass.

    Raises:
        Undecided: see there.
    """
    tokens, chosen, found = _TOKENS.get(model.device.type, 1024), 0, Packing(None)
    for many in _LOOKS:
        few = sample(queries, many * tokens, many * _REQUESTS)
        if len(few) == chosen:
            break
        chosen = len(few)
        found = _tried(lambda few=few: _packing(model, few, limit))
        if not found.by_rounding:
            break
    return found


def generation_fault(model: Any, prompts: Sequence[np.ndarray], pad: int) -> str | None:
    """Why greedy decoding with a shared beginning cannot be used with a model; None where it can.

    Args:
        model: a causal LM in evaluation mode.
        prompts: token ids, int32, [n] each; the longest of them is tried, and one made of it.
        pad: the token that fills up a batch.

    Raises:
        Undecided: see there.
    """
    longest = max(prompts, key=len)
    return _tried(lambda: Packing(_steps_fault(model, longest, pad))).fault


def _tried(compare: Callable[[], Packing]) -> Packing:
    try:
        return compare()
    except Undecided:
        raise
    except Exception as error:
        # lm-eval's own way may fit where the model in float32 beside itself does not
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error):
            return Packing("there is too little memory to try anything else")
        return Packing(f"the model does not take it ({type(error).__name__}: {' '.join(str(error).split())[:160]})")


def sample(queries: Sequence[Query], tokens: int, most: int = _REQUESTS) -> list[Query]:
    """Some of the queries: the longest and others of all lengths, each with one that begins like it where there is one.

    Args:
        queries: in any order.
        tokens: about as many as their inputs may have together; two queries are taken whatever they have.
        most: how many queries.
    """
    distinct = {query.inputs.tobytes(): query for query in queries}
    # big-endian bytes sort as the tokens do: neighbours share the longest beginnings
    ordered = sorted(distinct.values(), key=lambda query: query.inputs.astype(">u4").tobytes())
    by_length = sorted(range(len(ordered)), key=lambda place: -len(ordered[place].inputs))
    anchors = by_length[:: max(1, len(by_length) // max(_ANCHORS, most // 2))]
    # from both ends to the middle: where tokens run out, long and short ones are there
    anchors = [anchor for pair in zip(anchors, reversed(anchors), strict=True) for anchor in pair]
    places = [
        place for anchor in anchors for place in (anchor, anchor + 1 if anchor + 1 < len(ordered) else anchor - 1)
    ]
    chosen: list[Query] = []
    used = 0
    for place in dict.fromkeys(place for place in places if place >= 0):
        query = ordered[place]
        if len(chosen) >= most or (len(chosen) >= 2 and used + len(query.inputs) > tokens):
            continue
        chosen.append(query)
        used += len(query.inputs)
    return chosen if len(chosen) > 1 else [*chosen, _forked(chosen[0])]


def _forked(query: Query) -> Query:
    """Of a single request another one, that leaves it half way: reversed tokens, whatever the vocabulary is."""
    half = len(query.inputs) // 2
    inputs = np.concatenate([query.inputs[:half], query.inputs[half:][::-1]])
    return Query(inputs, query.targets)


# -- log-likelihoods ----------------------------------------------------------------------------------------------


def _packing(model: Any, queries: Sequence[Query], limit: int) -> Packing:
    arrangements = _arranged(queries, limit)
    with in_float32(model):
        exact = [_plain(model, query) for query in queries]
        fault = _structure(model, queries, arrangements, exact)
    if fault is not None or is_exact(model):
        return Packing(fault)
    theirs = _plain_distances(model, queries, exact)
    found: list[Packing] = []
    for wide in (False, True):
        ours = _packed_distances(model, queries, arrangements, exact, wide)
        fault = _further(ours, theirs)
        found.append(Packing(fault, wide, by_rounding=fault is not None))
        if found[-1].fault is None and ours.sums.mean() <= theirs.sums.mean():
            return found[-1]
    narrow, wide_head = found
    return narrow if wide_head.fault is not None and narrow.fault is None else wide_head


def distances(model: Any, queries: Sequence[Query], limit: int) -> tuple[Distances, Distances, Distances]:
    """How far from the plain pass in float32 three others are, on all of the queries: the packed pass, the packed pass
    with its head in float32, and the plain pass in the model's dtype.

    Args:
        model, limit: as for `packing`.
        queries: each is computed in full.
    """
    with in_float32(model):
        exact = [_plain(model, query) for query in queries]
    arranged = _arranged(queries, limit)
    narrow, wide = (_packed_distances(model, queries, arranged, exact, head) for head in (False, True))
    return narrow, wide, _plain_distances(model, queries, exact)


def _arranged(queries: Sequence[Query], limit: int) -> list[Passes]:
    """Once side by side, once with the shared beginnings in the cache."""
    return [arrange(queries, limit, limit), arrange(queries, limit, 1)]


def _structure(
    model: Any, queries: Sequence[Query], arrangements: Sequence[Passes], exact: Sequence[torch.Tensor]
) -> str | None:
    """What is wrong with the packed pass beside rounding; the model is in float32 here."""
    error = max(
        _difference(row, exact[query][place])
        for passes in arrangements
        for query, place, row in _rows(model, passes, queries)
    )
    return _wrong(error, _allowed(model, queries, exact))


def _rows(model: Any, passes: Passes, queries: Sequence[Query]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(query, place among its targets, logits) for every row that is asked for."""
    run = PackRunner(model)
    for pack in passes.packs:
        logits = run(pack)
        depths = pack.positions[pack.rows]
        for row, _, query in np.unique(pack.picks, axis=0).tolist():
            asked = queries[query]
            yield query, int(depths[row]) - len(asked.inputs) + len(asked.targets), logits[row]


def _packed_distances(
    model: Any, queries: Sequence[Query], arrangements: Sequence[Passes], exact: Sequence[torch.Tensor], wide: bool
) -> Distances:
    apart: list[list[float]] = [[] for _ in arrangements for _ in queries]
    sums = np.zeros((len(arrangements), len(queries)))
    with head_in_float32(model) if wide else nullcontext():
        for number, passes in enumerate(arrangements):
            for query, place, logits in _rows(model, passes, queries):
                apart[number * len(queries) + query].append(_difference(logits, exact[query][place]))
                pick = np.array([[0, queries[query].targets[place], query]])
                sums[number, query] += float(picked(logits[None], pick)[0])
    true = np.array([_sum(rows, query) for rows, query in zip(exact, queries, strict=True)])
    return _made(apart, np.abs(sums - true).reshape(-1))


def _plain_distances(model: Any, queries: Sequence[Query], exact: Sequence[torch.Tensor]) -> Distances:
    """As lm-eval sums: the logarithm of the softmax in the model's dtype. Twice, beside two arrangements."""
    plain = [_plain(model, query) for query in queries]
    apart = [
        [_difference(a, b) for a, b in zip(own, true, strict=True)] for own, true in zip(plain, exact, strict=True)
    ]
    wrong = [abs(_sum(own, q) - _sum(true, q)) for own, true, q in zip(plain, exact, queries, strict=True)]
    return _made([*apart, *apart], np.array([*wrong, *wrong]))


def _made(apart: Sequence[Sequence[float]], sums: np.ndarray) -> Distances:
    return Distances(np.array([np.mean(rows) for rows in apart]), max(map(max, apart)), sums)


def _sum(rows: torch.Tensor, query: Query) -> float:
    """The summed log-likelihood of the targets from their rows [targets, vocabulary], as lm-eval computes it."""
    targets = torch.from_numpy(query.targets.astype(np.int64)).to(rows.device)
    return float(rows.log_softmax(dim=-1).gather(1, targets[:, None]).sum())


def _further(ours: Distances, theirs: Distances) -> str | None:
    """In which way the packed pass is further from float32 than the plain one; None where it is not."""
    if _is_further(ours.logits, theirs.logits) or ours.furthest > _FURTHEST * theirs.furthest:
        return (
            "its logits are further from float32 than those of plain sequences: "
            f"mean {ours.logits.mean():.2g} of their spread, largest {ours.furthest:.2g} "
            f"(plain {theirs.logits.mean():.2g}, {theirs.furthest:.2g})"
        )
    if _is_further(ours.sums, theirs.sums):
        return (
            f"its log-likelihoods are further from float32 than those of plain sequences: mean {ours.sums.mean():.2g} "
            f"nats (plain {theirs.sums.mean():.2g})"
        )
    return None


def _is_further(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether a mean is larger beyond what chance does to so few requests; both [n], of the same requests."""
    more = ours - theirs
    return more.mean() > max(_MORE * theirs.mean(), _ERRORS * more.std() / len(more) ** 0.5)


# -- generation ---------------------------------------------------------------------------------------------------


def _steps_fault(model: Any, longest: np.ndarray, pad: int) -> str | None:
    half = len(longest) // 2
    shorter = np.concatenate([longest[:half], longest[half:][::-1][: max(1, (len(longest) - half) // 2)]])
    texts = [longest, shorter]
    batch = PromptBatch([Prompt(number, text) for number, text in enumerate(texts)], half)
    following = [int(text[0]) for text in texts]
    # the rows after the prompt and after one more token
    longer = [Query(np.append(t, token), np.zeros(2)) for t, token in zip(texts, following, strict=True)]

    def steps() -> list[torch.Tensor]:
        first, second = GreedyDecoder(model, pad).first_logits(batch, following)
        return [logits[row] for row in range(2) for logits in (first, second)]

    with in_float32(model):
        plain = [_plain(model, query) for query in longer]
        exact = [row for rows in plain for row in rows]
        error = max(_difference(got, wanted) for got, wanted in zip(steps(), exact, strict=True))
        fault = _wrong(error, _allowed(model, longer, plain))
    if fault is not None or is_exact(model):
        return fault
    ours = [_difference(got, wanted) for got, wanted in zip(steps(), exact, strict=True)]
    own = [row for query in longer for row in _plain(model, query)]
    theirs = [_difference(got, wanted) for got, wanted in zip(own, exact, strict=True)]
    if max(ours) <= _FURTHEST_OF_FEW * max(theirs):
        return None
    return (
        f"its logits are further from float32 than those of plain sequences: {max(ours):.2g} of their spread "
        f"(plain {max(theirs):.2g})"
    )


# -- both ---------------------------------------------------------------------------------------------------------


def _plain(model: Any, query: Query) -> torch.Tensor:
    """The logits of a sequence alone, as any user of the model gets them, at the rows of its targets."""
    # a copy: a view would keep the logits of the whole sequence
    return _batch(model, [query.inputs])[0, -len(query.targets) :].clone()


@torch.no_grad()
def _batch(model: Any, texts: Sequence[np.ndarray]) -> torch.Tensor:
    width = max(len(text) for text in texts)
    padded = np.stack([np.pad(text, (0, width - len(text))) for text in texts]).astype(np.int64)
    return model(torch.from_numpy(padded).to(model.device)).logits


def _allowed(model: Any, queries: Sequence[Query], exact: Sequence[torch.Tensor]) -> float:
    """What another batch makes of the same sequences, or what rounding may do, whichever is more."""
    texts = [query.inputs for query in queries[:2]]
    together = _batch(model, texts)
    noise = max(_difference(together[row, len(texts[row]) - 1], exact[row][-1]) for row in range(2))
    return max(4 * noise, _ROUNDING.get(model.dtype, 1e-4))


def _wrong(error: float, allowed: float) -> str | None:
    """What is wrong with logits in float32 that are this far from those of plain sequences; None: it is rounding."""
    if error <= allowed:
        return None
    return (
        f"its logits in float32 differ from those of plain sequences by {error:.2g} of their spread "
        f"({allowed:.2g} is rounding)"
    )


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two rows of logits as a share of the spread of the second; some models mask a part with -inf."""
    logits, expected = logits.float(), expected.float()
    if torch.isnan(expected).any() or torch.isposinf(expected).any():
        raise Undecided("the model's logits are not finite")
    open_ = torch.isfinite(expected)
    if not torch.equal(open_, torch.isfinite(logits)):
        return float("inf")
    expected, logits = expected[open_], logits[open_]
    spread = (expected - expected.mean()).norm()
    return float((logits - expected).norm() / spread.clamp(min=1e-12))
