"""Models on the grid "trellis": their training, what is written and read, and what is refused."""

from __future__ import annotations

import itertools
import json
from typing import ClassVar

import pytest
import torch

import compress
from compress.comparing import benchmark
from compress.errors import RecipeError, StartError
from compress.formats.base import Contents
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.folder import default_format, packed_export_note, write_model_folder
from compress.formats.gguf import GGUF
from compress.formats.onnx import Onnx
from compress.loading import load
from compress.maths import trellis
from compress.maths.divergence import kl_divergence
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import LayerShape
from compress.pipeline import run
from compress.recipe import Recipe
from compress.reports.headline import headline
from compress.testing import save_tiny, tiny_model, tiny_tokens

every_width = pytest.mark.parametrize("bits", trellis.BITS)
TEXT = tiny_tokens(64, 32)
SMALL = {"tokens": 32 * 32 * 20, "batch_size": 32}
TEXT_OF = {"source": "builtin:tiny", "samples": 4, "length": 32}
DATA = {"calibration": TEXT_OF, "training": TEXT_OF}


def on_trellis(bits=3, **options):
    return {"bits": bits, "group_size": 16, "grid": "trellis", **options}


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


# --------------------------------------------------------------------------------------------- the whole model


def divergence(model):
    with torch.no_grad():
        return kl_divergence(model(TEXT).logits, tiny_model("llama")(TEXT).logits).item()


@pytest.mark.parametrize("cls", [compress.EfficientQAT, compress.LLMQAT])
def test_training_brings_the_model_nearer_to_the_original(cls):
    model = tiny_model("llama")
    compress.RTN(**on_trellis())(model)
    codes = {name: layer.codes()[0] for name, layer in layers_of(model).items()}
    before = divergence(model)
    result = cls(**SMALL)(model, training=TEXT, original=tiny_model("llama"))
    assert divergence(model) < 0.93 * before
    assert result.measurements["losses"][-1]["loss"] < result.measurements["losses"][0]["loss"]
    same = [torch.equal(layer.codes()[0], codes[name]) for name, layer in layers_of(model).items()]
    assert all(same) if cls is compress.EfficientQAT else not all(same)


class Watched(compress.LLMQAT):
    """Keeps the layers it trains, with the original weights it was given and how far it started from its numbers."""

    seen: ClassVar[list] = []

    def trained(self, layer, sparse, original):
        trained = super().trained(layer, sparse, original)
        self.seen.append((trained, original, off_numbers(trained)))
        return trained


def off_numbers(trained):
    weight = trained.weight.detach()
    return float((weight - trellis.round_rows(weight, 3)[1]).square().sum())


def watched(model, **options):
    Watched.seen.clear()
    Watched(**options)(model, training=TEXT, original=tiny_model("llama"))
    return Watched.seen


def test_dampened_weights_end_nearer_to_their_numbers():
    left = []
    for dampening in (0.0, 2.0):
        model = compress.RTN(**on_trellis())(tiny_model("llama")).model
        left.append(sum(off_numbers(trained) for trained, *_ in watched(model, **SMALL, dampening=dampening)))
    assert left[1] < 0.8 * left[0]


def test_training_starts_towards_the_original_weights_unless_more_than_rounding_was_done():
    once = {"tokens": 32 * 32, "batch_size": 32}
    model = compress.RTN(**on_trellis())(tiny_model("llama")).model
    started = watched(model, **once)
    assert all(original is not None and away > 1 for _, original, away in started)
    turned = compress.Rotate()(tiny_model("llama"), calibration=TEXT).model
    compress.RTN(**on_trellis())(turned)
    started = watched(turned, **once)
    assert all(original is None and away == 0 for _, original, away in started)


def test_block_distill_is_refused_in_another_basis():
    model = tiny_model("llama")
    compress.Rotate()(model, calibration=TEXT)
    compress.GPTQ(**on_trellis())(model, calibration=TEXT)
    with pytest.raises(StartError, match="rotate turned that"):
        compress.BlockDistill(iterations=2)(model, calibration=TEXT, original=tiny_model("llama"))


def test_block_distill_brings_the_model_nearer_too():
    model = tiny_model("llama")
    compress.RTN(**on_trellis(2))(model)
    before = divergence(model)
    compress.BlockDistill(iterations=60)(model, calibration=TEXT, original=tiny_model("llama"))
    assert divergence(model) < before


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_what_is_written_packed_is_read_back_and_the_ordinary_folder_computes_the_same(family, dtype, tmp_path):
    model = tiny_model(family).to(dtype)
    compress.GPTQ(**on_trellis())(model, calibration=tiny_tokens(4, 16))
    contents, tokens = Contents.of_model(model), tiny_tokens(2, 8)
    assert default_format(contents) == "dense"
    assert "trellis" in (packed_export_note(contents) or "")
    with torch.no_grad():
        wanted = model(tokens).logits
        for name in ("packed", None):
            again = load(write_model_folder(tmp_path / (name or "model"), contents, name))
            near = 1e-4 if dtype == torch.float32 else 0.1  # loaded models sum in another order
            torch.testing.assert_close(again(tokens).logits, wanted, rtol=0, atol=near)
            for layer, module in layers_of(model).items():
                found = again.get_submodule(layer)
                assert torch.equal(found.weight, module.weight)
                if name:
                    assert all(torch.equal(t, found.state_dict()[key]) for key, t in module.state_dict().items())
            assert bool(layers_of(again)) == (name == "packed")


