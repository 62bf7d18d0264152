from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import compress
from compress.data import windows_from
from compress.errors import StartError
from compress.model import ModelHandle
from compress.passes.base import Context
from compress.passes.experts import gate_mass, weighted_outputs
from compress.pipeline import run
from compress.recipe import Recipe
from compress.testing import outputs, save_tiny, tiny_model, tiny_tokens
from tests import reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("experts") / "model", "gpt_oss")
    (folder.parent / "text.txt").write_text("The cat sat on the mat and saw the rat. " * 20)
    return folder


def _values(folder, output, **changes):
    return {
        "model": str(folder), "output": str(output), "benchmark": False, "passes": [{"experts": {"experts": 3}}],
        "data": {"calibration": {"source": str(folder.parent / "text.txt"), "samples": 4, "length": 16}}, **changes,
    }  # fmt: skip


def _routed(tokens=20, experts=5, k=2):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    gates, chosen = logits.softmax(-1).topk(k)
    return logits, gates / gates.sum(-1, keepdim=True), chosen


def test_the_mass_of_gates_is_the_textbooks():
    logits, gates, chosen = _routed()
    assert torch.allclose(gate_mass(chosen, gates, 5), reference.router_use(logits, 2), atol=1e-5)


def test_weighted_outputs_are_the_textbooks():
    logits, gates, chosen = _routed()
    given = torch.randn(5, 20, 3, generator=torch.Generator().manual_seed(1))
    total = weighted_outputs(chosen, gates, 5, lambda expert, token: given[expert, token])
    mean = total / gate_mass(chosen, (gates > 0).double(), 5).clamp_min(1)
    assert torch.allclose(mean, reference.router_weighted_outputs(logits, 2, given), atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("importance", ["use", "output"])
def test_a_blocks_experts_are_measured_as_the_textbook_does(family, importance):
    model, tokens = tiny_model(family), tiny_tokens()
    mixture, seen = model.model.layers[0].mlp, []
    handle = mixture.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 32)))
    outputs(model, tokens)
    handle.remove()
    x = torch.cat(seen).double()
    logits = x @ mixture.gate.weight.double().T
    expected = reference.router_use(logits, 2)
    if importance == "output":
        given = []
        for up, down in zip(mixture.experts.gate_up_proj.double(), mixture.experts.down_proj.double(), strict=True):
            gate, value = (x @ up.T).chunk(2, -1)
            given.append((F.silu(gate) * value) @ down.T)
        expected = reference.router_weighted_outputs(logits, 2, torch.stack(given))
    found = compress.Experts(experts=3, importance=importance)(model, calibration=tokens).measurements
    assert torch.allclose(torch.tensor(found["importance"][0]).double(), expected, rtol=1e-3)
    assert found["kept"][0] == sorted(expected.topk(3).indices.tolist())


def test_an_expert_that_no_token_visits_leaves_and_nothing_changes():
    model = tiny_model("gpt_oss")
    for index, layer in enumerate(model.model.layers):
        layer.mlp.router.bias.data[index] = -1e4
    before = outputs(model, tiny_tokens())
    result = compress.Experts(experts=3)(model, calibration=tiny_tokens())
    assert result.measurements["kept"] == [[1, 2, 3], [0, 2, 3], [0, 1, 3]]
    assert [block["use_lost"] for block in result.blocks] == pytest.approx([0, 0, 0])
    assert torch.allclose(outputs(model, tiny_tokens()), before, atol=1e-6)


def test_an_amount_is_reached_with_whole_experts():
    model = tiny_model("mixtral")
    result = compress.Experts(amount="25%")(model, calibration=tiny_tokens())
    assert model.config.num_local_experts == 2
    assert result.coverage >= 0.25
    assert compress.Experts(amount=0.05)(tiny_model("mixtral"), calibration=tiny_tokens()).coverage < 0.25


@pytest.mark.parametrize("residency", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_a_run_killed_after_it_ends_with_the_same_bytes(folder, tmp_path, residency, monkeypatch, unverified):
    passes = [{"experts": {"experts": 2}}, {"rtn": {"bits": 4, "group_size": 16}}]
    values = {"passes": passes, "residency": residency, "min_coverage": 0}
    run(_values(folder, tmp_path / "whole", **values))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for where in ("compress.passes.experts.keep_smaller", "compress.passes.rtn.RTN.compress_block"):
        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with pytest.raises(KeyboardInterrupt):
                run(_values(folder, tmp_path / "killed", **values))
    run(_values(folder, tmp_path / "killed", **values))
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_folder_of_a_run_is_a_plain_model_with_fewer_experts(folder, tmp_path):
    run(_values(folder, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.num_local_experts == 3
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == model.model.layers[0].mlp.router.weight.shape[0] == 3


def test_the_plan_foresees_the_size_of_the_files(folder, tmp_path, unverified):
    values = _values(folder, tmp_path / "out", passes=[{"experts": {"amount": "20%"}}])
    planned = compress.plan(Recipe.from_dict(values)).weights_bytes
    run(values)
    assert sum(f.stat().st_size for f in (tmp_path / "out" / "model").glob("*.safetensors")) == planned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 1}, "experts: 1: each token visits 2 experts, so as many must remain"),
        ({"experts": 4}, "nothing to remove"),
        ({"experts": 9}, "experts: 9 shall remain, and a block has 4"),
        ({"amount": 0.8}, "amount: 80%: leaves 0 of 4, and each token visits 2 experts"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(StartError, match=words):
        compress.Experts(**options)(tiny_model("mixtral"), calibration=tiny_tokens())


@pytest.mark.parametrize("options", [{}, {"experts": 2, "amount": 0.5}])
def test_one_target_must_be_given(options):
    with pytest.raises(ValidationError, match="give either experts"):
        compress.Experts(**options)


def test_a_model_without_experts_is_refused():
    with pytest.raises(StartError, match="experts: it removes experts, and this model is no mixture of experts"):
        compress.Experts(experts=2)(tiny_model("llama"), calibration=tiny_tokens())


def test_padding_is_no_use_of_an_expert():
    tokens, mask = tiny_tokens(2, 8), torch.arange(8) < torch.tensor([[8], [5]])

    def use(ids, mask=None):
        context = Context(calibration=replace(windows_from(ids, None), mask=mask))
        found = compress.Experts(experts=3).run(ModelHandle.wrap(tiny_model("mixtral")), context).measurements
        return torch.tensor(found["importance"])

    assert torch.allclose(use(tokens, mask), use(tokens[:1]) + use(tokens[1:, :5]), atol=1e-4)
