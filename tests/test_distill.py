"""distill: that a student nears its teacher whatever it is made of, what a warm cache spares, and what is refused."""

import copy
import dataclasses
import json

import pytest
import torch
from torch.nn import functional

import compress
from compress import training
from compress.data import windows_from
from compress.distillation import Distillation, Taught, Teacher, even_pairs, head_of
from compress.errors import RecipeError, StartError
from compress.losses import Loss, StudentOptions
from compress.maths.divergence import kl_divergence
from compress.model import ModelHandle
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import Context
from compress.pipeline import run
from compress.recipe import Recipe
from compress.student import make_student
from compress.teacher_cache import Kept, compact
from compress.testing import save_tiny, tiny_model, tiny_tokenizer, tiny_tokens

TEXT = tiny_tokens(64, 32)
SMALL = {"tokens": 32 * 32 * 30, "batch_size": 32}


def _divergence(model):
    with torch.no_grad():
        return kl_divergence(model(TEXT).logits, tiny_model("llama")(TEXT).logits).item()


def _losses(*entries):
    return [Loss.model_validate(entry) for entry in entries]


# What a loss is


def _value(entries, taught=None, teacher=None, student=None, kept=None, pairs=None, **batch):
    student = student or tiny_model("llama", seed=1)
    losses = _losses(*entries)
    pairs = pairs or [even_pairs(3, 3) if loss.kind == "hidden" else [(2, 2)] for loss in losses]
    kept = kept or Kept(0, 96, (1.0,), (0, 1, 2))
    objective = Distillation(student, losses, kept, teacher, pairs, torch.nn.ModuleDict())
    with torch.no_grad():
        return objective(input_ids=TEXT[:4], **batch, **(taught or {})).item()


def _logits(seed):
    with torch.no_grad():
        return tiny_model("llama", seed=seed)(TEXT[:4]).logits


def test_kl_is_that_of_the_two_models_logits_with_and_without_padding():
    teacher = Teacher(tiny_model("llama"))
    assert _value(["kl"], teacher=teacher) == pytest.approx(kl_divergence(_logits(1), _logits(0)).item(), rel=1e-5)
    mask = torch.ones(4, 32, dtype=torch.long)
    mask[1, 20:] = 0
    expected = kl_divergence(_logits(1), _logits(0), mask.bool()).item()
    assert _value(["kl"], teacher=teacher, attention_mask=mask) == pytest.approx(expected, rel=1e-4)


def test_labels_are_the_cross_entropy_of_the_next_tokens_that_are_to_be_learnt():
    logits = _logits(1)
    everything = functional.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:4, 1:].flatten()).item()
    assert _value(["labels"]) == pytest.approx(everything, rel=1e-5)
    labels = TEXT[:4].clone()
    labels[:, :20] = -100
    some = functional.cross_entropy(logits[:, 19:-1].flatten(0, 1), TEXT[:4, 20:].flatten()).item()
    assert _value(["labels"], labels=labels) == pytest.approx(some, rel=1e-5)


def test_kl_on_labelled_text_counts_the_positions_before_its_labels():
    labels = TEXT[:4].clone()
    labels[:, :20] = -100
    expected = kl_divergence(_logits(1)[:, 19:-1], _logits(0)[:, 19:-1]).item()
    assert _value(["kl"], teacher=Teacher(tiny_model("llama")), labels=labels) == pytest.approx(expected, rel=1e-5)


def test_the_second_task_counts_apart_from_the_first():
    labels = TEXT[:4].clone()
    labels[:, :20] = -100
    task = torch.tensor([0, 1, 0, 1])
    logits = _logits(1)[:, 19:-1]
    first, second = (
        functional.cross_entropy(logits[task == t].flatten(0, 1), TEXT[:4, 20:][task == t].flatten()).item()
        for t in (0, 1)
    )
    found = _value(["labels", {"rationale": {"weight": 0.5}}], labels=labels, task=task)
    assert found == pytest.approx(first + 0.5 * second, rel=1e-5)


