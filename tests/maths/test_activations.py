"""Rounded inputs and 8-bit floats, against the definitions of their types and against compressed-tensors itself."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus
from torch import nn

from compress.errors import StartError
from compress.maths.activations import rounded_tokens, token_codes, token_scales
from compress.maths.grid import QuantSpec, dequantize, eight_bit_spec, find_params, quantize

KINDS = ("int8", "float8")


def spec_of(kind: str, dtype: torch.dtype = torch.float32) -> QuantSpec:
    return eight_bit_spec(dtype, kind, True)


def by_the_package(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What a Linear of plain transformers makes of its input."""
    number = "float" if kind == "float8" else "int"
    args = QuantizationArgs(num_bits=8, type=number, symmetric=True, dynamic=True, strategy="token")
    module = nn.Linear(1, 1)
    module.quantization_status = QuantizationStatus.FROZEN
    rounded: torch.Tensor = forward_quantize(module, x, "input", args)
    return rounded


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[3, 7, 24], with an outlier channel, a token of zeros, and tokens of very different size."""
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 30
    x[0, 0] = 0
    x[1] *= 1e-4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_rounded_as_plain_transformers_rounds_them_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    x = tokens(dtype)
    assert torch.equal(rounded_tokens(x, spec_of(kind)), by_the_package(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_rounded_as_the_definition_says(kind: str) -> None:
    x = tokens(torch.float64).reshape(-1, 24)
    expected = torch.from_numpy(reference.rounded_rows(x.numpy(), kind))
    if kind == "int8":  # whether the largest, at 127.5 steps, is 127 or 128 of them is up to the last bit
        near = (rounded_tokens(x, spec_of(kind)) - expected).abs() <= token_scales(x, spec_of(kind)) * (1 + 1e-9)
        exact = x.abs() < x.abs().amax(-1, keepdim=True)
        assert near.all()
        torch.testing.assert_close(rounded_tokens(x, spec_of(kind))[exact], expected[exact], rtol=1e-12, atol=1e-15)
    else:
        torch.testing.assert_close(rounded_tokens(x, spec_of(kind)), expected, rtol=1e-12, atol=1e-15)


def test_the_worked_example_of_each_type() -> None:
    x = torch.tensor([[-255.0, 3.0, 100.0, 0.9]])
    assert token_scales(x, spec_of("int8")).tolist() == [[2.0]]
    assert token_codes(x, torch.tensor([[2.0]]), spec_of("int8")).tolist() == [[-128, 2, 50, 0]]  # 127.5, 1.5: to even
    x = torch.tensor([[448.0, 17.0, 0.0, -0.001]])
    assert token_scales(x, spec_of("float8")).tolist() == [[1.0]]
    # Between 16 and 32 steps are 2, and 17 goes to the even 16; the smallest step is 2**-9
    codes = token_codes(x, torch.ones(1, 1), spec_of("float8"))
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().tolist() == [[448.0, 16.0, 0.0, -(2.0**-9)]]


def test_a_token_is_rounded_whatever_stands_beside_it() -> None:
    x = tokens()
    for kind in KINDS:
        assert torch.equal(rounded_tokens(x, spec_of(kind))[2, 3], rounded_tokens(x[2, 3], spec_of(kind)))


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    x = tokens().requires_grad_()
    rounded_tokens(x, spec_of("int8")).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * rounded_tokens(x, spec_of("int8")).detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_row_by_row_as_the_definition_says(kind: str, dtype: torch.dtype) -> None:
    weight = torch.from_numpy(reference.random_weight(6, 40, 1)).to(dtype)
    spec = eight_bit_spec(dtype, kind, False)
    scale, zero = find_params(weight, spec)
    codes = quantize(weight, scale, zero, spec)
    assert zero is None
    assert codes.dtype == (torch.float8_e4m3fn if kind == "float8" else torch.int8)
    half = 448 if kind == "float8" else 127.5
    torch.testing.assert_close(scale[:, 0].double(), weight.double().abs().amax(1) / half, rtol=2**-8, atol=0)
    for row in range(len(weight)):  # the code next to weight / scale, for the scale as it is stored
        for column in range(weight.shape[1]):
            wanted = float(weight[row, column].double()) / float(scale[row, 0])
            near = {reference.round_to_type(wanted * (1 + slack), kind) for slack in (-1e-6, 0, 1e-6)}
            assert float(codes[row, column].float()) in near
    back = dequantize(codes, scale, zero, spec, torch.float32)
    assert torch.equal(back, codes.float() * scale.float())


def test_float8_is_as_exact_for_small_weights_as_for_large_ones() -> None:
    weight = torch.tensor([[448.0, 1.1, 0.011, 2e-2, 0.0]])
    spec = eight_bit_spec(torch.float32, "float8", False)
    scale, zero = find_params(weight, spec)
    back = dequantize(quantize(weight, scale, zero, spec), scale, zero, spec, torch.float32)
    assert ((back - weight).abs() <= weight.abs() / 16 + 2**-10).all()
    assert back[0, 4] == 0


def test_the_types_numbers_are_all_there() -> None:
    numbers = reference.e4m3_numbers()
    bits = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert bits.tolist() == numbers
    assert numbers[-1] == 448
    values = np.concatenate([np.linspace(-500, 500, 301), np.linspace(-0.02, 0.02, 101)])
    clamped = torch.from_numpy(values).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    assert clamped.tolist() == [reference.round_to_e4m3(float(np.float32(value))) for value in values]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bits": 4, "stored": "int8"}, "int8 codes have 8 bits"),
        ({"bits": 8, "stored": "float8", "group_size": 16}, "one scale per channel"),
        ({"bits": 8, "stored": "int8", "symmetric": False}, "no zero point"),
        ({"bits": 8, "activations": True}, "only where weights are stored so"),
        ({"bits": 8, "stored": "int9"}, "packed, int8, float8"),
    ],
)
def test_grids_that_nothing_computes_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(StartError, match=said):
        QuantSpec(**values)


def test_a_grid_without_the_new_words_is_what_it_was() -> None:
    assert QuantSpec(4, 16) == QuantSpec(4, 16, True, "float16", "packed", False)
