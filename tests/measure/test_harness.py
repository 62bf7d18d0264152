"""Tasks of lm-evaluation-harness from local files, on a model that is loaded already."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError, RecipeError, StartError
from compress.measure import harness_tasks
from compress.measure.benchmark import measure_compressed, measure_original
from compress.measure.comparison import compare
from compress.measure.flips import flips
from compress.measure.harness import of_samples, score_tasks
from compress.measure.harness_tasks import known_tasks, load_tasks, read_task_file
from compress.preparation import benchmark_job, benchmark_tasks
from compress.recipe import Recipe
from compress.testing import tiny_tokenizer

pytest.importorskip("lm_eval")

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: items.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """\
include: choice.yaml
task: local_written
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = "group: local_group\ntask: [local_choice, local_written]\n"
WORDS = ["bee", "fig", "hen", "ink", "jam", "kit", "lamp", "moss", "nut", "oak", "pea", "rug"]


@pytest.fixture(scope="module", autouse=True)
def quiet_cache(tmp_path_factory):
    """Data sets are kept in a folder of the test's own, and the harness says nothing."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    yield
    patch.undo()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"question": f"a {w} is", "choices": [w, "good", "not so"], "answer": i % 3} for i, w in enumerate(WORDS)]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("choice.yaml", CHOICE), ("written.yaml", WRITTEN), ("group.yaml", GROUP)):
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def small_index(monkeypatch):
    """Of the package's own tasks none: its index takes seconds to build."""
    manager = harness_tasks._manager
    monkeypatch.setattr(harness_tasks, "_manager", lambda defaults, folder=None: manager(False, folder))


def slow_scores(model, lines):
    """Each choice by itself in float64: its log-likelihood after the question, by characters."""
    tokenizer, plain, normed = tiny_tokenizer(), [], []
    for line in lines:
        sums = []
        for choice in line["choices"]:
            ids = tokenizer(f"{line['question']} {choice}")["input_ids"]
            with torch.no_grad():
                table = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            sums.append(sum(float(table[i - 1, ids[i]]) for i in range(len(line["question"]), len(ids))))
        lengths = [len(choice) for choice in line["choices"]]
        plain.append(float(max(range(3), key=lambda i: sums[i]) == line["answer"]))
        normed.append(float(max(range(3), key=lambda i: sums[i] / lengths[i]) == line["answer"]))
    return plain, normed


def test_a_choice_task_scores_each_item_as_the_textbook_does(pair, folder):
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    found = score_tasks(model, tiny_tokenizer(), [str(folder / "choice.yaml")], context=64)["local_choice"]
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    plain, normed = slow_scores(model, lines)
    assert found["metric"] == "acc_norm"
    assert found["scores"] == normed
    assert found["others"]["acc"] == pytest.approx(sum(plain) / 12)
    assert found["texts"][0] == "a bee is"
    assert found["answers"][:2] == ["bee", "good"]


def test_a_written_task_scores_what_greedy_decoding_writes(pair, folder):
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    tokenizer = tiny_tokenizer()
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    written = []
    for line in lines:
        ids = tokenizer(line["question"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(4):
                following = model(ids).logits[:, -1:].argmax(-1)
                if int(following) == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, following], 1)
        written.append(tokenizer.decode(ids[0, len(line["question"]) :], skip_special_tokens=True).split("e")[0])
    (folder / "reached.jsonl").write_text(
        "".join(json.dumps({**line, "choices": [written[i]]}) + "\n" for i, line in enumerate(lines[:6]))
        + "".join(json.dumps({**line, "choices": ["zzz"]}) + "\n" for line in lines[6:])
    )
    (folder / "reached.yaml").write_text(
        f"include: written.yaml\ntask: local_reached\ndataset_kwargs: {{data_files: {folder / 'reached.jsonl'}}}\n"
    )
    found = score_tasks(model, tokenizer, [str(folder / "reached.yaml")], context=64)["local_reached"]
    assert found["metric"] == "exact_match"
    assert found["scores"] == [1.0] * 6 + [0.0] * 6


