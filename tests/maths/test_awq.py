"""AWQ: the scale of the definition, clipping by outputs, and what the pass does to a block."""

from __future__ import annotations

import math

import pytest
import reference
import torch

from compress.maths.grid import COARSE_FACTORS, QuantSpec, dequantize
from compress.model import ModelHandle
from compress.passes import awq
from compress.passes.awq import AWQ, Inputs, clipped_rounding, diagonal_blocks, output_error, scale_of, search_scale
from compress.passes.base import LayerShape
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN, round_to_nearest
from compress.testing import outputs, tiny_model, tiny_tokens

GRIDS = [(2, True), (3, True), (3, False), (4, True)]


def sample(seed: int, rows: int = 5, columns: int = 12, tokens: int = 40):
    """Weight and inputs, float64, as tensors; their reference twins are the arrays themselves."""
    weight, inputs = reference.random_weight(rows, columns, seed), reference.random_inputs(tokens, columns, seed)
    inputs[:, 3] *= 8  # the channel that matters
    return torch.from_numpy(weight), torch.from_numpy(inputs)


def test_the_scale_by_hand():
    # sqrt of 4, 1, 1/4 is 2, 1, 1/2; the largest times the smallest is 1 already. Of 16, 4, 1: 4, 2, 1, over sqrt 4.
    assert scale_of(torch.tensor([4.0, 1.0, 0.25]), 0.5).tolist() == [2.0, 1.0, 0.5]
    assert scale_of(torch.tensor([16.0, 4.0, 1.0]), 0.5).tolist() == [2.0, 1.0, 0.5]
    assert scale_of(torch.tensor([16.0, 0.0]), 0.0).tolist() == [1.0, 1.0]
    assert scale_of(torch.tensor([16.0, 0.0]), 1.0).isfinite().all()


def test_the_inputs_statistics_are_those_of_all_tokens():
    x = torch.randn(60, 8)
    seen = Inputs(8)
    for part in x.split(17):
        seen.add(part)
    assert torch.allclose(seen.magnitude, x.abs().mean(0))
    assert torch.allclose(seen.hessian.matrix, 2 * x.T @ x / 60, atol=1e-5)


def test_the_output_error_is_that_of_the_tokens():
    change, x = torch.randn(4, 6).double(), torch.randn(30, 6).double()
    assert output_error(change.clone(), x.T @ x) == pytest.approx(float((x @ change.T).square().sum()))


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_exponent_of_the_definition(bits, symmetric, seed):
    weight, x = sample(seed)
    twin = torch.from_numpy(reference.random_weight(4, 12, 50 + seed))
    spec = QuantSpec(bits, 4, symmetric)
    found = search_scale([weight, twin], [spec, spec], x.abs().mean(0), x.T @ x, steps=10)
    errors = []
    for step in range(10):
        scale = reference.awq_scale(x.numpy(), step / 10)
        errors.append(sum(reference.awq_error(w.numpy(), x.numpy(), scale, bits, 4, symmetric) for w in (weight, twin)))
    best = errors.index(min(errors))
    assert found.exponent == best / 10
    assert found.gain == pytest.approx(errors[best] / errors[0], rel=1e-9)
    assert torch.allclose(found.values, torch.from_numpy(reference.awq_scale(x.numpy(), best / 10)))


def test_the_exponent_is_not_always_zero():
    weight, x = sample(0)
    assert search_scale([weight], [QuantSpec(3, 4)], x.abs().mean(0), x.T @ x, steps=10).exponent > 0


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_clipping_finds_no_worse_range_than_any_even_step_by_the_outputs_of_the_tokens(bits, symmetric):
    weight, x = sample(7, rows=6, columns=16)
    spec = QuantSpec(bits, 8, symmetric, "float32")
    codes, scale, zero = clipped_rounding(weight, spec, x.T @ x)
    rounded = dequantize(codes, scale, zero, spec, torch.float64)
    for row in range(6):
        for group in range(2):
            part = slice(8 * group, 8 * group + 8)
            values, tokens = weight[row, part].numpy(), x[:, part].numpy()
            found = reference.group_output_error(values, rounded[row, part].numpy(), tokens)
            least = math.inf
            for factor in COARSE_FACTORS:
                step, offset = reference.grid_of([factor * v for v in values], bits, symmetric, "float32")
                for signed in (step, -step) if symmetric else (step,):
                    near = [(reference.code_of(float(v), signed, offset, bits) - offset) * signed for v in values]
                    least = min(least, reference.group_output_error(values, near, tokens))
            assert found <= least * (1 + 1e-9)


def test_clipping_by_uncorrelated_inputs_is_the_search_weighed_by_their_squares():
    from compress.maths.grid import find_params

    weight, squares = torch.randn(8, 16).double(), torch.rand(16).double() + 0.1
    spec = QuantSpec(3, 4)
    blocks = diagonal_blocks(torch.diag(squares), 4)
    assert blocks.shape == (4, 4, 4)
    by_blocks, by_diagonal = find_params(weight, spec, True, blocks)[0], find_params(weight, spec, True, squares)[0]
    assert torch.equal(by_blocks, by_diagonal)


