"""Blocks that learn from the original's: less error after 3 bits, 2 bits and pruning, what stays, and resuming."""

import pytest
import torch

import compress
from compress.block_training import FloatAdam
from compress.errors import StartError
from compress.maths.divergence import kl_divergence
from compress.nn.quant_linear import QuantLinear
from compress.pipeline import run
from compress.testing import save_tiny, tiny_model, tiny_tokens

TEXT, OTHER = tiny_tokens(32, 32), tiny_tokens(16, 32, seed=9)
DAMAGE = {
    "3 bits": [compress.RTN(bits=3, group_size=16)],
    "2 bits": [compress.RTN(bits=2, group_size=16)],
    "half zero": [compress.Magnitude(sparsity=0.5)],
    "half zero in 4 bits": [compress.Magnitude(sparsity=0.5), compress.RTN(bits=4, group_size=16, symmetric=False)],
}


def _damaged(name, family="llama"):
    model = tiny_model(family)
    for pass_ in DAMAGE[name]:
        pass_(model)
    return model


def _divergence(model, family="llama"):
    """On text that was not trained on."""
    with torch.no_grad():
        return kl_divergence(model(OTHER).logits, tiny_model(family)(OTHER).logits).item()


def _distill(model, family="llama", **options):
    options = {"iterations": 60, **options}
    return compress.BlockDistill(**options)(model, calibration=TEXT, original=tiny_model(family))


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_block_comes_nearer_to_the_originals_and_so_does_the_model(damage):
    model = _damaged(damage)
    before = _divergence(model)
    result = _distill(model)
    assert all(block["trained_error"] < 0.9 * block["start_error"] for block in result.blocks), result.blocks
    assert _divergence(model) < 0.8 * before
    assert result.coverage == 1.0


def test_the_aim_is_the_original_and_not_the_model_as_it_came():
    whole = _distill(tiny_model("llama"))
    assert [block["start_error"] for block in whole.blocks] == [0.0] * 3
    damaged = _distill(_damaged("2 bits"), iterations=1)
    assert damaged.blocks[2]["start_error"] > damaged.blocks[0]["start_error"] > 0.01


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_other_families_are_mended_as_well(family):
    result = _distill(_damaged("2 bits", family), family)
    assert all(block["trained_error"] < block["start_error"] for block in result.blocks)


def test_zeros_stay_and_so_do_packed_layers():
    model = _damaged("half zero")
    zeros = {name: p == 0 for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}
    _distill(model)
    assert all(torch.equal(model.get_parameter(name) == 0, zero) for name, zero in zeros.items())
    model = _damaged("half zero in 4 bits")
    zeros = [m.dequantize() == 0 for m in model.modules() if isinstance(m, QuantLinear)]
    _distill(model)
    after = [m.dequantize() for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(after) == 21
    assert all(bool((weight[zero] == 0).all()) for weight, zero in zip(after, zeros, strict=True))


def test_what_is_not_to_be_trained_does_not_move():
    def codes(model):
        return [m.weight_packed.clone() for m in model.modules() if isinstance(m, QuantLinear)]

    for train, moved in (("scales", (False, False)), ("norms", (False, True)), ("all", (True, True))):
        model = _damaged("3 bits")
        before, norm = codes(model), model.model.layers[1].input_layernorm.weight.clone()
        _distill(model, train=train, iterations=20)
        assert any(not torch.equal(a, b) for a, b in zip(before, codes(model), strict=True)) == moved[0], train
        assert (not torch.equal(norm, model.model.layers[1].input_layernorm.weight)) == moved[1], train
    model = _damaged("half zero")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    _distill(model, skip=["mlp.*"], iterations=5)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_a_block_that_training_does_not_improve_stays_as_it_was():
    model = _damaged("half zero")
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = _distill(model, learning_rate=1.0, iterations=1)
    assert all("stays as it was" in block["note"] for block in result.blocks)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_in_16_bits_move_by_less_than_they_can_hold_in_a_step():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = FloatAdam([{"params": [weight], "lr": 1e-4}])
    for _ in range(100):  # a step is a hundredth of the distance between neighbours
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.detach().float() == pytest.approx(torch.full((4,), 0.99), abs=4e-3)
    model = _damaged("half zero").bfloat16()
    result = compress.BlockDistill(iterations=30)(model, calibration=TEXT, original=tiny_model("llama").bfloat16())
    assert all(block["trained_error"] < block["start_error"] for block in result.blocks)


def test_a_model_of_other_blocks_is_refused():
    with pytest.raises(StartError, match=r"this model has 2 of width 32, the original 3 of width 32: use distill"):
        compress.BlockDistill()(
            tiny_model("llama", num_hidden_layers=2), calibration=TEXT, original=tiny_model("llama")
        )
    with pytest.raises(StartError, match="train: scales needs packed layers"):
        _distill(tiny_model("llama"), train="scales")


@pytest.mark.slow
def test_runs_with_blocks_on_disk_or_killed_and_continued_leave_the_same_bytes(tmp_path, unverified, monkeypatch):
    folder = save_tiny(tmp_path / "model")

    def values(name, **more):
        text = {"source": "builtin:tiny", "samples": 8, "length": 32}
        passes = [{"rtn": {"bits": 3, "group_size": 16}}, {"block_distill": {"iterations": 8}}]
        return {
            "model": str(folder), "data": {"calibration": text}, "passes": passes, "benchmark": False,
            "output": str(tmp_path / name), **more,
        }  # fmt: skip

    run(values("whole"))
    run(values("disk", residency="disk"))
    inner, calls = compress.BlockDistill.compress_block, []

    def dies(self, block, calibration):
        calls.append(block.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, block, calibration)

    monkeypatch.setattr(compress.BlockDistill, "compress_block", dies)
    with pytest.raises(KeyboardInterrupt):
        run(values("killed"))
    run(values("killed"))
    assert len(calls) == 4
    expected = (tmp_path / "whole/model/model.safetensors").read_bytes()
    for name in ("disk", "killed"):
        assert (tmp_path / name / "model/model.safetensors").read_bytes() == expected, name
