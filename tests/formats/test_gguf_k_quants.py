"""k-quants: passes on their grids, blocks that hold them to the bit, training that stays on them, what is refused."""

from dataclasses import replace

import pytest
import torch

import compress
from compress.errors import RecipeError, StartError
from compress.formats.base import Contents
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.folder import default_format, packed_export_note, write_model_folder
from compress.formats.gguf import FILE, GGUF
from compress.formats.gguf_blocks import block_kind, pack_super_blocks, row_bytes
from compress.formats.onnx import Onnx
from compress.loading import load
from compress.maths.grid import find_params, named_spec, quantize
from compress.maths.named_grids import SUPER_BLOCKS
from compress.nn.cpu import why_not
from compress.nn.quant_linear import QuantLinear, packed_tensors
from compress.nn.trained import ScaleTrained, WeightTrained
from compress.recipe import Recipe
from compress.testing import BYTE_VOCABULARY, byte_tokenizer, save_tiny, tiny_model, tiny_tokens

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

GRIDS = list(SUPER_BLOCKS)
WIDE = {"vocab_size": BYTE_VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def wide(family="llama", **changes):
    return tiny_model(family, **{**WIDE, **changes})


def packed(grid, rows=4, columns=512, size=1.0, dtype=torch.float32):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).mul(size).to(dtype)
    weight[0, :32] = 0
    weight[1, :256] = 0
    weight[2, :32] = weight[2, :32].abs()
    spec = named_spec(dtype, grid)
    scale, zero = find_params(weight, spec, search=True)
    codes = quantize(weight, scale, zero, spec)
    return QuantLinear.from_codes(codes, scale, zero, spec, dtype=dtype), (codes, scale, zero)


def blocks(layer):
    minimum = layer.in_two("weight_minimum") if layer.spec.minima else None
    return pack_super_blocks(layer.stored_codes(), layer.in_two("weight_scale"), minimum, layer.spec.super_block.kind)


def read_blocks(data, kind):
    return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))


def test_a_block_of_q2_k_by_hand():
    codes = torch.full((1, 256), -2, dtype=torch.int8)
    codes[0, 1], codes[0, 33], codes[0, 128] = 1, -1, 0  # 3, 1 and 2, counted from 0
    number, low = torch.tensor([[0.5]]).half(), torch.tensor([[0.25]]).half()
    k, minima = torch.zeros(1, 16, dtype=torch.int8), torch.zeros(1, 16, dtype=torch.int8)
    k[0, 0], minima[0, 0], minima[0, 15] = 3, 15, 1
    data = pack_super_blocks(codes, (number, k), (low, minima), "Q2_K")[0].tolist()
    assert data[:16] == [0xF3, *[0] * 14, 0x10]
    # weights 1 and 33 share byte 1: 3 in its lowest bits, 1 in the next; weight 128 begins the second half
    assert (data[16 + 1], data[16 + 32], sum(data[16:80])) == (0b0111, 2, 9)
    assert data[80:] == [0x00, 0x38, 0x00, 0x34]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 30.0])
def test_layers_and_blocks_hold_every_weight_of_their_grid_to_the_bit(grid, dtype, size):
    layer, (codes, scale, zero) = packed(grid, size=size, dtype=dtype)
    kept = layer.codes()
    assert torch.equal(kept[0], codes)
    assert torch.equal(kept[1], scale)
    assert zero is None or torch.equal(kept[2], zero)
    kind = block_kind(layer.spec, 512)
    data = blocks(layer)
    assert data.shape == (4, row_bytes(kind, 512))
    assert torch.equal(read_blocks(data, kind), layer.dequantize(torch.float32))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_packed_layer_takes_the_bytes_of_its_blocks(grid):
    stored = packed_tensors(1024, 64, named_spec(torch.float32, grid))
    total = sum(torch.empty(shape, dtype=dtype).nbytes for dtype, shape in stored.values())
    assert total == 64 * row_bytes(SUPER_BLOCKS[grid].kind, 1024) + 16  # the shape


