import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import compress
from compress.errors import CompressError, StartError
from compress.passes.vocab import choose
from compress.pipeline import run
from compress.recipe import Recipe
from compress.testing import FAMILIES, outputs, renumbered, tiny_model, tiny_tokens
from tests.test_vocabulary import DOMAIN, TEXT, byte_level, ids

ROWS = 384  # more than the tokenizer has, as in models that pad their vocabulary


def _model(family="llama", **changes):
    return tiny_model(family, vocab_size=ROWS, bos_token_id=0, eos_token_id=0, pad_token_id=0, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    model = _model()
    model.generation_config.suppress_tokens = [310, 371]
    model.save_pretrained(folder / "model")
    byte_level().save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOMAIN * 8))
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT * 4))
    return folder


def _values(folder, output, **changes):
    return {
        "model": str(folder / "model"), "output": str(output), "benchmark": False, "passes": [{"vocab": {}}],
        "data": {"calibration": {"source": str(folder / "text.jsonl"), "samples": 4, "length": 16}}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_the_tokens_that_stay_get_the_logits_they_had(family):
    model, before, tokens = tiny_model(family), tiny_model(family), tiny_tokens()[:, :12]
    kept = compress.Vocab()(model, calibration=tokens).kept_tokens
    assert set(tokens.flatten().tolist()) <= set(kept)
    assert model.get_input_embeddings().weight.shape[0] == model.config.get_text_config().vocab_size == len(kept) < 96
    expected = outputs(before, tokens)
    expected = expected[..., kept] if before.get_output_embeddings() is not None else expected
    assert torch.equal(outputs(model, renumbered(tokens, kept)), expected)


def test_a_heads_bias_is_cut_with_its_rows():
    model = BertForMaskedLM(tiny_model("bert").config).eval()
    model.cls.predictions.bias.data.normal_()
    tokens = tiny_tokens()[:, :12]
    before = outputs(model, tokens)
    kept = compress.Vocab()(model, calibration=tokens).kept_tokens
    assert model.cls.predictions.bias.shape == (len(kept),)
    assert torch.equal(outputs(model, renumbered(tokens, kept)), before[..., kept])


def test_both_stacks_of_an_encoder_decoder_read_the_cut_table():
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=5)
    model, tokens = T5ForConditionalGeneration(config).eval(), tiny_tokens()[:, :12]
    with torch.no_grad():
        before = model(input_ids=tokens, decoder_input_ids=tokens[:, :4]).logits
    kept = compress.Vocab()(model, calibration=tokens).kept_tokens
    new = renumbered(tokens, kept)
    with torch.no_grad():
        after = model(input_ids=new, decoder_input_ids=new[:, :4]).logits
    assert torch.equal(after, before[..., kept])
    assert kept[model.config.decoder_start_token_id] == 5
    assert kept[model.generation_config.decoder_start_token_id] == 5


def test_a_table_as_wide_as_it_is_long_is_cut_by_its_rows():
    model, before, tokens = (*(tiny_model(vocab_size=96, hidden_size=96) for _ in range(2)), tiny_tokens()[:, :12])
    kept = compress.Vocab()(model, calibration=tokens).kept_tokens
    assert torch.equal(outputs(model, renumbered(tokens, kept)), outputs(before, tokens)[..., kept])


def test_text_of_the_domain_gives_the_same_pieces_and_logits():
    model, before, tokenizer = _model(), _model(), byte_level()
    result = compress.Vocab()(model, calibration=DOMAIN, tokenizer=tokenizer)
    new = result.tokenizer
    for text in DOMAIN:
        old_ids, new_ids = torch.tensor([ids(tokenizer, text)]), torch.tensor([ids(new, text)])
        assert tokenizer.convert_ids_to_tokens(old_ids[0]) == new.convert_ids_to_tokens(new_ids[0])
        assert torch.equal(outputs(model, new_ids), outputs(before, old_ids)[..., result.kept_tokens])
    found = result.measurements
    assert found["documents"] == 2
    assert found["documents_changed"] == 0
    assert found["text_tokens_before"] == found["text_tokens"]
    assert found["tokens"] == model.config.vocab_size < found["tokens_before"] == ROWS
    assert found["tokens"] % 8 == 0


def test_ids_in_both_configs_are_those_of_the_new_tokenizer():
    model, tokenizer = (
        tiny_model(vocab_size=ROWS, bos_token_id=300, eos_token_id=[310, 0], pad_token_id=320),
        byte_level(),
    )
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 300, [310, 0], 320
    generation.suppress_tokens, generation.forced_decoder_ids = [300, 371], [[1, 310]]
    result = compress.Vocab(multiple=1)(model, calibration=DOMAIN, tokenizer=tokenizer)
    new = {old: index for index, old in enumerate(result.kept_tokens)}
    assert 371 not in new
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (new[300], [new[310], 0], new[320])
    assert model.generation_config.suppress_tokens == [new[300]]
    assert model.generation_config.forced_decoder_ids == [[1, new[310]]]


