"""What lm-eval does to the process around it, kept within bounds: its logging, its bars, its global seeds, and what the
templates of its tasks can reach."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import lm_eval.api.task
import lm_eval.utils
import numpy as np
import torch
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

_TALKATIVE = ("lm_eval", "datasets", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors from lm-eval, datasets and transformers, and no progress bars, until the block ends."""
    loggers = {name: logging.getLogger(name).level for name in _TALKATIVE}
    bars = datasets.are_progress_bars_disabled()
    # build_all_requests draws its bar without asking
    tqdm = lm_eval.api.task.tqdm
    try:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def lm_eval_seeds() -> Iterator[None]:
    """The global generators as `lm_eval` seeds them at its start (tasks and sampling may draw), then as they were.

    So a score depends neither on what was drawn before nor changes what is drawn after.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch._C.default_generator.manual_seed(DEFAULT_OTHER_SEED)
            if devices:
                torch.cuda.manual_seed_all(DEFAULT_OTHER_SEED)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def sandbox_templates() -> None:
    """From now on templates of tasks reach no attribute by which Python could be run; what they write stays the same.

    lm-eval renders them in an environment without bounds, so that a YAML file alone could run any command.
    """
    plain = lm_eval.utils.env
    if isinstance(plain, SandboxedEnvironment):
        return
    bounded = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    bounded.filters, bounded.tests = plain.filters, plain.tests
    lm_eval.utils.env = bounded
