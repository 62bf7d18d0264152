"""Test items are read before there is work to lose, and what is wrong with them is said then."""

import json

import pytest

from compress.errors import RecipeError, StartError
from compress.preparation import benchmark_tasks
from compress.recipe import Recipe

ITEM = {"prompt": "1 plus 1 is ", "completion": "2"}


def recipe(*tasks, **benchmark) -> Recipe:
    return Recipe.from_dict({"model": "a/b", "benchmark": {"tasks": [str(task) for task in tasks], **benchmark}})


def lines(path, *items):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_a_wrong_line_is_refused_before_work_with_file_and_line(tmp_path):
    path = lines(tmp_path / "items.jsonl", ITEM, {"prompt": "no answer"})
    with pytest.raises(StartError, match=r"benchmark\.tasks: .*items\.jsonl:2") as caught:
        benchmark_tasks(recipe(path))
    assert caught.value.exit_code == 2
    assert "skip_bad" not in str(caught.value)


def test_a_file_without_items_is_refused_before_work(tmp_path):
    with pytest.raises(StartError, match="holds no test items"):
        benchmark_tasks(recipe(lines(tmp_path / "items.jsonl")))


def test_one_area_from_two_files_is_refused(tmp_path):
    one, two = lines(tmp_path / "a" / "items.jsonl", ITEM), lines(tmp_path / "b" / "items.jsonl", ITEM)
    with pytest.raises(StartError, match="both have items of the area items"):
        benchmark_tasks(recipe(one, two))


def test_a_task_named_twice_is_refused_when_the_recipe_is_read(tmp_path):
    path = lines(tmp_path / "items.jsonl", ITEM)
    with pytest.raises(RecipeError, match=r"items\.jsonl is there twice"):
        recipe(path, path)


def test_a_limit_takes_the_first_items_of_each_area(tmp_path):
    items = [{**ITEM, "completion": str(i), "area": "even" if i % 2 == 0 else "odd"} for i in range(10)]
    found, tasks, _ = benchmark_tasks(recipe(lines(tmp_path / "items.jsonl", *items), limit=3))
    assert {area: [item["completion"] for item in each] for area, each in found.items()} == {
        "even": ["0", "2", "4"],
        "odd": ["1", "3", "5"],
    }
    assert tasks == ()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("f1", "f1 needs texts with labels"),
        ("bits_per_byte", "bits_per_byte needs text"),
        ("rouge_l", "rouge_l needs test items"),
        ("hub:sacrebleu", "hub:sacrebleu needs test items"),
    ],
)
def test_what_a_metric_needs_must_be_there(metric, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({"model": "a/b", "benchmark": {"metrics": [metric]}})
