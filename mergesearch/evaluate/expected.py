"""What candidates will score on documents that nobody has seen, from what all of them did on those of a search; numpy.

The highest of many scores is too high: whoever has it was also lucky. What is told of a candidate here is the mean of a
posterior, in three steps, all of them empirical Bayes (Efron and Morris, Stein's paradox in statistics, Scientific
American 236(5), 1977; Efron, Tweedie's formula and selection bias, JASA 106, 2011): the prior is what the candidates
themselves show, and a posterior mean needs no correction for having been chosen by it.

1. *Everything is a difference.* Candidates share their documents, and so how hard these are. Each document's value is
   taken relative to that of the reference, the mean over the contenders on the same document; with x_i the difference
   of candidate i and n_i the documents that it was scored on (a race leaves some out), its noise is var(x_i) / n_i.
   Contenders count by w_i = exp(-(d_i / REACH)^2 / 2), d_i standard errors of the paired difference behind the best:
   where candidates are bad says nothing about how those vary among which a winner is looked for.
2. *Controls.* An accuracy counts a document as right or wrong; how probable what is right was varies less from document
   to document, and says nearly the same of a candidate. For each task the figure y and the controls p (probability of
   what is right) and l (its logarithm) have means z_i over documents with noise N_i (their covariance / n_i); over
   candidates z has the covariance V + N, V that of the true figures, found as S - N with its eigenvalues cut off below
   (in the metric of N; Efron and Morris, Annals of Statistics 4, 1976, on several means at once). The combination with
   the least error that is neither shrunk nor stretched, E(b z | y) = y, is

       b = c (V + N)^-1 V e_y,   c such that b V e_y = V_yy,   with the error  b (V + N) b - V_yy.

3. *Shrinking.* The objective of the combined figures has an error s_i^2. Its true value is from a mixture of two
   normals, the contenders N(m, t^2) and, where that pays, a broad one for all others, fitted by EM. The spread t of the
   contenders is what few candidates say little about, so it is not estimated but summed over, with a half-Cauchy prior
   of the size of the noise (Gelman, Bayesian Analysis 1(3), 2006). The posterior mean is m + B (z_i - m), with
   B = t^2 / (t^2 + s_i^2); its error for new documents is what reference + B x_i varies by over the documents of the
   search, and (1 - B)^2 t^2.

Controls are left out, with no gold given, where a soup was learned by them (`search.expectations`). What it cannot
see is a recipe that was fitted to the very documents beyond what its score shows, as a soup may be that was learned on
few. results/winner.md says how well it holds over recorded runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergesearch.evaluate import statistics
from mergesearch.evaluate.scores import DocumentScores

Documents = Mapping[str, DocumentScores]

# so many standard errors behind the best, a candidate counts as a contender by exp(-1/2)
REACH = 2.0
# how often contenders and controls are found anew, each from the other
ROUNDS = 3
# nats: a document on which what is right is less probable than that is no more wrong for it
LEAST_LOGPROB = -12.0
# of the noise, the least that the true figures are taken to vary by in any direction
LEAST_VARIANCE = 0.02
# how much a candidate's own noise counts, in documents, against the mean of the contenders'
COMMON_DOCUMENTS = 50.0
# of the contenders' spread, in units of the noise, what is summed over
SPREADS = np.concatenate([[0.0], np.geomspace(0.1, 10.0, 13)])
EM_STEPS = 40
# with fewer candidates than that there is nothing to learn controls from
FEWEST = 8
NOTHING = 1e-12


@dataclass(frozen=True)
class Expected:
    """What a candidate's objective will be on documents that nobody has seen.

    Attributes:
        value: the posterior mean, sum over tasks of factor x figure.
        stderr: the posterior's standard deviation, how hard the documents of the search are included.
        low, high: the 95 % interval.
        behind: the standard deviation without what all candidates share: how well it is told from the others.
    """

    value: float
    stderr: float
    low: float
    high: float
    behind: float

    def moved(self, by: float) -> Expected:
        """The same on a scale that begins elsewhere."""
        return Expected(self.value + by, self.stderr, self.low + by, self.high + by, self.behind)


def expect(candidates: Sequence[Documents], factors: Mapping[str, float]) -> list[Expected]:
    """The expected objective of every candidate of one search.

    Args:
        candidates: each one's documents by task; those that a race stopped have fewer. Two that are the same count
            twice: leave one out.
        factors: of each task's figure in the objective, signed so that more is better. Tasks without are not looked at.

    Raises:
        ValueError: a candidate lacks a task, or a task has no document that is known of all.
    """
    if not candidates:
        return []
    tasks = [_task([each[task] for each in candidates], factor) for task, factor in factors.items()]
    field = _controlled(tasks)
    return _shrunk(field)


# --- the matrix ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Task:
    """One task of all candidates, times its factor.

    Attributes:
        features: [features, candidates, documents], the figure first; 0 where there is no value.
        there: [candidates, documents], whether there is one.
        combined: [candidates, documents], the figure with its controls; the figure alone at first.
        lack: the variance of what the controls do not say of the figure.
    """

    features: np.ndarray
    there: np.ndarray
    combined: np.ndarray
    lack: float = 0.0

    @property
    def counts(self) -> np.ndarray:
        """Documents of each candidate."""
        return self.there.sum(axis=1)


def _task(found: Sequence[DocumentScores], factor: float) -> _Task:
    groups = found[0].aggregation == statistics.JACKKNIFE
    values = [_values(each) for each in found]
    # the pseudo-values of a jackknife belong to groups of documents, which have no numbers and no gold
    ids = [list(range(len(v))) for v in values] if groups else [each.ids for each in found]
    every = sorted(set().union(*ids))
    place = {document: position for position, document in enumerate(every)}
    golds = [] if groups or any(each.gold is None for each in found) else [each.gold for each in found]
    shape = (3 if golds else 1, len(found), len(every))
    features, there = np.zeros(shape), np.zeros(shape[1:], dtype=bool)
    for row, (numbers, own) in enumerate(zip(ids, values, strict=True)):
        where = [place[number] for number in numbers]
        there[row, where] = np.isfinite(own)
        features[0, row, where] = np.nan_to_num(own)
        if golds:
            logs = np.maximum(np.asarray(golds[row], dtype=np.float64), LEAST_LOGPROB)
            features[1:, row, where] = np.nan_to_num(np.stack([np.exp(logs), logs]))
    if not there.any(axis=1).all():
        raise ValueError("a candidate has no document of a task")
    features *= factor
    return _Task(features, there, features[0])


def _values(found: DocumentScores) -> np.ndarray:
    """[n] values whose mean is the figure, and which move it as the documents do."""
    moves = statistics.influence(found.values, found.aggregation)
    return moves - moves.mean() + statistics.figure(found.values, found.aggregation) if len(moves) else moves


# --- contenders and controls -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Field:
    """The candidates beside each other.

    Attributes:
        shares: [candidates], what each counts in the reference; they add up to 1.
        ahead: [candidates], the objective relative to the reference's.
        noise: [candidates], the variance of that.
        level: the reference's objective.
        level_noise: its variance over documents.
        together: [candidates], the covariance of both.
        freedom: degrees of freedom of `level_noise`.
    """

    shares: np.ndarray
    ahead: np.ndarray
    noise: np.ndarray
    level: float
    level_noise: float
    together: np.ndarray
    freedom: float


def _controlled(tasks: Sequence[_Task]) -> _Field:
    """Finds contenders, then the controls among them, then contenders by these, and so on."""
    shares = np.full(len(tasks[0].there), 1 / len(tasks[0].there))
    for _ in range(ROUNDS):
        shares = _contenders(tasks, shares)
        for task in tasks:
            _control(task, shares)
    return _field(tasks, shares)


def _contenders(tasks: Sequence[_Task], shares: np.ndarray) -> np.ndarray:
    """What each candidate counts, from how many standard errors it is behind the best one."""
    # the best of those that were scored on everything: a few lucky documents make nobody the best
    whole = np.all([task.counts == task.counts.max() for task in tasks], axis=0)
    ahead = sum(_relative(task.combined, task.there, shares)[1] for task in tasks)
    best = int(np.argmax(np.where(whole, ahead, -np.inf))) if whole.any() else int(np.argmax(ahead))
    behind, variance = np.zeros(len(shares)), np.zeros(len(shares))
    for task in tasks:
        both = task.there & task.there[best]
        count = np.maximum(both.sum(axis=1), 1)
        apart = np.where(both, task.combined[best] - task.combined, 0.0)
        mean = apart.sum(axis=1) / count
        behind += mean
        variance += ((apart - mean[:, None]) ** 2 * both).sum(axis=1) / np.maximum(count - 1, 1) / count + task.lack
    distance = np.maximum(behind, 0.0) / np.sqrt(np.maximum(variance, NOTHING))
    distance[best] = 0.0
    weights = np.exp(-((distance / REACH) ** 2) / 2)
    return weights / weights.sum()


def _relative(values: np.ndarray, there: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n] the reference, [candidates] their means relative to it, [candidates, n] what is left, 0 where nothing is."""
    weights = shares[:, None] * there
    total = weights.sum(axis=0)
    # a document that no contender has is taken as whoever has it finds it
    thin = total < NOTHING
    weights = np.where(thin, there.astype(np.float64), weights)
    reference = (weights * values).sum(axis=0) / weights.sum(axis=0)
    apart = np.where(there, values - reference, 0.0)
    means = apart.sum(axis=1) / there.sum(axis=1)
    return reference, means, np.where(there, apart - means[:, None], 0.0)


