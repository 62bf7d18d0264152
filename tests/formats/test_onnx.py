"""An ONNX export is the model: its blocks hold our codes, its graph computes what the model does, GenAI opens it."""

import json
import math

import numpy as np
import pytest
import torch

from compress.errors import StartError
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.formats.onnx import Onnx
from compress.formats.onnx_blocks import block_count, block_size, blocks, packed_zeros, refuses_grid, repeated
from compress.maths.grid import QuantSpec, find_params, quantize
from compress.measure.export_check import likelihood_differences
from compress.nn.quant_linear import QuantLinear
from compress.passes.rtn import RTN
from compress.testing import byte_tokenizer, tiny_model, tiny_tokenizer, tiny_tokens

pytest.importorskip("onnxruntime_genai")

from compress.measure.onnxruntime_engine import exact_session

FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "qwen2")
GRIDS = {
    "dense": {},
    "4 bits": {"bits": 4, "group_size": 16},
    "8 bits and the ends": {"bits": 8, "group_size": 32, "embeddings": 8},
    "zero points": {"bits": 4, "group_size": 16, "symmetric": False, "embeddings": 4},
    "a scale a row": {"bits": 8, "group_size": -1, "symmetric": False},
}


LLAMAS_OWN = ("model_type", "head_dim", "architectures", "attention_bias", "mlp_bias", "pretraining_tp")


def model_of(family, **changes):
    if family != "qwen2":
        return tiny_model(family, **changes)
    import transformers

    config = {key: value for key, value in tiny_model("llama").config.to_dict().items() if key not in LLAMAS_OWN}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15) if parameter.dim() > 1 else parameter.add_(0.05)
    return model.eval()


def rounded(model, options):
    return RTN(**options)(model).model if options else model


def written(folder, model, tokenizer=None):
    return write_model_folder(folder, Contents.of_model(model, tokenizer), "onnx")


def exact(folder, ids):
    """Logits of ids [rows, n] by the export, without the rounding of its kernels."""
    run = exact_session(folder, 1)
    return np.stack([run(row) for row in ids.tolist()])


