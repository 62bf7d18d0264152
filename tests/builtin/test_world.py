"""The small world, its text and items, and the embedded model that was trained on them."""

import random
import re
import subprocess
import sys
from itertools import islice
from typing import Any

import pytest

from compress import builtin
from compress.builtin import arithmetic, grammar, stories, text
from compress.builtin.world import PATHS, RELATIONS, SPLITS, split_of, two_hops, world

ITEMS = builtin.items(per_area=200)
TRAINING = list(islice(builtin.documents("tiny", "training"), 6000))
CALIBRATION = list(islice(builtin.documents("tiny", "calibration", 3), 2000))


def by_area(area: str) -> list[dict[str, Any]]:
    return [item for item in ITEMS if item["area"] == area]


def right_answer(item: dict[str, Any]) -> str:
    return item["choices"][item["label"]] if "choices" in item else item["completion"]


def test_documents_are_a_function_of_split_seed_and_index() -> None:
    for split in SPLITS:
        first = list(islice(builtin.documents("tiny", split, 5), 50))
        assert first == list(islice(builtin.documents("tiny", split, 5), 50))
        assert first[17] == text.document(split, 5, 17)
        assert first != list(islice(builtin.documents("tiny", split, 6), 50))


def test_text_is_the_same_in_another_process() -> None:
    """Hash randomisation or the order of a set would show here."""
    program = "from compress import builtin; print(repr(builtin.items(per_area=5)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(builtin.items(per_area=5))


def test_splits_share_no_document() -> None:
    evaluation = {d for seed in (0, 1) for d in islice(builtin.documents("tiny", "evaluation", seed), 1500)}
    assert not evaluation & set(TRAINING)
    assert not evaluation & set(CALIBRATION)
    assert not set(TRAINING) & set(CALIBRATION)
    assert {split_of(d) for d in evaluation} == {"evaluation"}
    assert {split_of(d) for d in TRAINING} == {"training"}
    assert {split_of(d) for d in CALIBRATION} == {"calibration"}


def test_items_are_well_formed() -> None:
    assert builtin.areas() == ["grammar", "story", "facts", "two_hop", "arithmetic"]
    for area in builtin.areas():
        assert len(by_area(area)) == 200
        assert len({repr(item) for item in by_area(area)}) == 200
    for item in ITEMS:
        if "choices" in item:
            assert set(item) == {"question", "choices", "label", "area"}
            assert len(item["choices"]) == len(set(item["choices"])) == 4
            assert 0 <= item["label"] < 4
            assert all(c.startswith(" ") and c.endswith(".") for c in item["choices"])
        elif "good" in item:
            assert set(item) == {"good", "bad", "area"}
            assert item["good"] != item["bad"]
        else:
            assert set(item) == {"prompt", "completion", "area"}
            assert item["completion"].startswith(" ")
            assert item["completion"].endswith(".")


def test_labels_are_spread() -> None:
    labels = [item["label"] for item in ITEMS if "label" in item]
    assert all(0.15 < labels.count(k) / len(labels) < 0.35 for k in range(4))


def test_fact_answers_are_facts_and_wrong_choices_are_not() -> None:
    known = {
        RELATIONS[r].state(subject, value)
        for subject, facts in [*((p.name, p.facts) for p in world().people.values()), *world().towns.items()]
        for r, value in facts.items()
    }
    for item in by_area("facts"):
        assert right_answer(item).strip() in known
        if "choices" in item:
            assert sum(c.strip() in known for c in item["choices"]) == 1


def test_two_hop_answers_follow_from_the_facts() -> None:
    answers = {text.question(hop.ask()): f" {hop.answer()}" for hop in two_hops("evaluation")}
    for item in by_area("two_hop"):
        assert right_answer(item) == answers[item.get("question") or item["prompt"]]
    hop = two_hops("evaluation")[0]
    middle = world().people[hop.person].facts[hop.first]
    facts = world().people[middle].facts if middle in world().people else world().towns[middle]
    assert hop.value == facts[hop.second]


def test_world_is_sound() -> None:
    people = world().people
    assert sum(len(two_hops(split)) for split in SPLITS) == len(people) * len(PATHS)
    for person in people.values():
        assert person.facts["friend"] in people
        assert person.facts["teacher"] in people
        assert person.name not in (person.facts["friend"], person.facts["teacher"])


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        (arithmetic.Sum(47, 85, "+"), "7+5=12, carry 1. 4+8+1=13, carry 1. So 132."),
        (arithmetic.Sum(83, 47, "-"), "13-7=6, borrow 1. 8-4-1=3. So 36."),
        (
            arithmetic.Sum(500, 1, "-"),
            "10-1=9, borrow 1. 10-0-1=9, borrow 1. 5-0-1=4. So 499.",
        ),
    ],
)
def test_working_is_written_out(problem: arithmetic.Sum, answer: str) -> None:
    assert problem.answer() == answer


