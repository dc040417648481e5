"""The forms in which a model may be served."""

from __future__ import annotations

from typing import Literal, TypeGuard, get_args

from mergesearch.errors import nearest

# what torchao quantises in memory
Quantised = Literal["int8", "int4", "fp8"]
# what llama.cpp's quantizer makes without an importance matrix
Filed = Literal[
    "gguf:Q4_K_M",
    "gguf:Q4_K_S",
    "gguf:Q4_0",
    "gguf:Q4_1",
    "gguf:IQ4_NL",
    "gguf:IQ4_XS",
    "gguf:Q2_K",
    "gguf:Q3_K_S",
    "gguf:Q3_K_M",
    "gguf:Q3_K_L",
    "gguf:IQ3_S",
    "gguf:IQ3_M",
    "gguf:Q5_K_M",
    "gguf:Q5_K_S",
    "gguf:Q5_0",
    "gguf:Q5_1",
    "gguf:Q6_K",
    "gguf:Q8_0",
    "gguf:F16",
    "gguf:BF16",
    "gguf:F32",
]

Form = Literal[Quantised, Filed]

_FILED = "gguf:"
_FORMS: tuple[str, ...] = get_args(Form)
# what llama.cpp makes with such a matrix alone
_WITH_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")


def check_form(form: object) -> None:
    """Refuses what is no form, and names the nearest.

    Raises:
        ValueError: it is none.
    """
    if form is None or form in _FORMS:
        return
    name = str(form)
    if name.upper().removeprefix(_FILED.upper()) in _WITH_MATRIX:
        raise ValueError(f"{name} needs an importance matrix, which is not made here: use gguf:Q2_K or a larger type")
    # also in small letters, and a file's type alone
    spelled = {known.casefold(): known for known in _FORMS} | {file_type(known).casefold(): known for known in _FORMS}
    close = nearest(name.casefold(), spelled)
    hint = f"did you mean {spelled[close]!r}? " if close else ""
    raise ValueError(f"unknown form {name!r}: {hint}(known: {', '.join(_FORMS)})")


def is_filed(form: str | None) -> TypeGuard[str]:
    """Whether a form is a file for llama.cpp: candidates are scored as merged, and finalists in both."""
    return form is not None and form.startswith(_FILED)


def file_type(form: str) -> str:
    """A file's type, as llama.cpp names it.

    >>> file_type("gguf:Q4_K_M")
    'Q4_K_M'
    """
    return form.removeprefix(_FILED)
