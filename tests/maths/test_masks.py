"""Masks: exact counts, the right weights, the same every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, StartError
from compress.maths.masks import keep_mask, nm_mask, parse_pattern, parse_sparsity, unstructured_mask


def scores_of(seed: int, rows: int, columns: int, levels: int) -> torch.Tensor:
    """Few levels: many ties."""
    return torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


shapes = st.tuples(st.integers(1, 6), st.integers(1, 40))
shares = st.floats(0, 1, exclude_max=True)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), shapes, st.sampled_from([1, 2, 5, 1000]), shares, st.sampled_from(["row", "layer"]))
def test_the_count_is_exact_and_nothing_kept_is_below_what_goes(seed, shape, levels, sparsity, per):
    scores = scores_of(seed, *shape, levels)
    keep = unstructured_mask(scores, sparsity, per)
    lists = [(scores.flatten(), keep.flatten())] if per == "layer" else list(zip(scores, keep, strict=True))
    for values, kept in lists:
        assert int((~kept).sum()) == int(round(sparsity * len(values), 6))
        if kept.any() and not kept.all():
            assert values[~kept].max() <= values[kept].min()
            tied = values == values[~kept].max()
            assert kept[tied].int().diff().ge(0).all()  # between equals the first go


def test_a_share_of_one_hundred_is_not_cut_down_by_floating_point():
    assert int((~unstructured_mask(torch.rand(1, 100), 0.29)).sum()) == 29  # 0.29 * 100 = 28.999999999999996


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)]), st.sampled_from([1, 3, 1000]))
def test_every_m_neighbours_keep_their_n_highest(seed, pattern, levels):
    n, m = pattern
    scores = scores_of(seed, 3, 4 * m, levels)
    keep = nm_mask(scores, n, m).view(3, 4, m)
    assert (keep.sum(2) == n).all()
    grouped = scores.view(3, 4, m)
    kept_sum = (grouped * keep).sum(2)
    assert torch.equal(kept_sum, grouped.topk(n, dim=2).values.sum(2))


def test_weights_that_are_zero_already_count_even_where_live_ones_score_zero_too():
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    scores = torch.zeros(1, 4)  # an input that is always zero: by index alone the first two would go
    assert keep_mask(weight, scores, sparsity=0.5).tolist() == [[True, True, False, False]]
    assert keep_mask(weight, scores, pattern="2:4").tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": 0.5, "per": "layer"}, {"pattern": "2:4"}])
def test_pruning_again_changes_nothing(target):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    once = weight * keep_mask(weight, weight.abs(), **target)
    assert torch.equal(once * keep_mask(once, once.abs(), **target), once)
    assert (once == 0).float().mean() == 0.5


def test_what_cannot_be_is_refused():
    with pytest.raises(CompressError, match="NaN"):
        unstructured_mask(torch.tensor([[1.0, float("nan")]]), 0.5)
    with pytest.raises(CompressError, match="NaN"):
        nm_mask(torch.tensor([[1.0, float("nan")]]), 1, 2)
    with pytest.raises(StartError, match="2:4 needs a multiple of 4 columns; the layer has 6"):
        nm_mask(torch.ones(2, 6), 2, 4)
    with pytest.raises(StartError, match="sparsity"):
        unstructured_mask(torch.ones(1, 2), 1.5)
    with pytest.raises(StartError, match="scope"):
        unstructured_mask(torch.ones(1, 2), 0.5, per="column")


def test_patterns_and_shares_are_read_as_people_and_yaml_write_them():
    assert parse_pattern("2:4") == "2:4"
    assert parse_pattern(" 4 : 8 ") == "4:8"
    assert parse_pattern(124) == "2:4"  # what YAML 1.1 makes of an unquoted 2:4
    assert parse_pattern(None) is None
    assert parse_sparsity("50%") == 0.5
    assert parse_sparsity(0.3) == 0.3


@pytest.mark.parametrize("pattern", ["2-4", "5:4", "0:4", "1:1", 2.5, True, ""])
def test_patterns_that_mean_nothing_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(pattern)


def test_a_percentage_of_nothing_is_refused():
    with pytest.raises(ValueError, match="percentage"):
        parse_sparsity("half%")
