"""GGUF files: their blocks against ggml's own reader, what they say of a model, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import compress
from compress.errors import CompressError, RecipeError, StartError
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.formats.gguf import FILE, GGUF
from compress.formats.gguf_blocks import block_kind, pack_blocks
from compress.formats.gguf_families import llama3_factors, rows_of
from compress.formats.gguf_tokenizer import PRE_TOKENIZERS, add_tokenizer, refuses_tokenizer
from compress.maths.grid import QuantSpec, dequantize, find_params, named_spec, quantize
from compress.maths.named_grids import NAMED_GRIDS
from compress.nn.quant_linear import QuantLinear
from compress.passes.autoround import AutoRound
from compress.passes.awq import AWQ
from compress.passes.gptq import GPTQ
from compress.passes.hqq import HQQ
from compress.passes.rtn import RTN
from compress.recipe import Recipe
from compress.testing import BYTE_VOCABULARY, byte_tokenizer, save_tiny, tiny_model, tiny_tokenizer, tiny_tokens

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

SMALL = {"vocab_size": BYTE_VOCABULARY}
KINDS = {"gguf-q4_0": "Q4_0", "gguf-q4_1": "Q4_1", "gguf-q8_0": "Q8_0"}
HELD = ("llama", "mistral", "qwen3", "gemma3")


def tiny(family="llama", **changes):
    window = {"sliding_window": 64} if family == "mistral" else {}
    return tiny_model(family, **{**SMALL, **window, **changes})


def stored(kind, data, columns):
    """float32 values of blocks, by ggml's own reader."""
    return gguf.dequantize(data, gguf.GGMLQuantizationType[kind])[:, :columns]


def read(folder):
    """Name -> (kind, float32 values in torch's order of dimensions), and the metadata."""
    reader = gguf.GGUFReader(folder / FILE)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        tensors[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(np.array(values, dtype=np.float32)))
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def written(model, folder, tokenizer=None):
    contents = Contents.of_model(model, tokenizer or byte_tokenizer())
    return read(write_model_folder(folder / "out", contents, "gguf"))


def test_a_block_of_q4_0_by_hand():
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, 0], codes[0, 1], codes[0, 16], codes[0, 31] = -8, 7, 1, -1
    packed = pack_blocks(codes, torch.tensor([[0.5]]), None, "Q4_0")
    # 0.5 in float16 is 0x3800; codes are stored 8 higher, the second half of the block in the high halves of bytes
    assert packed.tolist() == [[0x00, 0x38, 0x90, 0x8F, *[0x88] * 13, 0x78]]


def test_a_block_of_q4_1_by_hand():
    codes = torch.full((1, 32), -8, dtype=torch.int8)
    codes[0, 3] = 7
    packed = pack_blocks(codes, torch.tensor([[0.5]]), torch.tensor([[-4]], dtype=torch.int8), "Q4_1")
    # the minimum is -0.5 * (-4 + 8) = -2, 0xC000
    assert packed.tolist() == [[0x00, 0x38, 0x00, 0xC0, 0, 0, 0, 0x0F, *[0] * 12]]


@pytest.mark.parametrize("grid", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 30.0])
def test_blocks_hold_every_weight_of_their_grid_to_the_bit(grid, dtype, size):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).mul(size).to(dtype)
    weight[0, :32] = 0
    weight[1, :32] = weight[1, :32].abs()
    spec = named_spec(dtype, grid)
    scale, zero = find_params(weight, spec, search=True)
    codes = quantize(weight, scale, zero, spec)
    kind = block_kind(spec, 96)
    assert kind == KINDS[grid]
    ours = dequantize(codes, scale.float(), zero, spec, torch.float32)
    theirs = stored(kind, pack_blocks(codes, scale, zero, kind), 96)
    assert torch.equal(torch.from_numpy(theirs), ours)


@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_whole_blocks_are_held_by_repeating_their_scale(group_size, bits):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    spec = QuantSpec(bits, group_size)
    scale, _ = find_params(weight, spec)
    codes = quantize(weight, scale, None, spec)
    kind = block_kind(spec, 128)
    theirs = stored(kind, pack_blocks(codes, scale, None, kind), 128)
    assert torch.equal(torch.from_numpy(theirs), dequantize(codes, scale, None, spec, torch.float32))


