"""How a loaded model computes: inputs in int8, weights in oneDNN's order, layers that round their inputs."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import nn

import compress
from compress.errors import StartError
from compress.maths.activations import token_codes, token_scales
from compress.maths.grid import QuantSpec, eight_bit_spec, find_params, quantize
from compress.nn import cpu, kernels, prepacked
from compress.nn.prepacked import PrepackedLinear, prepack
from compress.nn.quant_linear import QuantLinear
from compress.nn.running import run_as
from compress.recipe import Runtime
from compress.testing import save_tiny, tiny_model, tiny_tokens

built = pytest.mark.skipif(cpu.library() is None, reason="the kernel is not built here, or the processor lacks AVX2")
vnni = pytest.mark.skipif(cpu.why_not_int8() is not None, reason="no AVX-512 VNNI, or the kernel is not built")
one_dnn = pytest.mark.skipif(prepacked.why_not() is not None, reason="oneDNN has no bfloat16 here")


def layer_of(bits: int, group: int, symmetric: bool, rows: int = 37, columns: int = 512) -> QuantLinear:
    torch.manual_seed(0)
    spec = QuantSpec(bits, group, symmetric, "float32")
    weight = torch.randn(rows, columns)
    scale, zero = find_params(weight, spec)
    layer = QuantLinear.from_codes(quantize(weight, scale, zero, spec), scale, zero, spec)
    layer.exact, layer.int8_inputs = False, True
    return layer


def rounded(x: torch.Tensor, share: int) -> torch.Tensor:
    """x in float64, every `share` columns rounded to 127 steps on either side: the definition."""
    parts = x.double().unflatten(-1, (-1, share))
    step = parts.abs().amax(-1, keepdim=True) / 127
    return (torch.round(parts / step) * step).flatten(-2)


@vnni
@pytest.mark.parametrize(
    ("bits", "group"), [(4, 64), (4, 128), (4, 256), (4, -1), (2, 128), (2, 512), (8, 32), (8, -1)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_int8_inputs_are_those_of_the_rounded_numbers(bits: int, group: int, symmetric: bool) -> None:
    layer = layer_of(bits, group, symmetric)
    assert cpu.why_not_int8(layer) is None
    share = min(group, 128) if group > 0 else 128
    for many in (1, 3):
        x = torch.randn(many, 512) * torch.rand(512)
        assert kernels.choose(layer, x).name == "cpu"
        expected = rounded(x, share) @ layer.dequantize(torch.float64).T
        found = layer(x).double()
        assert float((found - expected).norm() / expected.norm()) < 2e-6
        plain = x.double() @ layer.dequantize(torch.float64).T
        assert 1e-4 < float((found - plain).norm() / plain.norm()) < 0.02


@vnni
def test_groups_and_bits_that_int8_does_not_serve_take_floats_and_say_why() -> None:
    for bits, group in ((3, 128), (4, 32), (2, 64)):
        layer, x = layer_of(bits, group, True), torch.randn(1, 512)
        assert "multiples of 128, 64 or 32" in str(cpu.why_not_int8(layer))
        expected = x.double() @ layer.dequantize(torch.float64).T
        assert float((layer(x).double() - expected).norm() / expected.norm()) < 2e-6


@vnni
def test_a_zero_input_gives_zero() -> None:
    layer = layer_of(4, 64, False)
    assert torch.equal(layer(torch.zeros(1, 512)), torch.zeros(1, 37))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 64, 77])
def test_tokens_are_rounded_and_scaled_as_the_plain_kernel_does_to_the_last_bit(
    dtype: torch.dtype, columns: int
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(70, columns) * torch.rand(70, 1) * 30).to(dtype)
    x[3] = 0
    spec = eight_bit_spec(dtype, "int8", True)
    codes, scale = cpu.round_tokens(x)
    assert torch.equal(scale, token_scales(x, spec).float())
    assert torch.equal(codes, token_codes(x, token_scales(x, spec), spec))
    sums = torch.randint(-(2**20), 2**20, (70, 9), dtype=torch.int32)
    rows, bias = torch.rand(9, 1), torch.randn(9)
    for offset in (None, bias):
        expected = sums.float().mul_(scale).mul_(rows.t())
        expected = (expected if offset is None else expected + offset).to(dtype)
        assert torch.equal(cpu.scale_sums(sums, scale, rows, offset, dtype), expected)


@one_dnn
def test_prepacked_layers_give_the_same_to_the_last_bit_and_their_weights_back() -> None:
    plain = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)).to(torch.bfloat16)
    plain.requires_grad_(False)
    other = copy.deepcopy(plain)
    assert prepack(other) == 2
    for shape in ((1, 64), (2, 3, 64), (64,)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        torch.testing.assert_close(other(x), plain(x), rtol=0, atol=0)
    saved = other.state_dict()
    assert saved.keys() == plain.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(copy.deepcopy(other)[0].weight, plain[0].weight)
    x = torch.randn(1, 64, dtype=torch.bfloat16, requires_grad=True)
    other(x).sum().backward()
    assert x.grad is not None


@one_dnn
def test_load_prepacks_a_dense_model_when_it_is_asked_to(tmp_path) -> None:
    folder = save_tiny(tmp_path / "tiny", dtype=torch.bfloat16)
    plain, fast = compress.load(folder), compress.load(folder, prepack=True)
    assert any(isinstance(module, PrepackedLinear) for module in fast.modules())
    assert not any(isinstance(module, PrepackedLinear) for module in plain.modules())
    ids = tiny_tokens()
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=0, atol=0.02)


@vnni
def test_what_the_recipe_says_is_recorded_and_followed_and_a_caller_decides_otherwise(tmp_path, unverified) -> None:
    folder = save_tiny(tmp_path / "tiny", hidden_size=64, intermediate_size=128)
    recipe = {"model": str(folder), "passes": [{"rtn": {"bits": 4, "group_size": 64}}], "benchmark": False}
    recipe |= {"runtime": {"activations": "int8"}, "output": str(tmp_path / "run")}
    compress.run(compress.Recipe.from_dict(recipe))
    assert json.loads((tmp_path / "run/model/compress.json").read_text())["runtime"] == {"activations": "int8"}

    def served(**asked: str) -> set[bool]:
        model = compress.load(tmp_path / "run", **asked)
        return {layer.int8_inputs for layer in model.modules() if isinstance(layer, QuantLinear)}

    assert served() == {True}
    assert served(activations="float") == {False}


def test_what_this_machine_lacks_is_an_error_if_asked_for_and_a_warning_if_recorded(monkeypatch, caplog) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    compress.RTN(bits=4, group_size=64)(model)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.exact = False
    monkeypatch.setattr(cpu, "why_not_int8", lambda layer=None: "this processor lacks AVX-512 VNNI")
    with pytest.raises(StartError, match=r"cannot be had here: this processor lacks AVX-512 VNNI\. Leave it out"):
        run_as(model, Runtime(activations="int8"), asked=True)
    with caplog.at_level(logging.WARNING):
        run_as(model, Runtime(activations="int8"), asked=False)
    assert "runs without it: this processor lacks AVX-512 VNNI" in caplog.text