def _control(task: _Task, shares: np.ndarray) -> None:
    """Combines a task's figure with its controls."""
    squares = float(shares @ shares)
    if len(task.features) == 1 or 1 / squares < FEWEST:
        task.combined, task.lack = task.features[0], 0.0
        return
    parts = [_relative(each, task.there, shares) for each in task.features]
    means = np.stack([part[1] for part in parts])
    left = np.stack([part[2] for part in parts])
    counts = np.maximum(task.counts, 2)
    own = np.einsum("atn,btn->tab", left, left) / ((counts - 1) * counts)[:, None, None]
    noise = np.einsum("t,tab->ab", shares, own) / (1 - squares)
    centred = means - (means @ shares)[:, None]
    spread = (centred * shares) @ centred.T / (1 - squares)
    true = _true(spread, noise)
    weights = np.linalg.solve(true + noise, true[:, 0])
    weights *= true[0, 0] / float(weights @ true[:, 0])
    task.lack = max(0.0, float(weights @ true @ weights) - float(true[0, 0]))
    combined = np.einsum("f,ftn->tn", weights, task.features)
    # the figure's own level: what the contenders have in common stays what was counted
    reference, plain = parts[0][0], _relative(combined, task.there, shares)[0]
    # among those far behind figure and controls go together in another way
    close = (shares / shares.max())[:, None]
    combined = close * (combined - plain + reference) + (1 - close) * task.features[0]
    task.combined = np.where(task.there, combined, 0.0)


