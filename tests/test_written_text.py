"""Text that the teacher writes beside the given one: what is learnt from it, what is kept of it, what is refused."""

import dataclasses

import pytest
import torch
from transformers import GenerationMixin

import compress
from compress import self_text, training
from compress.data import windows_from
from compress.errors import RecipeError, StartError
from compress.passes.base import Context
from compress.passes.end_to_end import TRAINER_BYTES
from compress.pipeline import run
from compress.recipe import Recipe
from compress.self_text import with_written, write_text, writing_bytes
from compress.shapes import ModelShape
from compress.testing import save_tiny, tiny_model, tiny_tokenizer, tiny_tokens

TEXT = tiny_tokens(16, 32)


@pytest.fixture
def trained(monkeypatch):
    """The token ids that each training run was given."""
    seen = []
    inner = training.train

    def spy(objective, groups, texts, *args, **options):
        seen.append(getattr(texts, "windows", texts).tokens)
        return inner(objective, groups, texts, *args, **options)

    monkeypatch.setattr("compress.teaching.train", spy)
    return seen


@pytest.fixture
def generations(monkeypatch):
    """The number of batches that models wrote."""
    count = []
    inner = GenerationMixin.generate

    def counting(self, *args, **options):
        count.append(1)
        return inner(self, *args, **options)

    monkeypatch.setattr(GenerationMixin, "generate", counting)
    return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def _values(folder, output, **options):
    text = {"source": "builtin:tiny", "samples": 16, "length": 32}
    entry = {"steps": 6, "student": {"layers": 2}, "cache": str(output.parent / "cache"), "generated": 320, **options}
    return {
        "model": str(folder), "data": {"training": text}, "passes": [{"distill": entry}], "benchmark": False,
        "output": str(output),
    }  # fmt: skip


# What is learnt from it


def test_the_teacher_writes_beside_the_given_text_and_the_control_has_the_given_text_alone(trained, tmp_path):
    options = {"steps": 4, "student": {"layers": 2}, "cache": str(tmp_path), "control": True}
    controls = [
        compress.Distill(generated=generated, **options)(
            tiny_model("llama"), training=TEXT, original=tiny_model("llama")
        ).measurements["control"]
        for generated in (320, 0)
    ]
    alone, whole = trained[:2]
    assert torch.equal(alone, TEXT)
    assert whole.shape == (16 + 10, 32)
    assert torch.equal(whole[:16], TEXT)
    assert controls[0] == controls[1]


def test_labels_alone_learn_written_text_too(trained, tmp_path):
    pass_ = compress.Distill(steps=4, losses=["labels"], generated=320, cache=str(tmp_path))
    measured = pass_(tiny_model("llama"), training=TEXT, original=tiny_model("llama")).measurements
    assert trained[0].shape == (16 + 10, 32)
    assert measured["generated"] == {"tokens": 320}


def test_of_more_text_than_is_seen_given_windows_make_room():
    windows = windows_from(TEXT, None)
    found = with_written(windows, lambda: tiny_model("llama"), 320, Context(), "test", folder=None, most=12)
    assert found.tokens.shape == (12, 32)
    assert torch.equal(found.tokens[:2], TEXT[:2])
    assert not torch.equal(found.tokens[2], TEXT[2])
    few = with_written(windows, lambda: tiny_model("llama"), 320, Context(), "test", folder=None, most=4)
    assert few.tokens.shape == (4, 32)


def test_all_of_what_is_written_is_to_be_learnt_where_of_the_given_text_a_part_is():
    labels = TEXT.masked_fill(torch.arange(32) < 20, -100)
    windows = dataclasses.replace(windows_from(TEXT, None), labels=labels)
    found = with_written(windows, lambda: tiny_model("llama"), 64, Context(), "test", folder=None)
    assert torch.equal(found.labels[:16], labels)
    assert torch.equal(found.labels[16:], found.tokens[16:])


def test_a_teacher_of_a_padded_vocabulary_writes_tokens_that_the_student_has(trained, tmp_path):
    first = torch.arange(3, 43)
    wide = lambda: tiny_model("llama", vocab_size=300)  # noqa: E731
    assert int(write_text(wide, first, 12, 0, "test").max()) >= 96
    assert int(write_text(wide, first, 12, 0, "test", vocabulary=96).max()) < 96
    pass_ = compress.Distill(steps=4, generated=320, cache=str(tmp_path))
    pass_(tiny_model("llama"), training=TEXT, original=wide())
    assert int(trained[0][16:].max()) < 96


# What is kept of it


def test_with_a_warm_cache_another_recipe_neither_writes_nor_opens_the_teacher(
    folder, tmp_path, generations, unverified, monkeypatch
):
    run(_values(folder, tmp_path / "first"))
    assert len(generations) == 1
    monkeypatch.setattr("compress.pipeline._original", lambda *_: pytest.fail("the teacher is opened"))
    report = run(_values(folder, tmp_path / "second", learning_rate=2e-3))
    assert len(generations) == 1
    assert report.stages[0].measurements["generated"] == {"tokens": 320}


def test_another_teacher_amount_text_or_seed_has_written_text_of_its_own(tmp_path):
    def written(teacher=0, tokens=64, text=TEXT, seed=0):
        model = tiny_model("llama", seed=teacher)
        found = with_written(
            windows_from(text, None), lambda: model, tokens, Context(seed=seed), "test", folder=tmp_path,
            identity={"teacher": str(teacher)},
        )  # fmt: skip
        return len(list(tmp_path.glob("written-*.safetensors"))), found.fingerprint

    first = written()
    assert first[0] == 1
    assert written() == first
    counts = [written(**other)[0] for other in ({"teacher": 1}, {"tokens": 96}, {"text": TEXT[:4]}, {"seed": 1})]
    assert counts == [2, 3, 4, 5]


