"""Width pruning: what stays computes what it did, what is fitted is the textbook's least squares, and what cannot be is
refused."""

import pytest
import torch
from reference import ridge
from transformers import AutoModelForCausalLM

import compress
from compress.data import windows_from
from compress.errors import RecipeError, StartError
from compress.importance import taylor, taylor_scores
from compress.model import ModelHandle
from compress.pipeline import run
from compress.places import Probe, find_landing, probe_windows
from compress.recipe import Recipe
from compress.reshaping import parameters_of
from compress.shapes import ModelShape
from compress.stream import CalibrationStream
from compress.testing import FAMILIES, check_pass, outputs, save_tiny, tiny_inputs, tiny_model, tiny_tokens
from compress.units import find_channels, find_groups

EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe")
#: Families whose config can say that there are fewer heads of the same width.
HEADS = ("llama", "qwen3", "mistral", "gemma3", "phi3", *EXPERTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("width") / "model")
    (folder.parent / "text.txt").write_text("The cat sat on the mat and saw the rat. " * 20)
    return folder


def _values(folder, output, **changes):
    return {
        "model": str(folder), "output": str(output), "benchmark": False,
        "passes": [{"width": {"intermediate_size": 40, "heads": 2}}],
        "data": {"calibration": {"source": str(folder.parent / "text.txt"), "samples": 4, "length": 16}}, **changes,
    }  # fmt: skip


def _width(model, **options):
    return compress.Width(**options)(model, calibration=tiny_tokens(), min_coverage=0.0)


def _silence(model, units, parts):
    """Makes some parts of every block give nothing: zero columns of the layers that read them."""
    from compress.model import find_stacks
    from compress.places import find_places
    from compress.reshaping import empty_model
    from compress.units import fewer

    handle = ModelHandle.wrap(model)
    probe = Probe(handle)
    smaller = find_stacks(empty_model(model, units.config(model.config, fewer(model, units))))
    for block in handle.block_list():
        stack = next(stack for stack in smaller if stack.name == block.stack.name)
        (places,) = find_places(block, stack.modules[block.index], units, probe)
        block.layers()[places.reader].weight[:, places.columns[parts].flatten()] = 0.0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPERTS])
def test_channels_that_do_nothing_go_and_the_outputs_stay(family):
    model, given = tiny_model(family), tiny_inputs(family)
    units = find_channels(model)
    with torch.no_grad():
        _silence(model, units, list(range(1, units.count, 2)))
    before = outputs(model, given)
    compress.Width(intermediate_size="50%", refit=False)(model, calibration=given, min_coverage=0.0)
    assert find_channels(model).count == units.count // 2
    assert torch.allclose(outputs(model, given), before, atol=1e-4)


@pytest.mark.parametrize("family", HEADS)
def test_heads_that_do_nothing_go_and_the_outputs_stay(family):
    model = tiny_model(family)
    with torch.no_grad():
        _silence(model, find_groups(model), [0])
    before = outputs(model, tiny_tokens())
    result = _width(model, heads=2, refit=False)
    assert result.measurements["heads"] == model.config.num_attention_heads == 2
    assert model.config.num_key_value_heads == 1
    assert torch.allclose(outputs(model, tiny_tokens()), before, atol=1e-4)


@pytest.mark.parametrize("family", [*HEADS, "vit"])
def test_cutting_heads_conforms(family):
    check_pass(compress.Width(heads=2), family)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_every_importance_conforms(importance):
    check_pass(compress.Width(intermediate_size=40, importance=importance))


def test_an_amount_conforms():
    check_pass(compress.Width(amount=0.2), "gpt2")  # no heads to choose from: the plan is exact


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "bert"])
def test_the_last_layer_of_the_first_block_is_the_textbooks_least_squares(family):
    """Its inputs are those of the original in the first block, so only the cut has to be made up for."""
    model, before = tiny_model(family), tiny_model(family)
    units = find_channels(model)
    with torch.no_grad():
        for block in ModelHandle.wrap(model).block_list():  # those of the first half always matter most
            for layer in block.layers().values():
                if layer.weight.shape[1] == units.count:
                    layer.weight[:, units.count // 2 :] *= 1e-3
            for block_before in [ModelHandle.wrap(before).block_list()[block.index]]:
                for name, layer in block_before.layers().items():
                    layer.set_weight(block.layers()[name].weight)
    (reader,) = [n for n, la in block.layers().items() if la.weight.shape[1] == units.count]
    seen = {}

    def note(_, args, out):
        seen["x"], seen["y"] = args[0].flatten(0, -2), out.flatten(0, -2)

    ModelHandle.wrap(before).block_list()[0].module.get_submodule(reader).register_forward_hook(note)
    outputs(before, tiny_tokens())
    half = units.count // 2
    _width(model, intermediate_size=half, damping=0.05)
    old = ModelHandle.wrap(before).block_list()[0].layers()[reader]
    new = ModelHandle.wrap(model).block_list()[0].layers()[reader]
    x, near = seen["x"][:, :half], old.weight[:, :half]
    if old.module.bias is not None:
        x, near = torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat([near, old.module.bias[:, None]], 1)
    expected = ridge(x, seen["y"], near, 0.05)
    assert torch.allclose(new.weight.double(), expected[:, :half], atol=1e-4)
    if old.module.bias is not None:
        assert torch.allclose(new.module.bias.double(), expected[:, half], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "opt", "bert"])
