"""Layers that round their inputs: the integer kernel, the plain one, and what plain transformers computes."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional

from compress.maths.activations import rounded_tokens
from compress.maths.grid import eight_bit_spec, find_params, quantize
from compress.nn.kernels import choose
from compress.nn.quant_linear import QuantLinear, packed_tensors


def layer_of(
    kind: str = "int8",
    dtype: torch.dtype = torch.float32,
    activations: bool = True,
    bias: bool = True,
    shape: tuple[int, int] = (21, 48),
) -> QuantLinear:
    weight = torch.from_numpy(reference.random_weight(*shape, 3)).to(dtype)
    spec = eight_bit_spec(dtype, kind, activations)
    scale, zero = find_params(weight, spec)
    offset = torch.linspace(-1, 1, shape[0]) if bias else None
    return QuantLinear.from_codes(quantize(weight, scale, zero, spec), scale, zero, spec, offset, dtype)


def inputs(columns: int = 48, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[2, 5, columns], with an outlier channel and a token of zeros."""
    x = torch.from_numpy(reference.random_inputs(10, columns, 0)).reshape(2, 5, columns)
    x[..., 7] *= 20
    x[0, 1] = 0
    return x.to(dtype)


def fast(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    layer.exact = False
    assert choose(layer, x).name == "int8"
    out = layer(x)
    layer.exact = True
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(21, 48), (1, 1), (64, 1025), (3, 4096)])
def test_the_integer_kernel_is_within_1e_5_of_what_transformers_computes(shape: tuple[int, int], bias: bool) -> None:
    layer = layer_of(shape=shape, bias=bias)
    x = inputs(max(shape[1], 8))[..., : shape[1]]
    slow = layer(x)
    assert torch.equal(slow, functional.linear(rounded_tokens(x, layer.spec), layer.dequantize(), layer.bias))
    torch.testing.assert_close(fast(layer, x), slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()))


def test_the_integer_kernel_is_the_product_of_the_codes() -> None:
    """In float64 no rounding is left but that of codes, and the definition gives the same figures."""
    layer = layer_of(dtype=torch.float32, bias=False)
    codes, scale, _ = layer.codes()
    x = inputs(dtype=torch.float64)
    x[..., 0] = x.abs().amax(-1) * 1.5  # the largest is positive, where 127.5 steps are cut to 127
    rounded = torch.from_numpy(reference.rounded_rows(x.reshape(-1, 48).numpy(), "int8"))
    expected = rounded @ (codes.double() * scale.double()).T
    torch.testing.assert_close(fast(layer, x).reshape(-1, 21), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x).reshape(-1, 21), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_both_kernels_agree_to_the_dtypes_precision(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype=dtype), inputs(dtype=dtype)
    slow, quick = layer(x), fast(layer, x)
    assert quick.dtype == slow.dtype == dtype
    torch.testing.assert_close(quick, slow, rtol=0, atol=16 * torch.finfo(dtype).eps * float(slow.abs().max()))


def test_large_sums_do_not_overflow() -> None:
    layer = layer_of(shape=(2, 40000), bias=False)
    layer._buffers["weight"].fill_(127)
    x = torch.full((1, 1, 40000), -3.0)  # -128 * 127 * 40000 is beyond float32's whole numbers and within int32
    expected = -128.0 * (3.0 / 127.5) * 127 * 40000 * layer.weight_scale.double().T
    torch.testing.assert_close(fast(layer, x)[0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 48), (2, 2, 3, 48), (0, 48)])
def test_inputs_of_any_shape_are_taken_by_both(shape: tuple[int, ...]) -> None:
    layer, x = layer_of(), torch.randn(shape)
    slow = layer(x)
    layer.exact = False
    quick = layer(x)
    assert quick.shape == slow.shape == (*shape[:-1], 21)
    torch.testing.assert_close(quick, slow, rtol=1e-5, atol=1e-5)


def test_the_exact_kernel_runs_unless_told_otherwise_and_where_the_other_does_not_fit() -> None:
    x = inputs()
    assert choose(layer_of(), x).name == "torch"
    for layer in (layer_of("float8"), layer_of(activations=False)):
        layer.exact = False
        assert choose(layer, x).name == "torch"
    layer = layer_of()
    layer.exact = False
    assert choose(layer, x).name == "int8"
    assert choose(layer, x.requires_grad_()).name == "torch"
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], layer.dequantize().sum(0))


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_the_state_dict_is_that_of_the_format_and_weight_is_the_dequantized_one(kind: str) -> None:
    layer = layer_of(kind, torch.bfloat16, bias=False)
    state = layer.state_dict()
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    assert found == packed_tensors(48, 21, layer.spec)
    assert found["weight"] == (torch.int8 if kind == "int8" else torch.float8_e4m3fn, (21, 48))
    assert found["weight_scale"] == (torch.bfloat16, (21, 1))
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, layer.dequantize())
    empty = QuantLinear.like(nn.Linear(48, 21, bias=False, dtype=torch.bfloat16), layer.spec)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(inputs(dtype=torch.bfloat16)), layer(inputs(dtype=torch.bfloat16)))


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_casting_the_model_leaves_the_codes_alone(kind: str) -> None:
    layer = layer_of(kind)
    before = layer.codes()[0].clone()
    moved = nn.Sequential(layer).to(torch.bfloat16)[0]
    assert moved.codes()[0].dtype == before.dtype
    assert torch.equal(moved.codes()[0].view(torch.int8), before.view(torch.int8))
    assert moved.weight.dtype == torch.bfloat16
