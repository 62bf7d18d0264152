"""The CPU kernel on layers whose codes lie along a trellis, against torch's own reading of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress.maths.grid import QuantSpec
from compress.nn import cpu
from compress.nn.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the kernel is not built here")
#: Columns, and group sizes: whole rows of odd multiples of 32, groups of every kind.
SIZES = [(96, 32), (192, 64), (384, 128), (192, 96), (224, -1), (256, -1), (32, -1)]
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
