"""A candidate in a form that llama.cpp serves: written as a file, and scored as that file."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch import leftovers
from mergesearch.config.served import file_type
from mergesearch.engine.gguf import llama
from mergesearch.engine.gguf.vocabulary import FileVocabulary, vocabulary_of
from mergesearch.engine.gguf.writing import check_writable, write
from mergesearch.errors import UserError


def check_filed(form: str) -> None:
    """Refuses a form that cannot be had here, before anything is loaded.

    Raises:
        UserError: what makes or reads files of it is not installed.
    """
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join({"llama_cpp": "llama-cpp-python", "gguf": "gguf"}[name] for name in missing)
        raise UserError(f"score_as is {form}, which needs {names}: pip install 'mergesearch[gguf]'")


class FileForm:
    """Candidates as GGUF files of a type.

    Args:
        form: as `gguf:Q4_K_M`.

    Raises:
        UserError: what it needs is not installed.
    """

    def __init__(self, form: str):
        check_filed(form)
        self.form = form
        self.type: str = file_type(form)
        self._vocabulary: tuple[Any, FileVocabulary] | None = None

    @property
    def name(self) -> str:
        """What a checkpoint calls its file."""
        return f"model-{self.type}.gguf"

    def check(self, model: Any) -> None:
        """Refuses a model that cannot be written; its weights are not looked at.

        Raises:
            UserError: why.
        """
        check_writable(model)

    def write(
        self, model: Any, tokenizer: Any, out: Path, name: str = "", metadata: Mapping[str, str] | None = None
    ) -> list[str]:
        """Writes a live model as a file of this type; returns what whoever serves it should know, a sentence each.

        Beside it, the file with the numbers as they were merged takes room until this is done.

        Args:
            model: a transformers causal language model.
            tokenizer: its own.
            out: the new file.
            name, metadata: that the file carries.

        Raises:
            UserError: a model that cannot be written.
            CandidateError: llama.cpp cannot make the file.
        """
        if self._vocabulary is None or self._vocabulary[0] is not tokenizer:
            self._vocabulary = (tokenizer, vocabulary_of(tokenizer, llama.tokenize))
        vocabulary = self._vocabulary[1]
        plain = leftovers.partial(out.with_name(f"merged-{self.type}.gguf"))
        try:
            write(model, vocabulary, plain, name, metadata)
            with leftovers.writing(out) as temporary:
                llama.quantize(plain, temporary, self.type)
        finally:
            plain.unlink(missing_ok=True)
        return [f"of its tensors {_types(out)}", *filter(None, [vocabulary.note])]


def _types(file: Path) -> str:
    """How many tensors of each type a file has: `210 are Q4_K, 61 are F32`."""
    import gguf

    counts = Counter(gguf.GGMLQuantizationType(tensor.tensor_type).name for tensor in gguf.GGUFReader(file).tensors)
    return ", ".join(f"{count} are {kind}" for kind, count in counts.most_common())
