"""Hadamard matrices and the rotations made of them."""

from __future__ import annotations

import pytest
import reference
import torch

from compress.maths.hadamard import Rotation, hadamard, hadamard_orders, random_orthogonal

KNOWN = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 72, 76, 96, 108, 124, 128, 140, 192]


@pytest.mark.parametrize("order", KNOWN)
def test_rows_are_of_ones_and_orthogonal(order):
    matrix = hadamard(order)
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [2, 4, 8, 64])
def test_a_power_of_two_is_sylvesters_matrix(order):
    signs = [[(-1.0) ** (row & column).bit_count() for column in range(order)] for row in range(order)]
    assert hadamard(order).tolist() == signs


@pytest.mark.parametrize(("order", "prime"), [(12, 11), (20, 19), (28, 13), (36, 17)])
def test_paleys_matrices_are_those_of_the_definition(order, prime):
    assert (hadamard(order).numpy() == reference.paley(prime)).all()


@pytest.mark.parametrize("order", [3, 6, 10, 15, 22, 50])
def test_an_order_that_cannot_be_has_none(order):
    assert hadamard(order) is None


def test_the_hidden_sizes_of_known_models_are_products_of_small_factors():
    for size in (192, 576, 768, 896, 960, 1024, 1536, 1600, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 6144, 8192):
        orders = hadamard_orders(size)
        assert orders is not None, size
        assert max(orders) <= 60, (size, orders)
        assert torch.tensor(orders).prod() == size


@pytest.mark.parametrize("size", [1, 2, 7, 12, 14, 32, 45, 192])
@pytest.mark.parametrize("fixes_ones", [False, True])
def test_a_rotation_is_orthogonal_whatever_the_size(size, fixes_ones):
    matrix = Rotation(size, seed=3, fixes_ones=fixes_ones).matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [7, 12, 32, 192])
def test_a_rotation_that_fixes_ones_keeps_the_mean_of_every_vector(size):
    x = torch.randn(5, size, dtype=torch.float64)
    assert torch.allclose(Rotation(size, 1, fixes_ones=True).apply(x).mean(1), x.mean(1), atol=1e-12)
    assert not torch.allclose(Rotation(size, 1).apply(x).mean(1), x.mean(1), atol=1e-3)


def test_apply_multiplies_the_last_dimension_by_signs_and_the_normalised_hadamard_matrix():
    rotation = Rotation(24, seed=5)
    expected = torch.diag(rotation.signs) @ hadamard(24) / 24**0.5
    x = torch.randn(2, 3, 24)
    assert torch.allclose(rotation.matrix(), expected, atol=1e-12)
    assert torch.allclose(rotation.apply(x), x.double() @ expected, atol=1e-12)


def test_the_seed_decides_signs_and_random_matrices():
    for size in (16, 14):
        assert torch.equal(Rotation(size, 1).matrix(), Rotation(size, 1).matrix())
        assert not torch.equal(Rotation(size, 1).matrix(), Rotation(size, 2).matrix())


def test_a_random_orthogonal_matrix_is_orthogonal():
    matrix = random_orthogonal(9, torch.Generator().manual_seed(0))
    assert torch.allclose(matrix @ matrix.T, torch.eye(9, dtype=torch.float64), atol=1e-12)
