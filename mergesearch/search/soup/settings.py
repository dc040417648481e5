"""The settings of learned soups: the key `search.learned_soup`, and what the learning itself goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mergesearch.schema import ONE_OR_MORE, Strict

Loss = Literal["expected", "cross_entropy", "mixed", "entropy"]


# a short budget leaves a soup no fewer
FEWEST_STEPS = 10
# where nothing is held apart, the share of the documents on which losses are measured
MEASURED = 0.25


class SoupSettings(Strict):
    """Learned soup: mixing coefficients learned on the search documents."""

    method: Literal["task_arithmetic", "linear"] = Field(
        default="task_arithmetic", description="whose weights are learned"
    )
    per: list[Literal["recipe", "group", "tensor"]] = Field(
        default=["tensor"],
        min_length=1,
        description="a list, one soup each: what has weights of its own, the whole model, a group or a tensor",
    )
    loss: Annotated[list[Loss], ONE_OR_MORE] = Field(
        default=["cross_entropy", "expected"],
        min_length=1,
        description="a list, soups for each, the first one first where the budget may not last for all, else the "
        "cheapest; `cross_entropy`: does not give up a task of which hardly anything is "
        "right yet; `expected`: the chance that an answer drawn from the model is wrong, nearest to what is counted; "
        "`mixed`: that and 3 % of cross-entropy; "
        "`entropy`: how unsure the model is, for tasks that do not say what is right (AdaMerging); it may as well grow "
        "sure of what is wrong",
    )
    coefficients: Literal["free", "softmax"] = Field(
        default="free", description="`free`: any number; `softmax`: positive, with sum 1"
    )
    optimizer: Literal["adam", "cmaes"] = Field(
        default="adam", description="`adam`, by gradients of the losses; `cmaes`, without gradients, by the objective"
    )
    start: float | None = Field(
        default=None, description="the weight of each model at the start; default: the best mix so far"
    )
    folds: int = Field(
        default=1,
        ge=1,
        le=20,
        description="parts of the search documents: a soup is learned on all but each in turn, these choose the step "
        "together, and the soup is their mean; 1: one soup, and a part of the documents held apart",
    )
    rounds: int = Field(
        default=2,
        ge=0,
        description="with one fold, how often the best soup is learned on from where it ended, at most; it ends with "
        "the first round that brought less than noise, and with two thirds of the run's document evaluations. Where "
        "these do not last for the soups of all losses and a round, each loss has its own, before the next",
    )
    steps: int = Field(default=100, ge=1, description="steps of adam, at most, of all folds together")
    learning_rate: float = Field(default=0.03, gt=0, description="of adam, falling to a tenth along half a cosine")
    documents: int = Field(default=4, ge=1, description="of each task, drawn for each step")
    validation: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description="with one fold, the share of the search documents kept for early stopping; 0: all are learned "
        "from, and all steps are taken",
    )
    validation_documents: int = Field(
        default=64, ge=1, description="of each task, the most that are held apart, in each fold"
    )
    look_every: int = Field(default=10, ge=1, description="steps between looks at the validation documents")
    patience: int = Field(
        default=4, ge=1, description="looks in a row that are worse than the best beyond noise end it"
    )
    decay: float = Field(
        default=1.0,
        ge=0,
        description="of adam's rate, the share by which a group's and a tensor's deviations from the whole model's "
        "weights shrink in each step",
    )
    average: bool = Field(default=True, description="looks are at the mean of the weights since the look before")
    layer_groups: int = Field(default=3, ge=1, description="of `per: group`: how many ranges of layers")
    components: list[str] = Field(
        default=["attention", "mlp", "other"], min_length=1, description="of `per: group`: into what each range splits"
    )
    candidates: int = Field(default=100, ge=1, description="how many candidates cmaes scores")
    checkpointing: bool = Field(default=False, description="compute activations twice rather than keep them")
    batch_size: int = Field(default=16, ge=1, description="documents at once")

    @model_validator(mode="after")
    def _softmax_is_positive(self) -> SoupSettings:
        if self.coefficients == "softmax" and self.start is not None and self.start <= 0:
            raise ValueError(f"start is {self.start:g} and coefficients softmax, which are positive: start above 0")
        return self

    @property
    def rounds_at_most(self) -> int:
        """How often a soup may be learned on. The mean over folds never is: all documents were learned from, and none
        is left to say whether going on helps. Nor is what was found without gradients."""
        return self.rounds if self.optimizer == "adam" and self.folds == 1 else 0

    def cost(self, loss: str | None, models: int, documents: Sequence[int]) -> int:
        """The document evaluations that one soup takes at most.

        Args:
            loss: None for a soup that is learned without gradients.
            models: how many are mixed.
            documents: how many each task has to search on.
        """
        # the base and each model once, where their scores do not tell what a loss is measured by
        return self._cost(loss, models + 1, documents)

    def usual_cost(self, loss: str | None, measured: int, documents: Sequence[int]) -> int:
        """The document evaluations that one soup usually takes: all steps, as patience seldom ends one.

        Args:
            loss: as for `cost`.
            measured: how many parents' losses have to be measured, where their scores do not tell the scale.
            documents: as for `cost`.
        """
        return self._cost(loss, measured, documents)

    def steps_within(self, most: float, loss: str | None, measured: int, documents: Sequence[int]) -> int:
        """The steps of one soup that so many document evaluations last for, `steps` at most and `FEWEST_STEPS` at
        least: the rate falls over the steps that are taken, so that fewer from the start are better than all cut short.

        Args:
            loss, measured, documents: as for `usual_cost`.
        """
        steps, cost = self.steps, self.usual_cost(loss, measured, documents)
        while steps > FEWEST_STEPS and cost > most:
            steps -= 1
            cost = self.model_copy(update={"steps": steps}).usual_cost(loss, measured, documents)
        return steps

    def _cost(self, loss: str | None, measured: int, documents: Sequence[int]) -> int:
        if loss is None:
            return self.candidates * sum(documents)
        folds = self.folds if min(documents, default=0) >= self.folds else 1
        steps = -(-self.steps // folds)
        looks = 1 + -(-steps // self.look_every) * bool(self.validation or folds > 1)
        few = sum(self.held_apart(count) for count in documents)
        looked = sum(min(count, folds * self.validation_documents) for count in documents) if folds > 1 else few
        return 3 * folds * steps * self.documents * len(documents) + looks * looked + measured * few

    def held_apart(self, count: int) -> int:
        """How many of a task's documents are held apart, or measure what a loss counts."""
        return min(max(1, round((self.validation or MEASURED) * count)), self.validation_documents)

    def closed_form_cost(self, models: int, documents: Sequence[int]) -> int:
        """The document evaluations of `fisher` at most, and of `regmean` but for the layers that no longer fit."""
        return 3 * models * sum(min(self.validation_documents, count) for count in documents)

    @property
    def soups(self) -> list[tuple[str, str | None]]:
        """What is learned, in order: (per, loss); without gradients no loss is needed."""
        losses = [None] if self.optimizer == "cmaes" else dict.fromkeys(self.loss)
        return [(per, loss) for loss in losses for per in dict.fromkeys(self.per)]
