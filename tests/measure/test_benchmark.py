import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError, StartError
from compress.locating import locate
from compress.measure import benchmark, worker
from compress.measure.benchmark import BenchmarkJob, measure_original
from compress.measure.comparison import compare, original_figures
from compress.measure.jobs import run_child, run_job
from compress.measure.measurements import Measurements
from compress.opening import read_config
from compress.registry import METRICS

QUALITY = ("perplexity", "accuracy", "accuracy/pairs", "kl_divergence", "top1_agreement")


def test_perplexity_and_kl_are_those_of_full_float64_tables(pair, measured):
    windows = measured.job.windows
    tables = []
    for folder in pair:
        model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        with torch.no_grad():
            tables.append(torch.log_softmax(model(windows).logits[:, :-1], -1))
    targets = windows[:, 1:, None]
    for table, found in zip(tables, (measured.original, measured.compressed), strict=True):
        want = math.exp(-table.gather(-1, targets).mean())
        assert found.figures["perplexity"].value == pytest.approx(want, rel=1e-5)
    p, q = tables
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert measured.compressed.figures["kl_divergence"].value == pytest.approx(float(kl), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert measured.compressed.figures["top1_agreement"].value == pytest.approx(float(agreement), abs=1e-9)


def test_every_metric_is_a_number_or_null_with_a_reason(measured):
    for found in (original_figures(measured.original, measured.compressed), measured.compressed.figures):
        for name in measured.job.names():
            figure = found[name]
            if figure.value is None:
                assert figure.reason, name
            else:
                assert math.isfinite(figure.value), name
    nulls = {name for name, figure in measured.compressed.figures.items() if figure.value is None}
    assert nulls <= {"energy_joules_per_token"}


def test_the_original_is_no_distance_from_itself(measured):
    assert measured.original.figures["kl_divergence"].value == 0
    assert measured.original.figures["top1_agreement"].value == 1


def test_sizes_and_parameters_are_exact(pair, measured):
    size = (pair[1] / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(pair[0]).parameters())
    figures = measured.compressed.figures
    assert figures["weights_bytes"].value == size
    assert figures["parameters"].value == parameters
    assert figures["bits_per_weight"].value == pytest.approx(8 * size / parameters)
    assert figures["weights_bytes"].stderr is None


def test_the_areas_are_reported_and_accuracy_is_their_mean(measured, items):
    figures = measured.compressed.figures
    values = [figures[f"accuracy/{area}"].value for area in items]
    assert figures["accuracy"].value == pytest.approx(sum(values) / 3)
    assert figures["accuracy/exact"].n == 12


def test_memory_is_that_of_a_process_with_torch_in_it(measured):
    figure = measured.compressed.figures["peak_memory_bytes"]
    assert 100e6 < figure.value < 4e9
    assert 0 < figure.detail["above_import_bytes"] < figure.value


def test_a_figure_names_the_runtime_that_it_was_measured_in():
    records = {"nll": [2.0, 3.0], "tokens": [1, 1], "file_bytes": [10], "resident_weights_bytes": [10]}
    runtimes = {"memory": "compress.load", "text": "transformers", "memory/toy": "toy 1.0"}
    found = Measurements("m", Path("m"), records=records, runtimes=runtimes)
    records["resident_weights_bytes/toy"] = [10]
    named = {"perplexity": "transformers", "resident_weights_bytes": "compress.load", "weights_bytes": None,
             "resident_weights_bytes/toy": "toy 1.0"}  # fmt: skip
    for name, runtime in named.items():
        figure = benchmark.figure_of(METRICS.get(name.partition("/")[0]), name, records, found)
        assert (figure.value is not None, figure.runtime) == (True, runtime), name


def test_speeds_are_compared_with_rounds_taken_in_turn(measured):
    beside = measured.compressed.beside["decode_tokens_per_second"]
    assert len(beside) == measured.job.speed.rounds
    figures = original_figures(measured.original, measured.compressed)
    assert figures["decode_tokens_per_second"].n == measured.job.speed.rounds
    assert measured.comparison["decode_tokens_per_second"].delta == pytest.approx(
        measured.compressed.figures["decode_tokens_per_second"].value - figures["decode_tokens_per_second"].value
    )


def test_damage_is_called_worse_and_said_in_words(measured):
    compared = measured.comparison["perplexity"]
    assert compared.verdict == "worse"
    assert compared.ci_low < compared.delta < compared.ci_high
    assert compared.sentence.startswith("worse by ")
    assert "95 % interval" in compared.sentence
    assert measured.comparison["kl_divergence"].verdict == "worse"
    assert measured.comparison["weights_bytes"].verdict == "no_difference"
    assert measured.comparison["weights_bytes"].ci_low is None


def test_a_model_compared_with_itself_shows_no_difference(measured):
    records = {**measured.original.records}
    records |= {"kl": 0 * records["nll"], "top1": records["tokens"]}
    figures = {name: measured.original.figures[name] for name in QUALITY}
    twin = dataclasses.replace(measured.original, records=records, figures=figures)
    found = compare(measured.original, twin)
    assert {found[name].verdict for name in QUALITY} == {"no_difference"}
    assert found["accuracy"].sentence.startswith("no measurable difference at 36 items")


def test_both_write_something_after_each_prompt(measured):
    rows = benchmark.generations(measured.job, measured.original, measured.compressed)
    assert [row["prompt"] for row in rows] == ["the bee"]
    assert set(rows[0]) == {"prompt", "original", "compressed"}


def test_asked_again_the_original_is_not_measured_again(pair, measured, monkeypatch):
    def no_process(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr("compress.measure.jobs.run_child", no_process)
    again = measure_original(str(pair[0]), job=measured.job, workdir=measured.workdir)
    assert again.figures == measured.original.figures
    other = dataclasses.replace(measured.job, windows=measured.job.windows[:5])
    with pytest.raises(AssertionError, match="a process was started"):
        measure_original(str(pair[0]), job=other, workdir=measured.workdir)


def test_nothing_but_kept_results_stays_behind(measured):
    kinds = {"quality", "memory", "speed", "bandwidth"}
    assert {path.name.split("-")[0] for path in measured.workdir.iterdir()} == kinds


@pytest.mark.usefixtures("same_process")
def test_a_broken_model_gives_one_sentence(pair, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in pair[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    job = BenchmarkJob(metrics=("parameters",), threads=1)
    with pytest.raises(CompressError, match="cannot load") as caught:
        measure_original(str(folder), job=job, workdir=tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(StartError, match=r"no config\.json"):
        read_config(locate(tmp_path))


def test_a_model_that_is_nowhere_is_refused_without_a_network(tmp_path):
    with pytest.raises(StartError, match="hub is needed, and it cannot be reached"):
        locate("nobody/nothing-here")


def test_a_child_that_dies_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(CompressError, match=r"measuring m \(memory\) failed"):
        run_job({"kind": "memory", "model": "m", "threads": 1}, tmp_path)
    with pytest.raises(CompressError, match=r"ended by SIGKILL.*out of memory"):
        run_child(["sh", "-c", "kill -9 $$"], what="measuring", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_speed_settings_fit_a_short_context():
    fitted = benchmark.BenchmarkJob().speed.fitted(16)
    assert fitted.decode_prompt + fitted.new_tokens <= 16
    assert fitted.prompt < 16


@pytest.mark.usefixtures("same_process")
def test_an_encoder_has_no_perplexity_and_the_reason_is_given(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    job = BenchmarkJob(
        windows=torch.ones(2, 8, dtype=torch.long), metrics=("perplexity", "kl_divergence", "parameters"), threads=1
    )
    found = measure_original(str(tmp_path / "bert"), job=job, workdir=tmp_path / "work")
    assert found.figures["perplexity"].value is None
    assert "no head" in found.figures["perplexity"].reason
    assert found.figures["kl_divergence"].value is None
    assert found.figures["parameters"].value > 0
    json.dumps({name: figure.model_dump() for name, figure in found.figures.items()}, allow_nan=False)


@pytest.mark.usefixtures("same_process")
def test_packed_layers_count_the_weights_they_stand_for(pair):
    from torch import nn

    model = AutoModelForCausalLM.from_pretrained(pair[0])
    dense = worker.count_parameters(model)
    layer = nn.Module()
    layer.weight_packed = nn.Parameter(torch.zeros(32, 4, dtype=torch.int32), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.zeros(32, 1))
    layer.register_buffer("weight_shape", torch.tensor([32, 32]))
    model.model.layers[0].self_attn.q_proj = layer
    assert worker.count_parameters(model) == dense
    assert dense == sum(p.numel() for p in model.parameters()) - 32 * 4 - 32 + 32 * 32
