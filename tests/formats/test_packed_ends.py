"""Rounded embeddings and heads in folders: plain transformers and `load` compute what the model in memory does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Shelf

from compress.checkpoint import TensorSource
from compress.formats.base import Contents
from compress.formats.folder import packed_export_note, write_model_folder
from compress.loading import load
from compress.nn.quant_embedding import QuantEmbedding, TiedHead
from compress.passes.rtn import RTN
from compress.testing import CAUSAL, outputs, tiny_model

HALF = torch.float16
#: Name -> (pass, family, changes of the model); in `PACKED` the embedding is packed in model/ too.
CASES = {
    "tied, symmetric": (RTN(group_size=16, embeddings=8), "llama", {}),
    "tied, by head": (RTN(group_size=16, head=4), "llama", {}),
    "tied, asymmetric": (RTN(group_size=16, symmetric=False, embeddings=8), "llama", {}),
    "tied, one asymmetric grid": (RTN(group_size=16, symmetric=False, embeddings=4), "llama", {}),
    "tied, one symmetric grid of half": (RTN(group_size=16, embeddings=4), "llama", {"dtype": HALF}),
    "untied, symmetric": (RTN(group_size=16, embeddings=8, head=4), "qwen3", {}),
    "untied, asymmetric": (RTN(group_size=16, symmetric=False, embeddings=8), "qwen3", {}),
    "untied, one asymmetric grid": (RTN(bits=8, group_size=16, symmetric=False, embeddings=8, head=8), "qwen3", {}),
    "untied, head alone": (RTN(group_size=16, head=8), "qwen3", {}),
    "untied, one grid of half": (RTN(bits=8, group_size=16, embeddings=8, head=8), "qwen3", {"dtype": HALF}),
    **{f"{family}, embeddings": (RTN(group_size=16, embeddings=8), family, {}) for family in (*CAUSAL, "bert")},
}
PACKED = {"tied, one asymmetric grid", "tied, one symmetric grid of half", "untied, one asymmetric grid",
          "untied, head alone", "untied, one grid of half"}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    shelf = Shelf(tmp_path_factory.mktemp("ends"))
    for name, (pass_, family, changes) in CASES.items():
        model = tiny_model(family, **changes)
        pass_(model, min_coverage=0.0)
        shelf.add(name, model)
        contents = Contents.of_model(model)
        if packed_export_note(contents):
            write_model_folder(shelf.root / name / "exports" / "packed", contents, "packed")
    return shelf


@pytest.fixture(scope="module")
def plain(library: Shelf) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return library.read_plainly()


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_the_same(
    name: str, library: Shelf, plain: tuple[dict[str, torch.Tensor], dict[str, str]]
) -> None:
    results, failures = plain
    assert name not in failures, failures.get(name)
    if "gpt2" in name:  # Conv1D multiplies with the transposed weight: other order of sums
        torch.testing.assert_close(results[name], library.written[name].expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(results[name], library.written[name].expected)


@pytest.mark.parametrize("name", CASES)
def test_load_runs_from_the_packed_table_whichever_folder_has_it(name: str, library: Shelf) -> None:
    written = library.written[name]
    for folder in (written.folder, written.folder.parent):
        model = load(folder)
        assert torch.equal(outputs(model, library.tokens), written.expected)
        assert isinstance(model.get_input_embeddings(), QuantEmbedding) == ("head alone" not in name)
        assert isinstance(model.get_output_embeddings(), TiedHead) == isinstance(
            written.model.get_output_embeddings(), TiedHead
        )


@pytest.mark.parametrize("name", CASES)
def test_the_embedding_is_packed_where_transformers_can_read_it_and_else_beside(name: str, library: Shelf) -> None:
    written = library.written[name]
    beside = written.folder.parent / "exports" / "packed"
    assert beside.exists() == (name not in PACKED)
    assert (packed_export_note(Contents.of_model(written.model)) is None) == (name in PACKED)
    if beside.exists():
        assert _bytes(beside) < _bytes(written.folder)


@pytest.mark.parametrize("name", [name for name in CASES if "gpt2" not in name])
def test_a_copy_of_the_model_folder_alone_reads_the_same(name: str, library: Shelf, tmp_path: Path) -> None:
    written = library.written[name]
    (tmp_path / "alone").symlink_to(written.folder)
    assert torch.equal(outputs(load(tmp_path / "alone"), library.tokens), written.expected)


def test_a_tied_tensor_is_stored_once_in_either_folder(library: Shelf) -> None:
    for name in ("tied, symmetric", "tied, by head", "tied, one asymmetric grid"):
        folder = library.written[name].folder
        names = TensorSource(folder).names()
        beside = folder.parent / "exports" / "packed"
        names += TensorSource(beside, "packed").names() if beside.exists() else []
        assert not [tensor for tensor in names if tensor.startswith("lm_head")]
        assert "model.embed_tokens.weight_packed" in names


def test_the_folder_says_which_layers_it_holds_unpacked(library: Shelf) -> None:
    for name in ("tied, symmetric", "untied, symmetric"):
        about = json.loads((library.written[name].folder / "compress.json").read_text())
        assert about["unpacked"] == ["model.embed_tokens"]
    assert "unpacked" not in json.loads((library.written["untied, head alone"].folder / "compress.json").read_text())


def test_dequantize_is_written_where_an_embedding_is_packed(library: Shelf) -> None:
    for name in ("tied, one asymmetric grid", "tied, one symmetric grid of half"):
        stored = json.loads((library.written[name].folder / "config.json").read_text())["quantization_config"]
        assert stored["dequantize"]
        assert stored["config_groups"]["group_0"]["targets"] == ["Linear", "model.embed_tokens"]
        assert stored["ignore"] == ["lm_head"]


def test_a_loaded_model_generates(library: Shelf) -> None:
    model = load(library.written["tied, one asymmetric grid"].folder)
    assert model.generate(library.tokens, max_new_tokens=3, do_sample=False).shape == (2, 15)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
