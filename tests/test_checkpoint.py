"""Reading and writing safetensors folders."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint import (
    SafetensorsWriter,
    TensorSource,
    TensorSpec,
    atomic_write_bytes,
    atomic_write_text,
    check_finite,
    write_checkpoint,
)
from compress.errors import CompressError, StartError
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.testing import outputs, tiny_model, tiny_tokens


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{str(dtype).removeprefix('torch.')}": torch.randn(3, 5, generator=generator).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    }
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        tensors[f"codes.{str(dtype).removeprefix('torch.')}"] = torch.arange(7).to(dtype)
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "namé": torch.ones(2)}


def _specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def test_what_the_writer_writes_the_library_reads_bit_for_bit(tmp_path: Path) -> None:
    tensors = _tensors()
    write_checkpoint(tmp_path, _specs(tensors), tensors.__getitem__)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(_same(read[name], tensors[name]) for name in tensors)


def test_the_source_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    source = TensorSource(tmp_path)
    assert source.names() == sorted(tensors)
    assert all(_same(source.read(name), tensors[name]) for name in tensors)
    assert source.info("layer.float16") == (torch.float16, (3, 5))
    assert source.total_bytes() == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert "scalar" in source
    assert "other" not in source


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    tensors = _tensors()
    for file, order in (("a", list(tensors)), ("b", list(reversed(tensors)))):
        with SafetensorsWriter(tmp_path / file, _specs({name: tensors[name] for name in order})) as writer:
            for name in order:
                writer.write(name, tensors[name])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_non_contiguous_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    write_checkpoint(tmp_path, [TensorSpec("t", tensor.dtype, (4, 3))], lambda name: tensor)
    assert torch.equal(TensorSource(tmp_path).read("t"), tensor)


def test_shards_hold_at_most_their_size_and_everything_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)} | {"large": torch.zeros(100)}
    files = write_checkpoint(tmp_path, _specs(tensors), tensors.__getitem__, max_shard_bytes=80)
    assert [file.name for file in files] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 680
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert sorted(sum(t.nbytes for t in load_file(file).values()) for file in files) == [40, 80, 80, 80, 400]
    source = TensorSource(tmp_path)
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)


def test_memory_stays_level_while_tensors_are_read_one_after_the_other(tmp_path: Path) -> None:
    megabytes, count = 16, 10
    specs = [TensorSpec(f"t{i}", torch.float32, (megabytes << 18,)) for i in range(count)]
    write_checkpoint(tmp_path, specs, lambda name: torch.full((megabytes << 18,), float(name[1:])))
    process = psutil.Process()
    source = TensorSource(tmp_path)
    source.read("t0")
    before, highest = process.memory_info().rss, 0
    for spec in specs:
        tensor = source.read(spec.name)
        assert tensor[-1] == float(spec.name[1:])
        highest = max(highest, process.memory_info().rss)
        del tensor
    assert highest - before < 2.5 * (megabytes << 20)
    assert not [file for file in process.open_files() if file.path.startswith(str(tmp_path))]


def test_a_tensor_read_outlives_its_file(tmp_path: Path) -> None:
    save_file({"t": torch.ones(4)}, tmp_path / "model.safetensors")
    tensor = TensorSource(tmp_path).read("t")
    (tmp_path / "model.safetensors").write_bytes(b"")
    tensor += 1
    assert tensor.tolist() == [2.0] * 4


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"t": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CompressError, match=rf"{name}.*safetensors"):
        TensorSource(tmp_path)


def test_pickles_beside_safetensors_are_ignored(tmp_path: Path) -> None:
    torch.save({"t": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    save_file({"t": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert TensorSource(tmp_path).read("t").tolist() == [0.0, 0.0]


def test_a_folder_without_weights_or_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="holds no weights"):
        TensorSource(tmp_path)
    with pytest.raises(StartError, match="no such folder"):
        TensorSource(tmp_path / "absent")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) - 10],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data + b"more",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"{]" + data[10:],
        lambda data: b"<!DOCTYPE html><html>not found</html>",
    ],
    ids=["cut", "cut header", "empty", "longer", "length", "json", "html"],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: object) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(40)}, file)
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CompressError, match=r"model\.safetensors is cut off or no safetensors file"):
        TensorSource(tmp_path)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(40)}, file)
    source = TensorSource(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CompressError, match=r"model\.safetensors: the file ends inside t"):
        source.read("t")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.ones(10) for i in range(3)}
    files = write_checkpoint(tmp_path, _specs(tensors), tensors.__getitem__, max_shard_bytes=40)
    files[1].unlink()
    with pytest.raises(CompressError, match=f"{files[1].name}, which is missing"):
        TensorSource(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CompressError, match="no readable weight_map"):
        TensorSource(tmp_path)


def test_an_index_cannot_point_elsewhere_or_to_tensors_that_are_not_there(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": "../other.safetensors"}}))
    with pytest.raises(CompressError, match="outside its folder"):
        TensorSource(tmp_path)
    save_file({"u": torch.ones(2)}, tmp_path / "a.safetensors")
    index.write_text(json.dumps({"weight_map": {"t": "a.safetensors"}}))
    with pytest.raises(CompressError, match=r"a\.safetensors: t should be in it"):
        TensorSource(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_inf_are_counted_and_the_tensor_is_named(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), float("-inf"), float("nan")]).to(dtype)
    with pytest.raises(CompressError, match=r"layer\.weight holds 2 NaN and 2 Inf of 5 values"):
        check_finite("layer.weight", values)
    check_finite("layer.weight", values[:1])
    check_finite("codes", torch.tensor([1, 2]))
    check_finite("nothing", torch.zeros(0))


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CompressError, match=r"model\.safetensors: the disk is full.*same command"):
        write_checkpoint(tmp_path, [TensorSpec("t", torch.float32, (4,))], lambda name: torch.ones(4))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompressError, match=r"notes\.json: the disk is full"):
        atomic_write_text(tmp_path / "notes.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    def read(name: str) -> torch.Tensor:
        if name == "b":
            raise KeyboardInterrupt
        return torch.ones(4)

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, [TensorSpec(name, torch.float32, (4,)) for name in "abc"], read)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_takes_just_what_was_announced(tmp_path: Path) -> None:
    spec = TensorSpec("t", torch.float32, (4,))
    with pytest.raises(ValueError, match="announced as"), SafetensorsWriter(tmp_path / "a", [spec]) as writer:
        writer.write("t", torch.ones(5))
    with pytest.raises(ValueError, match="never written: t"), SafetensorsWriter(tmp_path / "b", [spec]):
        pass
    writer = SafetensorsWriter(tmp_path / "c", [spec])
    writer.write("t", torch.ones(4))
    with pytest.raises(ValueError, match="twice"):
        writer.write("t", torch.ones(4))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_atomic_writing_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    atomic_write_bytes(path, b"old")

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(CompressError, match=r"report\.json cannot be written: I/O error"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_mapped_tensors_are_those_of_the_file_and_what_is_written_to_them_is_not(tmp_path):
    tensors = _tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    source = TensorSource(tmp_path)
    for name, tensor in tensors.items():
        mapped = source.map(name)
        assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(mapped.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        mapped.zero_()
        assert torch.equal(source.read(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_loading_a_packed_folder_reads_no_weight(tmp_path, monkeypatch):
    model = tiny_model("llama")
    compress.RTN(bits=4, group_size=16)(model)
    write_model_folder(tmp_path / "packed", Contents.of_model(model))
    expected = outputs(model, tiny_tokens())

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorSource, "read", read)
    torch.testing.assert_close(outputs(compress.load(tmp_path / "packed"), tiny_tokens()), expected)