def textbook_dequantize(packed, scales, zeros, bits, columns, size):
    """W [out, in] in float64 of `MatMulNBits`' tensors, one weight at a time, as ONNX Runtime's documentation says."""
    rows, count, _ = packed.shape
    weight = np.zeros((rows, columns))

    def number(stream: bytes, index: int) -> int:
        return stream[index * bits // 8] >> (index * bits % 8) & (2**bits - 1)

    for row in range(rows):
        for column in range(columns):
            block, place = divmod(column, size)
            zero = 2 ** (bits - 1) if zeros is None else number(zeros[row].tobytes(), block)
            weight[row, column] = (number(packed[row, block].tobytes(), place) - zero) * float(scales[row, block])
    assert count == math.ceil(columns / size)
    return weight


@pytest.mark.parametrize(
    ("bits", "group", "columns"), [(4, 16, 48), (8, 32, 64), (4, 48, 96), (4, -1, 76), (8, -1, 20)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_hold_the_weights_of_our_grid(bits, group, columns, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(5, columns)
    spec = QuantSpec(bits, group, symmetric, scale_dtype="float32")
    scale, zero = find_params(weight, spec, search=True)
    layer = QuantLinear.from_codes(quantize(weight, scale, zero, spec), scale, zero, spec)
    zeros = None if symmetric else packed_zeros(layer.weight_zero_point, spec, 5, columns).numpy()
    found = textbook_dequantize(
        blocks(layer.weight_packed, spec, columns).numpy(), repeated(layer.weight_scale, spec, columns).numpy(), zeros,
        bits, columns, block_size(spec),
    )  # fmt: skip
    assert np.array_equal(found.astype(np.float32), layer.dequantize(torch.float32).numpy())


def test_codes_of_one_an_element_become_the_same_bytes():
    spec = QuantSpec(8, stored="int8", scale_dtype="float32")
    codes = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert blocks(codes, spec, 4)[0, 0, :4].tolist() == [0, 127, 128, 255]


@pytest.mark.parametrize(
    ("group", "size", "count"), [(16, 16, 12), (32, 32, 6), (48, 16, 12), (96, 32, 6), (192, 64, 3), (-1, 128, 2)]
)
def test_a_block_is_the_largest_power_of_two_that_cuts_a_group(group, size, count):
    spec = QuantSpec(4, group)
    assert (block_size(spec), block_count(spec, 192)) == (size, count)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_computes_what_the_model_does(family, grid, tmp_path):
    options = GRIDS[grid]
    model = rounded(model_of(family), options)
    ids = tiny_tokens(2, 40)  # longer than the window of the families that have one
    found = exact(written(tmp_path / "export", model), ids)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    # The model multiplies asymmetric grids in the scales' float16, and rounds each weight to it.
    allowed = 1e-5 if options.get("symmetric", True) else 5e-3
    assert max(likelihood_differences(wanted, torch.from_numpy(found), ids)) < allowed
    assert np.abs(found - wanted.numpy()).max() < (5e-5 if allowed < 1e-4 else 2e-2)


@pytest.mark.parametrize(
    "changes", [{"head_dim": 16}, {"tie_word_embeddings": False}, {"attention_bias": True}], ids=str
)
def test_heads_that_attention_rotates_itself_a_head_of_its_own_and_biases_are_right(changes, tmp_path):
    model = rounded(tiny_model("llama", **changes), {"bits": 4, "group_size": 16})
    ids = tiny_tokens(2, 24)
    found = exact(written(tmp_path / "export", model), ids)
    with torch.no_grad():
        assert np.abs(found - model(input_ids=ids).logits.numpy()).max() < 5e-5


def test_stretched_rotary_positions_are_the_models(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    model = tiny_model("llama", rope_parameters=rope)
    ids = tiny_tokens(1, 48)
    found = exact(written(tmp_path / "export", model), ids)
    with torch.no_grad():
        assert np.abs(found - model(input_ids=ids).logits.numpy()).max() < 5e-5


def test_sixteen_bit_models_are_held_in_float32(tmp_path):
    model = rounded(tiny_model("llama").to(torch.bfloat16), {"bits": 4, "group_size": 16})
    ids = tiny_tokens(1, 24)
    found = exact(written(tmp_path / "export", model), ids)
    wanted = model.float()
    wanted.model.rotary_emb = tiny_model("llama").model.rotary_emb  # `to` has rounded its frequencies
    with torch.no_grad():
        wanted = wanted(input_ids=ids).logits
    assert np.abs(found - wanted.numpy()).max() < 5e-5


def test_equal_models_give_equal_bytes(tmp_path):
    model = rounded(tiny_model("llama"), GRIDS["8 bits and the ends"])
    first, second = (written(tmp_path / name, model, byte_tokenizer()) for name in "ab")
    names = sorted(file.name for file in first.iterdir())
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "compress.json"} <= set(names)
    assert "config.json" not in names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_write_that_fails_leaves_no_folder(tmp_path):
    from dataclasses import replace

    contents = Contents.of_model(rounded(tiny_model("llama"), GRIDS["4 bits"]))
    last = contents.tensors[-1].name

    def read(name):
        if name == last:
            raise RuntimeError("the disk went away")
        return contents.read(name)

    with pytest.raises(RuntimeError, match="went away"):
        write_model_folder(tmp_path / "export", replace(contents, read=read), "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("grid", ["dense", "zero points"])
def test_the_size_is_known_before_it_is_written(grid, tmp_path):
    model = rounded(tiny_model("llama"), GRIDS[grid])
    folder = written(tmp_path / "export", model)
    size = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert Onnx().file_bytes(Contents.of_model(model)) == pytest.approx(size, rel=0.1)


def refused(specs):
    return Onnx().refuses(torch.float32, dict.fromkeys(specs, "Linear"), specs)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (QuantSpec(3, 32), "3 bits"),
        (QuantSpec(2, 32), "2 bits"),
        (QuantSpec(4, 24), "groups of 24"),
        (QuantSpec(8, stored="float8", scale_dtype="float32"), "float8"),
        (QuantSpec(8, stored="int8", scale_dtype="float32", activations=True), "inputs"),
    ],
)
def test_what_cannot_be_held_is_refused_with_what_can(spec, said):
    reason = refused({"a": QuantSpec(4, 32), "b": spec})
    assert said in reason
    assert " b " in reason
    assert refuses_grid(QuantSpec(8, -1, False), "a") is None


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral", "gpt_oss"])
def test_another_architecture_is_refused_with_the_families(family, tmp_path):
    with pytest.raises(StartError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM"):
        written(tmp_path / "export", tiny_model(family))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"hidden_act": "relu"}, "relu"),
    ],
)
def test_what_the_blocks_cannot_be_is_refused(changes, said):
    assert said in Onnx().refuses_model(Contents.of_model(tiny_model("llama", **changes)))


def test_a_tokenizer_that_genai_does_not_read_is_refused():
    assert "WordLevel" in Onnx().refuses_tokenizer(tiny_tokenizer(), None)
    assert Onnx().refuses_tokenizer(byte_tokenizer(), None) is None


def test_genai_is_told_how_long_a_text_may_be_and_where_it_ends(tmp_path):
    model = tiny_model("mistral")
    model.generation_config.eos_token_id, model.generation_config.temperature = [2, 5], 0.7
    told = json.loads((written(tmp_path / "export", model) / "genai_config.json").read_text())
    assert told["model"]["eos_token_id"] == [2, 5]
    assert told["model"]["context_length"] == told["search"]["max_length"] == 64
    assert (told["model"]["type"], told["search"]["temperature"]) == ("mistral", 0.7)
