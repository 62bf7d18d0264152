"""bitsandbytes' layers: stored as transformers stores them, and computing after a reload as they did in memory."""

import importlib.util
import json

import numpy as np
import pytest
import reference
import torch
from test_pipeline import content
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import compress
from compress.checkpoint import TensorSource
from compress.errors import RecipeError, StartError
from compress.formats.folder import write_model_folder
from compress.maths.grid import QuantSpec
from compress.measure.worker import count_parameters
from compress.model import ModelHandle
from compress.nn.bnb_linear import BnbLinear, BnbSpec, bnb_tensors
from compress.nn.quant_linear import QuantLinear
from compress.passes.bnb import Bnb
from compress.pipeline import run
from compress.planning import plan
from compress.recipe import Recipe
from compress.testing import outputs, save_tiny, tiny_model, tiny_tokens

installed = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not installed, reason="bitsandbytes is an extra, and is not installed")
every_format = pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A llama whose rows are whole blocks of 64."""
    return save_tiny(tmp_path_factory.mktemp("model") / "wide", "llama", **WIDE, num_key_value_heads=4)


def recipe(model, output, changes=(), **options):
    return {
        "model": str(model), "passes": [{"bnb": options}], "benchmark": False, "output": str(output), **dict(changes),
    }  # fmt: skip


def theirs(folder, form, double=True):
    """What transformers makes of the folder by itself, layer norms and head as they are."""
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if form == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.fixture(scope="module")
def finished(wide_folder, tmp_path_factory):
    """A run of each format, with its report and what was planned for it."""
    if not installed:
        pytest.skip("bitsandbytes is not installed")
    found = {}
    for form in ("nf4", "int8"):
        output = tmp_path_factory.mktemp("run") / form
        asked = recipe(wide_folder, output, format=form)
        found[form] = output, run(asked), plan(Recipe.from_dict(asked))
    return found


both_finished = pytest.mark.parametrize("form", ["nf4", "int8"])


@both_finished
def test_the_folder_holds_the_tensors_that_transformers_itself_writes(form, finished, wide_folder, tmp_path):
    theirs(wide_folder, form).save_pretrained(tmp_path)
    ours, other = TensorSource(finished[form][0] / "model"), TensorSource(tmp_path)
    assert ours.names() == other.names()
    for name in ours.names():
        if "quant_state" in name:
            one, two = (json.loads(bytes(source.read(name).tolist())) for source in (ours, other))
            assert one == two
        else:
            assert torch.equal(ours.read(name), other.read(name)), name


@both_finished
def test_a_run_is_verified_and_loads_the_same_by_both_ways(form, finished):
    output, report, _ = finished[form]
    assert report.verified.reloaded
    assert report.stages[0].coverage == 1.0
    found = compress.load(output)
    plain = AutoModelForCausalLM.from_pretrained(output / "model")
    tokens = tiny_tokens()
    assert torch.equal(outputs(found, tokens), outputs(plain, tokens))
    assert [entry["pass"] for entry in found.compress_history] == ["bnb"]
    kinds = {type(module).__name__ for module in found.modules()}
    assert ("Linear8bitLt" if form == "int8" else "Linear4bit") in kinds
    assert found.generate(tokens[:1], max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape[1] == 35
    assert count_parameters(found) == count_parameters(tiny_model("llama", **WIDE, num_key_value_heads=4))


@both_finished
def test_the_plan_says_the_size_to_the_byte(form, finished):
    output, _, planned = finished[form]
    assert (output / "model" / "model.safetensors").stat().st_size == planned.weights_bytes


@needs_bitsandbytes
@pytest.mark.parametrize(("form", "double"), [("nf4", False), ("fp4", True), ("fp4", False)])
def test_other_formats_give_the_tensors_that_transformers_makes(form, double, wide_folder):
    model = AutoModelForCausalLM.from_pretrained(wide_folder)
    Bnb(format=form, double_quantization=double)(model)
    ours, other = model.state_dict(), theirs(wide_folder, form, double).state_dict()
    names = [name for name in ours if "layers.1.mlp.up_proj" in name]
    assert len(names) == (6 if double else 4)
    for name in names:
        if "quant_state" not in name:
            assert torch.equal(ours[name], other[name]), name


@needs_bitsandbytes
def test_a_continued_run_and_one_from_disk_give_the_same_folder(
    finished, wide_folder, tmp_path, monkeypatch, unverified
):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for residency in ("memory", "disk"):
        asked = recipe(wide_folder, tmp_path / residency, {"residency": residency})
        with monkeypatch.context() as patch:
            patch.setattr("compress.pipeline._export", fail)
            with pytest.raises(KeyboardInterrupt):
                run(asked)
        run(asked)
        assert content(tmp_path / residency / "model") == content(finished["nf4"][0] / "model")


@needs_bitsandbytes
def test_layers_that_are_skipped_stay_dense_and_are_named_in_the_config(wide_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(wide_folder)
    Bnb(skip=["mlp.*"])(model, min_coverage=0.1)
    write_model_folder(tmp_path / "out", ModelHandle.wrap(model).contents())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in config["llm_int8_skip_modules"]
    assert "model.layers.1.self_attn.q_proj" not in config["llm_int8_skip_modules"]
    model = compress.load(tmp_path / "out")
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert type(model.model.layers[1].self_attn.q_proj).__name__ == "Linear4bit"


@needs_bitsandbytes
def test_gpt2_s_transposed_layers_are_packed(tmp_path):
    folder = save_tiny(tmp_path / "model", "gpt2", n_embd=64)
    report = run(recipe(folder, tmp_path / "out"))
    assert report.verified.reloaded
    assert "transformer.h.0.attn.c_attn.weight.absmax" in TensorSource(tmp_path / "out" / "model")


@needs_bitsandbytes
def test_nf4_is_the_paper_s_rounding():
    weight = torch.from_numpy(reference.random_weight(32, 128, 3)).float()
    found = BnbLinear.from_weight(weight, BnbSpec.of("nf4", False)).dequantize()
    expected = reference.nf4(weight.double().numpy(), 64)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-6, atol=1e-7)


@needs_bitsandbytes
def test_int8_is_the_paper_s_rounding():
    weight = torch.from_numpy(reference.random_weight(8, 48, 3)).half().float()
    layer = BnbLinear.from_weight(weight, BnbSpec.of("int8", False))
    largest = weight.abs().amax(1, keepdim=True)
    expected = (weight.double() / largest * 127).round() * largest / 127
    off = (layer.dequantize().double() - expected).abs() / (largest / 127)
    assert (off < 1e-3).double().mean() > 0.99  # a quotient next to a tie may go to the other side
    assert float(off.max()) < 1.001


@needs_bitsandbytes
@every_format
def test_a_forward_leaves_what_is_stored_and_computes_nearly_the_product(form):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 64)
    layer = BnbLinear.from_weight(weight, BnbSpec.of(form, True), bias)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = layer(x), x @ layer.dequantize().T + bias
    assert float((found - expected).square().mean() / expected.square().mean()) < 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@every_format
def test_an_empty_layer_has_the_tensors_of_the_file_and_takes_them_by_name(form):
    spec = BnbSpec.of(form, True)
    layer = QuantLinear.like(torch.nn.Linear(64, 32), spec)
    assert isinstance(layer, BnbLinear)
    state = {name: torch.zeros(shape, dtype=kind) for name, (kind, shape) in bnb_tensors(64, 32, spec).items()}
    state["bias"] = torch.ones(32)
    assert set(layer.state_dict()) == set(state)
    parent = torch.nn.ModuleDict({"linear": layer})
    named = {f"linear.{name}": tensor for name, tensor in state.items()}
    assert parent.load_state_dict(named, strict=False, assign=True) == ([], [])
    assert layer.bias.tolist() == [1.0] * 32
    missing, unexpected = parent.load_state_dict({"linear.bias": torch.ones(32), "linear.other": torch.ones(1)}, False)
    assert set(missing) == {f"linear.{name}" for name in state if name != "bias"}
    assert unexpected == ["linear.other"]


def test_without_the_package_it_is_refused_before_any_work_with_the_extra_named(wide_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.passes.bnb.find_spec", lambda name: None)
    monkeypatch.setattr("compress.nn.bnb_linear.find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"compress\[bitsandbytes\]"):
        run(recipe(wide_folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(StartError, match=r"compress\[bitsandbytes\]"):
        Bnb()(tiny_model("llama", **WIDE))


@needs_bitsandbytes
def test_loading_such_a_folder_without_the_package_names_the_extra(finished, monkeypatch):
    monkeypatch.setattr("compress.nn.bnb_linear.find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"compress\[bitsandbytes\]"):
        compress.load(finished["nf4"][0])


@needs_bitsandbytes
def test_rows_that_are_no_whole_blocks_are_refused_by_the_plan(tiny_folder, tmp_path):
    with pytest.raises(StartError, match=r"multiple of 64 weights, and these have 32.*int8"):
        plan(Recipe.from_dict(recipe(tiny_folder, tmp_path / "out")))


def test_formats_of_integer_grids_refuse_it_and_it_refuses_them(wide_folder, tmp_path):
    from compress.registry import FORMATS

    own, grid = {"a": BnbSpec.of("nf4", True)}, {"a": QuantSpec(4)}
    for name in ("dense", "packed", "compressed-tensors"):
        assert "bitsandbytes" in FORMATS.get(name)().refuses(torch.float32, {"a": "Linear"}, own)
    assert "pass bnb" in FORMATS.get("bitsandbytes")().refuses(torch.float32, {"a": "Linear"}, grid)
    assert FORMATS.get("bitsandbytes")().refuses(torch.float32, {"a": "Linear"}, own) is None


def test_an_unknown_format_is_refused_as_the_recipe_is_read(wide_folder, tmp_path):
    with pytest.raises(RecipeError, match="allowed: nf4, fp4, int8"):
        Recipe.from_dict(recipe(wide_folder, tmp_path / "out", format="int4"))
