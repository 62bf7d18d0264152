"""`load`: what it builds, what it refuses, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quantize_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from compress.checkpoint import TensorSource, write_checkpoint
from compress.errors import CompressError, StartError
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.loading import load, model_class, skeleton
from compress.maths.grid import QuantSpec
from compress.nn.quant_linear import QuantLinear
from compress.testing import FAMILIES, outputs, tiny_model, tiny_tokens

SPEC = QuantSpec(4, 16, False)


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return quantize_model(tiny_model("llama"), SPEC)


@pytest.fixture
def folder(original: PreTrainedModel, tmp_path: Path) -> Path:
    history = [{"pass": "rtn", "options": {"bits": 4}, "leaves": "quantized"}]
    return write_model_folder(tmp_path / "run" / "model", Contents.of_model(original, history=history, card="# Card\n"))


class LiveFloats(TorchDispatchMode):
    """The most bytes of floating-point tensors that were alive at once, meta tensors not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for alive, size in self.live.values() if alive() is not None))
        return out


def test_the_expanded_model_never_exists_neither_while_loading_nor_while_running(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=8)
    expanded = sum(p.numel() * 4 for p in model.parameters())
    largest = 64 * 256 * 4
    write_model_folder(tmp_path / "model", Contents.of_model(quantize_model(model, SPEC)))
    with LiveFloats() as while_loading:
        loaded = load(tmp_path)
    kept = sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()) if t.is_floating_point())
    assert kept < expanded / 4
    assert kept / 2 < while_loading.peak < kept + largest
    with LiveFloats() as while_running, torch.no_grad():
        loaded(tiny_tokens(1, 4))
    assert largest <= while_running.peak < 4 * largest < expanded / 4


def test_a_loaded_model_generates_and_brings_its_generation_config_and_history(
    folder: Path, original: PreTrainedModel
) -> None:
    GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=95, pad_token_id=0).save_pretrained(folder)
    model = load(folder)
    prompt = tiny_tokens(2, 5)
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    assert generated.shape == (2, 8)
    assert torch.equal(generated[:, 5], outputs(original, prompt)[:, -1].argmax(-1))
    assert model.compress_history[0]["pass"] == "rtn"
    assert (folder / "README.md").read_text() == "# Card\n"


def test_a_loaded_model_saves_as_a_folder_that_reads_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "copy")
    tokens = tiny_tokens(1, 6)
    assert torch.equal(outputs(load(tmp_path / "copy"), tokens), outputs(model, tokens))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(outputs(plain.eval(), tokens), outputs(model, tokens))


def test_another_dtype_is_that_of_all_that_is_not_packed(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert model.config.dtype == torch.bfloat16
    assert torch.isfinite(outputs(model, tiny_tokens(1, 4))).all()


def test_sharded_folders_read_the_same_here_and_in_transformers(folder: Path, original: PreTrainedModel) -> None:
    source = TensorSource(folder)
    tensors = {name: source.read(name) for name in source.names()}
    (folder / "model.safetensors").unlink()
    contents = Contents.of_model(original)
    files = write_checkpoint(folder, contents.tensors, tensors.__getitem__, max_shard_bytes=5_000)
    assert len(files) > 3
    tokens = tiny_tokens(2, 8)
    expected = outputs(original, tokens)
    assert torch.equal(outputs(load(folder), tokens), expected)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_has_no_weights_and_the_buffers_that_from_pretrained_gives(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    built = skeleton(loaded.config, torch.float32)
    assert type(built) is type(loaded)
    assert all(parameter.is_meta for parameter in built.parameters())
    expected = dict(loaded.named_non_persistent_buffers())
    found = dict(built.named_non_persistent_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype
        assert torch.equal(found[name], buffer), name


def test_building_a_skeleton_leaves_the_random_state_and_the_config_alone() -> None:
    config = tiny_model("llama").config
    before, state = config.to_dict(), torch.get_rng_state()
    skeleton(config, torch.bfloat16)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


PACKED = "model.layers.1.mlp.up_proj.weight_packed"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("model.norm.weight"), r"do not fit LlamaForCausalLM \(missing: model\.norm\.weight\)"),
        (_without(PACKED), rf"missing: {PACKED}"),
        (_without(SCALE), rf"{SCALE} is missing, though model\.layers\.1\.mlp\.up_proj is said to be packed"),
        (lambda t: t | {"model.extra": torch.ones(1)}, r"not expected: model\.extra"),
        (lambda t: t | {PACKED: torch.zeros(64, 3, dtype=torch.int32)}, r"int32 \[64, 3\]; .* needs int32 \[64, 4\]"),
        (lambda t: t | {PACKED: torch.zeros(64, 4, dtype=torch.int16)}, r"int16 \[64, 4\]; .* needs int32 \[64, 4\]"),
        (lambda t: t | {SCALE: torch.zeros(64, 2, dtype=torch.int32)}, rf"{SCALE} is int32; scales are one of float16"),
    ],
    ids=["missing", "missing codes", "missing scale", "unexpected", "shape", "dtype", "scale dtype"],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str
) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(CompressError, match=said):
        load(folder)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_no_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no such folder"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartError, match=r"no config\.json"):
        load(tmp_path / "empty")
    _edit(folder, architectures=["LlamaForCausalLMs"])
    with pytest.raises(StartError, match=r'LlamaForCausalLMs.*Did you mean "LlamaForCausalLM"'):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(StartError, match=r"config\.json cannot be used"):
        load(folder)