def test_what_no_block_holds():
    assert block_kind(QuantSpec(3, 32), 64) is None
    assert block_kind(QuantSpec(4, 16), 64) is None
    assert block_kind(QuantSpec(4, 48), 96) is None
    assert block_kind(QuantSpec(4, 32), 48) is None
    assert block_kind(QuantSpec(4, 32, symmetric=False), 64) is None
    assert block_kind(QuantSpec(4, 32, scale_dtype="bfloat16"), 64) is None
    assert block_kind(QuantSpec(8, stored="int8"), 64) is None


def test_blocks_never_round_a_scale_or_a_minimum():
    codes, zero = torch.zeros(1, 32, dtype=torch.int8), torch.full((1, 1), 7, dtype=torch.int8)
    with pytest.raises(CompressError, match="float16"):
        pack_blocks(codes, torch.tensor([[1.0001]]), None, "Q4_0")
    scale = torch.tensor([[1 + 2.0**-10]])  # float16 holds it, and not 15 times as much
    pack_blocks(codes, scale, None, "Q4_0")
    with pytest.raises(CompressError, match="float16"):
        pack_blocks(codes, scale, zero, "Q4_1")


def expected(model, name):
    """A weight as the file should have it, from the model alone."""
    config, weight = model.config, model.state_dict().get(f"{name}.weight")
    layer = model.get_submodule(name)
    weight = (layer.dequantize(torch.float32) if isinstance(layer, QuantLinear) else weight).float()
    if config.model_type in ("llama", "mistral") and name.endswith(("q_proj", "k_proj")):
        heads = weight.unflatten(0, (-1, config.head_dim))
        half = config.head_dim // 2
        weight = torch.stack([heads[:, :half], heads[:, half:]], 2).flatten(0, 2)
    if config.model_type == "gemma3_text" and name.endswith("norm"):
        weight = weight + 1
        if name.endswith("q_norm"):
            weight = weight * math.sqrt(config.head_dim / config.query_pre_attn_scalar)
    return weight


