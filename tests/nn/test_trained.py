"""Trainable layers against what they stand for: the packed layer's output, and gradients by autograd in plain steps."""

import pytest
import torch

from compress.maths.grid import QuantSpec
from compress.nn.quant_linear import QuantLinear
from compress.nn.trained import ScaleTrained, WeightTrained
from compress.passes.rtn import round_to_nearest

SPECS = [QuantSpec(bits, group, symmetric) for bits in (2, 4) for group in (8, -1) for symmetric in (True, False)]


def _packed(spec, bias=True, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(6, 16)
    return QuantLinear.from_codes(
        *round_to_nearest(weight, spec, search=True), spec, bias=torch.randn(6) if bias else None
    )


def _x():
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [ScaleTrained, WeightTrained])
@pytest.mark.parametrize("spec", SPECS)
def test_an_untrained_layer_computes_and_packs_what_it_was_made_from(kind, spec):
    layer = _packed(spec)
    trained = kind(layer)
    torch.testing.assert_close(trained(_x()), layer(_x()), rtol=2e-3, atol=2e-3)
    again = trained.packed()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("spec", SPECS)
def test_scale_and_zero_have_the_gradient_of_the_plain_formula(spec):
    layer = _packed(spec)
    trained = ScaleTrained(layer)
    x = _x().requires_grad_(True)
    trained(x).square().sum().backward()
    codes = layer.codes()[0].double().unflatten(1, (trained.scale.shape[1], -1))
    scale = trained.scale.detach().double().requires_grad_(True)
    zero = (torch.zeros_like(scale) if trained.zero is None else trained.zero.detach().double()).requires_grad_(True)
    slow_x = x.detach().double().requires_grad_(True)
    weight = ((codes - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1)
    (slow_x @ weight.t() + layer.bias.double()).square().sum().backward()
    torch.testing.assert_close(trained.scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), slow_x.grad, rtol=1e-4, atol=1e-3)
    if trained.zero is not None:
        torch.testing.assert_close(trained.zero.grad.double(), zero.grad, rtol=1e-4, atol=1e-3)


def test_weight_and_scale_have_the_gradients_of_lsq_on_a_case_by_hand():
    """Two bits, codes -2..1, scale 1: 0.4 -> 0, 2.0 -> 1 by force, -1.6 -> -2, -3.0 -> -2 by force."""
    spec = QuantSpec(2)
    layer = QuantLinear.from_codes(torch.tensor([[0, 1, -2, -2]], dtype=torch.int8), torch.ones(1, 1), None, spec)
    trained = WeightTrained(layer)
    with torch.no_grad():
        trained.weight.copy_(torch.tensor([[0.4, 2.0, -1.6, -3.0]]))
    y = trained(torch.eye(4))
    assert y[:, 0].tolist() == [0, 1, -2, -2]
    y.sum().backward()
    assert trained.weight.grad.tolist() == [[1, 0, 1, 0]]
    assert trained.scale.grad.item() == pytest.approx((0 - 0.4) + 1 + (-2 + 1.6) - 2)


def test_a_trained_weight_that_crosses_half_a_step_gets_the_next_code():
    layer = _packed(QuantSpec(4, 8), bias=False)
    trained = WeightTrained(layer)
    before = layer.codes()[0]
    with torch.no_grad():
        trained.weight[0, 0] += 0.6 * trained.scale[0, 0]
    after = trained.packed().codes()[0]
    step = 1 if before[0, 0] < 7 else 0
    assert int(after[0, 0]) == int(before[0, 0]) + step
    assert torch.equal(after.flatten()[1:], before.flatten()[1:])


def test_autocast_multiplies_in_bfloat16_and_keeps_gradients_in_float32():
    for kind in (ScaleTrained, WeightTrained):
        trained = kind(_packed(QuantSpec(4, 8)))
        with torch.autocast("cpu", torch.bfloat16):
            y = trained(_x())
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert trained.scale.grad.dtype == torch.float32