def test_the_words_of_the_chat_template_stay():
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}never {{ m.content }} Unbelievable{% endfor %}"
    result = compress.Vocab()(_model(), calibration=DOMAIN, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "The river"}]
    old, new = (
        t.apply_chat_template(messages, tokenize=True, return_dict=False) for t in (tokenizer, result.tokenizer)
    )
    assert [result.kept_tokens[index] for index in new] == old


def test_so_many_tokens_stay_as_are_asked_for_the_most_frequent_first():
    tokenizer = byte_level()
    result = compress.Vocab(keep=280)(_model(), calibration=TEXT, tokenizer=tokenizer)
    assert len(result.kept_tokens) == result.model.config.vocab_size == 280
    assert result.measurements["documents_changed"] == 4
    assert result.measurements["text_tokens"] > result.measurements["text_tokens_before"]
    for text in TEXT:
        assert result.tokenizer.decode(ids(result.tokenizer, text)) == text


def test_rare_tokens_leave_by_min_count():
    every = compress.Vocab(multiple=1)(_model(), calibration=TEXT, tokenizer=byte_level()).kept_tokens
    frequent = compress.Vocab(multiple=1, min_count=4)(_model(), calibration=TEXT, tokenizer=byte_level()).kept_tokens
    assert set(frequent) < set(every)


def test_what_is_missing_to_a_multiple_is_filled_with_unused_tokens():
    counts = torch.tensor([0, 3, 0, 1, 0, 0, 0, 2, 0, 0])
    assert choose(counts, [9], lambda index: {index}, None, 1, 1) == {1, 3, 7, 9}
    assert choose(counts, [9], lambda index: {index}, None, 1, 6) == {0, 1, 2, 3, 7, 9}
    assert choose(counts, [9], lambda index: {index}, 3, 1, 1) == {1, 7, 9}
    assert choose(counts, [9], lambda index: {index, 8} if index == 1 else {index}, 2, 1, 1) == {7, 9}
    with pytest.raises(StartError, match="alone are 3"):
        choose(counts, [7, 8, 9], lambda index: {index}, 2, 1, 1)