def test_the_fit_brings_the_outputs_nearer(family):
    expected, lost = outputs(tiny_model(family), tiny_tokens()), {}
    for refit in (False, True):
        model = tiny_model(family)
        _width(model, intermediate_size="75%", refit=refit)
        lost[refit] = float((outputs(model, tiny_tokens()) - expected).square().mean())
    assert lost[True] < 0.7 * lost[False]


LANDINGS = {
    ("llama", "self_attn.o_proj"): "post_attention_layernorm",
    ("llama", "mlp.down_proj"): None,
    ("opt", "fc2"): None,
    ("gpt_neox", "attention.dense"): None,  # attention and MLP stand side by side
    ("gemma3", "mlp.down_proj"): "mlp.down_proj",  # a norm of its own comes first
    ("bert", "output.dense"): "output.LayerNorm",
}


@pytest.mark.parametrize(("family", "reader"), LANDINGS)
def test_where_a_layer_is_added_to_the_stream_is_found(family, reader):

    handle = ModelHandle.wrap(tiny_model(family))
    found = find_landing(handle.block_list()[0], reader, CalibrationStream(handle, probe_windows(handle)))
    assert found == LANDINGS[family, reader]


def test_taylor_is_the_change_of_the_loss_to_first_order():
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    gradient = torch.tensor([[1.0, -1.0, 2.0], [5.0, 1.0, 1.0]])
    found = taylor(x, gradient, torch.tensor([[0, 1], [1, 2]]))
    assert found.tolist() == [(1 - 2) ** 2 + 1**2, (-2 + 6) ** 2 + (1 - 1) ** 2]


def test_taylor_walks_back_through_the_blocks_as_autograd_does():
    from compress.narrowing import Narrowing
    from compress.passes.base import Context

    model, tokens = tiny_model(), tiny_tokens(4, 16)
    handle, windows = ModelHandle.wrap(model), windows_from(tokens, None)
    units = [find_channels(model)]
    work = Narrowing(compress.Width(amount=0.2), handle, Context(calibration=windows), units)
    found = taylor_scores(handle, windows, work.places)
    inputs = []
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    model.model.embed_tokens.weight.requires_grad_(True)
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, inputs)
    for hook in hooks:
        hook.remove()
    for index, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        expected = (x * gradient).double().square().sum((0, 1))
        scores = torch.tensor(found[f"model.layers.{index}"][0], dtype=torch.float64)
        assert torch.allclose(scores, expected, rtol=1e-3)


@pytest.mark.parametrize("options", [{"intermediate_size": 40}, {"hidden_size": 24}])
def test_zeros_stay_zero(options):
    model = tiny_model()
    compress.Magnitude(sparsity=0.5, scope="row")(model)
    _width(model, **options)
    weights = [layer.weight for block in ModelHandle.wrap(model).block_list() for layer in block.layers().values()]
    assert all(0.3 < float((weight == 0).float().mean()) < 0.7 for weight in weights)


def test_the_hidden_size_of_an_encoder_with_a_decoder_is_refused():
    with pytest.raises(StartError, match="an encoder and a decoder"):
        _width(tiny_model("t5"), hidden_size=16)


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_a_share_of_the_blocks_goes(family):
    model = tiny_model(family)
    before = parameters_of(model)
    result = compress.Width(amount=0.2)(model, calibration=tiny_inputs(family), min_coverage=0.0)
    assert result.measurements["intermediate_size"] == find_channels(model).count
    assert parameters_of(model) < before


@pytest.mark.parametrize("amount", [0.2, 0.5])
def test_as_much_is_removed_as_was_asked_for_and_no_more_than_a_multiple_beyond(amount):
    model = tiny_model()
    inside = sum(p.numel() for p in model.model.layers.parameters())
    before = parameters_of(model)
    result = _width(model, amount=amount, multiple=4)
    removed = before - parameters_of(model)
    assert amount * inside <= removed < amount * inside + 4 * 3 * 3 * 32
    assert result.measurements["intermediate_size"] % 4 == 0


def test_the_whole_model_comes_to_have_at_most_so_many_parameters():
    model = tiny_model()
    _width(model, to="25k")
    assert 24_000 < parameters_of(model) <= 25_000


