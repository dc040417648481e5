"""Requests as token tries: what to compute, in which forward passes, so that no token is computed twice.

Queries that begin alike share their beginning. A pack is one forward pass over a part of the trie: a path that was
computed before and is still cached, then nodes in depth-first order, each of which attends to its ancestors only. Which
passes there are depends on the tokens alone, so they are arranged once for a run and serve every candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# A shared beginning gets a forward pass of its own where that saves this many tokens; shorter ones are repeated.
_WORTH_CACHING = 64
_Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Query:
    """One question to the model: how likely `targets` are, one by one, at the last positions of `inputs`.

    Attributes:
        inputs: int32, [n]; the context and all of the continuation but its last token.
        targets: int32, [1 to n]; targets[-1] is predicted at inputs[-1], and so on backwards.
    """

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, eq=False)
class Pack:
    """One forward pass of n tokens behind `cached` others.

    Attributes:
        cached: how many tokens of the cache this pass stands on; what lies beyond is dropped first.
        keep: whether the tokens stay in the cache for the packs that follow.
        tokens, positions: int32, [n]; nodes in depth-first order, and their depths in the trie.
        ends: int32, [n]; node j is an ancestor of node i, or i itself, where j <= i < ends[j].
        rows: int32, [r]; the nodes whose logits are needed, ascending.
        picks: int32, [k, 3]; (index into rows, target token, query) for every log-probability that is asked for.
    """

    cached: int
    keep: bool
    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    picks: np.ndarray


@dataclass(frozen=True, eq=False)
class Passes:
    """The forward passes that answer `queries` queries: all packs, in the order in which they must run.

    `tokens` counts what is computed, `naive` what one sequence for each distinct inputs would take.
    """

    packs: list[Pack]
    queries: int
    tokens: int
    naive: int

    @property
    def longest(self) -> int:
        """The tokens of the longest pack."""
        return max((len(pack.tokens) for pack in self.packs), default=0)


def arrange(queries: Sequence[Query], limit: int, fill: int) -> Passes:
    """The forward passes that answer every query.

    Args:
        queries: in any order, repeated ones included.
        limit: the most tokens of one forward pass, 1 or more; longer inputs are computed piece by piece.
        fill: up to how many tokens branches are put side by side; more would attend in vain.
    """
    trie = _SortedQueries(queries)
    packs = list(_Packer(trie, limit, min(fill, limit)).packs()) if queries else []
    return Passes(packs, len(queries), sum(len(pack.tokens) for pack in packs), int(trie.sizes.sum()))


class _SortedQueries:
    """The distinct inputs in the order of their tokens: neighbours share the longest beginnings.

    Attributes:
        inputs: int32 arrays, sorted and distinct; `sizes`, int64, are their lengths.
        shared: int64, [len(inputs)]; how many first tokens each has in common with the one before it.
        members: for each input, the (query number, targets) that it answers.
    """

    def __init__(self, queries: Sequence[Query]) -> None:
        members: dict[bytes, list[tuple[int, np.ndarray]]] = {}
        for number, query in enumerate(queries):
            # big-endian bytes sort as the tokens do
            members.setdefault(query.inputs.astype(">u4").tobytes(), []).append((number, query.targets))
        self.members = [members[key] for key in sorted(members)]
        self.inputs = [queries[answered[0][0]].inputs for answered in self.members]
        self.sizes = np.array([len(inputs) for inputs in self.inputs], dtype=np.int64)
        self.shared = np.array([0, *(common_prefix(a, b) for a, b in pairwise(self.inputs))], dtype=np.int64)[
            : len(self.inputs)
        ]

    def common(self, first: int, second: int) -> int:
        """How many first tokens two different inputs share."""
        return int(self.shared[first + 1 : second + 1].min())

    def fork(self, low: int, high: int) -> int:
        """The depth at which the inputs `low` to `high` - 1 part."""
        return self.common(low, high - 1) if high - low > 1 else int(self.sizes[low])

    def branches(self, low: int, high: int, fork: int) -> list[_Range]:
        """The ranges of inputs that stay together beyond their fork."""
        cuts = [low, *(low + 1 + np.flatnonzero(self.shared[low + 1 : high] == fork)).tolist(), high]
        return list(pairwise(cuts))

    def tokens(self, low: int, high: int, cached: int) -> int:
        """The distinct tokens of a range of inputs beyond the `cached` first ones."""
        within = np.maximum(self.shared[low + 1 : high], cached)
        return int((self.sizes[low:high] - cached).sum() - (within - cached).sum())

    def needed(self, which: int, low: int, high: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """(depths, targets, query) for what is asked of one input at depths from `low` to `high` - 1."""
        size = len(self.inputs[which])
        for number, targets in self.members[which]:
            first = size - len(targets)
            begin, end = max(low, first), min(high, size)
            if begin < end:
                yield np.arange(begin, end), targets[begin - first : end - first], number


class _Packer:
    """Walks the trie depth first: subtrees that fit go into packs, long shared beginnings go into the cache."""

    def __init__(self, trie: _SortedQueries, limit: int, fill: int) -> None:
        self._trie, self._limit, self._target = trie, limit, fill

    def packs(self) -> Iterator[Pack]:
        """All packs, in the order in which they must run.

        Walks with a stack of its own, as tries may be deeper than Python recurses.
        """
        waiting: list[tuple[list[_Range], int]] = [([(0, len(self._trie.inputs))], 0)]
        while waiting:
            branches, cached = waiting.pop()
            if len(branches) > 1 or self._fits(*branches[0], cached):
                yield from self._fill(branches, cached)
                continue
            low, high = branches[0]
            fork = self._trie.fork(low, high)
            if self._worth_caching(low, high, cached, fork):
                for begin in range(cached, fork, self._limit):
                    yield self._chain(low, high, begin, min(begin + self._limit, fork))
                cached = fork
            waiting.extend(reversed(self._children(low, high, cached, fork)))

    def _fits(self, low: int, high: int, cached: int) -> bool:
        total = self._trie.tokens(low, high, cached)
        return total <= self._limit and total - (self._trie.fork(low, high) - cached) <= self._target

    def _worth_caching(self, low: int, high: int, cached: int, fork: int) -> bool:
        if high - low == 1:
            return True
        passes = 1 + self._trie.tokens(low, high, cached) // self._target
        return (fork - cached) * (passes - 1) >= _WORTH_CACHING or fork - cached >= self._target

    def _children(self, low: int, high: int, cached: int, fork: int) -> list[tuple[list[_Range], int]]:
        """Runs of branches that fit, and single ones that do not."""
        groups: list[tuple[list[_Range], int]] = []
        together = False
        for branch in self._trie.branches(low, high, fork):
            fits = self._fits(*branch, cached)
            if fits and together:
                groups[-1][0].append(branch)
            else:
                groups.append(([branch], cached))
            together = fits
        return groups

    def _fill(self, branches: Sequence[_Range], cached: int) -> Iterator[Pack]:
        """As few packs as the order allows; a branch that fits is never split."""
        chosen: list[int] = []
        used = 0
        for low, high in branches:
            more = self._trie.tokens(low, high, cached)
            if chosen:
                again = max(cached, self._trie.common(chosen[-1], low)) - cached
                if used + more - again > self._target:
                    yield from self._pack(chosen, cached)
                    chosen, used, again = [], 0, 0
                more -= again
            chosen.extend(range(low, high))
            used += more
        yield from self._pack(chosen, cached)

    def _chain(self, low: int, high: int, begin: int, end: int) -> Pack:
        """The tokens that all inputs of a range share at depths `begin` to `end` - 1, to be cached."""
        needed = [each for which in range(low, high) for each in self._trie.needed(which, begin, end)]
        picks = [(depths - begin, targets, query) for depths, targets, query in needed]
        ends = np.full(end - begin, end - begin)
        return _finish(begin, True, self._trie.inputs[low][begin:end], np.arange(begin, end), ends, picks)

    def _pack(self, chosen: Sequence[int], cached: int) -> Iterator[Pack]:
        tokens, positions, picks = [], [], []
        ends = np.zeros(int(self._trie.sizes[chosen].sum()), dtype=np.int64)
        # the node at each depth of the input that comes last
        path = np.zeros(int(self._trie.sizes[chosen].max()), dtype=np.int64)
        used, depth = 0, cached
        for before, which in zip([None, *chosen], chosen, strict=False):
            known = cached if before is None else max(cached, self._trie.common(before, which))
            ends[path[known:depth]] = used
            depth = len(self._trie.inputs[which])
            path[known:depth] = used + np.arange(depth - known)
            tokens.append(self._trie.inputs[which][known:])
            positions.append(np.arange(known, depth))
            used += depth - known
            needed = self._trie.needed(which, cached, depth)
            picks.extend((path[depths], targets, query) for depths, targets, query in needed)
        ends[path[cached:depth]] = used
        # an input that ends where the cache does was answered when that was computed
        if used:
            yield _finish(cached, False, np.concatenate(tokens), np.concatenate(positions), ends[:used], picks)


def _finish(
    cached: int,
    keep: bool,
    tokens: np.ndarray,
    positions: np.ndarray,
    ends: np.ndarray,
    picks: Sequence[tuple[np.ndarray, np.ndarray, int]],
) -> Pack:
    columns = [np.stack([nodes, targets, np.full(len(nodes), query)], axis=1) for nodes, targets, query in picks]
    table = np.concatenate(columns) if columns else np.zeros((0, 3), dtype=np.int64)
    rows, indices = np.unique(table[:, 0], return_inverse=True)
    table[:, 0] = indices.reshape(-1)
    small = [array.astype(np.int32) for array in (tokens, positions, ends, rows, table)]
    return Pack(cached, keep, *small)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many first tokens two sequences have in common."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
