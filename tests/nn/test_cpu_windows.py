"""The CPU kernel on layers whose codes lie along a trellis, against torch's own reading of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import compress
from compress.maths.grid import QuantSpec, find_params, quantize
from compress.nn import cpu, running
from compress.nn.cpu_step import BlockStep, use_block_steps
from compress.nn.quant_linear import QuantLinear
from compress.testing import outputs, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the kernel is not built here")
_int8 = cpu.library() is not None and cpu.why_not_int8() is None and bool(cpu.library().compress_vbmi())
vnni = pytest.mark.skipif(not _int8, reason="no AVX-512 VNNI or VBMI")
#: Columns, and group sizes: whole rows of odd multiples of 32, groups of every kind.
SIZES = [(96, 32), (192, 64), (384, 128), (192, 96), (224, -1), (256, -1), (32, -1), (384, 192), (288, -1), (64, -1)]
CASES = [(bits, *size) for bits in (2, 3, 4) for size in SIZES]


def trellis_layer(bits: int, columns: int, group: int, rows: int = 37, scale_dtype: str = "float16") -> QuantLinear:
    """Random codes, so that every window is met, and scales of both ends of a wide range."""
    generator = torch.Generator().manual_seed(bits * columns)
    spec = QuantSpec(bits, group, True, scale_dtype, grid="trellis")
    codes = torch.randint(spec.qmin, spec.qmax + 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, spec.groups(columns), generator=generator) * 0.1 + 0.01
    scale[0] = 6e-8  # float16's smallest
    layer = QuantLinear.from_codes(codes, scale.to(spec.torch_scale_dtype), None, spec)
    layer.exact = False
    return layer


def expanded(layer: QuantLinear, level: int, dtype: torch.dtype, first: int = 0) -> torch.Tensor:
    """Rows from `first` on, by the kernel."""
    assert cpu.fits(layer, torch.zeros(1, layer.in_features))
    rows = layer.out_features - first
    found = torch.empty(rows, layer.in_features, dtype=dtype)
    cpu.library().compress_expand(
        layer.prepared.address, first, layer.out_features, found.data_ptr(), cpu._KINDS[dtype], 1, level
    )
    return found


def off(layer: QuantLinear, x: torch.Tensor, level: int) -> float:
    """How far the kernel's product is from that of float64, of its norm."""
    assert cpu.fits(layer, x)
    expected = functional.linear(x.double(), layer.dequantize(torch.float64))
    return float((cpu.multiply(layer, x, level).double() - expected).norm() / expected.norm())


def off_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def steps(model: torch.nn.Module) -> list[BlockStep]:
    return [module.forward for module in model.modules() if isinstance(module.__dict__.get("forward"), BlockStep)]


@torch.inference_mode()
def written(model: torch.nn.Module) -> torch.Tensor:
    """Logits of single tokens after a prompt of five."""
    ids = (torch.arange(11) * 7 % 90 + 3)[None]
    out = model(input_ids=ids[:, :5], use_cache=True)
    logits = []
    for at in range(5, 11):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1].float())
    return torch.stack(logits)


@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize(("bits", "columns", "group"), CASES)
def test_expanded_rows_are_those_of_torch_to_the_last_bit(bits: int, columns: int, group: int, level: int) -> None:
    layer = trellis_layer(bits, columns, group)
    expected = layer.dequantize(torch.float32)
    assert torch.equal(expanded(layer, level, torch.float32), expected)
    assert torch.equal(expanded(layer, level, torch.bfloat16), expected.bfloat16())
    assert torch.equal(expanded(layer, level, torch.float32, first=30), expected[30:])


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_scales_of_other_dtypes_are_read(scale_dtype: str) -> None:
    layer = trellis_layer(4, 128, 32, scale_dtype=scale_dtype)
    assert torch.equal(expanded(layer, max(cpu.LEVELS), torch.float32), layer.dequantize(torch.float32))


@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize(("bits", "columns", "group"), CASES)
def test_the_product_is_that_of_float64_to_the_rounding_of_the_dtype(
    bits: int, columns: int, group: int, level: int
) -> None:
    layer = trellis_layer(bits, columns, group)
    torch.manual_seed(0)
    for many in (1, 3, 5, cpu.MANY + 1):
        for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 6e-3)):
            assert off(layer, torch.randn(many, columns).to(dtype), level) < most


@vnni
@pytest.mark.parametrize(("bits", "columns", "group"), CASES)
def test_inputs_in_int8_cost_a_hundredth(bits: int, columns: int, group: int) -> None:
    layer = trellis_layer(bits, columns, group)
    layer.int8_inputs = True
    torch.manual_seed(0)
    for many in (1, 5):
        x = torch.randn(many, columns)
        assert cpu.why_not_int8(layer) is None
        assert 1e-3 < off(layer, x, max(cpu.LEVELS)) < 2e-2
        assert off(layer, x, 1) < 2e-6