def test_a_batch_with_the_teachers_words_gives_the_loss_of_one_that_asks_it():
    entries = ["kl", {"kl": {"direction": "jsd", "temperature": 2.0, "weight": 0.5}}, {"hidden": {"weight": 0.3}}]
    kept = Kept(96, 96, (1.0, 2.0), (0, 1, 2))
    teacher = Teacher(tiny_model("llama"), (0, 1, 2))
    said = compact(*teacher.said({"input_ids": TEXT[:4]}), kept)
    cached = _value(entries, {f"taught.{name}": tensor for name, tensor in said.items()}, kept=kept)
    assert cached == pytest.approx(_value(entries, teacher=teacher, kept=kept), rel=2e-3)


def test_hidden_and_attention_are_zero_for_the_teacher_itself_and_not_for_another():
    for entry in ("hidden", {"hidden": {"metric": "cosine"}}, "attention"):
        same, other = tiny_model("llama"), tiny_model("llama", seed=1)
        for model in (same, other):
            model.set_attn_implementation("eager")
        teacher = Teacher(tiny_model("llama"), (0, 1, 2), attention=True)
        teacher.model.set_attn_implementation("eager")
        assert _value([entry], teacher=teacher, student=same) == pytest.approx(0, abs=1e-6)
        assert _value([entry], teacher=teacher, student=other) > 0.05


def test_the_head_is_found_where_it_is_all_there_is_to_the_logits():
    model = tiny_model("llama")
    assert head_of(model) is model.lm_head
    scaled = tiny_model("gpt2")
    forward = scaled.lm_head.forward
    scaled.lm_head.forward = lambda x: forward(x) * 2
    assert head_of(scaled) is scaled.lm_head
    assert head_of(tiny_model("bert")) is None


def test_a_block_that_is_not_there_cannot_remain():
    with pytest.raises(StartError, match="there is no block 5, the last is 2"):
        compress.Distill(student={"layers": [1, 5]}, **SMALL)(
            tiny_model("llama"), training=TEXT, original=tiny_model("llama")
        )


# What training brings


@pytest.mark.parametrize(
    "losses", [None, ["kl", {"hidden": {"weight": 0.2}}], [{"kl": {"direction": "reverse"}}], ["attention", "kl"]]
)
def test_a_student_of_two_blocks_nears_its_teacher(losses):
    model = tiny_model("llama")
    compress.Distill(student={"layers": 2}, tokens=64)(model, training=TEXT, original=tiny_model("llama"))
    start = _divergence(model)
    model = tiny_model("llama")
    options = {**SMALL, "student": {"layers": 2}, "losses": losses, "learning_rate": 3e-3}
    result = compress.Distill(**options)(model, training=TEXT, original=tiny_model("llama"))
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert _divergence(model) < 0.75 * start
    assert result.measurements["steps"] == 30
    assert result.coverage == 1.0
    assert model.config._attn_implementation == "sdpa"


def test_zeros_stay_and_packed_layers_stay_packed():
    sparse = tiny_model("llama")
    compress.Magnitude(sparsity=0.5)(sparse)
    zeros = {name: p == 0 for name, p in sparse.named_parameters() if "layers" in name and p.dim() == 2}
    before = _divergence(sparse)
    compress.Distill(**SMALL, learning_rate=3e-3)(sparse, training=TEXT, original=tiny_model("llama"))
    assert _divergence(sparse) < 0.8 * before
    for name, zero in zeros.items():
        assert bool((sparse.get_parameter(name)[zero] == 0).all())
        assert int((sparse.get_parameter(name) == 0).sum()) == int(zero.sum())
    packed = tiny_model("llama")
    compress.RTN(bits=3, group_size=16)(packed)
    before = _divergence(packed)
    result = compress.Distill(**SMALL)(packed, training=TEXT, original=tiny_model("llama"))
    assert _divergence(packed) < 0.8 * before
    assert sum(isinstance(m, QuantLinear) for m in packed.modules()) == 21
    assert result.coverage == 1.0


