"""Corrections of low rank in closed form, against the textbook; and what repair leaves for lora to begin at."""

import numpy as np
import pytest
import torch
from reference import eora

import compress
from compress.adapters import layers_of
from compress.errors import StartError
from compress.maths.divergence import kl_divergence
from compress.maths.low_rank import best_for_inputs, best_of_rank, share_ranks, spectrum
from compress.pipeline import run
from compress.testing import save_tiny, tiny_model, tiny_tokens

TEXT = tiny_tokens(48, 16)


def _divergence(model):
    with torch.no_grad():
        return kl_divergence(model(TEXT).logits, tiny_model("llama")(TEXT).logits).item()


def _drawn(out, columns, tokens, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=draw) * torch.logspace(0, -2, columns)
    return torch.randn(out, columns, generator=draw), x


@pytest.mark.parametrize(("out", "columns", "tokens", "r"), [(6, 10, 40, 2), (12, 5, 30, 3), (8, 10, 4, 3)])
def test_the_correction_is_the_textbooks(out, columns, tokens, r):
    error, x = _drawn(out, columns, tokens)
    left, right = best_for_inputs(error, 2 * x.T @ x / tokens, r)
    expected = eora(error.double().numpy(), x.double().numpy(), r)
    given, wanted = (left @ right).double().numpy() @ x.double().numpy().T, expected @ x.double().numpy().T
    assert np.allclose(given, wanted, atol=1e-5 * np.abs(wanted).max())


def test_no_other_product_of_that_rank_restores_more_of_the_output():
    error, x = _drawn(6, 10, 40)
    hessian = x.T @ x

    def lost(product):
        return ((error - product) @ x.T).square().sum().item()

    left, right = best_for_inputs(error, hessian, 2)
    best = lost(left @ right)
    plain = best_of_rank(error, 2)
    assert best < 0.9 * lost(plain[0] @ plain[1])
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        moved = (left + 0.01 * torch.randn(left.shape, generator=draw)) @ (
            right + 0.01 * torch.randn(right.shape, generator=draw)
        )
        assert lost(moved) > best
    # Eckart and Young: what is left are the singular values that were not taken
    assert best == pytest.approx(spectrum(error, hessian)[2:].sum().item(), rel=1e-4)


def test_ranks_are_shared_out_as_trying_all_would():
    spectra = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([8.0, 7.0, 6.0])}
    costs = {"a": 2, "b": 2}

    def restored(ranks):
        return sum(float(spectra[name][:r].sum()) for name, r in ranks.items())

    for budget in range(2, 13, 2):
        found = share_ranks(spectra, costs, budget)
        every = [{"a": i, "b": j} for i in range(4) for j in range(4) if 2 * i + 2 * j <= budget]
        assert restored(found) == max(map(restored, every))
    assert share_ranks(spectra, costs, 1) == {}


@pytest.mark.parametrize("damage", ["rounded", "pruned"])
def test_it_brings_the_model_nearer_and_more_rank_brings_it_nearer_still(damage):
    found = []
    for r in (0, 2, 8):
        model = tiny_model("llama")
        if damage == "rounded":
            compress.RTN(bits=3, group_size=16)(model)
        else:
            compress.Magnitude(sparsity=0.5)(model)
        if r:
            result = compress.Repair(r=r)(model, calibration=TEXT, original=tiny_model("llama"))
            losses = [layer for block in result.blocks for layer in block["layers"].values()]
            assert all(layer["left"] < layer["loss"] for layer in losses)
        found.append(_divergence(model))
    assert found[0] > found[1] > found[2]
    assert found[2] < 0.6 * found[0]


def test_a_base_whose_weights_were_moved_is_refused():
    model = tiny_model("llama")
    compress.AWQ(bits=4, group_size=16)(model, calibration=TEXT)
    with pytest.raises(StartError, match="repair compares each layer with the original's, and awq rescaled or turned"):
        compress.Repair(r=2)(model, calibration=TEXT, original=tiny_model("llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def _values(folder, output, lora=None):
    text = {"source": "builtin:tiny", "samples": 8, "length": 16}
    passes = [{"rtn": {"bits": 3, "group_size": 16}}, {"repair": {"r": 4}}, *([{"lora": lora}] if lora else [])]
    return {
        "model": str(folder), "data": {"calibration": text, "training": text}, "passes": passes, "benchmark": False,
        "output": str(output),
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_in_the_walk_ends_with_the_same_bytes(folder, tmp_path, monkeypatch, unverified):
    run(_values(folder, tmp_path / "whole"))
    from compress.passes import repair

    done, calls = repair.corrections, []

    def once_more(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return done(*args)

    with monkeypatch.context() as patch:
        patch.setattr(repair, "corrections", once_more)
        with pytest.raises(KeyboardInterrupt):
            run(_values(folder, tmp_path / "killed"))
        run(_values(folder, tmp_path / "killed"))
    assert len(calls) == 2 + 2
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_lora_goes_on_from_what_repair_left(folder, tmp_path, unverified):
    lora = {"init_lora_weights": "repair", "tokens": 8 * 16 * 4, "batch_size": 8, "learning_rate": 1e-3}
    repaired, trained = run(_values(folder, tmp_path / "a")), run(_values(folder, tmp_path / "b", lora))
    plain = run(
        {
            **_values(folder, tmp_path / "c", lora),
            "passes": [
                {"rtn": {"bits": 3, "group_size": 16}},
                {"lora": {**lora, "init_lora_weights": "default", "r": 4}},
            ],
        }
    )
    first = [report.stages[-1].measurements["held_out_losses"][0]["loss"] for report in (trained, plain)]
    assert first[0] < 0.8 * first[1]
    assert repaired.stages[-1].measurements["parameters"] == trained.stages[-1].measurements["parameters"]
    model = compress.load(tmp_path / "b")
    assert layers_of(model)["model.layers.0.mlp.up_proj"].r == {"default": 4}
