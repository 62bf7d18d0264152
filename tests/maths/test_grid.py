"""Grids: what rounding promises, on any weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, StartError
from compress.maths.grid import QuantSpec, dequantize, find_params, quantize, spec_for

specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 4, 12]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


def random_weight(seed: int, rows: int = 3, columns: int = 24, size: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


def rounded(weight: torch.Tensor, spec: QuantSpec, **options) -> torch.Tensor:
    scale, zero = find_params(weight, spec, **options)
    return dequantize(quantize(weight, scale, zero, spec), scale, zero, spec, torch.float32)


def per_weight(values: torch.Tensor, columns: int) -> torch.Tensor:
    return values.float().repeat_interleave(columns // values.shape[1], dim=1)


@settings(max_examples=150, deadline=None)
@given(specs, st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 100.0]))
def test_inside_the_range_a_weight_moves_by_at_most_half_a_step(spec, seed, size):
    weight = random_weight(seed, size=size)
    scale, zero = find_params(weight, spec)
    result = dequantize(quantize(weight, scale, zero, spec), scale, zero, spec, torch.float32)
    step = per_weight(scale, 24)
    offset = torch.zeros_like(step) if zero is None else per_weight(zero, 24)
    inside = (weight >= (spec.qmin - offset) * step) & (weight <= (spec.qmax - offset) * step)
    assert ((weight - result).abs() <= step * 0.5 * (1 + 1e-4))[inside].all()
    # The ends: a symmetric grid is half a step short, an asymmetric one as far as its zero was rounded; and the scale,
    # rounded to its dtype, misses by up to half its last digit for every step from zero.
    digit = {"float16": (step * 2**-11).clamp(min=2**-25), "bfloat16": step * 2**-8, "float32": step * 2**-23}
    assert ((weight - result).abs() <= (step + digit[spec.scale_dtype] * 2**spec.bits) * 1.001).all()


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 10**6))
def test_rounding_what_is_on_the_grid_changes_nothing(spec, seed):
    weight = random_weight(seed)
    scale, zero = find_params(weight, spec)
    codes = quantize(weight, scale, zero, spec)
    again = dequantize(codes, scale, zero, spec, torch.float32)
    assert torch.equal(quantize(again, scale, zero, spec), codes)


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 10**6))
def test_zero_is_stored_exactly(spec, seed):
    weight = random_weight(seed)
    weight[:, ::3] = 0
    assert (rounded(weight, spec)[:, ::3] == 0).all()


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 10**6), st.booleans())
def test_search_never_makes_the_weighted_error_larger(spec, seed, weighed):
    weight = random_weight(seed)
    importance = torch.rand(24, generator=torch.Generator().manual_seed(seed)) ** 4 if weighed else None
    factor = torch.ones(24) if importance is None else importance
    plain = ((rounded(weight, spec) - weight).square() * factor).sum()
    found = ((rounded(weight, spec, search=True, importance=importance) - weight).square() * factor).sum()
    assert found <= plain * (1 + 1e-5)


def test_search_cuts_an_outlier_off_where_the_rest_matters_more():
    weight = torch.tensor([[1.0, -1.0, 0.9, -0.9, 0.5, -0.5, 0.1, 2.0]])
    spec = QuantSpec(bits=2)
    assert find_params(weight, spec, search=True)[0].abs() < find_params(weight, spec)[0]
    important = torch.tensor([0.0] * 7 + [1.0])
    outlier = rounded(weight, spec, search=True, importance=important)[0, 7]
    assert abs(outlier - 2.0) < abs(rounded(weight, spec, search=True)[0, 7] - 2.0)


def test_search_turns_a_symmetric_grid_round_where_the_longer_side_is_above_zero():
    weight = torch.tensor([[2.0, -1.0, 0.0, 1.0, 1.0], [-2.0, 1.0, 0.0, -1.0, 1.0]])
    spec = QuantSpec(2)
    scale, _ = find_params(weight, spec, search=True)
    assert scale[0] < 0 < scale[1]  # codes -2..1: the first row needs 2, 1, 0 and -1
    assert (rounded(weight, spec, search=True) - weight).abs().max() < 0.05
    assert (rounded(weight, spec) - weight).abs().max() > 0.4


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_independent_of_the_chunks_they_are_worked_on_in(monkeypatch, symmetric):
    weight, spec = random_weight(1, rows=11), QuantSpec(4, 8, symmetric)
    whole = (*find_params(weight, spec, search=True), rounded(weight, spec))
    monkeypatch.setattr("compress.maths.grid.CHUNK_ELEMENTS", 50)
    parts = (*find_params(weight, spec, search=True), rounded(weight, spec))
    for one, other in zip(whole, parts, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_bfloat16_weights_are_rounded_in_float32():
    weight, spec = random_weight(2).bfloat16(), QuantSpec(8, 4, True, "bfloat16")
    assert torch.equal(rounded(weight, spec), rounded(weight.float(), spec))


def test_dequantize_calculates_in_the_dtype_that_is_asked_for():
    spec = QuantSpec(8, -1, False, "bfloat16")
    codes, zero = torch.tensor([[127, -128]], dtype=torch.int8), torch.tensor([[-100]], dtype=torch.int8)
    scale = torch.tensor([[0.1]], dtype=torch.bfloat16)
    result = dequantize(codes, scale, zero, spec, torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, torch.tensor([[227.0, -28.0]], dtype=torch.bfloat16) * scale)


def test_a_group_size_that_does_not_divide_is_refused_with_the_sizes_that_do():
    spec = QuantSpec(4, 5)
    with pytest.raises(StartError, match=r"5 does not divide the 12 columns.*2, 3, 4, 6, 12, or -1"):
        find_params(random_weight(0, columns=12), spec)
    assert (QuantSpec(4, 4).groups(12), QuantSpec(4).groups(12)) == (3, 1)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"bits": 4, "group_size": 0}])
def test_impossible_grids_are_refused(options):
    with pytest.raises(StartError):
        QuantSpec(**options)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_finite_or_too_large_for_their_scale_are_refused(symmetric):
    spec = QuantSpec(4, -1, symmetric)
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(CompressError, match="NaN or infinite"):
            find_params(torch.tensor([[1.0, value]]), spec)
    with pytest.raises(CompressError, match="does not fit float16"):
        find_params(torch.tensor([[1.0, 2e6]]), spec)
    assert find_params(torch.tensor([[1.0, 2e6]]), QuantSpec(4, -1, symmetric, "bfloat16"))[0].isfinite().all()


def test_small_weights_keep_their_digits_in_float16_scales():
    weight = random_weight(3, size=1e-3)
    result = rounded(weight, QuantSpec(8))  # steps near 1e-5, below the smallest normal float16
    assert (result - weight).norm() / weight.norm() < 0.01


def test_scales_follow_the_models_dtype():
    assert spec_for(torch.bfloat16, 4, 32, True).scale_dtype == "bfloat16"
    assert spec_for(torch.float16, 4, 32, True).scale_dtype == "float16"
    assert spec_for(torch.float32, 4, 32, True).scale_dtype == "float16"
