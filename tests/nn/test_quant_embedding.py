"""The packed embedding against `nn.Embedding` on its dequantized table, and the head that runs from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.ends import round_into
from compress.errors import StartError
from compress.maths.grid import QuantSpec, find_params, quantize
from compress.maths.packing import pack_rows, unpack_rows, unpack_some_rows
from compress.nn.quant_embedding import QuantEmbedding, TiedHead, packed_like

GRIDS = [(bits, symmetric, size) for bits in (2, 3, 4, 8) for symmetric in (True, False) for size in (-1, 16)]
IDS = torch.tensor([[0, 36, 7], [7, 1, 35]])


def _table(spec: QuantSpec, dtype: torch.dtype = torch.float32, **kwargs: float) -> tuple[QuantEmbedding, nn.Embedding]:
    torch.manual_seed(spec.bits)
    plain = nn.Embedding(37, 48, dtype=dtype, **kwargs)
    packed = packed_like(plain, spec)
    assert isinstance(packed, QuantEmbedding)
    round_into(packed, plain.weight.detach())
    return packed, plain


@pytest.mark.parametrize(("bits", "symmetric", "size"), GRIDS)
def test_rows_are_those_of_the_dequantized_table_bit_by_bit(bits: int, symmetric: bool, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed, _ = _table(QuantSpec(bits, size, symmetric), dtype)
        rows = packed(IDS)
        assert rows.dtype == dtype
        assert torch.equal(rows, functional.embedding(IDS, packed.dequantize()))


@pytest.mark.parametrize(("bits", "symmetric", "size"), GRIDS)
def test_the_table_is_rounded_to_nearest_with_searched_ranges(
    bits: int, symmetric: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = QuantSpec(bits, size, symmetric)
    monkeypatch.setattr("compress.ends.CHUNK_ELEMENTS", 48 * 5)  # in parts that the words do not end with
    packed, plain = _table(spec)
    weight = plain.weight.detach()
    scale, zero = find_params(weight, spec, search=True)
    codes, found_scale, found_zero = packed.codes()
    assert torch.equal(codes, quantize(weight, scale, zero, spec))
    assert torch.equal(found_scale, scale)
    assert (zero is None and found_zero is None) or torch.equal(zero, found_zero)
    assert packed.weight_shape.tolist() == [37, 48]


def test_the_loss_is_the_relative_squared_error() -> None:
    spec = QuantSpec(3, 16)
    plain = nn.Embedding(37, 48)
    packed = packed_like(plain, spec)
    loss = round_into(packed, plain.weight.detach())
    weight = plain.weight.detach().double()
    expected = (packed.dequantize().double() - weight).square().sum() / weight.square().sum()
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_looking_up_never_expands_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = _table(QuantSpec(4, 16, False))
    monkeypatch.setattr(QuantEmbedding, "dequantize", lambda *a: pytest.fail("expanded"))
    monkeypatch.setattr("compress.maths.packing.unpack_rows", lambda *a: pytest.fail("all zero points unpacked"))
    packed(IDS)


@pytest.mark.parametrize("bits", range(1, 9))
def test_some_rows_are_unpacked_as_all_of_them_are(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (45, 3), generator=generator, dtype=torch.int8)
    packed = pack_rows(codes, bits)
    ids = torch.tensor([44, 0, 10, 10, 31, 32])
    assert torch.equal(unpack_rows(packed, bits, 45)[ids], unpack_some_rows(packed, bits, ids))


def test_a_tied_head_multiplies_with_the_table_and_has_no_tensors_of_it() -> None:
    packed, _ = _table(QuantSpec(4, 16))
    bias = nn.Parameter(torch.randn(37), requires_grad=False)
    x = torch.randn(2, 48)
    assert torch.equal(TiedHead(packed)(x), functional.linear(x, packed.dequantize()))
    torch.testing.assert_close(TiedHead(packed, bias)(x), functional.linear(x, packed.dequantize(), bias))
    assert list(TiedHead(packed).state_dict()) == []
    assert list(TiedHead(packed, bias).state_dict()) == ["bias"]


def test_rows_are_scaled_as_the_family_scales_them() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for made in (BartScaledWordEmbedding(37, 48, 0, 7.0), Gemma3TextScaledWordEmbedding(37, 48, 0, 7.0)):
        packed = packed_like(made, QuantSpec(8, 16))
        round_into(packed, made.weight.detach())
        made.weight.data.copy_(packed.dequantize())
        assert torch.equal(packed(IDS), made(IDS))
        again = packed_like(packed, QuantSpec(8, 16))
        again.load_state_dict(packed.state_dict(), assign=True)
        assert torch.equal(again(IDS), made(IDS))


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    class Normed(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) / 2

    with pytest.raises(StartError, match="Normed, which does more"):
        packed_like(Normed(37, 48), QuantSpec(8, 16))
    with pytest.raises(StartError, match="does more"):
        packed_like(nn.Embedding(37, 48, max_norm=1.0), QuantSpec(8, 16))
