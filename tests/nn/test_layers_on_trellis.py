"""Layers on the grid "trellis": what they compute, packed and in training."""

import pytest
import torch

from compress.errors import CompressError
from compress.maths import trellis
from compress.maths.grid import QuantSpec
from compress.nn.quant_linear import QuantLinear
from compress.nn.trained import RowTrained, ScaleTrained, WeightTrained, weight_trained
from compress.passes.rtn import round_to_nearest

every_width = pytest.mark.parametrize("bits", trellis.BITS)


def packed(bits, rows=6, columns=64):
    spec = QuantSpec(bits, 16, grid="trellis")
    generator = torch.Generator().manual_seed(bits)
    weight, bias = torch.randn(rows, columns, generator=generator), torch.randn(rows, generator=generator)
    return QuantLinear.from_codes(*round_to_nearest(weight, spec, search=True), spec, bias=bias)


def inputs():
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))


@every_width
def test_a_packed_layer_takes_the_bytes_of_integers_and_computes_with_its_own_numbers(bits):
    layer, integers = packed(bits), QuantSpec(bits, 16)
    plain = QuantLinear.from_codes(torch.zeros(6, 64, dtype=torch.int8), torch.ones(6, 4), None, integers)
    bias, *sizes = [tensor.nbytes for tensor in layer.state_dict().values()]
    assert (bias, sizes) == (24, [tensor.nbytes for tensor in plain.state_dict().values()])
    layer.exact = False
    torch.testing.assert_close(layer(inputs()), inputs() @ layer.dequantize().t() + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [ScaleTrained, RowTrained])
@every_width
def test_an_untrained_layer_computes_and_packs_what_it_was_made_from(kind, bits):
    layer = packed(bits)
    trained = kind(layer)
    torch.testing.assert_close(trained(inputs()), layer(inputs()), rtol=2e-3, atol=2e-3)
    assert torch.equal(trained.packed().dequantize(torch.float32), layer.dequantize(torch.float32))


def test_a_layer_with_a_trained_weight_is_made_for_its_grid():
    integers = QuantLinear.from_codes(torch.zeros(6, 64, dtype=torch.int8), torch.ones(6, 4), None, QuantSpec(3, 16))
    assert type(weight_trained(packed(3))) is RowTrained
    assert type(weight_trained(integers)) is WeightTrained


def test_a_weight_that_is_trained_starts_half_way_to_the_original_unless_that_is_far():
    layer = packed(3)
    scale = layer.scales().float().repeat_interleave(16, 1)
    numbers = layer.dequantize(torch.float32) / scale
    like = (numbers + 0.25) * scale
    like[0, 0] = 6 * scale[0, 0]
    expected = numbers + 0.125
    expected[0, 0] = numbers[0, 0]
    torch.testing.assert_close(RowTrained(layer, like).weight.detach(), expected, rtol=1e-4, atol=1e-4)


@every_width
def test_scales_have_the_gradient_of_the_plain_formula(bits):
    layer = packed(bits)
    trained, x = ScaleTrained(layer), inputs().requires_grad_(True)
    trained(x).square().sum().backward()
    numbers = trellis.values(layer.codes()[0], bits).double().unflatten(1, (4, -1))
    scale, slow_x = trained.scale.detach().double().requires_grad_(True), x.detach().double().requires_grad_(True)
    weight = (numbers * scale.unsqueeze(2)).flatten(1)
    (slow_x @ weight.t() + layer.bias.double()).square().sum().backward()
    torch.testing.assert_close(trained.scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(x.grad.double(), slow_x.grad, rtol=1e-4, atol=1e-2)


@every_width
def test_a_weight_gets_the_gradient_of_what_it_became_unless_it_is_far_from_that(bits):
    trained = RowTrained(packed(bits))
    with torch.no_grad():
        trained.weight += 0.3 * torch.randn(6, 64, generator=torch.Generator().manual_seed(7))
    upstream = torch.randn(64, 6, generator=torch.Generator().manual_seed(8))
    (trained(torch.eye(64)) * upstream).sum().backward()
    steps = trained.weight.detach()
    numbers = trellis.round_rows(steps, bits)[1]
    near = (steps - numbers).abs() < 4 / 2**bits
    wanted = upstream.t() * trained.scale.detach().repeat_interleave(16, 1) * near
    torch.testing.assert_close(trained.weight.grad, wanted)
    to_scale = (numbers * upstream.t()).unflatten(1, (4, 16)).sum(2)
    torch.testing.assert_close(trained.scale.grad, to_scale, rtol=1e-4, atol=1e-4)


@every_width
def test_a_trained_layer_packs_what_it_computes(bits):
    trained = RowTrained(packed(bits))
    with torch.no_grad():
        trained.weight += 0.5 * torch.randn(6, 64, generator=torch.Generator().manual_seed(7))
        trained.scale.copy_(trained.scale.mul(1.25).half().float())
    again = trained.packed()
    torch.testing.assert_close(again(inputs()), trained(inputs()), rtol=1e-5, atol=1e-5)
    assert not torch.equal(again.codes()[0], packed(bits).codes()[0])


@every_width
def test_settling_draws_a_weight_to_its_numbers_which_the_next_forward_does_not_look_for(bits, monkeypatch):
    trained = RowTrained(packed(bits))
    away = 0.2 * torch.randn(6, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        trained.weight += away
    before, numbers = trained.weight.detach().clone(), trellis.round_rows(trained.weight.detach(), bits)[1]
    trained.settle(trained.weight.detach(), 0.25)
    torch.testing.assert_close(trained.weight.detach(), before + 0.25 * (numbers - before))
    searches, search = [], trellis.round_rows
    monkeypatch.setattr(trellis, "round_rows", lambda *given: searches.append(1) or search(*given))
    settled = trained(inputs())
    assert not searches
    trained._settled = None
    assert torch.equal(trained(inputs()), settled)
    trained.settle(trained.weight.detach(), 0.25)
    with torch.no_grad():
        trained.weight.copy_(trained.weight + away)
    searches.clear()
    assert not torch.equal(trained(inputs()), settled)
    assert searches


def test_an_original_in_another_basis_is_no_start_for_training():
    layer = packed(3)
    other = RowTrained(layer, torch.randn(6, 64) * float(layer.scales().float().mean()))
    assert torch.equal(other.weight, RowTrained(layer).weight)


def test_a_weight_that_diverged_is_not_packed():
    layer = RowTrained(packed(3))
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(CompressError, match="training diverged"):
        layer.packed()
