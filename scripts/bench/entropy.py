"""The entropy soup of AdaMerging (Yang et al. 2023, arXiv:2310.02575), a yardstick of scripts/bench/search.py: a weight
for each model and tensor, learned so that the merged model is sure of its answers. It is told none of them.

For a document with choices the entropy is over the choices, for a generated answer over the vocabulary at the prompt's
end, for a whole text over the vocabulary, the mean of its positions; in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesearch.evaluate import losses
from mergesearch.evaluate.losses import Losses, Tokens
from mergesearch.search.soup.learner import Learner

# as published: weights begin at 0.3, Adam with 0.001, the last weights count. Steps and documents fit a search's budget
SETTINGS = "{per: [tensor], loss: [cross_entropy], start: 0.3, learning_rate: 0.001, steps: 300, patience: 1000}"


class Entropies(Losses):
    """In the place of a loss how unsure the model is."""

    def _batch(self, label: str, ids: Sequence[int]) -> Tensor:
        documents = [self._document(label, number) for number in ids]
        if all(isinstance(document, losses._Choices) for document in documents):
            sums = self._log_likelihoods([s for document in documents for s in document.sequences])
            parts = sums.split([len(document.sequences) for document in documents])
            return torch.stack([_over_choices(d, part) for d, part in zip(documents, parts, strict=True)])
        return torch.stack([self._of_text(document) for document in documents])

    def _of_text(self, document: Any) -> Tensor:
        found = [self._entropies(s, first=document.whole) for s in document.sequences if s.targets]
        return torch.cat(found).mean()

    def _entropies(self, sequence: Tokens, first: bool) -> Tensor:
        """[positions] the entropy of what is predicted where the text to be scored stands, or at its begin alone."""
        begin = len(sequence.inputs) - len(sequence.targets)
        end = begin + 1 if first else len(sequence.inputs)
        tokens = torch.tensor([sequence.inputs[:end]], device=self.model.device)
        logprobs = self.model(input_ids=tokens, use_cache=False).logits[0, begin:].float().log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)


def _over_choices(document: Any, sums: Tensor) -> Tensor:
    logprobs = (sums / sums.new_tensor(document.lengths)).log_softmax(0)
    return -(logprobs.exp() * logprobs).sum()


def unsupervised(learner: Learner) -> None:
    """Makes a run's learner look at entropies alone, a task's as much as any other's."""
    made: list[Entropies] = []

    def entropies(_: Any) -> Losses:
        if not made:
            scorer = learner.scorer.only(learner.documents) if learner.config.guard else learner.scorer
            made.append(Entropies(scorer, learner.engine.model, learner.settings.batch_size))
        return made[0]

    if not (callable(learner.losses) and callable(learner._scales)):
        raise TypeError("the learner of soups takes its losses in another way now")
    vars(learner).update(losses=entropies, _scales=lambda *_, **__: dict.fromkeys(learner.documents, 1.0))