def _true(spread: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The covariance of the true figures: what the seen ones vary by beyond their noise."""
    size = np.sqrt(np.maximum(np.diag(noise), NOTHING))
    scaled = noise / np.outer(size, size) + 1e-6 * np.eye(len(noise))
    root = np.linalg.cholesky(scaled)
    inverse = np.linalg.inv(root)
    values, vectors = np.linalg.eigh(inverse @ (spread / np.outer(size, size)) @ inverse.T)
    back = root @ vectors
    return (back * np.maximum(values - 1, LEAST_VARIANCE)) @ back.T * np.outer(size, size)


def _field(tasks: Sequence[_Task], shares: np.ndarray) -> _Field:
    count = len(shares)
    ahead, noise, together = np.zeros(count), np.zeros(count), np.zeros(count)
    level, parts = 0.0, []
    squares = float(shares @ shares)
    for task in tasks:
        reference, means, left = _relative(task.combined, task.there, shares)
        counts, every = task.counts, len(reference)
        ahead += means
        own = (left**2).sum(axis=1) / np.maximum(counts - 1, 1)
        common = float(shares @ own)
        noise += (own * counts + common * COMMON_DOCUMENTS) / (counts + COMMON_DOCUMENTS) / counts + task.lack
        centred = reference - reference.mean()
        level += float(reference.mean())
        parts.append((float(centred @ centred) / max(every - 1, 1) / every, every - 1))
        together += (left @ centred) / np.maximum(counts - 1, 1) / every
    level_noise = sum(variance for variance, _ in parts)
    uncertain = sum(variance**2 / max(freedom, 1) for variance, freedom in parts)
    freedom = level_noise**2 / uncertain if uncertain > 0 else math.inf
    # a candidate is a part of the reference
    noise /= max(1 - squares, 0.5)
    return _Field(shares, ahead, np.maximum(noise, NOTHING), level, level_noise, together, freedom)


# --- shrinking -------------------------------------------------------------------------------------------------------


def _shrunk(field: _Field) -> list[Expected]:
    """The posterior of every candidate, summed over the spread of the contenders."""
    spreads = SPREADS**2 * float(field.shares @ field.noise)
    fits = [_alike(field, spreads), _two_kinds(field, spreads)]
    # of each spread the half-Cauchy prior, and how far it stands for its neighbours
    prior = np.log(np.gradient(SPREADS)) - np.log1p(SPREADS**2)
    logs = np.array([fit.likelihood + prior for fit in fits])
    chances = np.exp(logs - logs.max())
    chances /= chances.sum()
    mean, square, apart = (np.zeros(len(field.ahead)) for _ in range(3))
    for fit, chance in zip(fits, chances, strict=True):
        for part in fit.components:
            share = chance[:, None] * part.share
            kept = part.spread / (part.spread + field.noise)
            value = part.center + kept * (field.ahead - part.center)
            before = (1 - kept) ** 2 * (part.spread + part.error)
            own = kept**2 * field.noise + before
            both = np.maximum(field.level_noise + 2 * kept * field.together + own, before)
            mean += (share * value).sum(axis=0)
            square += (share * (both + value**2)).sum(axis=0)
            apart += (share * (own + value**2)).sum(axis=0)
    stderr, behind = (np.sqrt(np.maximum(each - mean**2, 0.0)) for each in (square, apart))
    reach = _student(field.freedom) * stderr
    values = field.level + mean
    rows = np.stack([values, stderr, values - reach, values + reach, behind], axis=1)
    return [Expected(*row) for row in rows.tolist()]


@dataclass(eq=False)
class _Component:
    """One normal of the prior, for each spread that is summed over; all but `share` are [spreads, 1].

    Attributes:
        share: [spreads, candidates], the chance that each belongs to it.
        center: its mean.
        spread: its variance.
        error: the variance of the center.
    """

    share: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    error: np.ndarray


@dataclass(eq=False)
class _Prior:
    """Where the true objectives are, for each spread: [spreads] the logarithm of its likelihood."""

    components: Sequence[_Component]
    likelihood: np.ndarray


def _alike(field: _Field, spreads: np.ndarray) -> _Prior:
    """One normal for all candidates."""
    seen, narrow = field.ahead, field.noise + spreads[:, None]
    precision = (1 / narrow).sum(axis=1, keepdims=True)
    center = (seen / narrow).sum(axis=1, keepdims=True) / precision
    everyone = np.ones_like(narrow)
    likelihood = _log_normal(seen - center, narrow).sum(axis=1)
    return _Prior([_Component(everyone, center, spreads[:, None], 1 / precision)], likelihood)


def _two_kinds(field: _Field, spreads: np.ndarray) -> _Prior:
    """Contenders and others, by EM from the contenders that are known.

    The three numbers that say where the others are cost what Schwarz's criterion (Annals of Statistics 6, 1978) charges
    for them.
    """
    seen, noise, variance = field.ahead, field.noise, spreads[:, None]
    narrow = noise + variance
    least = variance + 4 * float(field.shares @ noise)
    chance = np.broadcast_to(np.clip(field.shares / field.shares.max(), 0.01, 0.99), narrow.shape)
    first = second = broad = both = np.zeros_like(variance)
    for _ in range(EM_STEPS):
        share = (chance.sum(axis=1, keepdims=True) + 1) / (len(seen) + 2)
        rest = 1 - chance
        left = np.maximum(rest.sum(axis=1, keepdims=True), NOTHING)
        # with hardly any noise it may be that no one is near enough to be a contender
        weight = np.maximum(chance, NOTHING) / narrow
        first = (weight * seen).sum(axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)
        second = (rest * seen).sum(axis=1, keepdims=True) / left
        broad = np.maximum(least, (rest * ((seen - second) ** 2 - noise)).sum(axis=1, keepdims=True) / left)
        one = _log_normal(seen - first, narrow) + np.log(share)
        both = np.logaddexp(one, _log_normal(seen - second, noise + broad) + np.log(1 - share))
        chance = np.exp(one - both)
    error = np.minimum(1 / ((chance / narrow).sum(axis=1, keepdims=True) + NOTHING), broad)
    parts = [_Component(chance, first, variance, error), _Component(1 - chance, second, broad, np.zeros_like(broad))]
    return _Prior(parts, both.sum(axis=1) - 1.5 * math.log(len(seen)))


def _log_normal(apart: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return -0.5 * (np.log(2 * math.pi * variance) + apart**2 / variance)


def _student(freedom: float) -> float:
    """Student's quantile at 97.5 %, within 1 % from 3 degrees of freedom on (Abramowitz and Stegun 26.7.5)."""
    inverse = 1 / max(freedom, 2.0)
    return 1.959964 + inverse * (2.372271 + inverse * (2.822499 + inverse * (2.555583 + inverse * 1.589536)))
