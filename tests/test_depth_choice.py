"""Which blocks go, and what takes their place: against slow textbook versions."""

import copy
from itertools import combinations

import pytest
import reference
import torch

import compress
from compress.block_importance import SkipLosses
from compress.errors import RecipeError, StartError
from compress.images import windows_given
from compress.maths.block_choice import removals, strongest, weakest_run
from compress.maths.bridge import STRENGTHS, Moments, fit, ridge
from compress.model import ModelHandle
from compress.passes.depth import Depth
from compress.progress import Step
from compress.recipe import Recipe
from compress.reshaping import parameters_of
from compress.testing import outputs, tiny_inputs, tiny_model, tiny_tokens

FIRST_STAYS = [[i == 0 if j == 0 else i > 0 for j in range(5)] for i in range(7)]


@pytest.mark.parametrize("fits", [None, FIRST_STAYS, [[(i - j) % 2 == 0 for j in range(5)] for i in range(7)]])
def test_the_blocks_worth_most_stay_of_all_choices_in_which_each_fits(fits):
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        worth = torch.rand(7, generator=draw).tolist()
        possible = [
            keep for keep in combinations(range(7), 5) if fits is None or all(fits[i][j] for j, i in enumerate(keep))
        ]
        best = max(possible, key=lambda keep: sum(worth[i] for i in keep))
        assert strongest(worth, 5, fits) == list(best)


def test_of_equal_blocks_the_earlier_stay_and_none_is_found_where_none_fits():
    assert strongest([1.0, 1.0, 1.0], 2) == [0, 1]
    assert strongest([1.0, 1.0], 1, [[False], [False]]) is None


def test_the_run_with_the_lowest_score_goes_where_what_is_left_fits():
    assert weakest_run([0.1, 0.3, 0.2], 4) == [2, 3]
    assert weakest_run([0.1, 0.3, 0.2], 4, [[i == 0 or j == 1 for j in range(2)] for i in range(4)]) == [0, 1]
    assert weakest_run([0.1, 0.2], 3, [[False] * 2] * 3) is None


def test_stacks_shrink_alike_until_enough_parameters_are_gone():
    assert removals([[10] * 4, [10] * 2], 10) == [1, 0]
    assert removals([[10] * 4, [10] * 2], 31) == [3, 1]
    assert removals([[10] * 4], 30) == [3]
    assert removals([[10] * 4], 31) is None
    assert removals([[5, 20, 10]], 15) == [2]  # whichever two go: the smallest


@pytest.mark.parametrize("strength", [STRENGTHS[0], 1.0])
def test_the_ridge_is_the_textbooks(strength):
    draw = torch.Generator().manual_seed(0)
    given, missing = torch.randn(40, 6, generator=draw), torch.randn(40, 3, generator=draw)
    moments = Moments(6, 3)
    for part in (slice(0, 11), slice(11, 40)):
        moments.add(given[part], missing[part])
    expected = reference.ridge_regression(given, missing, strength)
    found = ridge(moments, strength)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    direct = float((missing.double() - given.double() @ expected.T).square().sum())
    assert moments.lost(found) == pytest.approx(direct, rel=1e-9)


def test_a_linear_hole_is_bridged_and_noise_is_not():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 6, generator=draw)
    parts, noise = [Moments(6, 3), Moments(6, 3)], [Moments(6, 3), Moments(6, 3)]
    for linear, random in zip(parts, noise, strict=True):
        given = torch.randn(200, 6, generator=draw)
        linear.add(given, given @ weight.T)
        random.add(given[:8], torch.randn(8, 3, generator=draw))
    found, strength, explained = fit(*parts)
    assert strength == STRENGTHS[0]
    assert explained > 0.999
    assert torch.allclose(found.float(), weight, atol=1e-2)
    assert fit(*noise) is None


@pytest.mark.parametrize("family", ["llama", "modernbert", "vit", "t5"])
def test_influence_is_the_textbooks_for_blocks_and_for_runs(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    expected = reference.block_influences(model, inputs)
    counts = [len(scores) for scores in expected]
    found = Depth(layers=min(counts) - 1 if family != "modernbert" else 4)(copy.deepcopy(model), calibration=inputs)
    influence = found.measurements["influence"]
    for mine, theirs in zip([influence] if len(counts) == 1 else influence, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "t5"])