@pytest.mark.usefixtures("same_process", "small_index")
def test_a_benchmark_with_local_tasks_has_paired_statistics_and_flips(pair, folder, tmp_path):
    recipe = Recipe.from_dict(
        {
            "model": str(pair[0]),
            "benchmark": {"metrics": ["accuracy"], "tasks": [str(folder / "group.yaml")], "limit": 10},
        }
    )
    job = benchmark_job(recipe, "cpu", None)
    first = measure_original(str(pair[0]), job=job, workdir=tmp_path)
    second = measure_compressed(pair[1], str(pair[0]), first, job=job, workdir=tmp_path)
    areas = ["local_group", "local_group/local_choice", "local_group/local_written"]
    assert list(first.figures) == ["accuracy", *(f"accuracy/{area}" for area in areas)]
    assert first.figures["accuracy/local_group/local_choice"].n == 10
    assert set(first.figures["accuracy/local_group/local_choice"].detail["metrics"]) == {"acc", "acc_norm"}
    found = compare(first, second)
    for area in areas:
        compared = found[f"accuracy/{area}"]
        assert compared.ci_low <= compared.delta <= compared.ci_high
        assert compared.p_adjusted is not None
        assert "adjusted for 3 tasks" in compared.sentence
    changed = flips(first, second)
    assert changed.items == 20
    assert changed.right_to_wrong + changed.wrong_to_right == len(changed.examples)


@pytest.mark.usefixtures("small_index")
def test_a_task_that_is_there_twice_is_refused(folder):
    with pytest.raises(StartError, match=r"local_choice is there twice, as local_choice and in .*group\.yaml"):
        load_tasks([str(folder / "choice.yaml"), str(folder / "group.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", r"bad\.yaml:\d+: not YAML"),
        ("- task", r"bad\.yaml:1: a task is a mapping"),
        ("dataset_path: json\n", "has neither task: nor group:"),
        (CHOICE + "output_typ: x\n", r"bad\.yaml:13: unknown key output_typ\. Did you mean \"output_type\"\?"),
        (CHOICE + "task: again\n", r"bad\.yaml:13: task is there twice"),
        (CHOICE.replace("multiple_choice", "choose"), r'bad\.yaml:6: output_type: "choose" is not allowed; allowed:'),
        (CHOICE.replace("items.jsonl", "itms.jsonl"), r"bad\.yaml:3: data_files: no such file: .*itms\.jsonl"),
        (CHOICE.replace("test_split: train\n", ""), "no test_split or validation_split"),
        ("include: nowhere.yaml\ntask: x\n", "FileNotFoundError"),
        (CHOICE.replace("test_split: train", "test_split: test"), "lm-eval cannot load it|has no items"),
    ],
)  # fmt: skip
def test_a_task_file_that_is_wrong_is_refused_with_its_line(folder, text, message):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(StartError, match=message) as caught:
        load_tasks([str(folder / "bad.yaml")])
    assert "\n" not in str(caught.value)


def test_a_data_file_that_is_wrong_is_refused_with_its_line(folder, tmp_path):
    (tmp_path / "task.yaml").write_text(CHOICE)
    (tmp_path / "items.jsonl").write_text('{"question": "a"}\n{"question": \n')
    with pytest.raises(StartError, match=r"items\.jsonl:2: not a line of JSON"):
        read_task_file(tmp_path / "task.yaml")
    (tmp_path / "items.jsonl").write_text("\n")
    with pytest.raises(StartError, match="holds no items"):
        read_task_file(tmp_path / "task.yaml")


