"""Zeros shared out over the blocks: what is measured, what is allotted, what is refused, and that a stop keeps it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from reference import token_divergence, wanda_scores

from compress.data import windows_from
from compress.errors import StartError
from compress.model import ModelHandle
from compress.opening import open_model
from compress.passes.base import Context
from compress.passes.magnitude import Magnitude
from compress.passes.sparsegpt import SparseGPT
from compress.passes.wanda import Wanda
from compress.shapes import ModelShape
from compress.sparsity import best_rates, levelled, owl_rates
from compress.testing import outputs, tiny_model, tiny_tokens
from compress.workspace import Stage

TOKENS = tiny_tokens(8, 24)
methods = pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
shared = pytest.mark.parametrize("allocation", ["owl", "measured"])


def zeros(model, block):
    layers = [layer for b in ModelHandle.wrap(model).block_list() if b.name == block for layer in b.layers().values()]
    return sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)


def uneven(**changes):
    """A model whose second block adds next to nothing, and whose last has outliers."""
    model = tiny_model("llama", **changes)
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.01)
        model.model.layers[2].mlp.gate_proj.weight[:2] *= 8
    return model


@methods
@shared
def test_the_mean_is_on_target_and_no_block_is_further_off_than_allowed(method, allocation):
    model = uneven()
    result = method(sparsity=0.5, allocation=allocation, max_deviation=0.125)(model, calibration=TOKENS)
    rates = result.measurements["allocation"]["rates"]
    assert sum(rates.values()) / 3 == pytest.approx(0.5, abs=1e-12)  # blocks of one size
    assert all(abs(rate - 0.5) <= 0.125 + 1e-12 for rate in rates.values())
    assert len(set(rates.values())) > 1
    for block, rate in rates.items():
        assert zeros(model, block) == pytest.approx(rate, abs=1 / 32)  # a row of 32 is cut at whole weights
    json.dumps(result.measurements, allow_nan=False)


def test_a_block_that_adds_nothing_is_pruned_most():
    result = Wanda(sparsity=0.5, allocation="measured", max_deviation=0.2)(uneven(), calibration=TOKENS)
    account = result.measurements["allocation"]
    assert account["fallback"] is None
    assert account["rates"]["model.layers.1"] == pytest.approx(0.7)
    assert account["measured_loss"] < account["uniform_loss"]
    assert account["windows"] == [4, 4]


def test_the_loss_is_that_of_the_model_with_the_one_block_pruned():
    model = uneven()
    whole = copy.deepcopy(model)
    account = Magnitude(sparsity=0.5, allocation="measured")(model, calibration=TOKENS).measurements["allocation"]
    for index, block in enumerate(ModelHandle.wrap(whole).block_list()):
        for choice, found in zip(account["choices"], account["losses"][block.name], strict=True):
            alone = copy.deepcopy(whole)
            names = [f"layers.{index}.{name}" for name in block.layers()]
            Magnitude(sparsity=choice)(alone, min_coverage=0.0)
            for other, parameter in whole.model.named_parameters():
                if other.removesuffix(".weight") not in names:
                    alone.model.get_parameter(other).data = parameter.data
            expected = token_divergence(outputs(whole, TOKENS[:4]), outputs(alone, TOKENS[:4]))
            assert found == pytest.approx(expected, rel=2e-3)


def test_outliers_are_those_of_the_paper():
    model = uneven()
    whole = copy.deepcopy(model)
    ratios = Wanda(sparsity=0.5, allocation="owl")(model, calibration=TOKENS).measurements["allocation"]
    seen = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
    outputs(whole, TOKENS[:4])
    for index in range(3):
        names = [name for name in seen if f"layers.{index}." in name]
        scores = [wanda_scores(whole.get_submodule(n).weight.detach().numpy(), seen[n].numpy()) for n in names]
        every = torch.cat([torch.from_numpy(score).flatten() for score in scores])
        expected = float((every > 5 * every.mean()).double().mean())
        assert ratios["outlier_ratios"][f"model.layers.{index}"] == pytest.approx(expected, abs=2e-4)
    by_ratio = sorted(ratios["rates"], key=lambda block: ratios["outlier_ratios"][block])
    assert [ratios["rates"][b] for b in by_ratio] == sorted(ratios["rates"].values(), reverse=True)


def test_owl_spreads_the_rates_over_twice_the_deviation_by_hand():
    # Ratios 1, 2 and 5 %: 0, a quarter, and all of 0.16 less. Shifted to a mean of 0.5 with weights 1, 1 and 2.
    rates = owl_rates({"a": 0.01, "b": 0.02, "c": 0.05}, 0.08)
    assert rates == {"a": 0.0, "b": pytest.approx(-0.04), "c": pytest.approx(-0.16)}
    found = levelled(rates, {"a": 1, "b": 1, "c": 2}, 0.5, 0.42, 0.58)
    # a would be 0.59: cut off at 0.58, the others make up for it: 0.58 + b + 2 c = 2 and b - c = 0.12
    assert found == {"a": pytest.approx(0.58), "b": pytest.approx(0.5533333), "c": pytest.approx(0.4333333)}
    assert owl_rates({"a": 0.01, "b": 0.01}, 0.08) == {"a": 0.0, "b": 0.0}


def test_the_best_rates_by_hand():
    # Two blocks of 10 weights, half to go. (0.4, 0.6) loses 1 + 2, (0.5, 0.5) 2 + 2, (0.6, 0.4) 9 + 1.
    losses = {"a": [1.0, 2.0, 9.0], "b": [1.0, 2.0, 2.0]}
    assert best_rates(losses, [0.4, 0.5, 0.6], {"a": 10, "b": 10}, 0.5) == {"a": 0.4, "b": 0.6}
    # With b three times as large, 0.4 for a and 0.6 for b prunes too much, which is allowed, and loses least.
    assert best_rates(losses, [0.4, 0.5, 0.6], {"a": 10, "b": 30}, 0.5) == {"a": 0.4, "b": 0.6}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 70, 5), (1000, 1, 1)])
def test_levelled_rates_have_the_mean_asked_for_and_keep_to_the_limits(sizes):
    weights = dict(zip("abc", sizes, strict=True))
    for rates in ({"a": 0.1, "b": 0.5, "c": 0.9}, {"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 0.62, "b": 0.4, "c": 0.41}):
        found = levelled(rates, weights, 0.5, 0.4, 0.6)
        mean = sum(found[name] * size for name, size in weights.items()) / sum(sizes)
        assert mean == pytest.approx(0.5, abs=1e-12)
        assert all(0.4 <= rate <= 0.6 for rate in found.values())


def test_rates_that_do_more_harm_than_the_same_for_all_are_not_taken(monkeypatch):
    monkeypatch.setattr("compress.sparsity.candidate_losses", lambda *_: [2.0, 1.0])
    account = Wanda(allocation="measured")(uneven(), calibration=TOKENS).measurements["allocation"]
    assert "the same for all" in account["fallback"]
    assert set(account["rates"].values()) == {0.5}


def context(stage):
    return Context(calibration=windows_from(TOKENS, None), stage=stage)


@pytest.mark.parametrize("residency", ["memory", "disk"])
def test_a_continued_run_takes_the_rates_that_were_measured(residency, tmp_path, monkeypatch):
    uneven().save_pretrained(tmp_path / "model")
    pass_ = SparseGPT(sparsity=0.6, allocation="measured")
    whole = pass_.run(open_model(tmp_path / "model", residency=residency), context(Stage(tmp_path / "stage")))
    before = (tmp_path / "stage" / "model.layers.2.safetensors").read_bytes()
    (tmp_path / "stage" / "model.layers.2.json").unlink()
    monkeypatch.setattr("compress.sparsity.choose_rates", lambda *_: pytest.fail("measured again"))
    again = pass_.run(open_model(tmp_path / "model", residency=residency), context(Stage(tmp_path / "stage")))
    assert again.measurements == whole.measurements
    assert (tmp_path / "stage" / "model.layers.2.safetensors").read_bytes() == before


@methods
@shared
def test_an_allocation_with_a_pattern_is_refused(method, allocation):
    with pytest.raises(ValidationError, match="leaves the same zeros everywhere"):
        method(pattern="2:4", allocation=allocation)


def test_magnitude_needs_text_for_an_allocation_only():
    assert not Magnitude().takes_calibration
    assert Magnitude(allocation="owl").takes_calibration
    with pytest.raises(StartError, match="needs calibration text"):
        Magnitude(allocation="owl")(tiny_model())


def test_layers_left_alone_do_not_count():
    model = uneven()
    pass_ = Wanda(sparsity=0.5, allocation="measured", targets=["mlp.*"], skip=["*.up_proj"])
    rates = pass_(model, calibration=TOKENS, min_coverage=0.1).measurements["allocation"]["rates"]
    assert sum(rates.values()) / 3 == pytest.approx(0.5, abs=1e-12)
    assert not (model.model.layers[0].self_attn.q_proj.weight == 0).any()


def test_the_plan_counts_the_measuring():
    shape = ModelShape(tiny_model(), torch.float32)
    layers = [block.layers for block in shape.blocks(Wanda())]
    assert Wanda().preparing_bytes(shape, layers, 24) == 0
    owl = Wanda(allocation="owl").preparing_bytes(shape, layers, 24)
    assert 0 < owl < Wanda(allocation="measured").preparing_bytes(shape, layers, 24)