def test_other_quantizations_are_refused_by_name(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    _edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(StartError, match="quantized as gptq"):
        load(folder)
    _edit(folder, quantization_config=stored | {"format": "marlin-24"})
    with pytest.raises(StartError, match="quantized as compressed-tensors, marlin-24"):
        load(folder)
    stored["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    _edit(folder, quantization_config=stored)
    with pytest.raises(StartError, match="not one that compressed-tensors takes"):
        load(folder)


def test_folders_of_transformers_own_making_load_too(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    model.save_pretrained(tmp_path)
    tokens = tiny_tokens(1, 8)
    assert torch.equal(outputs(load(tmp_path), tokens), outputs(model, tokens))
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CompressError, match="pickled"):
        load(tmp_path)


def test_a_dense_folder_that_lacks_a_tensor_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(_without("model.norm.weight")(load_file(file)), file, {"format": "pt"})
    with pytest.raises(CompressError, match=r"missing: model\.norm\.weight"):
        load(tmp_path)


def test_a_packed_export_without_its_grids_is_named(tmp_path: Path) -> None:
    model = quantize_model(tiny_model("gpt2"), SPEC)
    write_model_folder(tmp_path, Contents.of_model(model), "packed")
    loaded = load(tmp_path)
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 12
    with pytest.raises(OSError, match="no file named"):  # transformers must not take codes for weights
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "compress.json").unlink()
    with pytest.raises(CompressError, match=r"compress\.json is missing or damaged"):
        load(tmp_path)


def test_the_class_follows_from_the_config() -> None:
    config = tiny_model("llama").config
    assert model_class(config).__name__ == "LlamaForCausalLM"
    assert model_class(config, "LlamaModel").__name__ == "LlamaModel"
    config.architectures = None
    assert model_class(config).__name__ == "LlamaForCausalLM"
    bert = tiny_model("bert").config
    assert model_class(bert).__name__ == "BertModel"
    config.architectures = ["Tensor"]
    with pytest.raises(StartError, match="Tensor"):
        model_class(config)


def test_a_folder_is_replaced_whole_or_not_at_all(folder: Path, original: PreTrainedModel) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    contents = Contents.of_model(original)

    def broken(name: str) -> torch.Tensor:
        if "layers.2" in name:
            raise CompressError("the stage is damaged")
        return contents.read(name)

    with pytest.raises(CompressError, match="stage is damaged"):
        write_model_folder(folder, Contents(**{**vars(contents), "read": broken}))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    write_model_folder(folder, contents)
    assert not (folder / "README.md").exists()
    assert [place.name for place in folder.parent.iterdir()] == ["model"]


def test_a_disk_that_fills_up_while_the_tokenizer_is_written_is_named(
    original: PreTrainedModel, tmp_path: Path
) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            raise Exception("No space left on device (os error 28)")  # as the tokenizers library does

    with pytest.raises(CompressError, match="the disk is full"):
        write_model_folder(tmp_path / "model", Contents.of_model(original, Tokenizer()))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_written_beside_the_model(original: PreTrainedModel, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    write_model_folder(tmp_path / "model", Contents.of_model(original, tokenizer))
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("hello", add_special_tokens=False).input_ids == [1]