@vnni
def test_products_of_inputs_that_int8_holds_are_exact() -> None:
    layer = trellis_layer(4, 384, 128)
    layer.int8_inputs = True
    x = torch.randint(-126, 127, (1, 384)).float()
    x[0, ::128] = 127
    assert off(layer, x, max(cpu.LEVELS)) < 3e-7


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_inputs_of_one_sign_and_with_one_far_larger_are_as_exact(level: int) -> None:
    layer = trellis_layer(4, 384, 128)
    torch.manual_seed(0)
    x = torch.rand(1, 384) + 3
    assert off(layer, x, level) < 2e-6
    x[0, 5] = -4096
    for given, most in ((x, 2e-6), (x.bfloat16(), 4e-3)):
        assert off(layer, given, level) < most
    assert torch.equal(cpu.multiply(layer, torch.zeros(1, 384), level), torch.zeros(1, layer.out_features))


@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_seen_in_the_result(value: float, level: int) -> None:
    layer, x = trellis_layer(4, 384, 128), torch.randn(1, 384)
    x[0, 200] = value
    assert cpu.fits(layer, x)
    assert not cpu.multiply(layer, x, level).isfinite().any()


@vnni
def test_inputs_in_bfloat16_lose_less_than_their_result_when_it_is_rounded() -> None:
    layer = trellis_layer(3, 384, 128, rows=1)
    torch.manual_seed(0)
    x = torch.randn(64, 384).bfloat16()
    exact = functional.linear(x.double(), layer.dequantize(torch.float64))
    assert cpu.fits(layer, x)
    found = torch.cat([cpu.multiply(layer, row[None]) for row in x]).double()
    assert float((found - exact).norm()) < 1.05 * float((exact.bfloat16().double() - exact).norm())


@vnni
def test_int8_is_refused_with_a_reason_where_tables_cannot_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = trellis_layer(3, 96, 32)
    assert cpu.why_not_int8(layer) is None

    class Without:
        def compress_int8(self) -> int:
            return 1

        def compress_vbmi(self) -> int:
            return 0

    monkeypatch.setattr(cpu, "library", Without)
    assert "AVX-512 VBMI" in str(cpu.why_not_int8(layer))


def test_the_number_of_threads_changes_no_bit() -> None:
    layer, x = trellis_layer(4, 256, 128, rows=130), torch.randn(3, 256)
    assert cpu.fits(layer, x)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(cpu.multiply(layer, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("int8", [False, True])
def test_a_whole_block_takes_a_token_in_one_call(int8: bool) -> None:
    """Blocks of layers along a trellis, one integer layer among them."""
    model, other = (tiny_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2) for _ in range(2))
    for each in (model, other):
        compress.RTN(bits=4, group_size=64, grid="trellis")(each)
        up = each.model.layers[0].mlp.up_proj
        spec = QuantSpec(4, 64)
        scale, zero = find_params(up.dequantize(), spec)
        plain = QuantLinear.from_codes(quantize(up.dequantize(), scale, zero, spec), scale, zero, spec)
        each.model.layers[0].mlp.up_proj = plain
        for layer in each.modules():
            if isinstance(layer, QuantLinear):
                layer.exact, layer.int8_inputs = False, int8 and cpu.why_not_int8() is None
    assert use_block_steps(other) == 2
    # an input that lies half-way between two int8 codes can get the other one, and what follows it moves by as much
    assert off_of(written(other), written(model)) < (2e-2 if int8 else 1e-5)
    assert all(step.proved for step in steps(other))


def test_a_loaded_model_runs_by_the_kernel() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    compress.RTN(bits=4, group_size=32, grid="trellis")(model)
    exact = outputs(model, tokens)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        layer.exact = False
    assert running.served(layers[0]) == "CPU kernel, float activations"
    assert off_of(outputs(model, tokens), exact) < 1e-4


def test_a_layer_on_a_trellis_and_an_integer_one_do_not_share_an_input() -> None:
    layer, x = trellis_layer(4, 128, 64), torch.randn(1, 128)
    plain = QuantLinear.from_codes(layer.codes()[0], layer.weight_scale, None, QuantSpec(4, 64))
    plain.exact = False
    for each in (layer, plain, layer):
        assert off(each, x, max(cpu.LEVELS)) < 2e-6


def test_groups_that_it_cannot_serve_are_refused_with_a_reason() -> None:
    assert "multiples of 32" in str(cpu.why_not(trellis_layer(4, 96, 48)))
    assert "multiples of 32" in str(cpu.why_not(trellis_layer(3, 48, -1)))
    assert not cpu.fits(trellis_layer(2, 96, 16), torch.randn(1, 96))
    assert cpu.why_not(trellis_layer(3, 96, 32)) is None