def test_weights_in_16_bits_are_trained_in_32_and_come_back():
    model = tiny_model("llama").bfloat16()
    compress.Distill(tokens=1024, student={"layers": 2})(model, training=TEXT, original=tiny_model("llama").bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_student_of_other_widths_and_a_padded_vocabulary_learns_from_the_shared_part():
    student = tiny_model("llama", seed=3, hidden_size=16, vocab_size=104, num_hidden_layers=2)

    def far():
        with torch.no_grad():
            return kl_divergence(student(TEXT).logits[..., :96], tiny_model("llama")(TEXT).logits).item()

    before = far()
    compress.Distill(**SMALL, losses=_losses("kl", "hidden"), learning_rate=1e-2)(
        student, training=TEXT, original=tiny_model("llama")
    )
    assert far() < 0.8 * before
    assert not any("projections" in name for name, _ in student.named_parameters())


def test_an_encoder_learns_hidden_states_by_default():
    model, teacher = tiny_model("bert"), tiny_model("bert")
    result = compress.Distill(**SMALL, student={"layers": 2})(model, training=TEXT, original=teacher)
    losses = result.measurements["losses"]
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]


def test_text_that_the_student_writes_is_judged_by_the_teacher():
    model = tiny_model("llama")
    options = {**SMALL, "tokens": 32 * 32 * 8, "student": {"layers": 2}, "on_policy": 0.5}
    result = compress.Distill(**options)(model, training=TEXT, original=tiny_model("llama"))
    losses = result.measurements["losses"]
    assert losses[-1]["loss"] < losses[0]["loss"]


# What the cache spares


@pytest.fixture
def forwards(monkeypatch):
    """The number of batches that teachers were asked about."""
    count = []
    asked = Teacher.__call__

    def counting(self, text):
        count.append(1)
        return asked(self, text)

    monkeypatch.setattr(Teacher, "__call__", counting)
    return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def _values(folder, output, passes=None, **more):
    text = {"source": "builtin:tiny", "samples": 16, "length": 32}
    cache = str(output.parent / "cache")
    first = {"distill": {"tokens": 32 * 8 * 6, "student": {"layers": 2}, "cache": cache}}
    return {
        "model": str(folder), "data": {"training": text}, "passes": passes or [first], "benchmark": False,
        "output": str(output), **more,
    }  # fmt: skip


def test_with_a_warm_cache_another_recipe_does_not_open_the_teacher(
    folder, tmp_path, forwards, unverified, monkeypatch
):
    run(_values(folder, tmp_path / "first"))
    assert len(forwards) == 1  # 16 windows are one batch, 3 epochs are not three
    monkeypatch.setattr("compress.pipeline._original", lambda *_: pytest.fail("the teacher is opened"))
    values = _values(folder, tmp_path / "second")
    values["passes"][0]["distill"] |= {"learning_rate": 2e-3, "losses": [{"kl": {"direction": "reverse"}}]}
    report = run(values)
    assert len(forwards) == 1
    assert report.stages[0].measurements["cache"]["bytes_per_token"] < 200


def test_without_a_cache_the_teacher_is_asked_in_every_step(folder, tmp_path, forwards, unverified):
    values = _values(folder, tmp_path / "run")
    values["passes"][0]["distill"]["cache"] = "off"
    run(values)
    assert len(forwards) == 6


# Runs


def test_a_run_killed_in_training_ends_with_the_same_bytes(folder, tmp_path, monkeypatch, unverified):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)

    def values(name):
        made = _values(folder, tmp_path / name)
        made["passes"][0]["distill"] |= {"on_policy": 0.5, "control": True}
        return made

    run(values("whole"))
    done = training._Trainer.training_step
    calls = []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) in (3, 10):
            raise KeyboardInterrupt
        return done(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "training_step", step)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(values("killed"))
    run(values("killed"))
    assert len(calls) == 12 + 2
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()


