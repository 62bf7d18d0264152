"""Documents and test items about the small world: each one a pure function of (split, seed, index)."""

import random
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from compress.builtin import arithmetic, grammar, stories
from compress.builtin.world import (
    PERSON_RELATIONS,
    RELATIONS,
    TOWN_RELATIONS,
    Person,
    capital,
    check_split,
    split_of,
    two_hops,
    world,
)

Item = dict[str, Any]


def _fact(rng: random.Random) -> tuple[str, str]:
    """Return a random (subject, relation)."""
    if rng.random() < 0.08:
        return rng.choice(tuple(world().towns)), rng.choice(TOWN_RELATIONS)
    return rng.choice(tuple(world().people)), rng.choice(PERSON_RELATIONS)


def _state(rng: random.Random, subject: str, relation: str) -> str:
    form = rng.randrange(len(RELATIONS[relation].statements))
    return RELATIONS[relation].state(subject, world().fact(subject, relation), form)


def question(text: str) -> str:
    """Return the line that poses a question, up to where its answer starts."""
    return f"Question: {text} Answer:"


def _grammar(rng: random.Random, split: str) -> str:
    return " ".join(grammar.draw(rng, split).good for _ in range(rng.randint(4, 8)))


def _stories(rng: random.Random, split: str) -> str:
    return "\n".join(stories.draw(rng, split).text for _ in range(rng.randint(1, 2)))


def _profile(rng: random.Random, split: str) -> str:
    """Return all that is known of one person, who is called by a pronoun now and then."""
    person: Person = rng.choice(tuple(world().people.values()))
    sentences = []
    for i, relation in enumerate(rng.sample(PERSON_RELATIONS, rng.randint(4, 7))):
        form = rng.randrange(len(RELATIONS[relation].statements))
        sentence = RELATIONS[relation].state(person.name, person.facts[relation], form)
        if i and rng.random() < 0.4 and sentence.startswith(person.name):
            # "Mila's job" -> "Her job", "Mila keeps" -> "She keeps"; "Mila and Oren are friends" stays
            rest = sentence[len(person.name) :]
            if rest.startswith("'"):
                sentence = capital(person.possessive) + rest[rest.index(" ") :]
            elif not rest.startswith(" and"):
                sentence = capital(person.pronoun) + rest
        sentences.append(sentence)
    return " ".join(sentences)


def _facts(rng: random.Random, split: str) -> str:
    """Return unconnected facts; a fact never leads to the next, which would write out a two-hop answer."""
    sentences: list[str] = []
    value = ""
    while len(sentences) < 8:
        subject, relation = _fact(rng)
        if subject != value:
            sentences.append(_state(rng, subject, relation))
            value = world().fact(subject, relation)
    return " ".join(sentences)


def _fact_questions(rng: random.Random, split: str) -> str:
    lines = []
    for _ in range(rng.randint(3, 6)):
        subject, relation = _fact(rng)
        answer = RELATIONS[relation].state(subject, world().fact(subject, relation))
        lines.append(f"{question(RELATIONS[relation].ask(subject))} {answer}")
    return "\n".join(lines)


def _two_hop(rng: random.Random, split: str) -> str:
    hops = rng.sample(two_hops(split), rng.randint(2, 4))
    return "\n".join(f"{question(hop.ask())} {hop.answer()}" for hop in hops)


def _arithmetic(rng: random.Random, split: str) -> str:
    problems = (arithmetic.draw(rng, split) for _ in range(rng.randint(2, 4)))
    return "\n".join(f"{question(p.ask())} {p.answer()}" for p in problems)


# kind of document: its weight in the mix
_DOCUMENTS: dict[Callable[[random.Random, str], str], int] = {
    _grammar: 2,
    _stories: 6,
    _profile: 4,
    _facts: 4,
    _fact_questions: 5,
    _two_hop: 5,
    _arithmetic: 6,
}


