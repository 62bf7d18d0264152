"""Folders of 8-bit codes, with and without rounded inputs: plain transformers computes what the model in memory did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Shelf, quantize_model
from transformers import PreTrainedModel

from compress.errors import StartError
from compress.formats.base import Contents
from compress.formats.dense import Dense
from compress.formats.folder import default_format, packed_export_note, write_model_folder
from compress.loading import load
from compress.maths.grid import QuantSpec, eight_bit_spec
from compress.measure.worker import count_parameters
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import Pass
from compress.passes.fp8 import FP8
from compress.passes.smoothquant import SmoothQuant
from compress.testing import CAUSAL, outputs, tiny_model, tiny_tokens

INT8, FLOAT8 = (eight_bit_spec(torch.float32, kind, True) for kind in ("int8", "float8"))


def _after(pass_: Pass, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(family, dtype=dtype)
    pass_(model, calibration=tiny_tokens() if pass_.needs_calibration else None, min_coverage=0.0)
    return model


def _mixed(name: str) -> QuantSpec | None:
    if "self_attn" in name:
        return INT8 if "o_proj" not in name else eight_bit_spec(torch.float32, "int8", False)
    return {"gate_proj": QuantSpec(4, 16), "up_proj": FLOAT8}.get(name.rpartition(".")[2])


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{
        f"{family}-smoothquant": (lambda family=family: _after(SmoothQuant(), family))
        for family in (*CAUSAL, "bert")
        if family != "gpt2"
    },
    **{f"{family}-fp8": (lambda f=family: _after(FP8(), f)) for family in ("llama", "gpt2", "mixtral", "bert")},
    **{
        f"{family}-fp8 dynamic": (lambda f=family: _after(FP8(activations="dynamic"), f))
        for family in ("llama", "gemma3", "opt")
    },
    **{
        f"llama {str(dtype)[6:]}-{pass_.name}": (lambda pass_=pass_, dtype=dtype: _after(pass_, "llama", dtype))
        for dtype in (torch.bfloat16, torch.float16)
        for pass_ in (SmoothQuant(), FP8(activations="dynamic"))
    },
    "some layers": lambda: _after(SmoothQuant(skip=["mlp.*"]), "llama"),
    "several formats": lambda: quantize_model(tiny_model("llama"), _mixed),
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    shelf = Shelf(tmp_path_factory.mktemp("eight"))
    for name, make in MODELS.items():
        shelf.add(name, make())
    return shelf


@pytest.fixture(scope="module")
def plain(eight: Shelf) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return eight.read_plainly()


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_computes_the_same(
    name: str, eight: Shelf, plain: tuple[dict[str, torch.Tensor], dict[str, str]]
) -> None:
    results, failures = plain
    assert name not in failures, failures.get(name)
    slack = 1e-5 if "gpt2" in name or "mixtral" in name else 0.0  # other order of sums
    torch.testing.assert_close(results[name], eight.written[name].expected, rtol=0, atol=slack)


@pytest.mark.parametrize("name", MODELS)
def test_load_brings_the_same_layers_and_the_same_arithmetic(name: str, eight: Shelf) -> None:
    """To the last bit where layers are exact; as they come from `load`, each layer within 1e-5 for the same input."""
    written = eight.written[name]
    model = load(written.folder)
    specs = {layer: m.spec for layer, m in model.named_modules() if isinstance(m, QuantLinear)}
    before = {layer: m.spec for layer, m in written.model.named_modules() if isinstance(m, QuantLinear)}
    if name == "gpt2-fp8":
        assert not specs  # its Conv1D layers are written unpacked
        return
    assert specs == before
    for layer in specs:
        loaded, old = model.get_submodule(layer), written.model.get_submodule(layer)
        assert not loaded.exact
        x = torch.randn(2, 3, loaded.in_features).to(loaded.dtype)
        size = float(old(x).float().abs().max())
        slack = 1e-5 if loaded.dtype == torch.float32 else 0.05
        torch.testing.assert_close(loaded(x), old(x), rtol=0, atol=slack * size)
        loaded.exact = True
    assert torch.equal(outputs(model, eight.tokens), written.expected)


def test_the_config_says_what_is_rounded_and_how(eight: Shelf) -> None:
    stored = json.loads((eight.written["llama-smoothquant"].folder / "config.json").read_text())["quantization_config"]
    group = stored["config_groups"]["group_0"]
    assert stored["format"] == group["format"] == "int-quantized"
    assert (stored["quantization_status"], stored["ignore"]) == ("compressed", ["lm_head"])
    assert group["targets"] == ["Linear"]
    inputs, weights = group["input_activations"], group["weights"]
    assert (inputs["num_bits"], inputs["type"], inputs["dynamic"], inputs["strategy"]) == (8, "int", True, "token")
    assert (weights["num_bits"], weights["strategy"], weights["symmetric"]) == (8, "channel", True)
    stored = json.loads((eight.written["llama-fp8"].folder / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "float-quantized"
    assert stored["config_groups"]["group_0"]["input_activations"] is None
    stored = json.loads((eight.written["several formats"].folder / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "mixed-precision"
    assert sorted(group["format"] for group in stored["config_groups"].values()) == [
        "float-quantized", "int-quantized", "int-quantized", "pack-quantized",
    ]  # fmt: skip


def test_parameters_are_counted_as_before(eight: Shelf) -> None:
    expected = count_parameters(tiny_model("llama"))
    for name in ("llama-smoothquant", "llama-fp8", "several formats"):
        assert count_parameters(load(eight.written[name].folder)) == expected


def test_a_loaded_model_saved_again_is_read_again(eight: Shelf, tmp_path: Path) -> None:
    for name in ("llama-smoothquant", "llama-fp8 dynamic"):
        model = load(eight.written[name].folder)
        model.save_pretrained(tmp_path / name)
        assert torch.equal(outputs(load(tmp_path / name), eight.tokens), outputs(model, eight.tokens))


@pytest.mark.parametrize("pass_", [SmoothQuant(), FP8(activations="dynamic")], ids=lambda pass_: pass_.name)
def test_gpt2_with_rounded_inputs_is_refused_in_a_sentence(pass_: Pass, tmp_path: Path) -> None:
    contents = Contents.of_model(_after(pass_, "gpt2"))
    with pytest.raises(StartError, match=r"transformer\.h\.0\.attn\.c_attn, a Conv1D, would need"):
        write_model_folder(tmp_path / "model", contents)
    assert not list(tmp_path.iterdir())


def test_gpt2_with_float8_weights_is_written_unpacked_and_runs_packed(eight: Shelf, tmp_path: Path) -> None:
    written = eight.written["gpt2-fp8"]
    contents = Contents.of_model(written.model)
    assert default_format(contents) == "dense"
    assert packed_export_note(contents)
    write_model_folder(tmp_path / "packed", contents, "packed")
    packed = load(tmp_path / "packed")
    assert {m.spec.stored for m in packed.modules() if isinstance(m, QuantLinear)} == {"float8"}
    assert torch.equal(outputs(packed, eight.tokens), written.expected)


def test_plain_weights_are_refused_where_inputs_are_rounded_and_taken_where_not(eight: Shelf, tmp_path: Path) -> None:
    model = eight.written["llama-smoothquant"].model
    contents = Contents.of_model(model)
    said = Dense().refuses(contents.dtype, contents.kinds, contents.quantization)
    assert said is not None
    assert "round the inputs of layers: round weights alone" in said
    model = eight.written["llama-fp8"].model
    write_model_folder(tmp_path / "model", Contents.of_model(model), "dense")
    assert torch.equal(outputs(load(tmp_path / "model"), eight.tokens), eight.written["llama-fp8"].expected)


@pytest.mark.parametrize(
    "change",
    [
        {"input_activations": {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor"}},
        {"input_activations": {"num_bits": 4, "type": "int", "dynamic": True, "strategy": "token"}},
        {"weights": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
        {"format": "naive-quantized"},
    ],
    ids=["one fixed scale", "4 bits", "one scale", "another format"],
)
def test_what_the_layers_do_not_compute_is_refused(change: dict[str, object], eight: Shelf, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", Contents.of_model(eight.written["llama-smoothquant"].model))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match=r"compress\.load reads weights of integers per group"):
        load(folder)