def test_the_mix_that_loses_least_is_taken():
    """Heads that do nothing cost nothing."""
    model = tiny_model()
    with torch.no_grad():
        _silence(model, find_groups(model), [1])
    assert _width(model, amount=0.12).measurements["heads"] == 2
    model = tiny_model()
    with torch.no_grad():
        _silence(model, find_channels(model), list(range(32)))
    assert _width(model, amount=0.12).measurements["heads"] == 4


def test_percentages_are_of_what_there_is_rounded_to_what_is_possible():
    model = tiny_model()
    found = _width(model, intermediate_size="70%", heads="60%").measurements
    assert (found["intermediate_size"], found["heads"]) == (48, 2)


@pytest.mark.parametrize("residency", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_the_folder_of_a_run_is_a_plain_model_of_that_width(folder, tmp_path, residency, unverified):
    run(_values(folder, tmp_path / "out", residency=residency))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (40, 2, 1)


@pytest.mark.parametrize("residency", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_a_run_killed_half_way_ends_with_the_same_bytes(folder, tmp_path, residency, monkeypatch, unverified):
    from compress.narrowing import Narrowing

    passes = [{"width": {"amount": "25%"}}, {"rtn": {"bits": 4, "group_size": 8}}]
    run(_values(folder, tmp_path / "whole", passes=passes, residency=residency))
    cut_block, told = Narrowing._cut_block, []

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    def third(self, block, *args):
        told.append(block.index)
        return fail() if block.index == 2 else cut_block(self, block, *args)

    places = {"compress.passes.rtn.RTN.compress_block": fail, "compress.pipeline._export": fail}
    for where, instead in {"compress.narrowing.Narrowing._cut_block": third, **places}.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, instead)
            with pytest.raises(KeyboardInterrupt):
                run(_values(folder, tmp_path / "killed", passes=passes, residency=residency))
    run(_values(folder, tmp_path / "killed", passes=passes, residency=residency))
    assert told == [0, 1, 2]
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_both_residencies_give_the_same_bytes(folder, tmp_path, unverified):
    for residency in ("memory", "disk"):
        run(_values(folder, tmp_path / residency, residency=residency))
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("memory", "disk")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_plan_foresees_the_size_of_the_files(folder, tmp_path, unverified):
    passes = [{"width": {"intermediate_size": 40, "heads": 2}}, {"rtn": {"bits": 4, "group_size": 8}}]
    values = _values(folder, tmp_path / "out", passes=passes)
    planned = compress.plan(Recipe.from_dict(values)).weights_bytes
    run(values)
    assert sum(f.stat().st_size for f in (tmp_path / "out" / "model").glob("*.safetensors")) == planned


def test_where_the_mix_is_measured_the_plan_says_so_and_is_an_upper_bound(folder, tmp_path, unverified):
    values = _values(folder, tmp_path / "out", passes=[{"width": {"amount": "25%"}}])
    planned = compress.plan(Recipe.from_dict(values))
    assert any("upper bound" in step.note for step in planned.steps)
    run(values)
    assert sum(f.stat().st_size for f in (tmp_path / "out" / "model").glob("*.safetensors")) <= planned.weights_bytes


REFUSED = {
    "nothing said": ({}, "how much is not said"),
    "two ways": ({"amount": 0.3, "heads": 2}, "amount and heads each say how much"),
    "all of it": ({"amount": "100%"}, "no share to remove"),
    "nothing": ({"amount": 0}, "no share to remove"),
    "no channels": ({"intermediate_size": 0}, "not what can remain"),
    "no heads": ({"heads": 0}, "not what can remain"),
    "over all": ({"heads": "120%"}, "not what can remain"),
    "a word": ({"to": "small"}, "no number of parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_amount_is_refused_when_the_recipe_is_read(folder, tmp_path, case):
    options, said = REFUSED[case]
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict(_values(folder, tmp_path, passes=[{"width": options}]))


IMPOSSIBLE = {
    "more channels": ("llama", {"intermediate_size": 65}, "intermediate_size: 65 shall remain, and the model has 64"),
    "as many": ("llama", {"intermediate_size": 64}, "nothing would be removed"),
    "more heads": ("llama", {"heads": 5}, "heads: 5 shall remain, and the model has 4"),
    "half a group": ("llama", {"heads": 3}, "goes with the 2 query heads that share it; allowed: 2, 4"),
    "too much": ("gpt2", {"amount": 0.9}, "at most .*% of the blocks' parameters can go"),
    "larger": ("llama", {"to": "10M"}, "to: 10,000,000 parameters shall remain, and the model has"),
    "smaller than the ends": ("llama", {"to": 3000}, "embeddings and head, which are not removed"),
    "gpt2's heads": ("gpt2", {"heads": 2}, "has no head_dim"),
    "bert's heads": ("bert", {"heads": 2}, "has no head_dim"),
    "one group": ("opt", {"heads": 2}, "has no head_dim"),
    "experts": ("mixtral", {"amount": 0.3}, "set of experts"),
    "no likelihood": ("bert", {"amount": 0.1, "importance": "taylor"}, "has no head"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_the_model_does_not_allow_is_refused_in_the_plan_and_by_the_pass(case):
    family, options, said = IMPOSSIBLE[case]
    model = tiny_model(family)
    with pytest.raises(StartError, match=said):
        ModelShape.of(model.config, model.dtype, type(model).__name__).apply(compress.Width(**options))
    with pytest.raises(StartError, match=said):
        _width(model, **options)


def test_heads_that_transformers_does_not_take_beside_the_hidden_size_are_refused():
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    with pytest.raises(StartError, match=r"does not take every number of heads.* allowed: 1, 2, 4, 8"):
        _width(model, heads=6)


STREAMS = ("llama", "qwen3", "mistral", "phi3")


@pytest.mark.parametrize("family", STREAMS)
def test_a_narrower_stream_conforms(family):
    check_pass(compress.Width(hidden_size=24), family)


@pytest.mark.parametrize("family", STREAMS)
@pytest.mark.parametrize("importance", ["reconstruction", "activation"])
def test_channels_of_the_stream_that_carry_nothing_go_and_the_outputs_stay(family, importance):
    """The norms divide by the size of fewer channels from then on; the fit takes that up."""
    model = tiny_model(family)
    silent = torch.tensor([0, 5, 6, 11, 17, 18, 30, 31])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, silent] = 0.0
        for block in ModelHandle.wrap(model).block_list():
            for layer in block.layers().values():
                if len(layer.weight) == 32 and "q_proj" not in layer.name:  # what writes to the stream
                    layer.weight[silent] = 0.0
    before = outputs(model, tiny_tokens())
    _width(model, hidden_size="75%", importance=importance, damping=1e-6)
    assert model.config.hidden_size == 24
    assert torch.allclose(outputs(model, tiny_tokens()), before, atol=2e-2)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_the_fit_brings_a_narrower_stream_nearer(changes):
    expected, lost = outputs(tiny_model(**changes), tiny_tokens()), {}
    for refit in (False, True):
        model = tiny_model(**changes)
        _width(model, hidden_size=28, refit=refit)
        lost[refit] = float((outputs(model, tiny_tokens()) - expected).square().mean())
    assert lost[True] < 0.7 * lost[False]


@pytest.mark.parametrize("residency", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_a_narrower_stream_killed_half_way_ends_with_the_same_bytes(
    folder, tmp_path, residency, monkeypatch, unverified
):
    from compress.hidden import NarrowStream

    values = {"passes": [{"width": {"hidden_size": 24}}], "residency": residency}
    planned = compress.plan(Recipe.from_dict(_values(folder, tmp_path, **values))).weights_bytes
    run(_values(folder, tmp_path / "whole", **values))
    fit = NarrowStream._fit_readers

    def second(self, block, *args):
        if block.index == 1:
            raise KeyboardInterrupt
        fit(self, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(NarrowStream, "_fit_readers", second)
        with pytest.raises(KeyboardInterrupt):
            run(_values(folder, tmp_path / "killed", **values))
    run(_values(folder, tmp_path / "killed", **values))
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size == planned


STREAM_REFUSED = {
    "gpt2": ("gpt2", {"hidden_size": 24}, "cannot say that the hidden size is another"),
    "bert": ("bert", {"hidden_size": 24}, "cannot say that the hidden size is another"),
    "experts": ("mixtral", {"hidden_size": 24}, "set of experts"),
    "more": ("llama", {"hidden_size": 40}, "hidden_size: 40 shall remain, and the model has 32"),
    "as many": ("llama", {"hidden_size": "100%"}, "nothing would be removed"),
    "not divisible": ("llama", {"hidden_size": 30}, "does not take 30 beside this number of heads"),
}


@pytest.mark.parametrize("case", STREAM_REFUSED)
def test_a_hidden_size_that_cannot_be_is_refused_in_the_plan_and_by_the_pass(case):
    family, options, said = STREAM_REFUSED[case]
    model = tiny_model(family)
    with pytest.raises(StartError, match=said):
        ModelShape.of(model.config, model.dtype, type(model).__name__).apply(compress.Width(**options))
    with pytest.raises(StartError, match=said):
        _width(model, **options)


def test_embeddings_scaled_by_the_hidden_size_are_refused():
    with pytest.raises(StartError, match="not the rows of its embedding as they are"):
        _width(tiny_model("gemma3"), hidden_size=24)