def test_arithmetic_is_right_in_every_step() -> None:
    for item in by_area("arithmetic"):
        left, sign, right = re.search(r"(\d+)([+-])(\d+)=\?", item["prompt"]).groups()
        result = int(left) + int(right) if sign == "+" else int(left) - int(right)
        *steps, last = item["completion"].split(" So ")
        assert last == f"{result}."
        for working, shown in re.findall(r"([\d+-]+)=(\d+)", steps[0]):
            assert sum(int(n) for n in re.findall(r"-?\d+", working)) == int(shown)
        digits = "".join(shown[-1] for shown in reversed(re.findall(r"=(\d+)", steps[0])))
        assert int(("1" if steps[0].endswith("carry 1.") else "") + digits) == result


def test_minimal_pairs_differ_in_one_place() -> None:
    for item in by_area("grammar"):
        good, bad = item["good"].lower().split(), item["bad"].lower().split()
        while good and bad and good[0] == bad[0]:
            good, bad = good[1:], bad[1:]
        while good and bad and good[-1] == bad[-1]:
            good, bad = good[:-1], bad[:-1]
        assert 1 <= len(good) + len(bad) <= 5


def test_held_out_combinations_are_absent_from_other_splits() -> None:
    seen = "\n".join(TRAINING + CALIBRATION)
    for hop in two_hops("evaluation"):
        assert hop.ask() not in seen
        assert hop.answer() not in seen
    problems = set(re.findall(r"(\d+)([+-])(\d+)=\?", seen))
    for item in by_area("arithmetic"):
        left, sign, right = re.search(r"(\d+)([+-])(\d+)=\?", item["prompt"]).groups()
        assert (left, sign, right) not in problems
        assert sign == "-" or (right, sign, left) not in problems
    for item in by_area("grammar"):
        assert item["good"] not in seen
    for item in by_area("story"):
        assert item["question"] + right_answer(item) not in seen


def test_every_unit_belongs_to_one_split() -> None:
    for split in SPLITS:
        rng = random.Random(1)
        for draw in (grammar.draw, stories.draw, arithmetic.draw):
            assert all(draw(rng, split).split == split for _ in range(20))


def test_unknown_names_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"'big'.*tiny"):
        builtin.model_path("big")
    with pytest.raises(ValueError, match=r"'big'.*tiny"):
        builtin.documents("big", "training")
    with pytest.raises(ValueError, match=r"'test'.*training, calibration, evaluation"):
        builtin.documents("tiny", "test")
    with pytest.raises(ValueError, match=r"'test'.*training, calibration, evaluation"):
        builtin.items("test")


def test_more_items_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text._ITEMS, "grammar", lambda rng, split: {"good": "a.", "bad": "b."})
    with pytest.raises(ValueError, match=r"per_area=2: the area 'grammar' has only 1"):
        builtin.items(per_area=2)


def test_import_is_light() -> None:
    program = "import sys, compress.builtin as _; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(builtin.model_path())


@pytest.mark.parametrize(
    "line", ["", "Mila lives in Harrow.", "  two  spaces\n\ttab", "Ünïcödé 漢字 🦊\u200d", "a\x00b", "3.14"]
)
def test_tokenizer_round_trip(tokenizer: Any, line: str) -> None:
    ids = tokenizer(line)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == line
    assert tokenizer(line, add_special_tokens=False)["input_ids"] == ids[1:]


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert len(tokenizer("47+185=", add_special_tokens=False)["input_ids"]) == 7


def test_answers_start_at_a_token_boundary(tokenizer: Any) -> None:
    """Then the tokens of prompt and completion are those of the whole text, however they are encoded."""
    for item in ITEMS:
        if "good" not in item:
            start, end = item.get("question") or item["prompt"], right_answer(item)
            parts = tokenizer(start)["input_ids"] + tokenizer(end, add_special_tokens=False)["input_ids"]
            assert parts == tokenizer(start + end)["input_ids"]


def test_model_loads_and_does_a_sum(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(builtin.model_path())
    assert model.num_parameters() == 3_410_176
    prompt = tokenizer("Question: 47+85=? Answer:", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(ids).startswith(" 7+5=12, carry 1. 4+8+1=13, carry 1. So 132.")


def test_package_is_small() -> None:
    assert sum(f.stat().st_size for f in builtin.model_path().rglob("*") if f.is_file()) <= 16 * 2**20
