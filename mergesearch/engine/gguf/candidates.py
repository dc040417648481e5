"""Recipes to files that llama.cpp answers from, one after another."""

from __future__ import annotations

import time
from pathlib import Path

from mergesearch import leftovers
from mergesearch.engine.gguf.form import FileForm
from mergesearch.engine.gguf.model import FileModel
from mergesearch.engine.live import Engine
from mergesearch.recipe import Recipe


class FileCandidates:
    """Builds candidates as an engine does, each as a file: `model` answers from the last one.

    Args:
        engine: merges them.
        form: of the files.
        folder: where the one that is open is.
        exact: as for `llama.LoadedFile`.
    """

    def __init__(self, engine: Engine, form: FileForm, folder: Path, exact: bool = False):
        self._engine = engine
        self._form = form
        self._file = leftovers.partial(folder / form.name)
        self.model: FileModel = FileModel(engine.model.config, engine.model.generation_config, exact)

    def load(self, recipe: Recipe) -> float:
        """Makes `model` answer as the recipe's candidate in this form; returns seconds.

        Raises:
            UserError, CandidateError, CutError: as `Engine.load`; CandidateError also where llama.cpp cannot do it.
        """
        started = time.perf_counter()
        self.close()
        with self._engine.as_merged():
            self._engine.load(recipe)
            self._form.write(self._engine.model, self._engine.pool.tokenizer, self._file)
        self.model.open(self._file)
        return time.perf_counter() - started

    def identity(self, recipe: Recipe) -> str:
        """Equal for recipes that do the same to every tensor."""
        return self._engine.identity(recipe)

    def close(self) -> None:
        """Lets the file go, and takes it away."""
        self.model.close()
        self._file.unlink(missing_ok=True)