def test_names_are_looked_up_when_the_recipe_is_read(monkeypatch):
    assert {"hellaswag", "arc_easy", "gsm8k", "mmlu", "ai2_arc"} <= set(known_tasks())
    recipe = Recipe.from_dict({"model": "a/b", "benchmark": {"tasks": ["hellaswag", "gsm8k"]}})
    assert recipe.benchmark.tasks == ("hellaswag", "gsm8k")
    with pytest.raises(RecipeError, match="hellaswag is there twice"):
        Recipe.from_dict({"model": "a/b", "benchmark": {"tasks": ["hellaswag", "hellaswag"]}})
    monkeypatch.setattr(harness_tasks, "_manager", lambda defaults: type("None", (), {"all_tasks": []}))
    with pytest.raises(RecipeError, match=r'"helaswag" is neither a file .* Did you mean "hellaswag"'):
        Recipe.from_dict({"model": "a/b", "benchmark": {"tasks": ["helaswag"]}})


def test_without_the_package_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for task in ("hellaswag", str(tmp_path / "task.yaml")):
        (tmp_path / "task.yaml").write_text(CHOICE)
        with pytest.raises(RecipeError, match=r'pip install "compress\[harness\]"'):
            Recipe.from_dict({"model": "a/b", "benchmark": {"tasks": [task]}})
    with pytest.raises(StartError, match=r"compress\[harness\]"):
        load_tasks(["hellaswag"])


def test_a_task_whose_data_are_on_the_hub_says_so_without_a_network(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    recipe = Recipe.from_dict({"model": "a/b", "benchmark": {"tasks": ["hellaswag"]}})
    with pytest.raises(StartError, match=r"hellaswag: its data set Rowan/hellaswag is not on this machine.*task file"):
        benchmark_tasks(recipe)


def test_text_that_is_no_items_is_refused_before_any_work(folder):
    text = CHOICE.replace("multiple_choice", "loglikelihood_rolling").replace("acc_norm", "bits_per_byte")
    (folder / "rolling.yaml").write_text(text.replace("metric: acc,", "metric: word_perplexity,"))
    with pytest.raises(StartError, match=r"scores running text, not items: give the text as data\.evaluation"):
        load_tasks([str(folder / "rolling.yaml")])


@pytest.mark.usefixtures("small_index")
def test_an_area_of_two_sources_is_refused(folder, tmp_path):
    line = json.dumps({"prompt": "a", "completion": "b", "area": "local_choice"}) + "\n"
    (tmp_path / "own.jsonl").write_text(line)
    tasks = [str(tmp_path / "own.jsonl"), str(folder / "choice.yaml")]
    recipe = Recipe.from_dict({"model": "a/b", "benchmark": {"tasks": tasks}})
    with pytest.raises(StartError, match="both have items of the area local_choice"):
        benchmark_tasks(recipe)


def test_a_task_that_fails_while_it_runs_is_named(pair, folder):
    (folder / "long.yaml").write_text(WRITTEN.replace("max_gen_toks: 4", "max_gen_toks: 64"))
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    with pytest.raises(CompressError, match="The task local_written failed while it ran"):
        score_tasks(model, tiny_tokenizer(), [str(folder / "long.yaml")], context=64)


def test_the_preferred_metric_of_the_first_filter_counts_and_worse_is_better_does_not():
    def row(doc, filter_, **metrics):
        return {
            "doc_id": doc,
            "filter": filter_,
            "metrics": list(metrics),
            "arguments": [("q",)],
            "target": "t",
            **metrics,
        }

    samples = [row(1, "strict", exact_match=0.0), row(0, "strict", exact_match=1.0), row(0, "loose", exact_match=1.0)]
    assert of_samples("t", samples, {})["scores"] == [1.0, 0.0]
    samples = [row(0, "none", brier=0.2, ter=3.0, f1=0.4, rougeL=0.5)]
    found = of_samples("t", samples, {"brier": False})
    assert (found["metric"], found["others"]) == ("f1", {"rougeL": 0.5})
    with pytest.raises(CompressError, match="no score between 0 and 1"):
        of_samples("t", [row(0, "none", bleu=("a", "b"))], {})
