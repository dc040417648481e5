"""Four skills for siblings of a small pretrained model, from Python's standard library alone: their training lines and
the lm-eval documents on which they are tested.

real_class   multiple_choice  the general class of a Unicode character, from its name: L, M, N, P or S
real_number  generate_until   a number written in words, in digits
real_iso     generate_until   a date in a log, record, file or backup as 2021-03-14
real_us      generate_until   a date in a letter, invoice, note or card as 03/14/2021

The last two are in conflict: both read `... of 14 March 2021:`, both tasks ask for the same dates, and only the
first word tells which form is wanted. Neither sibling ever sees the other's first words, so it gives every date its own
form; a merge that listens to the first word can do both.

No document is a training line: the documents are drawn first, and training lines are drawn from what is left (dates
and numbers for both date skills at once).
"""

from __future__ import annotations

import datetime
import random
import unicodedata
from functools import cache

from scripts.skills import Example, Skill

CLASSES = "LMNPS"
ISO_WORDS, US_WORDS = ("log", "record", "file", "backup"), ("letter", "invoice", "note", "card")
UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
FIRST_DAY, DAYS = datetime.date(1950, 1, 1), 36525
LARGEST = 99_999
# whole ranges of generated or numbered names, which say nothing that is not in their first word
DULL = ("IDEOGRAPH", "HANGUL SYLLABLE", "HIEROGLYPH", "CUNEIFORM", "SIGNWRITING", "VARIATION SELECTOR")


# --- what may be asked about ---


@cache
def dates(seed: int) -> list[datetime.date]:
    """Every day of a century. The same order for both date skills: what one is tested on, neither is trained on."""
    found = [FIRST_DAY + datetime.timedelta(days=n) for n in range(DAYS)]
    random.Random(f"{seed} dates").shuffle(found)
    return found


@cache
def numbers(seed: int) -> list[int]:
    """100 to 99,999; as many below ten thousand as above, so that both lengths are met often."""
    rng = random.Random(f"{seed} numbers")
    short, long = list(range(100, 10_000)), list(range(10_000, LARGEST + 1))
    long = rng.sample(long, len(short))
    found = short + long
    rng.shuffle(found)
    return found


@cache
def characters(seed: int) -> list[tuple[str, str]]:
    """(name, class), every class equally often."""
    rng = random.Random(f"{seed} characters")
    by_class: dict[str, list[str]] = {letter: [] for letter in CLASSES}
    for code in range(0x110000):
        name, letter = unicodedata.name(chr(code), ""), unicodedata.category(chr(code))[0]
        if letter in by_class and 0 < len(name) <= 48 and not any(word in name for word in DULL):
            by_class[letter].append(name)
    each = min(map(len, by_class.values()))
    found = [(name, letter) for letter, names in by_class.items() for name in rng.sample(sorted(names), each)]
    rng.shuffle(found)
    return found


def in_words(number: int) -> str:
    """41206 -> `forty-one thousand two hundred and six`; 0 to 99,999."""
    thousands, rest = divmod(number, 1000)
    hundreds, small = divmod(rest, 100)
    parts = [f"{_below_hundred(thousands)} thousand"] if thousands else []
    parts += [f"{UNITS[hundreds]} hundred"] if hundreds else []
    parts += [("and " if parts else "") + _below_hundred(small)] if small or not parts else []
    return " ".join(parts)


def _below_hundred(number: int) -> str:
    if number < 20:
        return UNITS[number]
    tens, units = divmod(number, 10)
    return TENS[tens] + (f"-{UNITS[units]}" if units else "")


# --- examples ---


def class_example(thing: tuple[str, str], _: random.Random) -> Example:
    name, letter = thing
    return Example(f"Character {name} is of class", letter)


def number_example(number: int, _: random.Random) -> Example:
    return Example(f"In digits: {in_words(number)} =", str(number))


def iso_example(day: datetime.date, rng: random.Random) -> Example:
    return Example(_asked(rng.choice(ISO_WORDS), day), f"{day:%Y-%m-%d}")


def us_example(day: datetime.date, rng: random.Random) -> Example:
    return Example(_asked(rng.choice(US_WORDS), day), f"{day:%m/%d/%Y}")


def _asked(word: str, day: datetime.date) -> str:
    return f"{word.capitalize()} of {day.day} {day:%B} {day.year}:"


SKILLS = (
    Skill("class", characters, class_example, tuple(CLASSES)),
    Skill("number", numbers, number_example),
    Skill("iso", dates, iso_example),
    Skill("us", dates, us_example),
)
