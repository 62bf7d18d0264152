"""Minimal pairs: a grammatical sentence, and the same sentence with one grammatical mistake."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from compress.builtin import words
from compress.builtin.world import capital, split_of, world


@dataclass(frozen=True)
class Pair:
    """A good and a bad sentence; only the good ones ever occur in text."""

    good: str
    bad: str

    @property
    def split(self) -> str:
        """The only split in whose text the good sentence occurs."""
        return split_of(f"grammar/{self.good}")


def _pair(pattern: str, good: str, bad: str) -> Pair:
    return Pair(capital(pattern.replace("*", good)), capital(pattern.replace("*", bad)))


def _swap(one: str, many: str, number: int) -> tuple[str, str]:
    """Return the form that agrees with `number` (0: one, 1: many), then the other."""
    return (many, one) if number else (one, many)


def _phrase(rng: random.Random, number: int) -> str:
    """Return a subject with a noun between it and its verb, most often of the other number (an attractor)."""
    other = number if rng.random() < 0.3 else 1 - number
    subject = f"the {rng.choice(words.CREATURES)[number]}"
    return f"{subject} {rng.choice(words.PREPOSITIONS)} the {rng.choice(words.THINGS)[other]}"


def _be(rng: random.Random) -> Pair:
    number = rng.randrange(2)
    verbs = rng.choice((("is", "are"), ("was", "were")))
    return _pair(f"{_phrase(rng, number)} * {rng.choice(words.ADJECTIVES)}.", *_swap(*verbs, number))


def _verb(rng: random.Random) -> Pair:
    number = rng.randrange(2)
    base, third, _ = rng.choice(words.ACTIONS)
    return _pair(f"{_phrase(rng, number)} * {rng.choice(words.TIMES)}.", *_swap(third, base, number))


def _relative(rng: random.Random) -> Pair:
    number = rng.randrange(2)
    subject = rng.choice(words.CREATURES)[number]
    other = rng.choice(words.CREATURES)[1 - number]
    pattern = f"the {subject} that {rng.choice(words.SIGHTS)} the {other} * {rng.choice(words.ADJECTIVES)}."
    return _pair(pattern, *_swap("is", "are", number))


def _possessive(rng: random.Random) -> Pair:
    person = rng.choice(tuple(world().people.values()))
    pattern = (
        f"{person.name} {rng.choice(words.DEEDS)[2]} * {rng.choice(words.OBJECTS)} "
        f"{rng.choice(words.PREPOSITIONS)} the {rng.choice(words.THINGS)[0]}."
    )
    return _pair(pattern, person.possessive, "his" if person.she else "her")


def _reflexive(rng: random.Random) -> Pair:
    verb = rng.choice(("washed", "hurt", "hid", "warmed", "admired", "blamed"))
    end = f"{rng.choice(words.PREPOSITIONS)} the {rng.choice(words.THINGS)[0]}."
    if rng.random() < 0.5:
        person = rng.choice(tuple(world().people.values()))
        good, bad = ("herself", "himself") if person.she else ("himself", "herself")
        return _pair(f"{person.name} {verb} * {end}", good, rng.choice((bad, "themselves")))
    return _pair(
        f"the {rng.choice(words.CREATURES)[1]} {verb} * {end}",
        "themselves",
        rng.choice(("himself", "herself")),
    )


def _determiner(rng: random.Random) -> Pair:
    number = rng.randrange(2)
    determiner = (rng.choice(("this", "that")), rng.choice(("these", "those")))[number]
    name = rng.choice(tuple(world().people))
    pattern = f"{name} {rng.choice(words.SIGHTS)} {determiner} * {rng.choice(words.TIMES)}."
    return _pair(pattern, *_swap(*rng.choice(words.CREATURES), number))


def _article(rng: random.Random) -> Pair:
    name = rng.choice(tuple(world().people))
    vowel = rng.random() < 0.5
    food = rng.choice(words.VOWEL_FOODS if vowel else words.OTHER_FOODS)
    verb = rng.choice(("bought", "ate", "wanted", "found"))
    pattern = f"{name} {verb} * {food} {rng.choice(words.PREPOSITIONS)} the {rng.choice(words.PLACES)}."
    return _pair(pattern, *(("an", "a") if vowel else ("a", "an")))


def _auxiliary(rng: random.Random) -> Pair:
    name = rng.choice(tuple(world().people))
    base, third, past = rng.choice(words.ACTIONS)
    helper = rng.choice(("did not", "will", "can", "must", "could not"))
    place = f"{rng.choice(words.PREPOSITIONS)} the {rng.choice(words.PLACES)}"
    return _pair(f"{name} {helper} * {place}.", base, rng.choice((third, past)))


def _perfect(rng: random.Random) -> Pair:
    name = rng.choice(tuple(world().people))
    _, _, past, participle = rng.choice(words.DEEDS)
    helper = rng.choice(("has", "had", "has never", "has often"))
    thing = f"{rng.choice(words.COLOURS)} {rng.choice(words.OBJECTS)}"
    return _pair(f"{name} {helper} * the {thing}.", participle, past)


def _time(rng: random.Random) -> Pair:
    name = rng.choice(tuple(world().people))
    base, _, past = rng.choice(words.ACTIONS)
    day, good, bad = rng.choice((("yesterday", past, f"will {base}"), ("tomorrow", f"will {base}", past)))
    return _pair(f"{day} {name} * {rng.choice(words.PREPOSITIONS)} the {rng.choice(words.PLACES)}.", good, bad)


_KINDS: tuple[Callable[[random.Random], Pair], ...] = (
    _be,
    _be,
    _verb,
    _verb,
    _relative,
    _possessive,
    _possessive,
    _reflexive,
    _determiner,
    _article,
    _auxiliary,
    _perfect,
    _time,
)


def draw(rng: random.Random, split: str) -> Pair:
    """Return a pair whose good sentence belongs to the split."""
    while True:
        pair = rng.choice(_KINDS)(rng)
        if pair.split == split:
            return pair
