"""Orthogonal matrices that spread every coordinate over all of them, and are cheap to apply.

A Hadamard matrix `H` of order n holds 1 and -1 alone, and `H H^T = n I`. Orders are built from Sylvester's doubling
(powers of two), Paley's two constructions over the integers modulo a prime, and Kronecker products of these. For a
prime `q` and its quadratic character `chi` (1 for squares, -1 for the others, 0 for 0), let `Q_ij = chi(i - j)`:

    q = 3 mod 4:  order q + 1,      H = I + [[0, 1^T], [-1, Q]]
    q = 1 mod 4:  order 2 (q + 1),  H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],  C = [[0, 1^T], [1, Q]]

A product of small factors is applied factor by factor, in `n (m_1 + m_2 + ...)` operations a row instead of `n * n`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Largest order that is built as one factor; beyond it orders are products.
LARGEST_FACTOR = 256


class Rotation:
    """An orthogonal matrix `Q` `[size, size]`: random signs, then normalised factors, as a Kronecker product.

    The factors are Hadamard matrices where the size allows; where it does not, its odd part is a random orthogonal
    matrix. Signs and that matrix are drawn from `seed`. With `fixes_ones` a reflection follows that makes `1 Q = 1`:
    the mean of a vector, which LayerNorm takes off, is then the mean of the rotated one.
    """

    def __init__(self, size: int, seed: int = 0, fixes_ones: bool = False):
        self.size, self.seed = size, seed
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        self.factors = _factors(size, generator)
        self.mirror: Tensor | None = None
        if fixes_ones and size > 1:
            ones = torch.full((size,), size**-0.5, dtype=torch.float64)
            mirror = self.apply(ones) - ones
            if float(mirror.norm()) > 1e-8:
                self.mirror = mirror / mirror.norm()

    def apply(self, x: Tensor) -> Tensor:
        """`x Q`, float64, for `x` `[..., size]` of any float dtype, on its device."""
        y = x.to(torch.float64) * self.signs.to(x.device)
        after = self.size
        for factor in self.factors:
            after //= len(factor)
            y = torch.einsum("bik,ij->bjk", y.reshape(-1, len(factor), after), factor.to(x.device))
        y = y.reshape(x.shape)
        if self.mirror is not None:
            mirror = self.mirror.to(x.device)
            y = y - 2 * (y @ mirror).unsqueeze(-1) * mirror
        return y

    def matrix(self) -> Tensor:
        """`Q` itself, float64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix of this order, float64 of 1 and -1, or None where none is known here.

    >>> hadamard(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    orders = hadamard_orders(order)
    if orders is None:
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in orders:
        matrix = torch.kron(matrix, _paley(factor))
    return matrix


@cache
def hadamard_orders(order: int) -> tuple[int, ...] | None:
    """The orders of Hadamard matrices whose Kronecker product has this order, or None; as small ones as can be."""
    if order == 1:
        return ()
    if order == 2:
        return (2,)
    if order % 4:
        return None
    found = []
    for first in (2, *range(4, min(order, LARGEST_FACTOR) + 1, 4)):
        rest = None if order % first or not _is_paley(first) else hadamard_orders(order // first)
        if rest is not None:
            found.append((*rest, first))
    return min(found, key=lambda orders: (max(orders), sum(orders), orders), default=None)


def _factors(size: int, generator: torch.Generator) -> list[Tensor]:
    """Orthogonal float64 matrices whose Kronecker product is `[size, size]`."""
    orders = hadamard_orders(size)
    if orders is not None:
        return [_paley(order) / order**0.5 for order in orders]
    odd = size
    while odd % 2 == 0:
        odd //= 2
    factors = [_paley(2) / 2**0.5] * (size // odd).bit_length()
    factors[0] = random_orthogonal(odd, generator)
    return factors


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A matrix drawn evenly from the orthogonal ones `[size, size]`, float64 (Q of a Gaussian matrix, R > 0)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def _is_paley(order: int) -> bool:
    return order == 2 or (_is_prime(order - 1) and order % 4 == 0) or (order % 4 == 0 and _is_second(order))


def _is_second(order: int) -> bool:
    return (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1)


@cache
def _paley(order: int) -> Tensor:
    """The Hadamard matrix of an order for which `_is_paley`."""
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    first = _is_prime(order - 1)
    prime = order - 1 if first else order // 2 - 1
    squares = {value * value % prime for value in range(1, prime)}
    chi = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if first else 1.0
    core[1:, 1:] = chi[(index.unsqueeze(1) - index) % prime]
    eye = torch.eye(prime + 1, dtype=torch.float64)
    if first:
        return eye + core
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    single = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, double) + torch.kron(eye, single)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
