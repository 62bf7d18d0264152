"""GPTAQ: against its definition, by hand, and through the engine."""

import numpy as np
import pytest
import reference
import torch

from compress.data import windows_from
from compress.maths.grid import QuantSpec, dequantize, spec_for
from compress.maths.hessian import CrossMoment, Hessian
from compress.model import ModelHandle
from compress.opening import open_model
from compress.passes.base import Context
from compress.passes.gptq import GPTQ, factorise, gptq
from compress.testing import outputs, tiny_model, tiny_tokens
from compress.walk import walk
from compress.workspace import Stage

TOKENS = tiny_tokens(samples=6, length=24)
GPTAQ = GPTQ(bits=3, group_size=16, propagation="gptaq")
orders = pytest.mark.parametrize("act_order", [True, False])


def paths(columns, seed):
    """The Hessian of inputs as they are now, and the mean of 2 (x - x~) x~^T, float64."""
    before = reference.random_inputs(4 * columns, columns, seed)
    now = before + 0.3 * reference.random_inputs(4 * columns, columns, seed + 50)
    return reference.hessian(now), 2 / len(now) * (before - now).T @ now


@orders
@pytest.mark.parametrize("symmetric", [True, False])
def test_in_float64_it_equals_the_definition(act_order, symmetric):
    for seed, (group, bits) in enumerate([(-1, 2), (8, 3), (4, 4)]):
        weight, (matrix, deviation) = reference.random_weight(6, 24, seed), paths(24, seed)
        expected = reference.gptq(weight, matrix, bits, group, symmetric, act_order, 0.01, deviation=deviation)
        factor = factorise(torch.from_numpy(matrix), act_order, 0.01, torch.from_numpy(deviation))
        for block_size in (1, 5, 8, 128):
            found = gptq(
                torch.from_numpy(weight), torch.from_numpy(matrix), QuantSpec(bits, group, symmetric), act_order,
                block_size=block_size, factor=factor,
            )  # fmt: skip
            np.testing.assert_array_equal(found.codes.numpy(), expected[0], err_msg=f"{group} {block_size}")
            np.testing.assert_array_equal(found.scale.double().numpy(), expected[1])


def test_by_hand():
    # Scale 1, inputs uncorrelated. The first weight, 1, is on the grid; the change of its input lies half in the
    # direction of the second input, so the second weight moves by 1 * 0.5 from 0.3 to 0.8, and is rounded to 1.
    weight = torch.tensor([[1.0, 0.3, 7.5]])
    hessian = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    deviation = torch.tensor([[9.0, 1.0, 0.0], [9.0, 9.0, 0.0], [9.0, 9.0, 9.0]])  # what lies below must not count
    factor = factorise(hessian, True, 1e-6, deviation)
    assert gptq(weight, hessian, QuantSpec(4), damping=1e-6).codes.tolist() == [[1, 0, 7]]
    result = gptq(weight, hessian, QuantSpec(4), damping=1e-6, factor=factor)
    assert result.codes.tolist() == [[1, 1, 7]]
    assert result.loss == pytest.approx((2 * 0.49 + 0.25) / (3 + 2 * 0.09 + 56.25))  # against the weight as given


@orders
def test_without_a_deviation_it_is_gptq(act_order):
    weight, (matrix, _) = (torch.from_numpy(reference.random_weight(6, 24, 1)), paths(24, 1))
    matrix = torch.from_numpy(matrix)
    plain = gptq(weight, matrix, QuantSpec(3, 8), act_order)
    same = gptq(weight, matrix, QuantSpec(3, 8), act_order, factor=factorise(matrix, act_order, 0.01, 0 * matrix))
    assert torch.equal(same.codes, plain.codes)
    assert same.loss == pytest.approx(plain.loss, rel=1e-6)


def test_the_output_comes_nearer_to_that_of_the_original_inputs():
    before = torch.from_numpy(reference.random_inputs(400, 24, 3))
    now = before + 0.3 * torch.from_numpy(reference.random_inputs(400, 24, 53))
    weight, spec = torch.from_numpy(reference.random_weight(16, 24, 3)), QuantSpec(3, 8)
    matrix = 2 * now.T @ now / 400
    factor = factorise(matrix, True, 0.01, 2 * (before - now).T @ now / 400)
    errors = []
    for result in (gptq(weight, matrix, spec), gptq(weight, matrix, spec, factor=factor)):
        values = dequantize(result.codes, result.scale, result.zero, spec, torch.float64)
        errors.append(float((now @ values.T - before @ weight.T).square().sum()))
    assert errors[1] < 0.8 * errors[0]


def inputs_of(model, layer):
    """What enters the layer, one batch of two windows after another, by a hook on the whole model."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for batch in TOKENS.split(2):
        outputs(model, batch)
    hook.remove()
    return seen


def test_by_the_engine_it_has_the_codes_of_a_naive_loop_over_two_whole_models():
    original, naive, model = (tiny_model("llama", num_hidden_layers=2) for _ in range(3))
    walk(GPTAQ, ModelHandle.wrap(model), Context(calibration=windows_from(TOKENS, None), tokens_per_batch=48))
    for index, block in enumerate(naive.model.layers):
        names = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
        results = {}
        for name in names:
            layer, before = block.get_submodule(name), original.model.layers[index].get_submodule(name)
            hessian, cross = Hessian(layer.in_features), CrossMoment(layer.in_features)
            for x, y in zip(inputs_of(naive, layer), inputs_of(original, before), strict=True):
                hessian.add(x)
                cross.add(y, x)
            factor = factorise(hessian.matrix, True, 0.01, cross.matrix - hessian.matrix)
            spec = spec_for(torch.float32, 3, 16, True)
            results[name] = gptq(layer.weight.detach(), hessian.matrix, spec, search=True, factor=factor)
        for name, result in results.items():
            assert torch.equal(model.model.layers[index].get_submodule(name).codes()[0], result.codes), (index, name)
            values = dequantize(result.codes, result.scale, result.zero, spec, torch.float32)
            block.get_submodule(name).weight.data.copy_(values)


def test_a_walk_that_stopped_continues_to_the_same_bytes_in_either_residency(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    contents = []
    for residency in ("memory", "disk"):
        stage = tmp_path / residency
        for _ in range(2):
            context = Context(calibration=windows_from(TOKENS, None), stage=Stage(stage), tokens_per_batch=48)
            walk(GPTAQ, open_model(tmp_path / "model", residency=residency), context)
            contents.append((stage / "model.layers.2.safetensors").read_bytes())
            (stage / "model.layers.2.json").unlink()
    assert contents[1:] == contents[:-1]


def test_it_is_planned_with_the_original_path_and_more_tables():
    from compress.costs import Holding, Text, one_pass
    from compress.shapes import ModelShape

    shape, text = ModelShape(tiny_model("llama"), torch.float32), Text(8, 32)
    plain, propagating = (
        one_pass(pass_, shape, Holding(False, torch.float32), text) for pass_ in (GPTQ(group_size=16), GPTAQ)
    )
    assert "original hidden states" in propagating
    assert "original hidden states" not in plain
    assert propagating["pass"] > 1.5 * plain["pass"]