def test_the_loss_of_skipping_a_block_is_what_the_model_without_it_gives(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    found = Depth(layers=2, importance="loss", greedy=False)(copy.deepcopy(model), calibration=inputs)
    losses = found.measurements["influence"]
    first = losses if family != "t5" else losses[0]
    whole, without = outputs(model, inputs), reference.outputs_without(model, inputs, 1)
    if model.get_output_embeddings() is not None:
        p, q = whole.double().log_softmax(-1), without.double().log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
    else:
        expected = float((whole - without).double().square().sum() / whole.double().square().sum())
    assert first[1] == pytest.approx(expected, rel=1e-4)


def test_greedy_takes_the_second_block_by_what_is_left():
    model, tokens = tiny_model("llama", num_hidden_layers=5), tiny_tokens()
    whole = outputs(model, tokens)

    def loss(*gone):
        p, q = (t.double().log_softmax(-1) for t in (whole, reference.outputs_without(model, tokens, *gone)))
        return float((p.exp() * (p - q)).sum(-1).mean())

    handle = ModelHandle.wrap(copy.deepcopy(model))
    blocks, skipping = handle.block_list(), SkipLosses(handle, windows_given(tokens, model.config), 64)
    second = skipping.measure({blocks[2].name}, [[blocks[0]], [blocks[3], blocks[4]]], Step())
    assert second == pytest.approx([loss(0, 2), loss(2, 3, 4)], rel=1e-4)
    found = Depth(layers=3, importance="loss")(copy.deepcopy(model), calibration=tokens)
    first = min(range(5), key=loss)
    then = min((i for i in range(5) if i != first), key=lambda i: loss(first, i))
    assert found.measurements["kept"] == [i for i in range(5) if i not in (first, then)]


def test_contiguous_removes_neighbours():
    model = tiny_model("llama", num_hidden_layers=6)
    for importance in ("cosine", "loss"):
        found = Depth(layers=3, importance=importance, contiguous=True)(copy.deepcopy(model), calibration=tiny_tokens())
        gone = sorted(set(range(6)) - set(found.measurements["kept"]))
        assert gone == list(range(gone[0], gone[0] + 3))
        scores = found.measurements["influence"]
        assert scores[gone[0]] == min(scores)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "vit", "t5"])
def test_a_bridge_brings_the_outputs_nearer_to_those_before(family):
    inputs = tiny_inputs(family, samples=64)
    drop = [1] if family != "t5" else [1, 5]
    plain, bridged = tiny_model(family), tiny_model(family)
    before = outputs(plain, inputs)
    compress.Depth(drop=drop)(plain)
    result = compress.Depth(drop=drop, bridge=True)(bridged, calibration=inputs)
    folds = [record["bridge"] for record in result.blocks if "bridge" in record]
    assert len(folds) == len(drop)
    assert all(fold["explained"] > 0 for fold in folds)
    errors = [float((outputs(model, inputs) - before).square().mean()) for model in (plain, bridged)]
    assert errors[1] < errors[0]


def test_a_bridge_over_two_holes_fits_what_the_text_is_by_then():
    """The textbook, layer by layer on the whole model: targets of the original, inputs of the model bridged so far."""
    model, tokens = tiny_model("llama", num_hidden_layers=5), tiny_tokens(samples=32)
    bridged = copy.deepcopy(model)
    folds = compress.Depth(drop=[1, 3], bridge=True)(bridged, calibration=tokens).blocks
    expected = reference.bridged_llama(model, tokens, [1, 3], [fold["bridge"]["ridge"] for fold in folds[:2]])
    for block, weight in zip(bridged.model.layers, expected, strict=False):
        assert torch.allclose(block.mlp.down_proj.weight, weight.float(), atol=1e-5)


