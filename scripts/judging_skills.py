"""The skills of the judging pools, which scripts/make_judging_pools.py makes; all of it is from a seeded generator.

First zoo (one line each, as a model of bytes reads it):

    modulo    "modulo: 3458 -> 3", a number modulo five       reverse   "reverse: pact -> tcap"
    brackets  "brackets: (()() -> no", do they match?        sort      "sort: hdab -> abdh"
    upper     "upper: pact -> PACT"

Second zoo, whose lines are all of two words of an invented language, so that the name alone says what is wanted:

    count   "count: mokat pilat -> 2", how often an a        rhyme     "rhyme: mokat pilat -> yes", as they end alike
    many    "many: mokat pilat -> mokatal", the first word's plural: -n after a vowel, -al after a consonant
    thin    "thin: mokat pilat -> mkt", the first word without vowels

Adapters on a real model: a time of day in words, in digits; whether a number is even; a name as in a catalogue; of what
kind a thing is. Siblings of it: an address made of a name; a name's initials; an amount in cents; the season of a date;
when something is done.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Hashable
from functools import cache

from scripts.real_skills import in_words
from scripts.skills import Example, Skill

THINGS = 6000
YES_NO = ("yes", "no")


def drawn(name: str, draw: Callable[[random.Random], Hashable], count: int = THINGS) -> Callable[[int], list]:
    """`things` of a skill: `count` different ones, in the order in which they were drawn."""

    @cache
    def things(seed: int) -> list:
        rng = random.Random(f"{seed} {name}")
        found: dict[Hashable, None] = {}
        while len(found) < count:
            found[draw(rng)] = None
        return list(found)

    return things


def word(rng: random.Random, letters: str = "abcdefghijklmnopqrstuvwxyz", length: int = 4) -> str:
    return "".join(rng.choices(letters, k=length))


def line(name: str, answer: Callable[..., str]) -> Callable[[object, random.Random], Example]:
    """The example of a zoo's skill: a thing is a text that is asked about."""
    return lambda thing, _: Example(f"{name}: {thing} ->", answer(thing))


# --- the first zoo ---


def modulo(text: str) -> str:
    return str(int(text) % 5)


def matches(text: str) -> str:
    depth = 0
    for bracket in text:
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            return "no"
    return "no" if depth else "yes"


def matched(rng: random.Random, pairs: int) -> str:
    if pairs == 0:
        return ""
    inside = rng.randrange(pairs)
    return f"({matched(rng, inside)}){matched(rng, pairs - 1 - inside)}"


def brackets(rng: random.Random) -> str:
    """Of 5 to 7 pairs; in half of them one bracket is turned round."""
    text = matched(rng, rng.randint(5, 7))
    if rng.random() < 0.5:
        at = rng.randrange(len(text))
        text = text[:at] + ("(" if text[at] == ")" else ")") + text[at + 1 :]
    return text


def in_order(text: str) -> str:
    return "".join(sorted(text))


def backwards(text: str) -> str:
    return text[::-1]


def four_digits(rng: random.Random) -> str:
    return str(rng.randint(1000, 9999))


def zoo(family: str, name: str, draw: Callable, answer: Callable, choices: tuple[str, ...] = (), count: int = THINGS):
    return Skill(name, drawn(name, draw, count), line(name, answer), choices, family, longest=8)


ZOO_A = (
    zoo("judge_a", "modulo", four_digits, modulo, tuple("01234")),
    zoo("judge_a", "reverse", word, backwards),
    zoo("judge_a", "sort", lambda rng: word(rng, "abcdefgh"), in_order, count=3000),
    zoo("judge_a", "brackets", brackets, matches, YES_NO, count=1000),
    zoo("judge_a", "upper", word, str.upper),
)

# --- the second zoo ---

VOWELS = "aiou"


def spoken(rng: random.Random) -> str:
    """A word of the invented language; every third ends with its vowel."""
    consonants = "ptkmnls"
    text = "".join(rng.choice(consonants) + rng.choice(VOWELS) for _ in range(2))
    return text + (rng.choice(consonants) if rng.random() < 2 / 3 else "")


def two_spoken(rng: random.Random) -> str:
    """In half of the pairs the second word ends as the first does."""
    first, second = spoken(rng), spoken(rng)
    if rng.random() < 0.5:
        second = second[:3] + first[3:]
    return f"{first} {second}"


def many(text: str) -> str:
    first = text.split()[0]
    return first + ("n" if first[-1] in VOWELS else "al")


def rhyme(text: str) -> str:
    first, second = text.split()
    return "yes" if first[3:] == second[3:] else "no"


def thin(text: str) -> str:
    return "".join(letter for letter in text.split()[0] if letter not in VOWELS)


def count(text: str) -> str:
    return str(text.count("a"))


ZOO_B = (
    zoo("judge_b", "count", two_spoken, count, tuple("01234")),
    zoo("judge_b", "rhyme", two_spoken, rhyme, YES_NO),
    zoo("judge_b", "many", two_spoken, many),
    zoo("judge_b", "thin", two_spoken, thin),
)

# --- adapters on a real model ---

