"""Heads of an encoder and a decoder: blocks that share a table of position biases lose the same ones, and what is left
is what plain transformers makes of the config."""

import pytest
import torch
from reference import shared_head_scores
from transformers import AutoModelForSeq2SeqLM, UMT5Config, UMT5ForConditionalGeneration

import compress
from compress.data import windows_from
from compress.inputs import with_decoder
from compress.model import ModelHandle
from compress.narrowing import Narrowing
from compress.passes.base import Context
from compress.pipeline import run
from compress.reshaping import parameters_of
from compress.testing import check_pass, outputs, save_tiny, tiny_model, tiny_tokens
from compress.units import find_groups

TOKENS = tiny_tokens()
TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _width(model, **options):
    return compress.Width(**options)(model, calibration=TOKENS, min_coverage=0.0)


def _umt5():
    """Of T5's shape, but every block has a table of its own."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    return UMT5ForConditionalGeneration(UMT5Config(vocab_size=96, decoder_start_token_id=0, **sizes)).eval()


def _attentions(model):
    """(stack, block, what it attends to) -> the attention."""
    return {
        (stack, index, name): getattr(layer, name)
        for stack in ("encoder", "decoder")
        for index, block in enumerate(getattr(model, stack).block)
        for layer in block.layer
        for name in ("SelfAttention", "EncDecAttention")
        if hasattr(layer, name)
    }


def _silent(model, gone):
    """Makes heads (where -> which) give nothing."""
    with torch.no_grad():
        for where, attention in _attentions(model).items():
            for head in gone[where]:
                attention.o.weight[:, 8 * head : 8 * head + 8] = 0.0


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("importance", ["reconstruction", "activation"])
def test_heads_that_do_nothing_in_their_stack_go_with_their_biases_and_the_outputs_stay(importance, refit):
    model = tiny_model("t5")
    same = {("encoder", "SelfAttention"): (0, 2), ("decoder", "SelfAttention"): (1, 2)}
    gone = {w: same.get((w[0], w[2]), (w[1] % 3, 3)) for w in _attentions(model)}  # those to the encoder: any
    _silent(model, gone)
    if importance == "activation":  # by what the heads give, not by what is made of it
        with torch.no_grad():
            for where, attention in _attentions(model).items():
                for head in gone[where]:
                    attention.v.weight[8 * head : 8 * head + 8] *= 1e-3
    before = outputs(model, TOKENS)
    tables = {stack: getattr(model, stack).get_parameter(TABLE).clone() for stack in ("encoder", "decoder")}
    assert _width(model, heads=2, importance=importance, refit=refit).measurements["heads"] == 2
    assert torch.allclose(outputs(model, TOKENS), before, atol=2e-3)
    assert torch.equal(model.encoder.get_parameter(TABLE), tables["encoder"][:, [1, 3]])
    assert torch.equal(model.decoder.get_parameter(TABLE), tables["decoder"][:, [0, 3]])


def test_all_blocks_of_a_stack_keep_the_heads_whose_biases_stay():
    model, old = tiny_model("t5"), tiny_model("t5")
    _width(model, heads=2, refit=False)
    was = _attentions(old)
    for (stack, index, name), attention in _attentions(model).items():
        rows = was[stack, index, name].q.weight.view(4, 8, -1)
        kept = [head for head in range(4) if any(torch.equal(rows[head], q) for q in attention.q.weight.view(2, 8, -1))]
        assert len(kept) == 2
        table = getattr(old, stack).get_parameter(TABLE)
        if name == "SelfAttention":
            assert torch.equal(getattr(model, stack).get_parameter(TABLE), table[:, kept]), index


@pytest.mark.parametrize("options", [{"heads": 3}, {"heads": 1, "intermediate_size": 40}, {"heads": 2, "refit": False}])
def test_cutting_heads_of_both_stacks_conforms(options):
    check_pass(compress.Width(**options), "t5")


def test_where_every_block_has_a_table_each_chooses_for_itself():
    check_pass(compress.Width(heads=2), "t5", lambda _: _umt5())
    model = _umt5()
    gone = {w: (w[1] + (w[2] == "SelfAttention"), 3) for w in _attentions(model)}
    _silent(model, gone)
    before = outputs(model, TOKENS)
    _width(model, heads=2)
    assert torch.allclose(outputs(model, TOKENS), before, atol=1e-4)


def _scores(model):
    """What the pass finds for the heads of the encoder's blocks, together."""
    windows = windows_from(TOKENS, None)
    units = [find_groups(model)]
    work = Narrowing(compress.Width(heads=2), ModelHandle.wrap(model), Context(calibration=windows), units)
    return work._joint_scores()["encoder.block", "layer.0.SelfAttention.o"]


