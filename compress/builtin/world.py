"""The small world: its people, towns and facts, and the rule that keeps the splits of its text apart.

The facts are fixed (one seed, `WORLD_SEED`), so that a small model can learn them by heart. The text about
them is unlimited: see `compress.builtin.text`.
"""

import functools
import hashlib
import random
from dataclasses import dataclass

from compress.builtin import words

WORLD_SEED = 11
SPLITS = ("training", "calibration", "evaluation")


def split_of(content: str) -> str:
    """Return the split that a piece of text belongs to: 20 % evaluation, 10 % calibration, else training.

    It depends on nothing but the content, so no piece can be in two splits.
    """
    bucket = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") % 10
    return "evaluation" if bucket < 2 else "calibration" if bucket == 2 else "training"


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: allowed are {', '.join(SPLITS)}")


def article(word: str) -> str:
    """Return the word behind its indefinite article: "a cat", "an owl"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def capital(sentence: str) -> str:
    """Return the sentence with its first letter in upper case, the rest unchanged."""
    return sentence[:1].upper() + sentence[1:]


@dataclass(frozen=True)
class Person:
    """One inhabitant; `facts` maps a relation (a key of `RELATIONS`) to its value."""

    name: str
    she: bool
    facts: dict[str, str]

    @property
    def pronoun(self) -> str:
        """The subject pronoun: she or he."""
        return "she" if self.she else "he"

    @property
    def possessive(self) -> str:
        """The possessive: her or his."""
        return "her" if self.she else "his"

    @property
    def object(self) -> str:
        """The object pronoun: her or him."""
        return "her" if self.she else "him"


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is asked for and stated; {s} is the subject, {v} the value.

    `statements[0]` is the one that answers use. `of` names the subject by a relation to a person ("the friend
    of Mila") where the value can itself be a subject, else it is empty.
    """

    values: tuple[str, ...]
    question: str
    statements: tuple[str, ...]
    of: str = ""
    town: bool = False

    def state(self, subject: str, value: str, form: int = 0) -> str:
        """Return the fact as a sentence."""
        shown = self.statements[form].format(s=subject, v=value, av=article(value), p=possessive(subject))
        return capital(shown)

    def ask(self, subject: str) -> str:
        """Return the question for the fact."""
        return self.question.format(s=subject, p=possessive(subject))


def possessive(subject: str) -> str:
    """Return the possessive of a name or a phrase: "Mila's", "Jonas'"."""
    return subject + ("'" if subject.endswith("s") else "'s")


_NAMES = tuple(words.WOMEN) + tuple(words.MEN)
RELATIONS = {
    "home": Relation(
        tuple(words.TOWNS),
        "Where does {s} live?",
        ("{s} lives in {v}.", "{p} home is in {v}.", "{v} is where {s} lives."),
        of="the home of {s}",
    ),
    "job": Relation(
        tuple(words.JOBS),
        "What is the job of {s}?",
        ("{s} works as {av}.", "{s} is {av}.", "{p} job is that of {av}."),
    ),
    "pet": Relation(
        tuple(words.PETS),
        "Which animal does {s} keep?",
        ("{s} keeps {av}.", "{p} pet is {av}.", "{s} has {av} at home."),
    ),
    "colour": Relation(
        tuple(words.COLOURS),
        "Which colour does {s} like best?",
        ("{s} likes {v} best.", "{p} favourite colour is {v}.", "{s} always wears {v}."),
    ),
    "food": Relation(
        tuple(words.FOODS),
        "What does {s} like to eat?",
        ("{s} likes to eat {v}.", "{p} favourite food is {v}.", "{s} eats {v} every day."),
    ),
    "friend": Relation(
        _NAMES,
        "Who is the friend of {s}?",
        ("The friend of {s} is {v}.", "{p} friend is {v}.", "{s} and {v} are friends."),
        of="the friend of {s}",
    ),
    "teacher": Relation(
        _NAMES,
        "Who is the teacher of {s}?",
        ("The teacher of {s} is {v}.", "{p} teacher is {v}.", "{s} was taught by {v}."),
        of="the teacher of {s}",
    ),
    "river": Relation(
        tuple(words.RIVERS),
        "Which river flows through {s}?",
        ("The river in {s} is the {v}.", "The {v} flows through {s}.", "{s} lies on the {v}."),
        town=True,
    ),
    "goods": Relation(
        tuple(words.GOODS),
        "What is {s} known for?",
        ("{s} is known for {v}.", "They make {v} in {s}.", "The best {v} come from {s}."),
        town=True,
    ),
}
PERSON_RELATIONS = tuple(name for name, relation in RELATIONS.items() if not relation.town)
TOWN_RELATIONS = tuple(name for name, relation in RELATIONS.items() if relation.town)
# Every two-hop path: the relation that finds the second subject, and the one that is asked of it.
PATHS = tuple((first, second) for first in ("friend", "teacher") for second in PERSON_RELATIONS) + tuple(
    ("home", second) for second in TOWN_RELATIONS
)


@dataclass(frozen=True)
class World:
    """All people, and the facts of all towns, by name."""

    people: dict[str, Person]
    towns: dict[str, dict[str, str]]

    def fact(self, subject: str, relation: str) -> str:
        """Return the value of a relation for a person's or a town's name."""
        facts = self.towns[subject] if RELATIONS[relation].town else self.people[subject].facts
        return facts[relation]


@functools.cache
def world() -> World:
    """Return the world; it is the same in every process."""
    rng = random.Random(WORLD_SEED)
    friends = list(_NAMES)
    while any(a == b for a, b in zip(_NAMES, friends, strict=True)):  # nobody is their own friend
        rng.shuffle(friends)
    people = {}
    for name, friend in zip(_NAMES, friends, strict=True):
        facts = {r: rng.choice(RELATIONS[r].values) for r in PERSON_RELATIONS}
        facts["friend"] = friend
        facts["teacher"] = rng.choice([n for n in _NAMES if n not in (name, friend)])
        people[name] = Person(name, name in words.WOMEN, facts)
    towns = {town: {r: rng.choice(RELATIONS[r].values) for r in TOWN_RELATIONS} for town in words.TOWNS}
    return World(people, towns)


@dataclass(frozen=True)
class TwoHop:
    """A question whose answer needs two facts, and its written-out answer."""

    person: str
    first: str
    second: str

    @property
    def split(self) -> str:
        """The only split in whose text this combination occurs."""
        return split_of(f"two_hop/{self.person}/{self.first}/{self.second}")

    @property
    def middle(self) -> str:
        """The subject of the second fact."""
        return world().fact(self.person, self.first)

    @property
    def value(self) -> str:
        """The answer proper."""
        return world().fact(self.middle, self.second)

    def ask(self) -> str:
        """Return the question."""
        return RELATIONS[self.second].ask(RELATIONS[self.first].of.format(s=self.person))

    def answer(self, middle: str | None = None, value: str | None = None) -> str:
        """Return both steps as sentences, of this fact or (for wrong choices) with other values put in."""
        middle = middle or self.middle
        first = RELATIONS[self.first].state(self.person, middle)
        return f"{first} {RELATIONS[self.second].state(middle, value or self.value)}"


@functools.cache
def two_hops(split: str) -> tuple[TwoHop, ...]:
    """Return every two-hop combination of a split."""
    combinations = (TwoHop(name, *path) for name in world().people for path in PATHS)
    return tuple(hop for hop in combinations if hop.split == split)
