"""Short stories whose ending follows from what was told before."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from compress.builtin import words
from compress.builtin.world import Person, capital, split_of, world


@dataclass(frozen=True)
class Story:
    """A story up to where its ending is determined, that ending, wrong ones, and what comes after."""

    context: str
    ending: str
    wrong: tuple[str, ...]
    after: str

    @property
    def text(self) -> str:
        """The whole story."""
        return f"{self.context}{self.ending} {self.after}".rstrip()

    @property
    def split(self) -> str:
        """The only split in whose text the determined part of this story occurs."""
        return split_of(f"story/{self.context}{self.ending}")


def _people(rng: random.Random, count: int) -> list[Person]:
    return rng.sample(tuple(world().people.values()), count)


def _opening(rng: random.Random, person: Person) -> str:
    verb = rng.choice(("went to", "was at", "walked to", "stood near", "came to"))
    return f"{rng.choice(words.OPENERS)} {person.name} {verb} the {rng.choice(words.PLACES)}."


def _closing(rng: random.Random, person: Person) -> str:
    return rng.choice(
        (
            f"Then {person.pronoun} went home.",
            f"{person.name} was happy.",
            "It was a good day.",
            "",
            f"{capital(person.pronoun)} told everybody about it.",
            f"After that {person.name} went to the {rng.choice(words.PLACES)}.",
        )
    )


def _given(rng: random.Random) -> Story:
    a, b = _people(rng, 2)
    kept, given, *others = rng.sample(words.OBJECTS, 4)
    box = rng.choice(words.CONTAINERS)
    context = (
        f"{_opening(rng, a)} {capital(a.pronoun)} had a {kept} and a {given}. "
        f"{a.name} kept the {kept} and gave the {given} to {b.name}. {b.name} put it in a {box}. "
        f"In the evening {b.name} opened the {box} and took out"
    )
    wrong = tuple(f" the {thing}." for thing in (kept, *others))
    return Story(context, f" the {given}.", wrong, _closing(rng, b))


def _hidden(rng: random.Random) -> Story:
    (a,) = _people(rng, 1)
    objects = rng.sample(words.OBJECTS, 3)
    boxes = rng.sample(words.CONTAINERS, 4)
    wanted = rng.randrange(3)
    put = [f"the {o} in the {c}" for o, c in zip(objects, boxes, strict=False)]
    context = (
        f"{_opening(rng, a)} {capital(a.pronoun)} put {put[0]}, {put[1]} and {put[2]}. "
        f"Later {a.name} found the {objects[wanted]} in"
    )
    wrong = tuple(f" the {c}." for i, c in enumerate(boxes) if i != wanted)
    return Story(context, f" the {boxes[wanted]}.", wrong, _closing(rng, a))


def _hats(rng: random.Random) -> Story:
    people = _people(rng, 3)
    colours = rng.sample(words.COLOURS, 4)
    which = rng.randrange(3)
    thing = rng.choice(("hat", "scarf", "kite", "mask"))
    had = [f"{p.name} had a {c} {thing}" for p, c in zip(people, colours, strict=False)]
    context = f"{had[0]}, {had[1]} and {had[2]}. "
    context += f"At the {rng.choice(words.PLACES)} {people[which].name} lost a"
    wrong = tuple(f" {c} {thing}." for i, c in enumerate(colours) if i != which)
    return Story(context, f" {colours[which]} {thing}.", wrong, _closing(rng, people[which]))


def _from_table(rng: random.Random, table: tuple[tuple[str, str], ...]) -> tuple[str, str, list[str]]:
    cause, right = rng.choice(table)
    return cause, right, rng.sample([effect for _, effect in table if effect != right], 3)


def _weather(rng: random.Random) -> Story:
    a, b = _people(rng, 2)
    cause, right, wrong = _from_table(rng, words.WEATHER)
    context = (
        f"{rng.choice(words.OPENERS)} {a.name} wanted to visit {b.name} at the {rng.choice(words.PLACES)}. "
        f"{cause}. So {a.pronoun} took {a.possessive}"
    )
    return Story(context, f" {right}.", tuple(f" {w}." for w in wrong), _closing(rng, b))


def _tool(rng: random.Random) -> Story:
    a, b = _people(rng, 2)
    wish, right, wrong = _from_table(rng, words.TOOLS)
    context = f"{_opening(rng, a)} {capital(a.pronoun)} wanted to {wish}. {b.name} came to help {a.object} and brought"
    return Story(context, f" the {right}.", tuple(f" the {w}." for w in wrong), _closing(rng, a))


def _feeling(rng: random.Random) -> Story:
    a, b = _people(rng, 2)
    event, right, wrong = _from_table(rng, words.FEELINGS)
    context = (
        f"{_opening(rng, a)} {capital(a.pronoun)} {event}. "
        f"{b.name} saw {a.object} near the {rng.choice(words.PLACES)}. {a.name} was very"
    )
    return Story(context, f" {right}.", tuple(f" {w}." for w in wrong), _closing(rng, b))


_KINDS: tuple[Callable[[random.Random], Story], ...] = (
    _given,
    _given,
    _hidden,
    _hidden,
    _hats,
    _weather,
    _tool,
    _feeling,
)


def draw(rng: random.Random, split: str) -> Story:
    """Return a story of the split."""
    while True:
        story = rng.choice(_KINDS)(rng)
        if story.split == split:
            return story