def test_rows_that_no_super_block_fills_are_no_blocks():
    assert block_kind(named_spec(torch.float32, "gguf-q4_k"), 320) is None
    assert block_kind(named_spec(torch.float32, "gguf-q4_k"), 512) == "Q4_K"


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "autoround"])
def test_what_a_pass_rounds_is_what_llama_cpp_reads(name, grid, tmp_path):
    model, tokens = wide(), tiny_tokens(4, 16)
    made = {
        "rtn": compress.RTN, "gptq": compress.GPTQ, "awq": compress.AWQ,
        "autoround": lambda **given: compress.AutoRound(iterations=3, **given),
    }[name](grid=grid)  # fmt: skip
    made(model, **({"calibration": tokens} if made.takes_calibration else {}))
    folder = write_model_folder(tmp_path / "out", Contents.of_model(model, byte_tokenizer()), "gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
    kind = SUPER_BLOCKS[grid].kind
    assert sum(tensor.tensor_type.name == kind for tensor in tensors.values()) == 7
    down = tensors["blk.0.ffn_down.weight"]
    values = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(values, model.model.layers[0].mlp.down_proj.dequantize(torch.float32))


def test_bits_and_order_follow_the_grid_and_are_read_again():
    made = compress.GPTQ(grid="gguf-q6_k")
    assert (made.bits, made.group_size, made.symmetric, made.act_order) == (6, 16, True, True)
    assert compress.GPTQ(**made.options()) == made
    assert not compress.GPTQ(grid="gguf-q2_k").act_order
    assert compress.GPTQ(grid="gguf-q2_k", act_order=True).act_order
    with pytest.raises(ValueError, match="bits is 5: use 2, 3, 4 or 8, or grid gguf-q5_k"):
        compress.RTN(bits=5)
    with pytest.raises(ValueError, match="grid gguf-q2_k is bits 2, and bits is 4: leave it out"):
        compress.GPTQ(grid="gguf-q2_k", bits=4)


def test_embedding_and_head_beside_super_blocks_are_in_blocks_of_32(tmp_path):
    model = compress.RTN(grid="gguf-q4_k", embeddings=4, head=8)(wide(tie_word_embeddings=False)).model
    folder = write_model_folder(tmp_path / "out", Contents.of_model(model, byte_tokenizer()), "gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / FILE).tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q4_0", "Q8_0")


@pytest.mark.parametrize("grid", ["gguf-q2_k", "gguf-q3_k"])
def test_the_packed_folder_is_read_back_and_the_ordinary_one_is_dense(grid, tmp_path):
    model = compress.RTN(grid=grid)(wide()).model
    contents, tokens = Contents.of_model(model), tiny_tokens(2, 8)
    assert default_format(contents) == "dense"
    assert "export gguf" in (packed_export_note(contents) or "")
    with torch.no_grad():
        wanted = model(tokens).logits
        for name in ("packed", None):
            again = load(write_model_folder(tmp_path / (name or "model"), contents, name))
            torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
            layer = again.model.layers[0].mlp.down_proj
            assert isinstance(layer, QuantLinear) == (name == "packed")
            assert torch.equal(layer.weight, model.model.layers[0].mlp.down_proj.weight)


def test_no_kernel_of_ours_runs_super_blocks():
    assert "built" in str(why_not(packed("gguf-q4_k")[0])) or "is for llama.cpp" in str(why_not(packed("gguf-q4_k")[0]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", [ScaleTrained, WeightTrained])
def test_an_untrained_layer_computes_and_packs_what_it_was_made_from(kind, grid):
    layer, _ = packed(grid)
    x, trained = torch.randn(3, 512, generator=torch.Generator().manual_seed(2)), kind(layer)
    torch.testing.assert_close(trained(x), layer(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(trained.packed().dequantize(torch.float32), layer.dequantize(torch.float32))


@pytest.mark.parametrize("grid", ["gguf-q2_k", "gguf-q3_k"])
def test_numbers_of_super_blocks_have_the_gradient_of_the_plain_formula(grid):
    layer, (codes, _, _) = packed(grid, rows=3)
    trained = ScaleTrained(layer)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(2))
    trained(x).square().sum().backward()
    d, k = (part.double() for part in layer.in_two("weight_scale"))
    d.requires_grad_(True)
    counted = codes.double() - (layer.spec.qmin if layer.spec.minima else 0)
    scale = (d.unsqueeze(2) * k.view(3, 2, -1)).flatten(1)
    weight = counted.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)
    if layer.spec.minima:
        dmin, low = (part.double() for part in layer.in_two("weight_minimum"))
        dmin.requires_grad_(True)
        weight = weight - (dmin.unsqueeze(2) * low.view(3, 2, -1)).flatten(1).unsqueeze(2)
    (x.double() @ weight.flatten(1).t()).square().sum().backward()
    torch.testing.assert_close(trained.scale.grad.double(), d.grad, rtol=1e-4, atol=1e-2)
    if layer.spec.minima:
        torch.testing.assert_close(trained.zero.grad.double(), dmin.grad, rtol=1e-4, atol=1e-2)


def test_weight_and_minimum_have_the_gradients_of_lsq_on_a_case_by_hand():
    """Scale 1, minimum 1, points -1 .. 2: 0.4 -> 0; 3.0 -> 2 and -2.0 -> -1 by force."""
    codes = torch.zeros(1, 256, dtype=torch.int8)
    layer = QuantLinear.from_codes(codes, torch.ones(1, 16), torch.ones(1, 16), named_spec(torch.float32, "gguf-q2_k"))
    trained = WeightTrained(layer)
    with torch.no_grad():
        trained.weight[0, :3] = torch.tensor([0.4, 3.0, -2.0])
    x = torch.zeros(1, 256)
    x[0, :3] = torch.tensor([1.0, 2.0, 4.0])
    y = trained(x)
    assert y.item() == 0.0 * 1 + 2.0 * 2 - 1.0 * 4
    y.backward()
    assert trained.weight.grad[0, :4].tolist() == [1.0, 0.0, 0.0, 0.0]
    # of 0.4: code 1 less 1.4; of 3.0 and -2.0 the codes 3 and 0 themselves
    unit = float(trained.multiples[0, 0])
    assert trained.scale.grad.item() == pytest.approx(unit * (-0.4 * 1 + 3 * 2 + 0 * 4), rel=1e-5)
    assert trained.zero.grad.item() == pytest.approx(-float(trained.minimum_multiples[0, 0]) * (2 + 4))


@pytest.mark.parametrize("grid", ["gguf-q2_k", "gguf-q3_k"])
@pytest.mark.parametrize("cls", [compress.EfficientQAT, compress.LLMQAT])
def test_training_the_whole_model_stays_on_the_grid_and_brings_it_nearer(cls, grid, tmp_path):
    original, text = wide(), tiny_tokens(32, 16)
    model = compress.RTN(grid=grid)(wide()).model
    before = [m.weight_scale.clone() for m in model.modules() if isinstance(m, QuantLinear)]

    def divergence():
        with torch.no_grad():
            p, q = (m(text).logits.log_softmax(-1) for m in (original, model))
            return float((p.exp() * (p - q)).sum())

    untrained = divergence()
    cls(tokens=32 * 16 * 20, batch_size=16)(model, training=text, original=original)
    after = [m.weight_scale for m in model.modules() if isinstance(m, QuantLinear)]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert divergence() < 0.9 * untrained
    folder = write_model_folder(tmp_path / "out", Contents.of_model(model, byte_tokenizer()), "gguf")
    down = next(t for t in gguf.GGUFReader(folder / FILE).tensors if t.name == "blk.0.ffn_down.weight")
    found = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(found, model.model.layers[0].mlp.down_proj.dequantize(torch.float32))


def test_what_cannot_hold_super_blocks_is_refused_when_the_recipe_is_read(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama", **WIDE)
    recipe = {"model": str(folder), "passes": [{"rtn": {"grid": "gguf-q2_k"}}], "benchmark": False}
    for name in ("compressed-tensors", "onnx"):
        with pytest.raises(RecipeError, match=rf"export.*{name} holds .*no super-blocks.*gguf-q2_k.*export gguf"):
            Recipe.from_dict({**recipe, "export": [name]})
    Recipe.from_dict({**recipe, "passes": [{"rtn": {"grid": "gguf-q4_0"}}], "export": ["compressed-tensors"]})
    contents = Contents.of_model(compress.RTN(grid="gguf-q2_k")(wide()).model)
    assert "no super-blocks" in CompressedTensors().refusal(contents)
    assert "no super-blocks" in Onnx().refuses(contents.dtype, contents.kinds, contents.quantization)
    assert GGUF().refusal(contents) is None
    with pytest.raises(RecipeError, match=r"hqq fits the scale of each group by itself.*use rtn"):
        Recipe.from_dict({**recipe, "passes": [{"hqq": {"grid": "gguf-q2_k"}}]})


def test_zeros_are_not_lost_on_a_grid_with_minima(tmp_path):
    passes = [{"magnitude": {"sparsity": 0.5}}, {"rtn": {"grid": "gguf-q2_k"}}]
    with pytest.raises(RecipeError, match="it takes dense weights, and magnitude leaves sparse ones"):
        Recipe.from_dict({"model": "builtin:tiny", "passes": passes})
    Recipe.from_dict({"model": "builtin:tiny", "passes": [passes[0], {"rtn": {"grid": "gguf-q3_k"}}]})
    model = compress.Magnitude(sparsity=0.5)(wide()).model
    with pytest.raises(StartError, match="rtn takes dense weights, and this model's are sparse"):
        compress.RTN(grid="gguf-q4_k")(model)
    zeros = model.model.layers[0].mlp.up_proj.weight == 0
    compress.GPTQ(grid="gguf-q3_k")(model, calibration=tiny_tokens(4, 16))
    assert bool(model.model.layers[0].mlp.up_proj.weight[zeros].eq(0).all())


def test_rows_that_do_not_fit_are_refused_in_the_plan_with_the_grids_that_do(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama", **{**WIDE, "intermediate_size": 288})
    recipe = {"model": str(folder), "passes": [{"rtn": {"grid": "gguf-q4_k"}}], "benchmark": False}
    with pytest.raises(StartError, match=r"super-blocks of 256 .*288 columns.*`skip`.*gguf-q4_0"):
        compress.plan(Recipe.from_dict(recipe))
    recipe["passes"][0]["rtn"]["skip"] = ["*down_proj"]
    compress.plan(Recipe.from_dict(recipe))


def test_a_spec_of_super_blocks_survives_a_copy_of_it():
    spec = named_spec(torch.float16, "gguf-q5_k")
    assert replace(spec) == spec
