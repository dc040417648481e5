"""`backend: vllm`: what is refused before anything is loaded, and the engine that a run's scorer asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.checkpoints import Pool, save_without_weights
from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.evaluate.leaves import generates
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import Task
from mergesearch.recipe import BASE
from mergesearch.search.strategies.baselines import parents

if TYPE_CHECKING:
    from mergesearch.evaluate.vllm import Backend


def find_backend(config: Config) -> Backend | None:
    """Where a configuration's engine is; None where it has none. No library of it is loaded.

    Raises:
        UserError: there is none, with the command that installs it.
    """
    if config.backend is None:
        return None
    # the only way to it: without a backend everything works as ever
    from mergesearch.evaluate.vllm import Backend, find

    python, version = find(config.backend.python)
    own = {"trust_remote_code": True} if config.trust_remote_code else {}
    return Backend(python, version, {**own, **config.backend.options}, config.backend.gpu_memory)


def check_generates(config: Config, tasks: Sequence[Task]) -> None:
    """`UserError` where a backend has nothing to do."""
    if config.backend is not None and not any(generates(leaf) for task in tasks for leaf in task.leaves.values()):
        raise UserError(
            "backend is vllm, which generates answers, and no task generates any: leave backend out, or add a task "
            "that does"
        )


def vllm_of(backend: Backend | None, pool: Pool) -> Callable[..., Any] | None:
    """What makes the language model of a scorer, for `scorer_of`; None where there is no backend."""
    if backend is None:
        return None
    from mergesearch.evaluate.vllm import VllmLM

    def write(folder: Path) -> None:
        save_without_weights(pool.form.blueprint.blank(), pool.tokenizer, folder)

    return partial(VllmLM, backend=backend, write=write)


def start(config: Config, engine: Engine, scorer: Scorer, say: Callable[[str], None]) -> None:
    """Starts the engine of a configuration that has one, and refuses it where it does not follow the live model.

    Args:
        config: the run's configuration.
        engine: its live model is scored, and is the base afterwards.
        scorer: of that model.
        say: told what is being done.

    Raises:
        UserError: it does not start, or does not take other weights as it should.
    """
    if config.backend is None:
        return
    from mergesearch.evaluate.vllm import VllmLM

    lm: Any = scorer.language_model
    assert isinstance(lm, VllmLM)
    rules = parents(config)
    say(f"starting {lm.kind}, and trying it with the base and {next(iter(config.models))}")
    lm.check(
        base=lambda: engine.load(config.recipe(rules[BASE])),
        other=lambda: engine.load(config.recipe(rules[next(iter(config.models))])),
    )


__all__ = ["check_generates", "find_backend", "start", "vllm_of"]