@pytest.mark.parametrize("cache", ["own", "off"])
def test_a_run_killed_in_training_does_not_write_again_and_ends_with_the_same_bytes(
    cache, folder, tmp_path, generations, monkeypatch, unverified
):
    def values(name):
        return _values(folder, tmp_path / name / "run", **({"cache": "off"} if cache == "off" else {}))

    run(values("whole"))
    done = training._Trainer.training_step
    calls = []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return done(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(values("killed"))
    run(values("killed"))
    assert len(generations) == 2  # one for each of the two runs
    files = [tmp_path / name / "run/model/model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_writing_that_was_killed_goes_on_and_ends_with_the_same_text(tmp_path, generations, monkeypatch):
    first = torch.arange(3, 13)
    monkeypatch.setattr(self_text, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(self_text, "_side_by_side", lambda *_: 3)

    def write(name):
        return write_text(lambda: tiny_model("llama"), first, 12, 0, "test", kept=tmp_path / f"{name}.safetensors")

    whole = write("whole")
    inner, parts = self_text._save, []

    def fail(path, tensors):
        inner(path, tensors)
        parts.append(path.suffix)
        if len(parts) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(self_text, "_save", fail)
        with pytest.raises(KeyboardInterrupt):
            write("killed")
    assert parts == [".begun", ".begun"]
    assert torch.equal(write("killed"), whole)
    assert len(generations) == 4 + 4
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert names == {"whole.safetensors", "killed.safetensors"}


# What the plan says


def test_writing_takes_keys_and_values_of_the_windows_at_a_time_and_the_likelihoods_of_a_token(monkeypatch):
    shape = ModelShape(tiny_model("llama").to("meta"), torch.float32)
    text = shape.handle.config
    token = 2 * 4 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads  # of one block
    assert writing_bytes(shape, 320, 32) == 10 * 32 * (3 + 1) * token + 4 * 4 * 10 * 96
    monkeypatch.setattr(self_text, "SMALL_BUDGET", 4 * 32 * 3 * token)
    monkeypatch.setattr(self_text, "CACHE_BUDGET", 4 * 32 * 3 * token)
    assert writing_bytes(shape, 320, 32) == 4 * 32 * (3 + 1) * token + 4 * 4 * 4 * 96
    assert writing_bytes(shape, 0, 32) == 0


def test_the_plan_has_the_larger_of_writing_and_training(folder, tmp_path, monkeypatch):
    def planned(**options):
        values = _values(folder, tmp_path / "run", **options)
        return next(step for step in compress.plan(Recipe.from_dict(values)).steps if step.name == "distill")

    none = planned(generated=0).parts["pass"]
    assert planned().parts["pass"] == none
    monkeypatch.setattr(self_text, "writing_bytes", lambda shape, tokens, length: tokens << 30)
    original = ModelShape(tiny_model("llama").to("meta"), torch.float32).original_bytes
    assert planned(generated=2).parts["pass"] == TRAINER_BYTES + original + (2 << 30)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": {"prompts": "builtin:tiny"}}, r"generated adds to the training text, and answers take its place"),
        ({"steps": None, "tokens": 319}, r"320 tokens generated are more than the 319 that are to be seen"),
        ({"generated": -1}, r"generated: -1 is not allowed"),
    ],
)
def test_what_cannot_be_generated_is_refused_when_the_recipe_is_read(options, message, folder, tmp_path):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(_values(folder, tmp_path / "run", **options))


@pytest.mark.parametrize("passes", [[{"distill": {"generated": 64}}], ["gptq", {"llm_qat": {"generated": 64}}]])
def test_texts_that_stand_alone_are_refused_when_the_recipe_is_read(passes, folder, tmp_path):
    values = _values(folder, tmp_path / "run") | {"passes": passes}
    values["data"]["training"] |= {"pack": False}
    with pytest.raises(RecipeError, match=r"comes in whole windows: leave data.training.pack out"):
        Recipe.from_dict(values)


def test_padded_windows_are_refused_when_the_pass_begins():
    windows = dataclasses.replace(windows_from(TEXT, None), mask=torch.ones(16, 32, dtype=torch.bool))
    with pytest.raises(StartError, match=r"distill: generated text comes in whole windows: leave out `pack: false`"):
        with_written(windows, lambda: pytest.fail("opened"), 64, Context(), "distill", folder=None)


def test_a_model_that_writes_no_text_is_refused_by_the_plan(tmp_path):
    folder = save_tiny(tmp_path / "model", "bert")
    with pytest.raises(StartError, match=r"distill: generated: BertModel writes no text of its own: leave it out"):
        compress.plan(Recipe.from_dict(_values(folder, tmp_path / "run")))


def test_a_teacher_whose_tokens_are_others_writes_nothing_for_the_student(tmp_path):
    other = save_tiny(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    pass_ = compress.Distill(teacher=str(other), losses=["labels"], steps=1, generated=64)
    with pytest.raises(StartError, match=r"cannot read the tokens that it writes: use answers in the place of"):
        pass_(tiny_model("llama"), training=TEXT, tokenizer=tiny_tokenizer(), original=tiny_model("llama"))