@pytest.mark.parametrize("residency", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_a_run_killed_after_it_ends_with_the_same_bytes(folder, tmp_path, residency, monkeypatch, unverified):
    passes = [{"vocab": {}}, {"gptq": {"bits": 4, "group_size": 16}}]
    run(_values(folder, tmp_path / "whole", passes=passes, residency=residency))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for where in (
        "compress.workspace.write_json", "compress.fewer_tokens.keep_smaller",
        "compress.passes.gptq.GPTQ.compress_block", "compress.pipeline._export",
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with pytest.raises(KeyboardInterrupt):
                run(_values(folder, tmp_path / "killed", passes=passes, residency=residency))
    run(_values(folder, tmp_path / "killed", passes=passes, residency=residency))
    files = sorted(path.name for path in (tmp_path / "whole" / "model").iterdir())
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    for name in files:
        assert (tmp_path / "whole" / "model" / name).read_bytes() == (tmp_path / "killed" / "model" / name).read_bytes()


@pytest.mark.parametrize("residency", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_the_folder_of_a_run_is_a_plain_model_with_its_own_tokenizer(folder, tmp_path, residency):
    report = run(_values(folder, tmp_path / "out", residency=residency))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert len(tokenizer) <= model.config.vocab_size == report.stages[0].measurements["tokens"] < ROWS
    old = byte_level()
    for text in DOMAIN:
        assert tokenizer.convert_ids_to_tokens(ids(tokenizer, text)) == old.convert_ids_to_tokens(ids(old, text))


def test_the_text_option_names_a_file_beside_the_recipe(folder, tmp_path, unverified):
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: model\npasses:\n  - vocab:\n      text: text.jsonl\nbenchmark: false\n")
    report = run(Recipe.load(recipe, output=str(tmp_path / "out")))
    assert report.stages[0].measurements["documents"] == 16
    assert report.stages[0].measurements["documents_changed"] == 0
    with pytest.raises(CompressError, match=r"no such file: .*txet\.jsonl.*text\.jsonl"):
        Recipe.from_dict({"model": str(folder / "model"), "passes": [{"vocab": {"text": "txet.jsonl"}}]}, base=folder)


def test_a_run_on_another_text_is_not_continued(folder, tmp_path, unverified):
    text = tmp_path / "text.jsonl"
    text.write_text((folder / "text.jsonl").read_text())
    values = _values(folder, tmp_path / "out", passes=[{"vocab": {"text": str(text)}}], data={})
    run(values)
    (tmp_path / "out" / "report.json").unlink()
    text.write_text((folder / "other.jsonl").read_text())
    with pytest.raises(StartError, match=r"passes\.0\.vocab\.text: its content is not what it was"):
        run(values)


def test_training_learns_from_the_original_of_the_tokens_that_are_left(folder, tmp_path, unverified):
    trained = {"tokens": 128, "generated": 32, "batch_size": 4}
    passes = [{"vocab": {}}, {"rtn": {"bits": 8, "group_size": 16}}, {"efficientqat": trained}]
    values = _values(folder, tmp_path / "out", passes=passes)
    values["data"]["training"] = {"source": str(folder / "text.jsonl"), "samples": 4, "length": 16}
    report = run(values)
    losses = report.stages[2].measurements["losses"]
    assert losses[0]["loss"] < 0.01  # 8 bits are close to the original, where ids mean the same to both


def test_the_plan_is_exact_for_a_number_and_an_upper_bound_for_what_is_used(folder, tmp_path, unverified):
    def both(options, name):
        values = _values(folder, tmp_path / name, passes=[{"vocab": options}])
        plan = compress.plan(Recipe.from_dict(values))
        run(values)
        files = (tmp_path / name / "model").glob("*.safetensors")
        return plan.steps[1].note, plan.weights_bytes, sum(file.stat().st_size for file in files)

    note, planned, written = both({"keep": 300}, "number")
    assert (note, planned) == ("", written)
    note, planned, written = both({}, "used")
    assert "upper bound" in note
    assert planned > written


@pytest.mark.parametrize(
    ("options", "texts", "words"),
    [
        ({}, [""], "holds no text"),
        ({}, [], "holds no text"),
        ({"keep": ROWS}, DOMAIN, "leaves nothing to remove: the model has 384 tokens"),
        ({"keep": 10}, DOMAIN, "special tokens, bytes and the chat template alone are 257"),
        ({"multiple": 256}, DOMAIN, "there is nothing to remove"),
    ],
)
def test_what_cannot_be_is_refused(options, texts, words):
    with pytest.raises(CompressError, match=words):
        compress.Vocab(**options)(_model(), calibration=texts, tokenizer=byte_level())


def test_texts_without_a_tokenizer_and_models_without_one_are_refused(folder, tmp_path):
    with pytest.raises(StartError, match="pass tokenizer"):
        compress.Vocab()(_model(), calibration=DOMAIN)
    _model().save_pretrained(tmp_path / "model")
    values = {"model": str(tmp_path / "model"), "passes": [{"vocab": {"text": str(folder / "text.jsonl")}}]}
    with pytest.raises(StartError, match="holds no tokenizer"):
        run({**values, "benchmark": False, "output": str(tmp_path / "out")})
    with pytest.raises(CompressError, match=r"vocab needs text: give data\.calibration"):
        Recipe.from_dict({"model": str(folder / "model"), "passes": ["vocab"]})


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused():
    tokenizer = byte_level()
    tokenizer.add_tokens([f"<{n}>" for n in range(20)])
    with pytest.raises(StartError, match="the model's embedding 384 rows"):
        compress.Vocab()(_model(), calibration=DOMAIN, tokenizer=tokenizer)


def test_positions_counted_from_the_padding_token_keep_it_in_its_place():
    config = RobertaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=66, pad_token_id=5, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    tokens = torch.full((2, 8), 7)
    with pytest.raises(CompressError, match="counts positions from the id of its padding token, 5"):
        compress.Vocab(multiple=1)(RobertaForMaskedLM(config).eval(), calibration=tokens)


@pytest.mark.parametrize("losses", [["labels"], ["kl"]])
def test_what_is_distilled_afterwards_has_the_original_with_the_tokens_that_are_left_as_its_teacher(
    folder, tmp_path, losses, unverified
):
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"good": text, "bad": text[::-1]}) + "\n" for text in DOMAIN[:4]))
    text = {"source": str(folder / "text.jsonl"), "samples": 8, "length": 16}
    report = run(_values(
        folder, tmp_path / "run", data={"calibration": text, "training": text},
        passes=[{"depth": {"layers": 2}}, {"vocab": {}}, {"distill": {"losses": losses, "steps": 2, "batch_size": 4}}],
        benchmark={"tasks": [str(items)], "metrics": ["accuracy"]},
    ))  # fmt: skip
    areas = report.stages[2].measurements["areas"]
    assert areas["teacher"]["items"] == report.original["accuracy/items"].value