@pytest.mark.parametrize("grid", [None, *KINDS])
@pytest.mark.parametrize("family", HELD)
def test_the_file_holds_the_models_weights_to_the_bit(family, grid, tmp_path):
    model = tiny(family)
    if grid is not None:
        model = RTN(grid=grid)(model).model
    tensors, fields = written(model, tmp_path)
    places = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3, "gemma3": gguf.MODEL_ARCH.GEMMA3}[
            fields["general.architecture"]
        ],
        3,
    )
    modules = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
    assert len(tensors) == len(set(modules) - tied)
    for name in set(modules) - tied:
        kind, values = tensors[f"{places.get_name(name)}.weight"]
        assert torch.equal(values, expected(model, name)), name
        packed = isinstance(modules[name], QuantLinear)
        assert kind == (KINDS[grid] if packed else "F32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_matrices_keep_their_dtype_and_vectors_are_float32(dtype, tmp_path):
    tensors, fields = written(tiny().to(dtype), tmp_path)
    short = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {kind for kind, values in tensors.values() if values.dim() == 2} == {short}
    assert {kind for kind, values in tensors.values() if values.dim() == 1} == {"F32"}
    assert fields["general.file_type"] == {"F16": 1, "BF16": 32}[short]


def test_embeddings_and_heads_in_blocks(tmp_path):
    tensors, _ = written(RTN(grid="gguf-q4_0", embeddings=8, head=4)(tiny("qwen3")).model, tmp_path)
    assert tensors["token_embd.weight"][0] == "Q8_0"
    assert tensors["output.weight"][0] == "Q4_0"


def test_the_reordered_rows_of_q_and_k_give_the_same_scores():
    """Half-and-half rotation of rows as they are, neighbouring rotation of rows as they are stored (float64)."""
    generator = torch.Generator().manual_seed(0)
    head, places = 8, torch.arange(5, dtype=torch.float64)
    angles = places[:, None] * 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    cos, sin = angles.cos(), angles.sin()

    def halves(x):
        a, b = x[:, : head // 2], x[:, head // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)

    def neighbours(x):
        a, b = x[:, 0::2], x[:, 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], 2).flatten(1)

    rows = rows_of(Contents.of_model(tiny()), "model.layers.0.self_attn.k_proj.weight")[:head]
    q, k = (torch.randn(5, head, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = neighbours(q[:, rows]) @ neighbours(k[:, rows]).t()
    assert torch.allclose(scores, halves(q) @ halves(k).t(), atol=1e-12)


def test_llama3s_factors_are_those_of_transformers():
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = tiny(rope_parameters=scaling, head_dim=64).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.allclose(llama3_factors(64, 500000.0, scaling).double(), plain / scaled.double(), rtol=1e-5)


def test_the_metadata_of_gemma_names_windows_and_both_bases(tmp_path):
    tensors, fields = written(tiny("gemma3"), tmp_path)
    assert fields["gemma3.attention.sliding_window"] == 16
    assert fields["gemma3.attention.sliding_window_pattern"] == [True, False, True]
    assert fields["gemma3.rope.freq_base"] == 1e6
    assert fields["gemma3.rope.freq_base_swa"] == 1e4
    assert "output.weight" not in tensors  # tied


def test_the_plan_knows_the_bytes_of_the_file(tmp_path):
    model = RTN(grid="gguf-q4_0")(tiny()).model
    contents = Contents.of_model(model, byte_tokenizer())
    folder = write_model_folder(tmp_path / "out", contents, "gguf")
    reader = gguf.GGUFReader(folder / FILE)
    assert GGUF().file_bytes(contents) == (folder / FILE).stat().st_size - reader.data_offset


def test_the_same_model_gives_the_same_bytes(tmp_path):
    contents = Contents.of_model(RTN(grid="gguf-q4_1")(tiny()).model, byte_tokenizer())
    files = [write_model_folder(tmp_path / name, contents, "gguf") / FILE for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_order_in_which_tensors_come_does_not_matter(tmp_path):
    contents = Contents.of_model(tiny(num_hidden_layers=11), byte_tokenizer())
    turned = replace(contents, tensors=contents.tensors[::-1])
    files = [write_model_folder(tmp_path / n, c, "gguf") / FILE for n, c in (("a", contents), ("b", turned))]
    assert files[0].read_bytes() == files[1].read_bytes()
    names = [tensor.name for tensor in gguf.GGUFReader(files[0]).tensors]
    assert names.index("blk.9.attn_q.weight") < names.index("blk.10.attn_q.weight")


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    contents = Contents.of_model(tiny(), byte_tokenizer())
    folder = write_model_folder(tmp_path / "out", contents, "gguf")
    before = (folder / FILE).read_bytes()

    def broken(name):
        if "layers.1" in name:
            raise CompressError("the disk is gone")
        return contents.read(name)

    with pytest.raises(CompressError, match="disk is gone"):
        write_model_folder(folder, replace(contents, read=broken), "gguf")
    assert (folder / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "pass_",
    [RTN, HQQ, GPTQ, AWQ, lambda **given: AutoRound(iterations=3, **given)],
    ids=["rtn", "hqq", "gptq", "awq", "autoround"],
)
@pytest.mark.parametrize("grid", KINDS)
def test_every_rounding_pass_rounds_on_the_grid(pass_, grid, tmp_path):
    model = tiny(num_hidden_layers=1)
    tokens = tiny_tokens(4, 16)
    made = pass_(grid=grid)
    given = {"calibration": tokens} if made.takes_calibration else {}
    tensors, _ = written(made(model, **given).model, tmp_path)  # refuses scales that blocks do not hold
    assert sum(kind == KINDS[grid] for kind, _ in tensors.values()) == 7


def test_a_grid_stands_for_bits_group_size_and_symmetry():
    made = GPTQ(grid="gguf-q4_1")
    assert (made.bits, made.group_size, made.symmetric) == (4, 32, False)
    assert GPTQ(**made.options()) == made
    with pytest.raises(ValueError, match="grid gguf-q4_0 is group_size 32, and group_size is 64: leave it out"):
        GPTQ(grid="gguf-q4_0", group_size=64)
    with pytest.raises(StartError, match="grid gguf-q4_0 is bits 4"):
        QuantSpec(3, 32, grid="gguf-q4_0")
    with pytest.raises(StartError, match=r"blocks of 32.*48 columns.*`skip`"):
        named_spec(torch.float32, "gguf-q4_0").columns_per_group(48)


def refusal(model):
    return GGUF().refusal(Contents.of_model(model))


def test_other_families_are_refused_by_name():
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM" in refusal(tiny("gpt2"))
    assert "MixtralForCausalLM" in refusal(tiny("mixtral"))


def test_models_that_llama_cpp_would_run_otherwise_are_refused():
    assert "sliding window of 16 tokens" in refusal(tiny("mistral", sliding_window=16))
    assert "activation is gelu" in refusal(tiny(hidden_act="gelu"))
    assert "self_attn.q_proj.bias" in refusal(tiny("qwen3", attention_bias=True))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "scaled by dynamic" in refusal(tiny(rope_parameters=dynamic))
    assert refusal(tiny(attention_bias=True, mlp_bias=True)) is None


def test_grids_that_no_block_holds_are_refused_with_those_that_can_be_held():
    said = refusal(RTN(bits=3, group_size=32)(tiny()).model)
    assert "in 3 bits" in said
    assert all(name in said for name in NAMED_GRIDS)
    assert "asymmetric" in refusal(RTN(bits=4, group_size=32, symmetric=False)(tiny()).model)
    assert "bfloat16" in refusal(RTN(bits=4, group_size=32)(tiny().to(torch.bfloat16)).model)
    assert refusal(RTN(bits=4, group_size=32)(tiny()).model) is None


def test_a_recipe_that_cannot_be_exported_is_refused_before_a_weight_is_read(tmp_path):
    folder = save_tiny(tmp_path / "model", "gpt2")
    recipe = {"model": str(folder), "passes": [{"rtn": {"group_size": 32}}], "export": ["gguf"], "benchmark": False}
    with pytest.raises(StartError, match=r"export: gguf holds .*Qwen3ForCausalLM.* this model is a GPT2LMHeadModel"):
        compress.plan(Recipe.from_dict(recipe))
    with pytest.raises(RecipeError, match="leave it out"):
        Recipe.from_dict({**recipe, "passes": [{"rtn": {"grid": "gguf-q4_0", "bits": 3}}]})


def byte_level(cuts, normalizer=None, whole=False):
    """A byte-level BPE without merges that cuts text so."""
    alphabet = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, [], ignore_merges=whole))
    tokenizer.pre_tokenizer = cuts
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def split(expression):
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), bytes_])