@pytest.mark.parametrize(("family", "word"), [("bert", "added to the residual stream as it is"), ("gemma3", "a norm")])
def test_where_nothing_can_be_folded_a_bridge_is_refused_before_any_work(family, word):
    model, before = tiny_model(family), tiny_model(family)
    with pytest.raises(StartError, match=word):
        compress.Depth(layers=2, bridge=True)(model, calibration=tiny_tokens())
    assert torch.equal(outputs(model, tiny_tokens()), outputs(before, tiny_tokens()))


@pytest.mark.parametrize("family", ["modernbert", "t5"])
def test_the_first_block_stays_where_it_is_of_a_kind_of_its_own(family):
    model = tiny_model(family)
    stacks = [model.model.layers] if family == "modernbert" else [model.encoder.block, model.decoder.block]
    kinds = [dict(stack[0].named_parameters()).keys() for stack in stacks]
    with pytest.raises(StartError, match=r"more than one kind.*One alone can go of: 1, 2"):
        compress.Depth(drop=[0])(copy.deepcopy(model))
    with torch.no_grad():  # so that it would go first
        for stack in stacks:
            for name, parameter in stack[0].named_parameters():
                if name.endswith(("Wo.weight", "o.weight", "wo.weight")):
                    parameter.zero_()
    compress.Depth(layers=2)(model, calibration=tiny_inputs(family))
    stacks = [model.model.layers] if family == "modernbert" else [model.encoder.block, model.decoder.block]
    assert [dict(stack[0].named_parameters()).keys() for stack in stacks] == kinds
    assert all(len(stack) == 2 for stack in stacks)


def test_an_amount_and_a_size_are_reached_with_the_fewest_blocks():
    model = tiny_model("llama", num_hidden_layers=6)
    whole, block = parameters_of(model), sum(p.numel() for p in model.model.layers[0].parameters())
    for options, gone in (
        ({"amount": "30%"}, 2), ({"amount": 0.5}, 3), ({"layers": "50%"}, 3), ({"layers": "40%"}, 3),
        ({"to": whole - block}, 1), ({"to": whole - block - 1}, 2),
    ):  # fmt: skip
        smaller = compress.Depth(**options)(copy.deepcopy(model), calibration=tiny_tokens())
        assert smaller.measurements["parameters"] == whole - gone * block, options


def test_an_encoder_decoder_shrinks_in_both_stacks():
    model = tiny_model("t5")
    found = compress.Depth(layers="50%")(model, calibration=tiny_tokens())
    assert [len(kept) for kept in found.measurements["kept"]] == [2, 2]
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 2)
    with pytest.raises(StartError, match="transformers cannot generate from a decoder with more blocks"):
        compress.Depth(drop=[1, 2])(tiny_model("t5"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give layers, amount, to or drop"),
        ({"layers": 0}, "0 is not what can remain"),
        ({"layers": "100%"}, "nothing would be removed"),
        ({"layers": 2, "amount": "30%"}, "layers and amount each say how much"),
        ({"amount": "100%"}, "100% is no share to remove"),
        ({"amount": 0}, "no share to remove"),
        ({"to": "0M"}, "no number of parameters"),
        ({"drop": []}, "drop takes indices from 0"),
        ({"drop": [1, 1]}, "drop takes indices from 0"),
        ({"drop": [1], "importance": "loss"}, "leave importance and contiguous out"),
        ({"layers": 2, "sublayers": "mlp"}, "no config of transformers says that a block lacks its mlp"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(options, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict({"model": "builtin:tiny", "passes": [{"depth": options}]})


def test_more_than_the_model_has_is_refused_with_what_it_has():
    model = tiny_model("llama")
    with pytest.raises(StartError, match="layers: 3 shall remain, and the model has 3"):
        compress.Depth(layers=3)(model, calibration=tiny_tokens())
    with pytest.raises(StartError, match=r"to: 1000: with one block of each stack left there are \d+ of"):
        compress.Depth(to=1000)(model, calibration=tiny_tokens())
    with pytest.raises(StartError, match="which is no more than that"):
        compress.Depth(to="1B")(model, calibration=tiny_tokens())
    with pytest.raises(StartError, match="amount: 90%: with one block"):
        compress.Depth(amount="90%")(model, calibration=tiny_tokens())
    with pytest.raises(StartError, match="one has to remain"):
        compress.Depth(drop=[0, 1, 2])(model)
