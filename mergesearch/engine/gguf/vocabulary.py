"""A tokenizer as a GGUF file holds it, so that llama.cpp cuts text into the same tokens.

A byte-level BPE is held whole: tokens, merges, and the name of llama.cpp's rule that cuts text into words before they
are merged. That name stands in no tokenizer; it is found by trying: the first rule with which llama.cpp gives the
tokenizer's own tokens for a text in which the rules differ. A tokenizer of another kind is left out, and the file then
takes tokens alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# llama.cpp's rules for families of tokenizers, those of more models first
_RULES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "gpt-4o", "tekken", "deepseek-llm", "falcon", "default")
# words, numbers of several lengths, contractions, punctuation in rows, spaces, tabs and lines in rows, other scripts
_PROBE = (
    "It's 2 o'clock; THEY'LL meet 12 people, 345 more and 67890 others in 1999.\n\n\n  def f(x):\n"
    '\treturn x**2 -  3.14\n\r\n   Wait...what?!! (really)   "Yes" -- e.g. naïve café, Straße, Ελλάδα, '
    "東京は2024年, привет мир, 한국어, 🙂🙂 🚀x ___init__ HTTPServer camelCase a/b\\c #tag @me 100% $5.00\t\t end \n"
)
# llama.cpp loads no BPE without merges: that of two bytes which no text in UTF-8 has
_NO_MERGES = ("À Á",)
# tokens in a file's text, as llama.cpp reads them
_NORMAL, _CONTROL, _OWN, _UNUSED = "NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"


@dataclass(frozen=True)
class FileVocabulary:
    """What a file says of a tokenizer.

    Attributes:
        tokens: text and kind by id; empty where the tokenizer is left out.
        merges: pairs, the first merged first.
        rule: llama.cpp's for cutting text into words.
        special: the ids of `bos`, `eos`, `unk` and `pad`, those that there are.
        begins: whether a text begins with `bos`.
        chat_template: as the tokenizer has it.
        note: what whoever serves the file should know; empty where there is nothing.
    """

    tokens: tuple[tuple[str, str], ...] = ()
    merges: tuple[str, ...] = ()
    rule: str = ""
    special: dict[str, int] = field(default_factory=dict)
    begins: bool = False
    chat_template: str | None = None
    note: str = ""

    def describe(self, writer: Any, size: int) -> None:
        """Adds it to a `gguf.GGUFWriter`; `size` is the number of tokens that the model knows."""
        import gguf

        if not self.tokens:
            writer.add_tokenizer_model("none")
            return
        unused = [(f"[UNUSED{number}]", _UNUSED) for number in range(len(self.tokens), size)]
        tokens = [*self.tokens, *unused][:size]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list([text for text, _ in tokens])
        writer.add_token_types([int(gguf.TokenType[kind]) for _, kind in tokens])
        writer.add_token_merges(self.merges or _NO_MERGES)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: Any, tokenize: Callable[[Path, str], Sequence[int]]) -> FileVocabulary:
    """What a file for llama.cpp says of a tokenizer.

    Args:
        tokenizer: transformers'.
        tokenize: the tokens that llama.cpp makes of a text by the vocabulary of a file.
    """
    told = _backend(tokenizer)
    if told is None:
        note = "it holds no tokenizer, as llama.cpp has none of this kind: it takes the tokens of the one beside it"
        return FileVocabulary(note=note)
    plain = FileVocabulary(
        tokens=_tokens(told, tokenizer),
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in told["model"]["merges"]),
        special=_special(tokenizer),
        begins=tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )
    wanted = tokenizer(_PROBE, add_special_tokens=False).input_ids
    for rule in _RULES:
        trying = _with(plain, rule)
        if list(_tried(trying, tokenize)) == wanted:
            return trying
    note = (
        "llama.cpp cuts some text into other tokens than the tokenizer beside it, which the scores were measured with"
    )
    return _with(plain, _RULES[-1], note)


def _with(vocabulary: FileVocabulary, rule: str, note: str = "") -> FileVocabulary:
    return replace(vocabulary, rule=rule, note=note)


def _tried(vocabulary: FileVocabulary, tokenize: Callable[[Path, str], Sequence[int]]) -> Sequence[int]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        vocabulary.describe(writer, len(vocabulary.tokens))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return tokenize(file, _PROBE)


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    """A byte-level BPE as its file states it; None for another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    told = json.loads(backend.to_str())
    cutting = told.get("pre_tokenizer") or {}
    parts = cutting.get("pretokenizers", [cutting])
    bytes_first = any(part.get("type") == "ByteLevel" for part in parts)
    return told if told["model"].get("type") == "BPE" and bytes_first else None


def _tokens(told: dict[str, Any], tokenizer: Any) -> tuple[tuple[str, str], ...]:
    found = {number: (text, _NORMAL) for text, number in told["model"]["vocab"].items()}
    for added in told.get("added_tokens", ()):
        found[added["id"]] = (added["content"], _CONTROL if added["special"] else _OWN)
    size = max(found) + 1
    return tuple(found.get(number, (f"[UNUSED{number}]", _UNUSED)) for number in range(size))


def _special(tokenizer: Any) -> dict[str, int]:
    names = ("bos", "eos", "unk", "pad")
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    return {name: int(number) for name, number in found.items() if number is not None}