def test_a_smaller_student_survives_a_kill_after_its_stage_and_the_passes_after_it(
    folder, tmp_path, monkeypatch, unverified
):
    passes = [
        {"distill": {"tokens": 512, "student": {"source": "fresh", "layers": 2, "intermediate_size": 32}}},
        {"rtn": {"bits": 4, "group_size": 16}},
    ]
    run(_values(folder, tmp_path / "whole", passes))
    with monkeypatch.context() as patch:
        patch.setattr("compress.passes.rtn.RTN.compress_block", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(_values(folder, tmp_path / "killed", passes))
    run(_values(folder, tmp_path / "killed", passes))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()


@pytest.mark.parametrize(
    ("student", "blocks"),
    [({"source": "teacher", "layers": [0, 2]}, 2), ({"source": "fresh"}, 3)],
)
def test_the_written_student_is_as_large_as_planned(student, blocks, folder, tmp_path, unverified):
    values = _values(folder, tmp_path / "out")
    values["passes"][0]["distill"]["student"] = student
    planned = compress.plan(Recipe.from_dict(values))
    run(values)
    assert (tmp_path / "out/model/model.safetensors").stat().st_size == planned.weights_bytes
    assert json.loads((tmp_path / "out/model/config.json").read_text())["num_hidden_layers"] == blocks


def test_a_written_student_gives_the_same_logits_in_plain_transformers(folder, tmp_path):
    assert run(_values(folder, tmp_path / "out")).verified.reloaded


def test_a_given_student_takes_the_models_place(folder, tmp_path, unverified):
    small = save_tiny(tmp_path / "small", hidden_size=16, num_hidden_layers=2)
    values = _values(folder, tmp_path / "out")
    values["passes"][0]["distill"]["student"] = {"source": str(small)}
    run(values)
    assert json.loads((tmp_path / "out/model/config.json").read_text())["hidden_size"] == 16


def test_accuracies_of_teacher_student_and_control_stand_in_the_account():
    items = [{"good": "a b c", "bad": "c b a"}, {"prompt": "ab", "completion": "c"}] * 4
    model = ModelHandle.wrap(tiny_model("llama"))
    context = Context(
        training=windows_from(TEXT, None), original=lambda: tiny_model("llama"), tokenizer=tiny_tokenizer(),
        tasks={"order": items, "next": items},
    )  # fmt: skip
    measured = compress.Distill(tokens=512, student={"layers": 2}, control=True).run(model, context).measurements
    areas = measured["areas"]
    assert set(areas) == {"teacher", "before", "after", "control", "differences"}
    assert set(areas["after"]) == {"order", "next", "mean"}
    assert set(areas["differences"]) == {"teacher", "before", "control"}
    assert areas["differences"]["control"]["ci_low"] is not None
    assert measured["control"][-1]["loss"] > 0


# What is refused


def test_another_tokenizer_is_found_by_its_content_and_the_way_out_is_named(tmp_path, folder):
    other = save_tiny(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    with pytest.raises(StartError, match=r"so kl has nothing to compare. .* use answers with losses: \[labels\]"):
        compress.Distill(teacher=str(other), **SMALL)(
            tiny_model("llama"), training=TEXT, tokenizer=tiny_tokenizer(), original=tiny_model("llama")
        )
    values = _values(folder, tmp_path / "out")
    values["passes"][0]["distill"]["student"] = {"source": str(other)}
    with pytest.raises(StartError, match="Make the student the recipe's model"):
        run(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": [{"kl": {"direction": "backward"}}]}, r'"backward" is not allowed; allowed: forward, reverse, jsd'),
        ({"losses": [{"kl": {"temprature": 2}}]}, r"unknown key; allowed: weight, direction, beta, temperature"),
        ({"losses": ["kll"]}, r'"kll" is no loss; allowed: one of kl, hidden'),
        ({"losses": [{"kl": {}, "labels": {}}]}, r"an entry of losses has one key, not 2"),
        ({"losses": [{"kl": {"weight": 0}}]}, r"0 is not allowed; allowed: a number above 0"),
        ({"losses": []}, r"losses"),
        ({"student": {"layers": "half"}}, r'"half" is not allowed; allowed: a whole number, or a percentage'),
    ],
)
def test_a_recipe_with_a_wrong_loss_is_refused_when_it_is_read(options, message, folder, tmp_path):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(_values(folder, tmp_path, [{"distill": options}]))


def test_blocks_that_are_not_there_are_named():
    losses = _losses({"hidden": {"layers": {0: 7}}})
    with pytest.raises(StartError, match=r"losses.hidden.layers: 0: 7 is not there; .* the teacher 0 to 2"):
        compress.Distill(losses=losses, **SMALL)(tiny_model("llama"), training=TEXT, original=tiny_model("llama"))


def test_options_come_back_as_they_were_given():
    given = compress.Distill(losses=_losses("kl", {"hidden": {"layers": {0: 2}}}), student={"layers": 2})
    assert given.options()["losses"][0] == {
        "kl": {"weight": 1.0, "direction": "forward", "beta": 0.5, "temperature": 1.0}
    }
    assert compress.Distill(**json.loads(json.dumps(given.options()))) == given
    assert copy.deepcopy(given) == given


def test_windows_carry_labels_and_tasks_to_the_batch():
    from dataclasses import replace

    windows = replace(windows_from(TEXT, None), labels=TEXT)
    item = Taught(windows, None, torch.zeros(64, dtype=torch.long))[3]
    assert torch.equal(item["labels"], TEXT[3])
    assert int(item["task"]) == 0


def test_a_classifier_learns_from_half_of_its_blocks_and_is_measured_on_text_kept_back():
    import transformers

    def classifier():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_labels=3, max_position_embeddings=64, pad_token_id=0,
        )  # fmt: skip
        config.architectures = ["BertForSequenceClassification"]
        model = transformers.BertForSequenceClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.15)
        return model

    with torch.no_grad():
        classes = classifier()(TEXT).logits.argmax(-1)
    windows = dataclasses.replace(windows_from(TEXT, None), labels=classes)
    model = ModelHandle.wrap(classifier())
    context = Context(training=windows, original=classifier)
    losses = _losses({"kl": {"temperature": 2}}, {"hidden": {"weight": 0.2}}, {"labels": {"weight": 0.5}})
    options = {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "student": {"layers": 2}, "control": True}
    measured = compress.Distill(losses=losses, **options).run(model, context).measurements
    assert len(model.block_list()) == 2
    assert measured["losses"][-1]["loss"] < 0.7 * measured["losses"][0]["loss"]
    areas = measured["areas"]
    assert areas["teacher"]["classes"] == 1.0
    assert set(areas) == {"teacher", "before", "after", "control", "differences"}
    assert areas["after"]["classes"] >= areas["before"]["classes"]


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_of_an_encoder_the_lowest_blocks_remain_whatever_the_last_one_changes(family):
    def kept(layers):
        model = ModelHandle.wrap(tiny_model(family))
        before = [copy.deepcopy(block.module) for block in model.block_list()]
        with torch.no_grad():
            for parameter in model.block_list()[-1].module.parameters():
                parameter.mul_(3)  # what changes the text most
        windows = windows_from(TEXT, None)
        make_student(model, StudentOptions(layers=layers), lambda: model.model, Context(training=windows))
        now = [next(block.module.parameters()) for block in model.block_list()]
        return [next(i for i, old in enumerate(before) if torch.equal(next(old.parameters()), p)) for p in now]

    assert kept(2) == kept("50%") == [0, 1]


def test_text_written_in_bfloat16_leaves_every_weight_its_gradient():
    student, teacher = tiny_model("llama", seed=1).requires_grad_(True), Teacher(tiny_model("llama"))
    objective = Distillation(student, _losses("kl"), Kept(0, 96), teacher, [[]], torch.nn.ModuleDict(), on_policy=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        objective(input_ids=TEXT[:4]).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
