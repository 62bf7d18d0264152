"""LoRA: what it wins back, what stays as it was, what it leaves beside the model or in it, and what it refuses."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import compress
from compress import training
from compress.adapters import Adapter, layers_of
from compress.data import windows_from
from compress.errors import CompressError, RecipeError, StartError
from compress.held_out import classified, quality, split
from compress.maths.divergence import kl_divergence
from compress.nn.quant_linear import QuantLinear
from compress.pipeline import run
from compress.recipe import Recipe
from compress.testing import save_tiny, tiny_model, tiny_tokenizer, tiny_tokens

TEXT = tiny_tokens(48, 16)
SMALL = {"r": 4, "tokens": 16 * 16 * 12, "batch_size": 16, "evaluations": 2, "learning_rate": 5e-3}
SMALL |= {"keep_unpacked": True, "precision": "float32"}


def _rounded(bits=3, **options):
    model = tiny_model("llama")
    compress.RTN(bits=bits, group_size=16, **options)(model)
    return model


def _divergence(model):
    with torch.no_grad():
        return kl_divergence(model(TEXT).logits, tiny_model("llama")(TEXT).logits).item()


def _packed(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def test_on_a_packed_base_training_brings_it_nearer_and_leaves_the_codes_packed():
    model = _rounded()
    before, packed = _divergence(model), _packed(model)
    codes = {name: layer.weight_packed.clone() for name, layer in packed.items()}
    result = compress.LoRA(**SMALL)(model, training=TEXT, original=tiny_model("llama"))
    assert _divergence(model) < 0.75 * before
    assert result.coverage == 1.0
    assert result.measurements["parameters"] == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert all(torch.equal(layer.weight_packed, codes[name]) for name, layer in packed.items())
    assert set(layers_of(model)) == set(packed)


def test_gradients_pass_a_packed_layer_and_no_weight_is_kept_for_them():
    layer = _packed(_rounded())["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x).square().sum().backward()
    dense = x.detach().clone().requires_grad_(True)
    nn.functional.linear(dense, layer.dequantize()).square().sum().backward()
    assert torch.allclose(x.grad, dense.grad, rtol=1e-5)
    assert max(sizes) < layer.in_features * layer.out_features


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "gaussian"}]
)
def test_zeros_of_a_pruned_model_stay_through_training_and_merging(options):
    model = tiny_model("llama")
    compress.Magnitude(sparsity=0.5)(model)
    before = _divergence(model)
    zeros = {n: p == 0 for n, p in model.named_parameters() if "proj" in n}
    compress.LoRA(**SMALL, merge=True, **options)(model, training=TEXT, original=tiny_model("llama"))
    assert not layers_of(model)
    assert _divergence(model) < 0.75 * before
    for name, zero in zeros.items():
        weight = model.get_parameter(name)
        assert bool((weight[zero] == 0).all())
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_zeros_stay_when_the_base_is_pruned_and_packed():
    model = tiny_model("llama")
    compress.Magnitude(sparsity=0.5)(model)
    compress.RTN(bits=4, group_size=16)(model)
    zeros = {name: layer.dequantize() == 0 for name, layer in _packed(model).items()}
    compress.LoRA(**SMALL, merge=True)(model, training=TEXT, original=tiny_model("llama"))
    assert all(bool((layer.dequantize()[zeros[name]] == 0).all()) for name, layer in _packed(model).items())


def test_merging_into_a_packed_base_rounds_anew_on_text_and_says_what_it_cost():
    model = _rounded(4)
    specs = {name: layer.spec for name, layer in _packed(model).items()}
    result = compress.LoRA(**SMALL, merge=True, held_out=0.25)(model, training=TEXT, original=tiny_model("llama"))
    assert {name: layer.spec for name, layer in _packed(model).items()} == specs
    said = {name: values["kl_divergence"] for name, values in result.measurements["held_out"].items()}
    assert set(said) == {"before", "after", "rounded plainly", "merged"}
    assert said["after"] < said["merged"] < said["rounded plainly"]
    assert said["merged"] == pytest.approx(_held_out_divergence(model, 0.25))


def _held_out_divergence(model, share):
    _, held_out = split(windows_from(TEXT, None), share, 0)
    return quality(model, held_out, tiny_model("llama"))["kl_divergence"]


def test_merged_into_dense_weights_it_computes_what_it_did_beside_them():
    models = [tiny_model("gpt2") for _ in range(2)]
    for model, merge in zip(models, (False, True), strict=True):
        compress.LoRA(**SMALL, purpose="task", merge=merge)(model, training=TEXT)
    outputs = [model(TEXT[:2]).logits for model in models]
    assert torch.allclose(*outputs, rtol=0, atol=1e-4)
    assert not layers_of(models[1])


def test_pissa_is_kept_as_an_adapter_of_the_untouched_base():
    model, base = tiny_model("llama"), tiny_model("llama")
    compress.LoRA(**SMALL, purpose="task", init_lora_weights="pissa")(model, training=TEXT)
    layer = layers_of(model)["model.layers.0.mlp.up_proj"]
    assert layer.r["default"] == 8
    assert torch.allclose(layer.base_layer.weight, base.model.layers[0].mlp.up_proj.weight, atol=1e-6)
    assert not torch.equal(model(TEXT).logits, base(TEXT).logits)


def test_loftq_begins_nearer_to_the_original_than_the_base_is():
    model = _rounded()
    before = _divergence(model)
    result = compress.LoRA(**{**SMALL, "tokens": 1, "learning_rate": 1e-9}, init_lora_weights="loftq")(
        model, training=TEXT, original=tiny_model("llama")
    )
    assert result.measurements["steps"] == 1
    assert _divergence(model) < 0.9 * before


def test_eva_begins_at_the_principal_directions_of_the_inputs_and_changes_nothing():
    model = tiny_model("llama")
    compress.LoRA(
        **{**SMALL, "tokens": 1, "learning_rate": 1e-12, "held_out": 0}, purpose="task", init_lora_weights="eva"
    )(model, training=TEXT)
    assert torch.allclose(model(TEXT).logits, tiny_model("llama")(TEXT).logits, atol=1e-4)
    seen = []
    plain = tiny_model("llama")
    plain.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(-1, 32)))
    plain(TEXT)
    _, _, directions = torch.linalg.svd(seen[0].double(), full_matrices=False)
    found = layers_of(model)["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.double()
    overlap = (found[0] @ directions[0]).abs().item() / found[0].norm().item()
    assert overlap > 0.99


def test_automatic_ranks_go_where_the_damage_is_and_keep_the_budget():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(torch.outer(torch.randn(32), torch.randn(64)))
    compress.RTN(bits=8, group_size=16, targets=["mlp.up_proj"])(model, min_coverage=0)
    compress.LoRA(**{**SMALL, "r": "auto"}, parameters=400, held_out=0)(
        model, training=TEXT, original=tiny_model("llama")
    )
    ranks = {name: layer.r["default"] for name, layer in layers_of(model).items()}
    assert ranks["model.layers.1.mlp.down_proj"] >= 1
    assert sum(r * 96 if "mlp" in name else r * 64 for name, r in ranks.items()) <= 400


def test_the_adapter_is_the_same_for_a_seed_and_another_for_another():
    found = []
    for seed in (0, 0, 1):
        model = _rounded()
        compress.LoRA(**SMALL)(model, training=TEXT, original=tiny_model("llama"), seed=seed)
        found.append(layers_of(model)["model.layers.0.mlp.up_proj"].lora_A["default"].weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_micro_batches_and_checkpointing_change_memory_and_not_the_result():
    found = []
    for options in ({}, {"micro_batch_size": 8, "gradient_checkpointing": True}):
        model = _rounded()
        compress.LoRA(**SMALL, **options)(model, training=TEXT, original=tiny_model("llama"))
        found.append(_divergence(model))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "states", "message"),
    [
        ({"r": 0}, (), "r is 0: use a rank of at least 1, or auto"),
        ({"r": 33}, (), r"r is 33, and model.layers.0.self_attn.q_proj is \[32, 32\]: its rank is 32 at most"),
        ({"target_modules": ["q_porj"]}, (), "target_modules: q_porj matches no layer of the blocks, whose layers end"),
        ({"target_modules": "("}, (), "is no regular expression"),
        ({"modules_to_save": ["heed"]}, (), "modules_to_save: heed matches no module; the model has model, lm_head"),
        ({"modules_to_save": ["lm_head"]}, (), "lm_head is tied to another module, or packed"),
        ({"init_lora_weights": "loftq"}, (), "loftq begins at what rounding or pruning took"),
        ({"init_lora_weights": "pissa"}, ("rtn",), "pissa takes its start out of dense weights"),
        ({"init_lora_weights": "repair"}, (), "repair needs the pass repair before it"),
        ({"use_dora": True, "merge": True}, ("magnitude",), "use_dora has no form that keeps zeros"),
        ({"parameters": "2"}, (), "parameters is 2: use a number of at least 1, or a share as in 2%"),
        ({"micro_batch_size": 3}, (), "micro_batch_size 3 does not divide batch_size 16"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan_with_a_sentence(options, states, message, folder, tmp_path):
    before = {"rtn": {"rtn": {"bits": 4, "group_size": 16}}, "magnitude": {"magnitude": {"sparsity": 0.5}}}
    passes = [*(before[name] for name in states), {"lora": {**SMALL, **options}}]
    values = {**_values(folder, tmp_path / "out"), "passes": passes}
    with pytest.raises((StartError, RecipeError), match=message):
        compress.plan(Recipe.from_dict(values))
    assert not (tmp_path / "out").exists()


def test_automatic_ranks_of_an_undamaged_model_are_refused_and_the_model_stays():
    model = tiny_model("llama")
    with pytest.raises(StartError, match="this model is as the original: give r"):
        compress.LoRA(**{**SMALL, "r": "auto"})(model, training=TEXT, original=tiny_model("llama"))
    assert not layers_of(model)


def test_an_encoder_without_a_head_cannot_learn_text():
    with pytest.raises(StartError, match="BertModel has no head that says a next token or a class"):
        compress.LoRA(**SMALL, purpose="task")(tiny_model("bert"), training=TEXT)


def test_a_loss_that_is_not_finite_gives_the_base_back(monkeypatch):
    model = _rounded()
    before = model(TEXT).logits
    monkeypatch.setattr("compress.passes.end_to_end.kl_divergence", lambda a, *_: a.sum() * float("nan"))
    with pytest.raises(CompressError, match=r"lora: the loss of step 1 is nan"):
        compress.LoRA(**{**SMALL, "held_out": 0})(model, training=TEXT, original=tiny_model("llama"))
    assert torch.equal(model(TEXT).logits, before)
    assert not layers_of(model)


def test_completions_alone_are_learnt():
    model = tiny_model("llama")
    items = [{"prompt": f"say {letter}: ", "completion": letter * 3} for letter in "abcdefgh"] * 4
    result = compress.LoRA(r=8, epochs=8, batch_size=8, learning_rate=2e-2, purpose="task", held_out=0.1)(
        model, training=items, tokenizer=tiny_tokenizer()
    )
    said = result.measurements["held_out"]
    assert said["after"]["perplexity"] < 4 < 20 < said["before"]["perplexity"]


def test_f1_is_the_mean_over_classes():
    found = classified([0, 1, 1, 1], [0, 0, 1, 1])
    assert found == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 4 / 5) / 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def _values(folder, output, **more):
    text = {"source": "builtin:tiny", "samples": 16, "length": 32}
    passes = [{"rtn": {"bits": 4, "group_size": 16}}, {"lora": {"r": 4, "tokens": 8 * 32 * 6, "batch_size": 8}}]
    return {
        "model": str(folder), "data": {"training": text}, "passes": passes, "benchmark": False,
        "output": str(output), **more,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_run_leaves_the_base_and_the_adapter_which_plain_peft_and_load_put_together(folder, tmp_path):
    values = _values(folder, tmp_path / "run")
    values["passes"][0]["rtn"]["symmetric"] = False
    report = run(values)
    assert report.verified.max_logit_difference < 1e-5
    assert report.stages[1].pass_ == "lora"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    plain = PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    whole, base = compress.load(tmp_path / "run"), compress.load(tmp_path / "run", adapter=False)
    outputs = [model(TEXT[:2]).logits for model in (plain, whole, base)]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)
    assert all(isinstance(layer.base_layer, QuantLinear) for layer in layers_of(whole).values())
    (tmp_path / "run/adapter/adapter_config.json").unlink()
    with pytest.raises(CompressError, match=r"is the base of an adapter, by its history, and .* does not"):
        compress.load(tmp_path / "run")


def test_an_adapter_that_does_not_fit_is_named_and_the_model_stays(folder, tmp_path, unverified):
    run(_values(folder, tmp_path / "run"))
    adapter = Adapter.read(tmp_path / "run/adapter")
    other = tiny_model("llama", intermediate_size=48)
    before = other(TEXT).logits
    with pytest.raises(CompressError, match=r"does not fit LlamaForCausalLM \(of another shape: .*mlp"):
        adapter.attach(other)
    assert torch.equal(other(TEXT).logits, before)


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_killed_in_training_or_after_ends_with_the_same_bytes(merge, folder, tmp_path, monkeypatch, unverified):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)

    def values(name):
        found = _values(folder, tmp_path / name)
        found["passes"][1]["lora"]["merge"] = merge
        return found

    run(values("whole"))
    done, calls = training._Trainer.training_step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return done(self, *args, **kwargs)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            run(values("killed"))
        patch.setattr("compress.pipeline._export", fail)
        with pytest.raises(KeyboardInterrupt):
            run(values("killed"))
    assert len(calls) == 4 + 3
    run(values("killed"))
    names = ["model/model.safetensors", "model/config.json"]
    names += [] if merge else ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "whole/adapter").exists() is not merge


def test_the_plan_states_the_parts_of_training_and_the_size_to_the_byte(folder, tmp_path, unverified):
    values = _values(folder, tmp_path / "run")
    plan = compress.plan(Recipe.from_dict(values))
    parts = plan.steps[2].parts
    assert parts["gradients"] == 4 * 6144
    assert parts["optimizer"] == 8 * 6144
    run(values)
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert plan.weights_bytes == written


def test_a_memory_budget_lowers_the_micro_batch_and_the_result_stays(folder, tmp_path, unverified):
    whole = compress.plan(Recipe.from_dict(_values(folder, tmp_path / "a"))).steps[2]
    less = whole.memory_bytes - whole.parts["activations"] // 2
    values = _values(folder, tmp_path / "b", memory=int(less))
    step = compress.plan(Recipe.from_dict(values)).steps[2]
    assert step.options == {"micro_batch_size": 4}
    assert step.memory_bytes <= less
    losses = [run(v).stages[1].measurements["losses"][-1]["loss"] for v in (_values(folder, tmp_path / "a"), values)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    history = json.loads((tmp_path / "b/model/compress.json").read_text())["history"]
    assert history[1]["options"]["micro_batch_size"] == 4