class Notes:
    """Stands for a GGUFWriter: what it is told, by the name of the method."""

    def __init__(self):
        self.told = {}

    def __getattr__(self, name):
        return lambda value: self.told.update({name.removeprefix("add_"): value})


#: As the models' own tokenizer.json have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("cuts", "whole", "name"),
    [
        (BYTES, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), False, "smollm"),
        (split(LLAMA3.replace("{1,3}", "")), False, "qwen2"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "dbrx"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_pre_tokenizers_name_is_found_by_how_it_cuts_text(cuts, whole, name):
    notes = Notes()
    add_tokenizer(notes, byte_level(cuts, normalizers.NFC(), whole), 256)
    assert notes.told["tokenizer_pre"] == name
    assert name in PRE_TOKENIZERS


def test_tokenizers_that_llama_cpp_has_not_are_refused():
    assert "WordLevel" in refuses_tokenizer(tiny_tokenizer())
    assert "there is none" in refuses_tokenizer(None)
    assert "no pre-tokenizer of llama.cpp" in refuses_tokenizer(byte_level(split(r"\S{1,2}")))
    assert "no pre-tokenizer of llama.cpp" in refuses_tokenizer(byte_level(BYTES, whole=True))
    assert refuses_tokenizer(byte_tokenizer()) is None


def sentencepiece():
    """BPE on characters with bytes to fall back on, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", "ab", "▁ab", "abc"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "ab"), ("ab", "c")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template="{{ messages }}",
    )  # fmt: skip


def test_sentencepieces_scores_fall_in_the_order_of_merges():
    notes = Notes()
    add_tokenizer(notes, sentencepiece(), 268)
    told = notes.told
    score = dict(zip(told["token_list"], told["token_scores"], strict=True))
    assert score["ab"] > score["▁ab"] > score["abc"] > score["a"]
    kind = dict(zip(told["token_list"], told["token_types"], strict=True))
    assert (kind["<unk>"], kind["<s>"], kind["<0x41>"], kind["ab"], kind["[PAD267]"]) == (2, 3, 6, 1, 5)
    assert (told["tokenizer_model"], told["add_space_prefix"], told["add_bos_token"]) == ("llama", True, False)
    assert (told["bos_token_id"], told["eos_token_id"], told["unk_token_id"]) == (1, 2, 0)
    assert told["chat_template"] == "{{ messages }}"


def test_what_stands_at_a_texts_ends_is_told():
    notes = Notes()
    add_tokenizer(notes, byte_tokenizer(), BYTE_VOCABULARY)
    assert (notes.told["add_bos_token"], notes.told["bos_token_id"], notes.told["add_eos_token"]) == (True, 1, False)
    assert notes.told["token_merges"][:2] == ["t h", "th e"]
    assert len(notes.told["token_list"]) == BYTE_VOCABULARY == len(set(notes.told["token_list"]))
