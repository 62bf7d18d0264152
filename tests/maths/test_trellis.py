"""Codes along a trellis: what they stand for, the cheapest path against all there are, and with GPTQ's feedback."""

from __future__ import annotations

import hashlib

import pytest
import reference
import torch

from compress.errors import CompressError
from compress.maths import trellis
from compress.maths.feedback import STRETCH
from compress.maths.grid import QuantSpec, dequantize, find_params, quantize
from compress.maths.packing import pack
from compress.maths.trellis_tables import TABLES
from compress.nn import cpu_trellis
from compress.nn.cpu import LEVELS, library
from compress.passes.gptq import GPTQ, gptq
from compress.passes.rtn import relative_weight_error, round_to_nearest

every_width = pytest.mark.parametrize("bits", trellis.BITS)
compiled = pytest.mark.skipif(library() is None, reason="the compiled code was not built, or cannot run here")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(columns: int, seed: int = 1) -> torch.Tensor:
    x = normal(4 * columns, 4, seed=seed) @ normal(4, columns, seed=seed + 1)
    x = x + 0.5 * normal(4 * columns, columns, seed=seed + 2)
    return 2 * x.T @ x / len(x)


def random_codes(bits: int, rows: int, columns: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.int8)


def table(bits: int) -> list[float]:
    return trellis.table_of(bits).tolist()


@pytest.mark.parametrize(
    ("bits", "digest"), [(2, "934fe55d8aba1665"), (3, "b331409d706c7098"), (4, "4f25d6805855dd21")]
)
def test_tables_never_change_since_folders_are_read_with_them(bits, digest):
    numbers = bytes(number % 256 for number in TABLES[bits])
    assert hashlib.sha256(numbers).hexdigest()[:16] == digest


