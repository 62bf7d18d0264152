"""Packing: nothing is lost, and every bit lies where compressed-tensors puts it."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.maths.packing import pack, pack_rows, packed_columns, unpack, unpack_rows


def random_codes(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 130), st.integers(0, 10**6))
def test_packing_equals_compressed_tensors_bit_for_bit_and_comes_back(bits, rows, columns, seed):
    codes = random_codes(bits, rows, columns, seed)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert packed.shape[1] == packed_columns(columns, bits)
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.integers(1, 5), st.integers(0, 10**6))
def test_zero_points_are_packed_down_the_columns(bits, rows, columns, seed):
    codes = random_codes(bits, rows, columns, seed)
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits, packed_dim=0))
    assert torch.equal(unpack_rows(packed, bits, rows), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_rows_of_a_large_layer_are_packed_in_chunks(monkeypatch, bits):
    codes = random_codes(bits, 37, 50)
    whole = pack(codes, bits)
    monkeypatch.setattr("compress.maths.packing.CHUNK_ELEMENTS", 200)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 50), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_and_words_are_packed_alike(monkeypatch, bits):
    codes = random_codes(bits, 5, 77)
    by_bytes = pack(codes, bits)
    monkeypatch.setattr("compress.maths.packing.sys.byteorder", "big")  # takes the way over words
    assert torch.equal(pack(codes, bits), by_bytes)
    assert torch.equal(unpack(by_bytes, bits, 77), codes)


def test_codes_and_words_of_another_kind_are_refused():
    with pytest.raises(CompressError, match="int8"):
        pack(torch.zeros(2, 2), 4)
    with pytest.raises(CompressError, match=r"10 columns of 3 bits take int32 \[rows, 1\]"):
        unpack(torch.zeros(2, 2, dtype=torch.int32), 3, 10)
