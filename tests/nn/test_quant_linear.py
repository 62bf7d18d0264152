"""The packed linear layer, against the compressed-tensors package and plain `torch.nn.Linear`."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress.maths.grid import QuantSpec, find_params, quantize
from compress.nn.kernels import cached
from compress.nn.quant_linear import QuantLinear, packed_tensors

GRIDS = [(bits, symmetric, size) for bits in (2, 3, 4, 8) for symmetric in (True, False) for size in (-1, 16, 48)]


def _layer(
    spec: QuantSpec, rows: int = 21, columns: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    generator = torch.Generator().manual_seed(spec.bits)
    weight = torch.randn(rows, columns, generator=generator) * 0.1 + 0.03
    scale, zero = find_params(weight, spec)
    codes = quantize(weight, scale, zero, spec)
    return QuantLinear.from_codes(
        codes, scale, zero, spec, torch.randn(rows, generator=generator) if bias else None, dtype
    )


def _by_the_package(layer: QuantLinear, scale: torch.Tensor) -> torch.Tensor:
    spec = layer.spec
    size = {"strategy": "channel"} if spec.group_size == -1 else {"strategy": "group", "group_size": spec.group_size}
    args = QuantizationArgs(num_bits=spec.bits, symmetric=spec.symmetric, **size)
    state = {name: tensor for name, tensor in layer.state_dict().items() if name.startswith("weight_")}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight: torch.Tensor = compressor.decompress(state | {"weight_scale": scale}, scheme)["weight"]
    return weight


@pytest.mark.parametrize(("bits", "symmetric", "size"), GRIDS)
def test_dequantized_equals_what_transformers_makes_of_the_same_tensors(bits: int, symmetric: bool, size: int) -> None:
    for scale_dtype, dtype in (
        ("float16", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.bfloat16),
    ):
        layer = _layer(QuantSpec(bits, size, symmetric, scale_dtype), dtype=dtype)
        # Scales of symmetric grids are cast as they are loaded; others are used as stored, and the weight is cast
        scale = layer.weight_scale.to(dtype) if symmetric else layer.weight_scale
        expected = _by_the_package(layer, scale).to(dtype)
        assert layer.dequantize().dtype == dtype
        assert torch.equal(layer.dequantize(), expected), (scale_dtype, dtype)


@pytest.mark.parametrize(("bits", "symmetric", "size"), GRIDS)
def test_codes_come_back_as_they_went_in(bits: int, symmetric: bool, size: int) -> None:
    spec = QuantSpec(bits, size, symmetric)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (7, 96), generator=generator, dtype=torch.int8)
    scale = torch.rand(7, spec.groups(96), generator=generator).half()
    zero = None if symmetric else torch.randint(spec.qmin, spec.qmax + 1, scale.shape, dtype=torch.int8)
    read = QuantLinear.from_codes(codes, scale, zero, spec).codes()
    assert torch.equal(read[0], codes)
    assert torch.equal(read[1], scale)
    assert zero is None if read[2] is None else torch.equal(read[2], zero)


def test_the_worked_example() -> None:
    """Codes -2..1 with scale 0.5 and zero -1: (code + 1) / 2. Two bits each, offset by 2, lowest first: 0b11100100."""
    spec = QuantSpec(2, -1, symmetric=False, scale_dtype="float32")
    codes = torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8)
    layer = QuantLinear.from_codes(codes, torch.tensor([[0.5]]), torch.tensor([[-1]], dtype=torch.int8), spec)
    assert layer.weight_packed.tolist() == [[0b11100100]]
    assert layer.weight_zero_point is not None
    assert layer.weight_zero_point.tolist() == [[1]]
    assert layer.dequantize().tolist() == [[-0.5, 0.0, 0.5, 1.0]]
    assert layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[5.0]]


def test_forward_is_the_linear_map_of_the_dequantized_weight() -> None:
    layer = _layer(QuantSpec(3, 16, False))
    x = torch.randn(2, 5, 48)
    assert torch.equal(layer(x), functional.linear(x, layer.dequantize(), layer.bias))
    assert layer(x.double()).dtype == torch.float64


def test_large_layers_are_dequantized_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(QuantSpec(4, 16, False))
    whole = layer.dequantize()
    monkeypatch.setattr("compress.nn.quant_linear._CHUNK_VALUES", 48 * 4)
    assert torch.equal(layer.dequantize(), whole)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_state_dict_is_that_of_the_format_and_as_large_as_predicted(symmetric: bool) -> None:
    spec = QuantSpec(3, 16, symmetric, "bfloat16")
    state = _layer(spec, bias=False).state_dict()
    expected = packed_tensors(48, 21, spec)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == expected
    assert expected["weight_packed"] == (torch.int32, (21, 5))  # 48 * 3 bits = 4.5 words
    assert expected["weight_scale"] == (torch.bfloat16, (21, 3))
    assert expected.get("weight_zero_point") == (None if symmetric else (torch.int32, (2, 3)))
    assert state["weight_shape"].tolist() == [21, 48]


def test_an_empty_layer_filled_with_a_state_dict_computes_the_same() -> None:
    spec = QuantSpec(4, 16, False)
    layer = _layer(spec)
    empty = QuantLinear.empty(48, 21, spec, bias=True)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 48)
    assert torch.equal(empty(x), layer(x))


def test_like_takes_shape_bias_and_dtype_of_what_it_replaces() -> None:
    spec = QuantSpec(4, 16)
    linear = QuantLinear.like(nn.Linear(48, 16, bias=False, dtype=torch.bfloat16), spec)
    assert (linear.in_features, linear.out_features, linear.dtype) == (48, 16, torch.bfloat16)
    assert linear.bias is None
    conv = QuantLinear.like(Conv1D(16, 48), spec)
    assert (conv.in_features, conv.out_features, conv.transposed) == (48, 16, True)
    assert conv.bias is not None
    assert QuantLinear.like(conv, spec).transposed


def test_a_replaced_conv1d_computes_the_same_and_shows_its_weight_its_way_round() -> None:
    spec = QuantSpec(8, 16)
    conv = Conv1D(21, 48)
    scale, zero = find_params(conv.weight.detach().t(), spec)
    codes = quantize(conv.weight.detach().t(), scale, zero, spec)
    layer = QuantLinear.from_codes(codes, scale, zero, spec, conv.bias, transposed=True)
    assert layer.weight.shape == conv.weight.shape
    conv.weight.data.copy_(layer.weight)
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-6)


def test_cached_keeps_the_weight_only_inside_and_changes_no_result() -> None:
    layer = _layer(QuantSpec(4, 16))
    model = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(3, 48)
    expected = model(x)
    with cached(model):
        assert torch.equal(model(x), expected)
        first = layer.cached_weight(torch.float32)
        assert layer.cached_weight(torch.float32) is first
        assert layer.cached_weight(torch.float64).dtype == torch.float64
    assert layer.cached_weight(torch.float32) is not first
    assert torch.equal(model(x), expected)


def test_moving_the_layer_to_another_dtype_moves_its_arithmetic() -> None:
    layer = _layer(QuantSpec(4, 16)).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight_packed.dtype == torch.int32
    assert layer(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_reach_the_input() -> None:
    layer = _layer(QuantSpec(4, 16))
    x = torch.randn(2, 48, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], layer.dequantize().sum(0))


@pytest.mark.parametrize(
    ("scale_shape", "zero_shape", "symmetric"),
    [((2, 2), None, True), ((2, 3), (2, 2), False), ((2, 3), None, False), ((2, 3), (2, 3), True)],
)
def test_parts_that_do_not_fit_together_are_refused(
    scale_shape: tuple[int, int], zero_shape: tuple[int, int] | None, symmetric: bool
) -> None:
    zero = None if zero_shape is None else torch.zeros(zero_shape, dtype=torch.int8)
    spec = QuantSpec(4, 16, symmetric)
    with pytest.raises(ValueError, match="need"):
        QuantLinear.from_codes(torch.zeros(2, 48, dtype=torch.int8), torch.ones(scale_shape), zero, spec)