def test_a_run_leaves_packed_codes_that_load_runs_from_and_a_folder_for_transformers(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    values = {"model": str(folder), "passes": [{"gptq": on_trellis()}], "data": DATA, "benchmark": False}
    report = run({**values, "output": str(tmp_path / "out")})
    assert any("codes along a trellis" in note for note in report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "out/model/config.json").read_text())
    plain = type(tiny_model()).from_pretrained(tmp_path / "out/model")
    again = compress.load(tmp_path / "out")
    assert layers_of(again)
    with torch.no_grad():
        torch.testing.assert_close(again(TEXT).logits, plain(TEXT).logits, rtol=1e-4, atol=1e-4)


def test_a_run_killed_between_blocks_ends_with_the_same_bytes(tmp_path, monkeypatch, unverified):
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=3)
    passes = [{"gptq": on_trellis()}, {"llm_qat": {"tokens": 4 * 32 * 3, "batch_size": 4}}]
    values = {"model": str(folder), "passes": passes, "data": DATA, "benchmark": False}
    run({**values, "output": str(tmp_path / "whole")})
    inner, seen = compress.GPTQ.compress_block, itertools.count()

    def fails(self, *args):
        if next(seen) == 1:
            raise KeyboardInterrupt
        return inner(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(compress.GPTQ, "compress_block", fails)
        with pytest.raises(KeyboardInterrupt):
            run({**values, "output": str(tmp_path / "killed")})
        run({**values, "output": str(tmp_path / "killed")})
    assert next(seen) == 4  # the first block was not rounded again
    for name in ("model/model.safetensors", "exports/packed/packed.safetensors"):
        files = [tmp_path / which / name for which in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_memory_and_disk_leave_the_same_bytes(tmp_path, unverified):
    folder = save_tiny(tmp_path / "tiny")
    for residency in ("memory", "disk"):
        run({
            "model": str(folder), "passes": [{"rtn": on_trellis()}], "benchmark": False, "residency": residency,
            "output": str(tmp_path / residency),
        })  # fmt: skip
    files = [tmp_path / which / "exports/packed/packed.safetensors" for which in ("memory", "disk")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("sensitivity", ["kl", "fisher"])
def test_a_budget_shares_out_bits_and_eight_of_them_are_integers(sensitivity, tmp_path, unverified):
    folder = save_tiny(tmp_path / "tiny")
    budget = {"average": 4.5, "choices": [2, 3, 4, 8]}
    values = {
        "model": str(folder), "passes": [{"gptq": on_trellis(budget, sensitivity=sensitivity)}], "data": DATA,
        "benchmark": False, "output": str(tmp_path / "out"),
    }  # fmt: skip
    compress.plan(Recipe.from_dict(values))
    report = run(values)
    account = report.stages[-1].measurements["allocation"]
    assert 4 < account["average_bits"] <= 4.5
    specs = {name: layer.spec for name, layer in layers_of(compress.load(tmp_path / "out")).items()}
    assert {spec.bits for spec in specs.values()} >= {4, 8}
    assert all(spec.trellis == (spec.bits != 8) for spec in specs.values())


@pytest.mark.parametrize("cls", [compress.RTN, compress.GPTQ])
def test_the_plan_counts_the_search_for_the_longest_rows_path(cls):
    layers = [LayerShape("block", "a", 100, 64, torch.float32), LayerShape("block", "b", 64, 4096, torch.float32)]
    budget = {"average": 3, "choices": [2, 4]}
    for bits, fewest in ((3, 3), (budget, 2)):
        plain, found = (cls(bits=bits, group_size=16, **more) for more in ({}, {"grid": "trellis"}))
        more = found.working_bytes(layers, 64) - plain.working_bytes(layers, 64)
        assert more >= trellis.search_bytes(4096, fewest) > 4096 * (256 >> fewest) * 16
        assert more < trellis.search_bytes(4096, fewest) + 1e6


def test_embedding_and_head_beside_a_trellis_are_plain_integers():
    model = tiny_model(tie_word_embeddings=False)
    compress.RTN(**on_trellis(embeddings=4, head=8))(model)
    specs = {name: layer.spec for name, layer in layers_of(model).items()}
    ends = {name: specs.pop(name) for name in ("model.embed_tokens", "lm_head")}
    assert [(spec.bits, spec.grid) for spec in ends.values()] == [(4, None), (8, None)]
    assert all(spec.trellis for spec in specs.values())


@pytest.mark.parametrize("made", ["trellis", "k-quants", "Conv1D", "packed embedding"])
def test_the_size_is_that_of_the_folder_that_runs(made, tmp_path):
    """As predicted, of a stage, in the report of the run and of `compress benchmark`, and for goals."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1} if made == "k-quants" else {}
    folder = save_tiny(tmp_path / "tiny", "gpt2" if made == "Conv1D" else "llama", **wide)
    options = {
        "trellis": on_trellis(), "k-quants": {"grid": "gguf-q3_k"}, "Conv1D": {"bits": 3, "group_size": 16},
        "packed embedding": {"bits": 4, "group_size": 16, "embeddings": 8},
    }[made]  # fmt: skip
    values = {
        "model": str(folder), "passes": [{"rtn": options}], "output": str(tmp_path / "out"),
        "benchmark": {"metrics": ["weights_bytes", "bits_per_weight"], "goals": {"weights_bytes": "-30%"}},
    }  # fmt: skip
    report = run(values)
    packed_size = (tmp_path / "out/exports/packed/packed.safetensors").stat().st_size
    unpacked = (tmp_path / "out/model/model.safetensors").stat().st_size
    assert packed_size < unpacked
    figure = report.compressed["weights_bytes"]
    assert figure.value == packed_size == compress.plan(Recipe.from_dict(values)).weights_bytes
    assert report.stages[0].predicted["weights_bytes"] == packed_size
    assert figure.detail == {"folder": "exports/packed", "unpacked_bytes": unpacked}
    bits = report.compressed["bits_per_weight"].value
    assert bits == pytest.approx(8 * packed_size / sum(p.numel() for p in compress.load(folder).parameters()))
    assert report.goals[0].met
    size = report.original["weights_bytes"].value / packed_size
    words = f"{size:.1f} × smaller (exports/packed, for compress.load; model/ has the weights unpacked)"
    assert headline(report).startswith(words)
    again = benchmark([folder, tmp_path / "out"], overrides=["benchmark.metrics=[weights_bytes]"])
    assert again.compressed["weights_bytes"] == figure
    assert headline(again).startswith(words)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "bits is 8, and grid trellis is for 2, 3, 4 bits"),
        ({"bits": 5}, "bits is 5, and grid trellis is for 2, 3, 4 bits"),
        ({"symmetric": False}, "symmetric is false, and grid trellis has no zero points: leave it out"),
        ({"act_order": True}, "act_order is true, and on grid trellis rows are rounded from left to right"),
        ({"propagation": "gptaq"}, "propagation is gptaq, which gptq cannot do on grid trellis"),
        ({"group_size": 0}, "group_size is 0: use a size of at least 1"),
    ],
)
def test_options_that_a_trellis_does_not_have_are_refused_when_the_recipe_is_read(options, words):
    with pytest.raises(RecipeError, match=rf"passes.0.gptq.*{words}"):
        Recipe.from_dict({"model": "builtin:tiny", "passes": [{"gptq": {"grid": "trellis", **options}}], "data": DATA})


@pytest.mark.parametrize("name", ["awq", "hqq", "autoround"])
def test_methods_that_round_each_weight_by_itself_are_refused_when_the_recipe_is_read(name):
    with pytest.raises(RecipeError, match=rf"grid is trellis, on which {name} cannot round: use gptq or rtn"):
        Recipe.from_dict({"model": "builtin:tiny", "passes": [{name: {"grid": "trellis"}}], "data": DATA})


def test_smoothquant_has_no_such_option():
    with pytest.raises(RecipeError, match="unknown key"):
        Recipe.from_dict({"model": "builtin:tiny", "passes": [{"smoothquant": {"grid": "trellis"}}], "data": DATA})


def test_zeros_of_a_pruned_model_are_not_lost():
    passes = [{"magnitude": {"sparsity": 0.5}}, {"rtn": {"grid": "trellis"}}]
    with pytest.raises(RecipeError, match="it takes dense weights, and magnitude leaves sparse ones"):
        Recipe.from_dict({"model": "builtin:tiny", "passes": passes})
    model = compress.Magnitude(sparsity=0.5)(tiny_model()).model
    with pytest.raises(StartError, match="rtn takes dense weights, and this model's are sparse"):
        compress.RTN(**on_trellis())(model)


@pytest.mark.parametrize(("name", "form"), [("compressed-tensors", CompressedTensors), ("onnx", Onnx), ("gguf", GGUF)])
def test_formats_of_plain_integers_are_refused_when_the_recipe_is_read_and_from_python(name, form, tmp_path):
    words = rf"{name} holds codes that each stand for a number, .*exports/packed has them packed"
    recipe = {"model": "builtin:tiny", "passes": [{"rtn": on_trellis()}], "benchmark": False}
    with pytest.raises(RecipeError, match=rf"export.*{words}"):
        Recipe.from_dict({**recipe, "export": [name]})
    Recipe.from_dict({**recipe, "export": ["packed"]})
    contents = Contents.of_model(compress.RTN(**on_trellis())(tiny_model()).model)
    assert words.split(",")[0] in form().refuses(contents.dtype, contents.kinds, contents.quantization)
    with pytest.raises(StartError, match=words):
        write_model_folder(tmp_path / "out", contents, name)