def test_heads_that_blocks_share_are_ranked_as_the_textbook_says():
    model = tiny_model("t5")
    seen = [[] for _ in model.encoder.block]
    readers = [block.layer[0].SelfAttention.o for block in model.encoder.block]
    for reader, inputs in zip(readers, seen, strict=True):
        reader.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
    outputs(model, TOKENS)
    inputs = [torch.cat(some) for some in seen]
    expected = shared_head_scores([reader.weight.detach() for reader in readers], inputs, 4, 0.01)
    assert torch.allclose(_scores(tiny_model("t5")), expected, rtol=1e-3)


def test_the_fit_brings_the_outputs_nearer():
    expected, lost = outputs(tiny_model("t5"), TOKENS), {}
    for refit in (False, True):
        model = tiny_model("t5")
        _width(model, heads=2, refit=refit)
        lost[refit] = float((outputs(model, TOKENS) - expected).square().mean())
    assert lost[True] < 0.7 * lost[False]


def test_of_heads_and_channels_those_go_that_cost_least():
    """A mix is pushed through the encoder, and what it gives is what that mix's decoder reads."""
    model = tiny_model("t5")
    _silent(model, dict.fromkeys(_attentions(model), (1, 3)))
    assert _width(model, amount=0.15).measurements["heads"] == 2


def test_the_model_writes_what_its_folder_does_in_plain_transformers(tmp_path):
    model = tiny_model("t5")
    _width(model, heads=1)
    model.save_pretrained(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    given = with_decoder({"input_ids": TOKENS[:2]}, model.config)
    told = {"max_new_tokens": 6, "do_sample": False}
    assert plain.config.num_heads == 1
    assert parameters_of(plain) == sum(p.numel() for p in type(plain)(plain.config).parameters())
    assert torch.equal(plain.generate(given["input_ids"], **told), model.generate(given["input_ids"], **told))


@pytest.mark.parametrize("residency", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
@pytest.mark.parametrize("refit", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_killed_in_either_stack_ends_with_the_same_bytes(residency, refit, tmp_path, monkeypatch, unverified):
    folder = save_tiny(tmp_path / "model", "t5")
    (tmp_path / "text.txt").write_text("The cat sat on the mat and saw the rat. " * 20)

    def values(output):
        return {
            "model": str(folder), "output": str(output), "benchmark": False, "residency": residency,
            "passes": [{"width": {"heads": 2, "refit": refit}}],
            "data": {"calibration": {"source": str(tmp_path / "text.txt"), "samples": 4, "length": 16}},
        }  # fmt: skip

    run(values(tmp_path / "whole"))
    cut_block = Narrowing._cut_block
    for at in ("encoder.block.2", "decoder.block.1"):

        def failing(self, block, *args, at=at):
            if block.name == at:
                raise KeyboardInterrupt
            return cut_block(self, block, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Narrowing, "_cut_block", failing)
            with pytest.raises(KeyboardInterrupt):
                run(values(tmp_path / "killed"))
    run(values(tmp_path / "killed"))
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