@pytest.fixture(params=["compiled", "torch"])
def engine(request, monkeypatch):
    """Both ways to find a path."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_trellis, "fits", lambda x: False)
    elif library() is None:
        pytest.skip("the compiled code was not built, or cannot run here")


def test_windows_of_a_row_by_hand():
    codes = torch.tensor([[1 - 8, 2 - 8, 3 - 8]], dtype=torch.int8)
    assert trellis.windows(codes, 4).tolist() == [[0x10, 0x21, 0x32]]
    # of three bits, 001 and 010 and 111: the newest on top, and of the first the two upper bits after the third
    codes = torch.tensor([[1 - 4, 2 - 4, 7 - 4]], dtype=torch.int8)
    assert trellis.windows(codes, 3).tolist() == [[0b00100000, 0b01000100, 0b11101000]]


@every_width
def test_codes_stand_for_what_the_stream_says_bit_by_bit(bits):
    codes = random_codes(bits, 5, 37)
    found = [reference.trellis_values(row, bits, table(bits)) for row in codes.tolist()]
    assert trellis.values(codes, bits).tolist() == found


@every_width
def test_a_window_is_eight_bits_of_the_row_as_it_is_packed(bits):
    codes = random_codes(bits, 3, 29)
    found = trellis.windows(codes, bits)
    for row, words in enumerate(pack(codes, bits).tolist()):
        stream = sum((word % 2**32) << (32 * index) for index, word in enumerate(words)) << 8  # zeros before the row
        assert found[row].tolist() == [stream >> bits * (column + 1) & 255 for column in range(29)]


@every_width
def test_tables_are_made_for_normally_distributed_numbers(bits):
    numbers = trellis.table_of(bits)
    assert numbers.shape == (256,)
    assert abs(float(numbers.mean())) < 0.05
    assert 0.8 < float(numbers.std()) < 1.2


@every_width
@pytest.mark.parametrize("weighted", [False, True])
def test_rounding_finds_the_least_error_of_all_sequences_of_codes(bits, weighted, engine):
    columns = {2: 6, 3: 4, 4: 3}[bits]
    x = normal(4, columns, seed=bits) * torch.tensor([[0.3], [1.0], [2.0], [1.0]])
    weights = normal(columns, seed=9).square() + 0.1 if weighted else None
    codes, values = trellis.round_rows(x, bits, weights)
    assert torch.equal(values, trellis.values(codes, bits))
    shares = (torch.ones(columns) if weights is None else weights).double()
    found = ((x.double() - values.double()).square() * shares).sum(1)
    least = [reference.trellis_least_error(row, shares.tolist(), bits, table(bits)) for row in x.double().tolist()]
    assert found.tolist() == pytest.approx(least, rel=1e-6)


@compiled
@every_width
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 96), (3, 2000)])
def test_compiled_code_rounds_as_torch_does(bits, level, shape, monkeypatch):
    x, weights = normal(*shape), normal(shape[1], seed=1).square() + 0.1
    for shares in (None, weights):
        codes, values = cpu_trellis.round_rows(x, bits, trellis.table_of(bits), shares, level)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_trellis, "fits", lambda x: False)
            plain = trellis.round_rows(x, bits, shares)
        assert torch.equal(codes, plain[0])
        assert torch.equal(values, plain[1])


@compiled
@every_width
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("columns", [1, 20, 64])
def test_compiled_code_settles_as_torch_does(bits, level, columns, monkeypatch):
    root = torch.linalg.cholesky(hessian_of(columns).flip(0, 1) + 0.1 * torch.eye(columns)).flip(0, 1)
    pivots = root.diagonal().square()
    target = normal(9, columns)
    work = target + 0.1 * normal(9, columns, seed=3)
    scale = normal(9, 1, seed=4).abs().add(0.5).expand(9, columns)
    begin = torch.arange(9, dtype=torch.int32) % (256 >> bits)
    args = (work, target, scale.contiguous(), (root / root.diagonal()).contiguous(), pivots.contiguous(), bits)
    first, second = begin.clone(), begin.clone()
    codes, values = cpu_trellis.settle(*args, trellis.table_of(bits), first, level)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_trellis, "fits", lambda x: False)
        plain = trellis.settle(*args, second)
    assert torch.equal(codes, plain[0])
    assert torch.equal(values, plain[1])
    assert torch.equal(first, second)


@every_width
def test_a_stretch_goes_on_where_the_one_before_it_ended(bits, engine):
    """Without correlations, with one to begin from, two stretches are windows of one stream."""
    x, ones = normal(5, 24), torch.ones(24)
    begin, square = torch.zeros(5, dtype=torch.int32), torch.eye(24)
    found = [
        trellis.settle(part, part, torch.ones(5, 12), square[:12, :12], ones[:12], bits, begin)
        for part in x.split(12, 1)
    ]
    codes, values = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    assert torch.equal(values, trellis.values(codes, bits))


@every_width
def test_the_number_of_threads_changes_nothing(bits, engine):
    x, before = normal(70, 64), torch.get_num_threads()
    spec, hessian = QuantSpec(bits, 32, grid="trellis"), hessian_of(64)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            begin = torch.zeros(70, dtype=torch.int32)
            settled = trellis.settle(x, x, torch.ones(70, 64), hessian.triu(), hessian.diagonal(), bits, begin)
            found.append((*trellis.round_rows(x, bits), *settled, begin))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(gptq(x, hessian, spec, act_order=False).codes, gptq(x, hessian, spec, act_order=False).codes)


@every_width
def test_weights_in_float64_get_the_codes_of_float32(bits):
    weight, spec = normal(6, 64), QuantSpec(bits, 16, grid="trellis")
    scale, _ = find_params(weight, spec, search=True)
    assert torch.equal(quantize(weight.double(), scale, None, spec), quantize(weight, scale, None, spec))
    assert torch.equal(find_params(weight.double(), spec, search=True)[0], scale)


@every_width
@pytest.mark.parametrize("weighted", [False, True])
def test_a_fitted_scale_lowers_the_error(bits, weighted):
    weight, spec = normal(16, 128), QuantSpec(bits, 32, grid="trellis")
    importance = normal(128, seed=5).square() + 0.05 if weighted else None
    shares = 1.0 if importance is None else importance

    def lost(search):
        scale = find_params(weight, spec, search, importance)[0].float().repeat_interleave(32, 1)
        rounded = trellis.round_rows(weight / scale, bits, importance)[1] * scale
        return float(((rounded - weight).square() * shares).sum())

    assert lost(True) < lost(False)


def test_a_scale_without_search_is_the_root_mean_square_of_its_group():
    weight = torch.tensor([[3.0, 4.0, 1.0, -1.0]])
    scale, zero = find_params(weight, QuantSpec(2, 2, grid="trellis", scale_dtype="float32"))
    assert scale.tolist() == [[pytest.approx(12.5**0.5), 1.0]]
    assert zero is None


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("search", [False, True])
def test_groups_of_zeros_become_next_to_nothing(bits, dtype, search):
    weight = normal(3, 64).to(dtype)
    weight[0] = 0
    weight[1, 16:32] = 0
    spec = QuantSpec(bits, 16, grid="trellis", scale_dtype="bfloat16" if dtype == torch.bfloat16 else "float16")
    codes, scale, zero = round_to_nearest(weight, spec, search)
    found = dequantize(codes, scale, zero, spec, torch.float32)
    assert float(found[0].abs().max()) < 1e-4
    assert float(found[1, 16:32].abs().max()) < 3e-4
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_in_the_words_of_integer_grids(search, value):
    weight = normal(2, 32)
    weight[1, 3] = value
    for grid in (None, "trellis"):
        with pytest.raises(CompressError, match="the weight holds NaN or infinite values"):
            round_to_nearest(weight, QuantSpec(3, 16, grid=grid), search)
        with pytest.raises(CompressError, match="the weight holds NaN or infinite values"):
            gptq(weight, hessian_of(32), QuantSpec(3, 16, grid=grid), act_order=False, search=search)


def test_weights_too_large_for_the_scales_type_are_refused_in_the_words_of_integer_grids():
    for grid in (None, "trellis"):
        with pytest.raises(
            CompressError, match=r"does not fit float16, which ends at 6.55e.04: .*load the model in bfl"
        ):
            round_to_nearest(1e7 * normal(2, 32), QuantSpec(3, 16, grid=grid))


@every_width
def test_normal_weights_lose_a_third_less_than_on_integers(bits):
    weight = normal(32, 512)
    lost = [
        relative_weight_error(weight, *round_to_nearest(weight, spec, search=True), spec)
        for spec in (QuantSpec(bits, 64), QuantSpec(bits, 64, grid="trellis"))
    ]
    assert lost[1] < {2: 0.7, 3: 0.67, 4: 0.7}[bits] * lost[0]


@every_width
@pytest.mark.parametrize("columns", [24, STRETCH + 20])
def test_gptq_is_per_survivor_processing(bits, columns, engine):
    weight, hessian, spec = normal(3, columns), hessian_of(columns), QuantSpec(bits, 4, grid="trellis")
    result = gptq(weight, hessian, spec, act_order=False, damping=0.01)
    scales = result.scale.double().repeat_interleave(4, 1).tolist()
    matrix = hessian.double().numpy()
    for row, own, codes in zip(weight.double().tolist(), scales, result.codes.tolist(), strict=True):
        assert codes == reference.per_survivor(row, own, matrix, bits, table(bits), STRETCH, 0.01)


@every_width
@pytest.mark.parametrize("search", [False, True])
def test_an_identity_for_a_hessian_gives_the_cheapest_path_of_the_weights(bits, search):
    weight, spec = normal(5, STRETCH), QuantSpec(bits, grid="trellis")
    result = gptq(weight, torch.eye(STRETCH), spec, act_order=False, search=search)
    codes, scale, _ = round_to_nearest(weight, spec, search)
    assert torch.equal(result.scale, scale)
    assert torch.equal(result.codes, codes)


@every_width
@pytest.mark.parametrize("block_size", [16, 64, 100, 128])
def test_gptqs_loss_is_the_quadratic_form_of_what_it_changed(bits, block_size):
    weight, hessian, spec = normal(8, 192), hessian_of(192), QuantSpec(bits, 32, grid="trellis")
    result = gptq(weight, hessian, spec, act_order=False, search=True, block_size=block_size)
    change = (dequantize(result.codes, result.scale, None, spec, torch.float32) - weight).double()
    lost, size = (float((part @ hessian.double() * part).sum()) for part in (change, weight.double()))
    assert result.loss == pytest.approx(lost / size, rel=2e-3)


@every_width
def test_gptq_loses_less_on_a_trellis_than_on_integers_and_than_rounding_to_nearest(bits):
    weight, hessian = normal(32, 256), hessian_of(256)
    spec = QuantSpec(bits, 64, grid="trellis")
    found = gptq(weight, hessian, spec, act_order=False, search=True).loss
    integers = gptq(weight, hessian, QuantSpec(bits, 64), act_order=True, search=True).loss
    nearest = dequantize(*round_to_nearest(weight, spec, search=True), spec, torch.float32).sub_(weight)
    assert found < 0.8 * integers
    assert found < 0.5 * float((nearest @ hessian * nearest).sum() / (weight @ hessian * weight).sum())


def test_inputs_that_never_come_and_a_hessian_that_cannot_be_solved():
    weight, hessian, spec = normal(4, 32), hessian_of(32), QuantSpec(3, 16, grid="trellis")
    hessian[5], hessian[:, 5] = 0, 0
    result = gptq(weight, hessian, spec, act_order=False)
    assert result.fallback is None
    assert result.loss < 0.1
    worse = gptq(weight, torch.full((32, 32), float("nan")), spec, act_order=False)
    assert "rounded to nearest" in (worse.fallback or "")
    assert torch.equal(worse.codes, round_to_nearest(weight, spec)[0])


def test_what_gptq_cannot_do_on_a_trellis_is_refused():
    assert not GPTQ(grid="trellis").act_order
    assert GPTQ(**GPTQ(grid="trellis").options()) == GPTQ(grid="trellis")
    with pytest.raises(ValueError, match="act_order is true, and on grid trellis rows are rounded from left to right"):
        GPTQ(grid="trellis", act_order=True)
    with pytest.raises(ValueError, match="propagation is gptaq, which gptq cannot do on grid trellis: leave it out"):
        GPTQ(grid="trellis", propagation="gptaq")


def test_gptq_goes_from_left_to_right_whatever_it_is_told():
    weight, hessian, spec = normal(8, 64), hessian_of(64), QuantSpec(3, 16, grid="trellis")
    told, plain = (gptq(weight, hessian, spec, act_order=order) for order in (True, False))
    assert torch.equal(told.codes, plain.codes)
    with pytest.raises(ValueError, match="zeros cannot be kept"):
        gptq(weight, hessian, spec, keep_zeros=True)


@compiled
def test_another_default_device_changes_nothing():
    x = normal(4, 32)
    expected = trellis.round_rows(x, 3)
    with torch.device("meta"):
        found = trellis.round_rows(x, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
