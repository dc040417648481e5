"""The forward passes of a token trie, against a naive reading of it; no model."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mergesearch.evaluate.tries.trie import Passes, Query, arrange


def query(inputs, targets):
    return Query(np.array(inputs, dtype=np.int32), np.array(targets, dtype=np.int32))


def read(passes: Passes) -> dict[int, list[tuple[tuple[int, ...], int]]]:
    """What each query is told: (all tokens that are seen, the target) for every pick, by running the packs on paper."""
    found: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    cache: list[int] = []
    for pack in passes.packs:
        assert len(pack.tokens) and pack.cached <= len(cache)
        cache = cache[: pack.cached]
        for row, target, which in pack.picks:
            node = pack.rows[row]
            ancestors = [j for j in range(node + 1) if node < pack.ends[j]]
            seen = cache + pack.tokens[ancestors].tolist()
            assert pack.positions[ancestors].tolist() == list(range(pack.cached, len(seen)))
            found.setdefault(int(which), []).append((tuple(seen), int(target)))
        assert np.array_equal(pack.rows, np.unique(pack.rows))
        cache = cache + pack.tokens.tolist() if pack.keep else cache
    return found


def asked(queries):
    return {
        number: [
            (tuple(each.inputs[: len(each.inputs) - len(each.targets) + 1 + at].tolist()), int(target))
            for at, target in enumerate(each.targets)
        ]
        for number, each in enumerate(queries)
    }


def assert_answers(queries, limit, fill):
    passes = arrange(queries, limit, fill)
    assert {number: sorted(each, key=lambda pair: len(pair[0])) for number, each in read(passes).items()} == asked(
        queries
    )
    assert passes.longest <= limit
    assert passes.tokens == sum(len(pack.tokens) for pack in passes.packs)
    return passes


def draw(rng, vocabulary):
    bases = [[rng.randrange(vocabulary) for _ in range(rng.choice([0, 1, 5, 80]))] for _ in range(rng.choice([1, 3]))]
    queries = []
    for _ in range(rng.randint(1, 25)):
        inputs = rng.choice(bases) + [rng.randrange(vocabulary) for _ in range(rng.randint(1, 12))]
        queries.append(query(inputs, [rng.randrange(vocabulary) for _ in range(rng.randint(1, len(inputs)))]))
    return queries


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 50])
@pytest.mark.parametrize(("limit", "fill"), [(1, 1), (2, 5), (7, 1), (20, 16), (64, 64), (500, 30), (500, 500)])
def test_every_query_sees_exactly_its_own_tokens(vocabulary, limit, fill):
    rng = random.Random(f"{vocabulary} {limit} {fill}")
    for _ in range(4):
        assert_answers(draw(rng, vocabulary), limit, fill)


def nodes(queries):
    """The number of different beginnings, which is what one big enough pack has to compute."""
    return len({tuple(each.inputs[: n + 1].tolist()) for each in queries for n in range(len(each.inputs))})


def test_one_pack_computes_every_beginning_once():
    rng = random.Random(1)
    for _ in range(8):
        queries = draw(rng, 4)
        passes = assert_answers(queries, 10_000, 10_000)
        assert len(passes.packs) == 1 and passes.tokens == nodes(queries)


def test_a_long_prefix_is_computed_once_for_all_packs():
    rng = random.Random(2)
    prefix = [rng.randrange(1000) for _ in range(400)]
    queries = []
    for _ in range(50):
        question = [rng.randrange(1000) for _ in range(20)]
        queries += [query(prefix + question + [rng.randrange(1000) for _ in range(4)], [1, 2, 3]) for _ in range(4)]
    passes = assert_answers(queries, 2048, 512)
    assert passes.tokens == nodes(queries)
    assert [(pack.cached, pack.keep) for pack in passes.packs[:2]] == [(0, True), (400, False)]
    assert max(len(pack.tokens) for pack in passes.packs[1:]) <= 512
    assert passes.naive == 200 * 424


def test_a_short_beginning_is_repeated_rather_than_cached():
    rng = random.Random(3)
    queries = [query([7, 8, *(rng.randrange(1000) for _ in range(60))], [1]) for _ in range(20)]
    passes = assert_answers(queries, 512, 128)
    assert not any(pack.keep for pack in passes.packs)
    assert passes.tokens <= nodes(queries) + 2 * len(passes.packs)


def test_inputs_longer_than_a_pass_go_piece_by_piece():
    long = list(range(1000))
    passes = assert_answers([query(long, [5, 6]), query([*long[:700], 3], [9])], 256, 256)
    assert passes.tokens == 1001 and passes.longest <= 256


def test_nested_beginnings_need_no_recursion():
    queries = [query(range(size), [1]) for size in range(1, 1200)]
    assert arrange(queries, 64, 8).tokens >= 1199


def test_the_same_request_twice_and_two_targets_for_the_same_inputs():
    passes = assert_answers([query([1, 2], [3]), query([1, 2], [3]), query([1, 2], [4, 5])], 8, 8)
    assert passes.tokens == 2


def test_no_queries():
    assert arrange([], 8, 8).packs == []