def document(split: str, seed: int, index: int) -> str:
    """Return one document of a split: one or more sentences, stories or worked questions of one kind."""
    check_split(split)
    rng = random.Random(f"document/{split}/{seed}/{index}")
    while True:
        kind = rng.choices(tuple(_DOCUMENTS), tuple(_DOCUMENTS.values()))[0]
        text = kind(rng, split)
        # Facts are the same in every split: the document as a whole decides. What is made of held-out parts
        # passes this test, too, so that the rule has no exception.
        while split_of(text) != split:
            text = kind(rng, split)
        return text


def documents(split: str, seed: int = 0) -> Iterator[str]:
    """Return the endless stream of a split's documents."""
    check_split(split)  # here, not at the first document
    return (document(split, seed, index) for index in count())


def _choices(rng: random.Random, asked: str, right: str, wrong: list[str]) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"question": asked, "choices": choices, "label": choices.index(right)}


def _grammar_item(rng: random.Random, split: str) -> Item:
    pair = grammar.draw(rng, split)
    return {"good": pair.good, "bad": pair.bad}


def _story_item(rng: random.Random, split: str) -> Item:
    story = stories.draw(rng, split)
    return _choices(rng, story.context, story.ending, list(story.wrong))


def _facts_item(rng: random.Random, split: str) -> Item:
    subject, name = _fact(rng)
    relation = RELATIONS[name]
    right = world().fact(subject, name)
    asked, answer = question(relation.ask(subject)), f" {relation.state(subject, right)}"
    if rng.random() < 0.6:
        return {"prompt": asked, "completion": answer}
    wrong = rng.sample([v for v in relation.values if v not in (right, subject)], 3)
    return _choices(rng, asked, answer, [f" {relation.state(subject, v)}" for v in wrong])


def _two_hop_item(rng: random.Random, split: str) -> Item:
    hop = rng.choice(two_hops(split))
    asked, answer = question(hop.ask()), f" {hop.answer()}"
    if rng.random() < 0.6:
        return {"prompt": asked, "completion": answer}
    # One wrong choice errs in the first step and then goes on rightly; two err in the second step.
    middles = [v for v in RELATIONS[hop.first].values if v not in (hop.middle, hop.person)]
    middle = rng.choice([v for v in middles if world().fact(v, hop.second) != hop.value])
    values = [v for v in RELATIONS[hop.second].values if v not in (hop.value, hop.middle)]
    wrong = [hop.answer(middle, world().fact(middle, hop.second))]
    wrong += [hop.answer(value=v) for v in rng.sample(values, 2)]
    return _choices(rng, asked, answer, [f" {w}" for w in wrong])


def _arithmetic_item(rng: random.Random, split: str) -> Item:
    problem = arithmetic.draw(rng, split)
    return {"prompt": question(problem.ask()), "completion": f" {problem.answer()}"}


_ITEMS: dict[str, Callable[[random.Random, str], Item]] = {
    "grammar": _grammar_item,
    "story": _story_item,
    "facts": _facts_item,
    "two_hop": _two_hop_item,
    "arithmetic": _arithmetic_item,
}


def areas() -> list[str]:
    """Return the names of the areas that items test."""
    return list(_ITEMS)


def item(area: str, split: str, seed: int, index: int) -> Item:
    """Return one test item of an area."""
    rng = random.Random(f"item/{area}/{split}/{seed}/{index}")
    return {**_ITEMS[area](rng, split), "area": area}


def items(split: str = "evaluation", per_area: int = 200, seed: int = 0) -> list[Item]:
    """Return `per_area` different items of each area.

    Three forms: multiple choice (`question`, `choices`, `label`), minimal pair (`good`, `bad`), exact answer
    (`prompt`, `completion`). Sentences, stories, two-hop combinations and operands are those of the split;
    facts are the same in all splits, since they are there to be recalled.
    """
    check_split(split)
    found: list[Item] = []
    for area in areas():
        unique: dict[str, Item] = {}
        for index in range(20 * per_area + 1000):
            if len(unique) == per_area:
                break
            candidate = item(area, split, seed, index)
            unique.setdefault(candidate.get("good") or repr(sorted(candidate.items(), key=str)), candidate)
        if len(unique) < per_area:
            raise ValueError(f"per_area={per_area}: the area {area!r} has only {len(unique)} different items")
        found += unique.values()
    return found