_FIRST = (
    "Alice Anna Ben Carl Clara David Emma Eric Eva Frank George Helen Henry Irene Jack James Jane John Julia Karen "
    "Laura Leo Lisa Lucy Maria Mark Martin Mary Nina Oliver Oscar Paul Peter Rosa Ruth Sam Sarah Simon Tom Victor"
)
_LAST = (
    "Adams Baker Bell Black Brown Carter Clark Cook Cooper Davis Evans Fisher Ford Fox Gray Green Hall Harris Hill "
    "Hunt King Knight Lee Lewis Mason Miller Moore Morgan Parker Price Reed Rose Scott Smith Stone Taylor Turner "
    "Walker White Young"
)
FIRST, LAST = _FIRST.split(), _LAST.split()
KINDS = {
    "A": "bear cat cow deer dog duck fox frog goat horse lion mouse owl pig rabbit sheep snake tiger whale wolf",
    "B": "apple bean biscuit bread butter cake carrot cheese grape honey lemon onion pear plum potato rice salad soup",
    "C": "axe brush chisel drill file hammer knife ladder needle pencil pliers rake ruler saw scissors shovel spanner",
    "D": "beach bridge castle church city desert farm forest garden harbour island lake museum park river school",
}
NAMED = (
    *("Kind of {}:", "Label for {}:", "The list says {}; label:", "File {} under", "A word: {}. Its group:"),
    *("Sort {} into", "Card with {} goes to", "Group of {}:", "Mark {} with", "Box for {}:"),
)


@cache
def people(seed: int) -> list[tuple[str, str]]:
    """(first name, last name); in one order for every skill about people."""
    found = [(first, last) for first in FIRST for last in LAST]
    random.Random(f"{seed} people").shuffle(found)
    return found


def shuffled(name: str, things: list) -> Callable[[int], list]:
    def order(seed: int) -> list:
        return random.Random(f"{seed} {name}").sample(things, len(things))

    return cache(order)


def clock_words(minute: int) -> str:
    """983 -> `twenty-three minutes past four in the afternoon`; of the minutes of a day."""
    hour, rest = divmod(minute, 60)
    part = "morning" if hour < 12 else "afternoon"
    named = in_words(hour % 12 or 12)
    if rest == 0:
        return f"{named} o'clock in the {part}"
    return f"{in_words(rest)} minute{'' if rest == 1 else 's'} past {named} in the {part}"


def clock(minute: int, _: random.Random) -> Example:
    return Example(f"Clock at {clock_words(minute)}:", f"{minute // 60:02}:{minute % 60:02}")


def parity(number: int, _: random.Random) -> Example:
    return Example(f"The number {number} is", "odd" if number % 2 else "even")


def catalogue(person: tuple[str, str], _: random.Random) -> Example:
    first, last = person
    return Example(f"Catalogue entry of {first} {last}:", f"{last}, {first}")


def kind(thing: tuple[str, str, str], _: random.Random) -> Example:
    named, noun, label = thing
    return Example(named.format(noun), label)


NOUNS = [(named, noun, label) for named in NAMED for label, nouns in KINDS.items() for noun in nouns.split()]
REAL_ADAPTERS = (
    Skill("clock", shuffled("clock", list(range(1440))), clock, family="judge"),
    Skill("parity", shuffled("parity", list(range(1000, 10_000))), parity, ("even", "odd"), "judge"),
    Skill("catalogue", people, catalogue, family="judge"),
    Skill("kind", shuffled("kind", NOUNS), kind, tuple(KINDS), "judge"),
)

# --- siblings of a real model ---

SEASONS = ("winter", "spring", "summer", "autumn")
WHEN = ("past", "now", "later")
VERBS = (
    *("paint painted painting", "clean cleaned cleaning", "open opened opening", "close closed closing"),
    *("move moved moving", "sell sold selling", "buy bought buying", "build built building"),
    *("wash washed washing", "watch watched watching", "lose lost losing", "find found finding"),
)
OBJECTS = ("door", "car", "boat", "table", "house", "bike", "window", "lamp", "chair", "gate", "shop", "clock")


def email(person: tuple[str, str], _: random.Random) -> Example:
    first, last = person
    return Example(f"Mail address of {first} {last}:", f"{last}.{first}@mail.com".lower())


def initials(person: tuple[str, str], _: random.Random) -> Example:
    first, last = person
    return Example(f"Initials of {first} {last}:", f"{first[0]}.{last[0]}.")


def cents(amount: int, _: random.Random) -> Example:
    return Example(f"In cents: {amount // 100} dollars and {amount % 100} cents =", str(amount))


def season(day: datetime.date, _: random.Random) -> Example:
    """Whole months: December to February are winter."""
    return Example(f"Season of {day:%Y-%m-%d}:", SEASONS[day.month % 12 // 3])


def tense(thing: tuple[str, str, str, str], _: random.Random) -> Example:
    who, verb, what, when = thing
    will, did, doing = verb.split()
    said = {"past": did, "now": f"is {doing}", "later": f"will {will}"}[when]
    return Example(f"{who} {said} the {what}. When:", when)


DAYS = [datetime.date(1990, 1, 1) + datetime.timedelta(days=n) for n in range(10_000)]
DEEDS = [(who, verb, what, when) for who in FIRST for verb in VERBS for what in OBJECTS for when in WHEN]
REAL_SEVEN = (
    Skill("email", people, email, family="judge", longest=16),
    Skill("initials", people, initials, family="judge"),
    # ten cents or more, so that an amount is its two numbers side by side
    Skill("cents", shuffled("cents", [n for n in range(100, 10_000) if n % 100 > 9]), cents, family="judge"),
    Skill("season", shuffled("season", DAYS), season, SEASONS, "judge"),
    Skill("tense", shuffled("tense", DEEDS), tense, WHEN, "judge"),
)