# --------------------------------------------------------------------------------------------------- the pass


def compressed(family, pass_, **changes):
    model = tiny_model(family, **changes)
    tokens = tiny_tokens(16, 32)
    result = pass_(model, calibration=tokens, min_coverage=0.0)
    return model, result


def test_every_layer_says_its_exponent_or_why_it_has_none():
    _, result = compressed("gpt2", AWQ(bits=3, group_size=16))
    layers = result.blocks[0]["layers"]
    assert "exponent" in layers["attn.c_attn"]
    assert "mlp.c_proj" in layers
    assert "not_scaled" in layers["mlp.c_proj"]  # GELU lies before it
    assert all(0 <= entry["loss"] < 1 for entry in layers.values())
    assert any(entry.get("exponent", 0) > 0 for block in result.blocks for entry in block["layers"].values())


def test_folding_alone_changes_nothing_of_what_the_model_computes(monkeypatch):
    monkeypatch.setattr(AWQ, "_round", lambda self, stage, seen, scale, report: None)
    model = tiny_model("llama")
    before = outputs(model, tiny_tokens())
    result = AWQ(bits=2, group_size=16)(model, calibration=tiny_tokens())
    assert any(entry.get("exponent", 0) > 0 for entry in result.blocks[0]["layers"].values())
    assert torch.allclose(outputs(model, tiny_tokens()), before, atol=2e-5)


def test_rounding_is_that_of_the_scaled_weight_and_the_divided_input(monkeypatch):
    seen = []
    rounding = awq.clipped_rounding

    def noted(weight, spec, moments):
        seen.append((weight.clone(), moments.clone()))
        return rounding(weight, spec, moments)

    monkeypatch.setattr(awq, "clipped_rounding", noted)
    weight_before = tiny_model("llama").model.layers[0].self_attn.q_proj.weight.detach()
    _, result = compressed("llama", AWQ(bits=3, group_size=16))
    exponent = result.blocks[0]["layers"]["self_attn.q_proj"]["exponent"]
    scaled, moments = seen[0]
    scale = (scaled / weight_before).median(0).values
    assert torch.allclose(scale, torch.ones(32), atol=1e-3) == (exponent == 0)
    handle = ModelHandle.wrap(tiny_model("llama"))
    hidden = handle.model.model.embed_tokens(tiny_tokens(16, 32))
    x = handle.block_list()[0].module.input_layernorm(hidden).flatten(0, 1) / scale
    assert torch.allclose(moments, 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3])
def test_blocks_lose_less_than_by_rounding_to_nearest(bits):
    errors = {}
    for pass_ in (RTN(bits=bits, group_size=16), AWQ(bits=bits, group_size=16)):
        model = tiny_model("llama")
        before = outputs(model, tiny_tokens())
        pass_(model, calibration=tiny_tokens(16, 32))
        errors[pass_.name] = float((outputs(model, tiny_tokens()) - before).square().mean())
    assert errors["awq"] < errors["rtn"]


def test_without_steps_and_clipping_it_is_rounding_to_nearest():
    model, _ = compressed("llama", AWQ(bits=3, group_size=16, steps=1, clip=False))
    plain, _ = compressed("llama", RTN(bits=3, group_size=16, search=False))
    assert torch.equal(outputs(model, tiny_tokens()), outputs(plain, tiny_tokens()))


def test_a_layer_that_no_token_reached_is_rounded_to_nearest_and_says_so():
    from stub_block import StubBlock

    block = StubBlock()
    entry: dict = {"silent": {}}
    AWQ(bits=3, group_size=4)._round({"silent": block.layers(None, ())["silent"]}, Inputs(16), None, entry)
    assert "no calibration token" in entry["silent"]["fallback"]
    expected = round_to_nearest(block.original["silent"], QuantSpec(3, 4), search=True)
    assert torch.equal(block.quantized["silent"][0], expected[0])


def test_zeros_of_a_sparse_weight_stay():
    from compress.passes.magnitude import Magnitude

    model = tiny_model("llama")
    Magnitude(pattern="2:4")(model)
    AWQ(bits=3, group_size=16)(model, calibration=tiny_tokens())
    codes = model.model.layers[1].mlp.up_proj.codes()[0]
    assert ((codes.unflatten(1, (-1, 4)) == 0).sum(2) >= 2).all()


def test_the_plan_counts_what_gptq_counts_and_the_copies():
    layers = [LayerShape("0", "a", 64, 32, torch.float32), LayerShape("0", "b", 32, 64, torch.float32)]
    pass_ = AWQ(group_size=16)
    assert pass_.observing_bytes(layers, 2048) >= GPTQ(group_size=16).observing_bytes(layers, 2048)
    assert pass_.working_bytes(layers, 2048) > pass_.observing_bytes(layers, 0)
