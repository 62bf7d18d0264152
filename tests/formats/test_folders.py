"""Every kind of folder is read by plain transformers and by `load`, with the outputs of the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Shelf, Written, quantize_model
from transformers import PreTrainedModel

from compress.checkpoint import TensorSource
from compress.formats.base import Contents, layer_kinds
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.folder import default_format, packed_export_note, write_model_folder
from compress.loading import load
from compress.maths.grid import QuantSpec, spec_for
from compress.nn.quant_linear import QuantLinear
from compress.testing import outputs, tiny_model

GRIDS = {
    f"llama-{bits}-{'sym' if symmetric else 'asym'}-{size}": QuantSpec(bits, size, symmetric)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for size in (-1, 16)
}
FAMILIES = ("qwen3", "mistral", "gemma3", "phi3", "opt", "gpt_neox", "gpt_oss", "mixtral", "bert")
SYMMETRIC, ASYMMETRIC = QuantSpec(4, 16), QuantSpec(3, 32, False)


def _mixed(name: str) -> QuantSpec | None:
    if "mlp" in name:
        return QuantSpec(3, 32)
    return None if "o_proj" in name else QuantSpec(8, -1)


def _some(name: str) -> QuantSpec | None:
    return QuantSpec(4, 16, False) if "layers.1.mlp" in name or "q_proj" in name else None


def _in(dtype: torch.dtype, symmetric: bool) -> PreTrainedModel:
    return quantize_model(tiny_model("llama", dtype=dtype), spec_for(dtype, 4, 16, symmetric))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: (lambda spec=spec: quantize_model(tiny_model("llama"), spec)) for name, spec in GRIDS.items()},
    **{f"{family}-sym": (lambda f=family: quantize_model(tiny_model(f), SYMMETRIC)) for family in FAMILIES},
    **{f"{family}-asym": (lambda f=family: quantize_model(tiny_model(f), ASYMMETRIC)) for family in FAMILIES},
    **{f"llama-{str(dtype)[6:]}-sym": (lambda dtype=dtype: _in(dtype, True)) for dtype in (torch.bfloat16, torch.half)},
    **{
        f"llama-{str(dtype)[6:]}-asym": (lambda dtype=dtype: _in(dtype, False))
        for dtype in (torch.bfloat16, torch.half)
    },
    "several grids": lambda: quantize_model(tiny_model("llama"), _mixed),
    "some layers": lambda: quantize_model(tiny_model("llama"), _some),
    "untied with bias": lambda: quantize_model(
        tiny_model("llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True), SYMMETRIC
    ),
    "lm_head too": lambda: quantize_model(tiny_model("llama", tie_word_embeddings=False), SYMMETRIC, skip="nothing"),
    "odd columns": lambda: quantize_model(tiny_model("llama", intermediate_size=51), QuantSpec(3, -1)),
    "odd columns-asym": lambda: quantize_model(tiny_model("llama", intermediate_size=51), QuantSpec(3, -1, False)),
    "fp32 scales": lambda: quantize_model(tiny_model("llama"), QuantSpec(4, 16, True, "float32")),
    "gpt2": lambda: quantize_model(tiny_model("gpt2"), QuantSpec(4, 16, False)),
    "dense llama": lambda: tiny_model("llama"),
    "dense gpt2": lambda: tiny_model("gpt2"),
    "dense mixtral": lambda: tiny_model("mixtral"),
}


@pytest.fixture(scope="session")
def library(shelf: Shelf) -> Shelf:
    for name, make in MODELS.items():
        shelf.add(name, make())
    gpt2 = shelf.written["gpt2"]
    write_model_folder(gpt2.folder.parent / "exports" / "packed", Contents.of_model(gpt2.model), "packed")
    return shelf


@pytest.fixture(scope="session")
def plain(library: Shelf) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return library.read_plainly()


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_computes_the_same_to_the_last_bit(
    name: str, library: Shelf, plain: tuple[dict[str, torch.Tensor], dict[str, str]]
) -> None:
    results, failures = plain
    assert name not in failures, failures.get(name)
    expected = library.written[name].expected
    if name == "gpt2":  # Conv1D multiplies with the transposed weight: other order of sums
        torch.testing.assert_close(results[name], expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(results[name], expected)


@pytest.mark.parametrize("name", MODELS)
def test_load_computes_the_same_to_the_last_bit_from_packed_weights(name: str, library: Shelf) -> None:
    written = library.written[name]
    for folder in (written.folder, written.folder.parent):
        model = load(folder)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.exact = True  # kernels may add up in another order
        assert torch.equal(outputs(model, library.tokens), written.expected)
        packed = {layer for layer, module in model.named_modules() if isinstance(module, QuantLinear)}
        assert packed == {layer for layer, module in written.model.named_modules() if isinstance(module, QuantLinear)}
        assert not model.training


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_pickled_and_all_weights_are_in_safetensors(name: str, library: Shelf) -> None:
    written = library.written[name]
    files = {file.name for file in written.folder.iterdir()}
    assert files <= {"config.json", "generation_config.json", "compress.json", "model.safetensors"}
    assert files >= {"config.json", "compress.json", "model.safetensors"}
    assert list(written.folder.parent.glob("*.partial")) == []


@pytest.mark.parametrize("name", [*GRIDS, "odd columns", "odd columns-asym"])
def test_packed_weights_take_the_bytes_that_their_bits_take(name: str, library: Shelf) -> None:
    written = library.written[name]
    source = TensorSource(written.folder)
    dense = load(written.folder)
    expected = sum(p.numel() * 4 for p in dense.parameters())  # norms, embeddings: float32
    for module in dense.modules():
        if isinstance(module, QuantLinear):
            spec, rows, columns = module.spec, module.out_features, module.in_features
            groups = columns // spec.group_size if spec.group_size > 0 else 1
            words = rows * -(-columns * spec.bits // 32)
            words += 0 if spec.symmetric else groups * -(-rows * spec.bits // 32)
            expected += 4 * words + 2 * rows * groups + 16
    assert source.total_bytes() == expected
    header = 8 + int.from_bytes((written.folder / "model.safetensors").read_bytes()[:8], "little")
    assert (written.folder / "model.safetensors").stat().st_size == expected + header


def test_dequantize_is_written_for_asymmetric_grids_only(library: Shelf) -> None:
    for name, spec in GRIDS.items():
        stored = json.loads((library.written[name].folder / "config.json").read_text())["quantization_config"]
        assert stored.get("dequantize", False) is not spec.symmetric
        assert stored["format"] == "pack-quantized"
        assert stored["quantization_status"] == "compressed"
        assert stored["ignore"] == ["lm_head"]
        assert stored["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_several_grids_name_their_layers_and_layers_left_alone_are_ignored(library: Shelf) -> None:
    stored = json.loads((library.written["several grids"].folder / "config.json").read_text())["quantization_config"]
    groups = stored["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in groups) == [3, 8]
    assert all(target.startswith("model.layers.") for group in groups for target in group["targets"])
    assert stored["ignore"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)] + ["lm_head"]


def test_tied_weights_are_stored_once(library: Shelf) -> None:
    assert "lm_head.weight" not in TensorSource(library.written["llama-4-sym-16"].folder).names()
    model = load(library.written["llama-4-sym-16"].folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_experts_are_stored_by_their_published_names_where_nothing_is_packed(library: Shelf) -> None:
    dense = TensorSource(library.written["dense mixtral"].folder).names()
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in dense
    assert not [name for name in dense if "gate_up_proj" in name]
    # transformers drops per-expert tensors of a compressed-tensors folder, and reads the merged ones
    packed = TensorSource(library.written["mixtral-sym"].folder).names()
    assert "model.layers.0.mlp.experts.gate_up_proj" in packed


def test_gpt2_is_written_unpacked_and_runs_packed(library: Shelf) -> None:
    written = library.written["gpt2"]
    contents = Contents.of_model(written.model)
    assert default_format(contents) == "dense"
    assert "exports/packed" in (packed_export_note(contents) or "")
    assert packed_export_note(Contents.of_model(library.written["llama-4-sym-16"].model)) is None
    config = json.loads((written.folder / "config.json").read_text())
    assert "quantization_config" not in config
    weight = TensorSource(written.folder).read("transformer.h.0.attn.c_attn.weight")
    layer = written.model.get_submodule("transformer.h.0.attn.c_attn")
    assert torch.equal(weight, layer.weight)
    small, large = (sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in _places(written))
    assert small < large / 2


def _places(written: Written) -> tuple[Path, Path]:
    return written.folder.parent / "exports" / "packed", written.folder


def test_a_packed_folder_of_another_run_is_not_taken_for_the_model(library: Shelf, tmp_path: Path) -> None:
    contents = Contents.of_model(tiny_model("gpt2"), history=[{"pass": "magnitude"}])
    write_model_folder(tmp_path / "model", contents)
    other = library.written["gpt2"].model
    write_model_folder(tmp_path / "exports" / "packed", Contents.of_model(other), "packed")
    assert not any(isinstance(module, QuantLinear) for module in load(tmp_path).modules())


def test_the_same_model_makes_the_same_bytes(library: Shelf, tmp_path: Path) -> None:
    for name in ("several grids", "dense mixtral", "gpt2"):
        first = library.written[name]
        write_model_folder(tmp_path / name, Contents.of_model(first.model))
        for file in first.folder.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_model("gpt2"), "a Conv1D"),
        (
            lambda: quantize_model(tiny_model("llama"), lambda n: QuantSpec(4, 16 if "mlp" in n else -1, False)),
            "here there are 2",
        ),
        (lambda: quantize_model(_half(), QuantSpec(4, 16, True, "float32")), "float16 cannot hold all float32 scales"),
        (lambda: quantize_model(_half(), QuantSpec(4, 16, True, "bfloat16")), "cannot hold all bfloat16"),
    ],
    ids=["conv1d", "several asymmetric", "wide scales", "other scales"],
)
def test_what_compressed_tensors_cannot_hold_is_refused_in_a_sentence(
    model: Callable[[], PreTrainedModel], reason: str, tmp_path: Path
) -> None:
    made = quantize_model(model(), SYMMETRIC) if "Conv1D" in reason else model()
    contents = Contents.of_model(made)
    said = CompressedTensors().refuses(contents.dtype, layer_kinds(made), contents.quantization)
    assert said is not None
    assert reason in said
    with pytest.raises(Exception, match="model: "):
        write_model_folder(tmp_path / "model", contents, "compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def _half() -> PreTrainedModel:
    return tiny_model("llama", dtype=torch.float16)
