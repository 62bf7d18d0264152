"""Weights on disk: reading safetensors folders one tensor at a time, and writing them the same way.

The library's own `save_file` wants all tensors in memory at once, and tensors it reads stay views of a mapped file,
which count as resident memory. Both would break the promise that memory is bounded by one block, hence the small reader
and writer here. The format: 8 bytes little-endian header length, a JSON header padded to 8 bytes, then the data.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from compress.errors import CompressError, StartError

STEM = "model"  # what transformers calls the weights: model.safetensors, model-00001-of-00002.safetensors
MAX_SHARD_BYTES = 5 * 10**9
MOVED_BYTES, ALIGNMENT = 16 * 2**20, 64  # of mapped tensors of floats
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is yet to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size: int = math.prod(self.shape) * self.dtype.itemsize
        return size


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Place(NamedTuple):
    file: Path
    start: int
    info: TensorInfo


class TensorSource:
    """The tensors of a folder of safetensors files (`<stem>.safetensors`, or shards with their index), read on demand.

    Opening it reads headers only, and checks every file: what is missing, cut off or not safetensors is a
    `CompressError` that names the file. A folder that holds pickled weights alone is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], stem: str = STEM):
        self.folder = Path(folder)
        self._places: dict[str, _Place] = {}
        shards = _shards(self.folder, stem)
        for file in sorted(set(shards.values())) if shards else [self.folder / f"{stem}.safetensors"]:
            self._places.update(_header(file))
        for name, file in shards.items():
            if name not in self._places or self._places[name].file != file:
                raise CompressError(f"{file}: {name} should be in it by the index, but is not. Get the folder again.")

    @classmethod
    def of_file(cls, file: str | os.PathLike[str]) -> TensorSource:
        """The tensors of one safetensors file, whatever its name."""
        source = cls.__new__(cls)
        source.folder = Path(file).parent
        source._places = _header(Path(file))
        return source

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def info(self, name: str) -> TensorInfo:
        """(dtype, shape) of a tensor, without reading it."""
        return self._place(name).info

    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(TensorSpec(name, *place.info).nbytes for name, place in self._places.items())

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own on the CPU; nothing stays open or mapped."""
        file, start, info = self._place(name)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(start)
                done = 0
                while done < len(buffer):
                    count = stream.readinto(buffer[done:])
                    if not count:
                        raise CompressError(f"{file}: the file ends inside {name}. Get the file again.")
                    done += count
        except OSError as error:
            raise CompressError(f"{file}: {name} cannot be read: {error.strerror}.") from error
        return tensor

    def map(self, name: str) -> Tensor:
        """The tensor as pages of the file, read when they are touched; what is written to it stays in memory.

        For a model that only runs: whoever loads it touches no weight.
        """
        file, start, info = self._place(name)
        if math.prod(info.shape) == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        size = math.prod(info.shape) * info.dtype.itemsize
        try:
            pages = np.memmap(file, dtype=np.uint8, mode="c", offset=start, shape=(size,))
        except (OSError, ValueError) as error:
            raise CompressError(f"{file}: {name} cannot be read: {error}.") from error
        tensor = torch.from_numpy(pages).view(info.dtype).view(info.shape)
        # Products of floats sum in an order that hangs on where they lie: those that are no great loss are moved.
        moved = info.dtype.is_floating_point and size <= MOVED_BYTES and tensor.data_ptr() % ALIGNMENT
        return tensor.clone() if moved else tensor

    def _place(self, name: str) -> _Place:
        try:
            return self._places[name]
        except KeyError:
            raise CompressError(f"{self.folder}: there is no tensor {name}.") from None


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `CompressError` naming the tensor if a floating-point tensor holds NaN or Inf. Integer tensors pass."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype.itemsize == 1:  # 8-bit floats have no reductions
        tensor = tensor.to(torch.float32)
    # min and max carry NaN through and need no copy of the tensor
    low, high = torch.aminmax(tensor)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    nans, infs = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    raise CompressError(
        f"{name} holds {nans} NaN and {infs} Inf of {tensor.numel()} values: the weights are damaged. "
        "Get the model again."
    )


class SafetensorsWriter:
    """Writes one safetensors file, tensor by tensor, in any order; only the tensor being written is in memory.

    The file is laid out widest dtype first, then by name (as the library does: readers need aligned tensors), whatever
    the order of `write`, so equal tensors make equal bytes. The work happens in `<path>.partial`; `close` checks that
    all tensors came, syncs and renames. Used as a context manager, an exception removes the partial file.
    """

    def __init__(self, path: str | os.PathLike[str], specs: Sequence[TensorSpec]):
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._specs = {spec.name: spec for spec in specs}
        if len(self._specs) != len(specs):
            raise ValueError(f"{self.path}: a tensor name is given twice")
        self._missing = set(self._specs)
        header, self._offsets, total = _layout(specs)
        with disk_errors(self.path):
            self._stream = self._partial.open("wb")
            try:
                _reserve(self._stream.fileno(), len(header) + total)
                self._stream.write(header)
            except BaseException:
                self.discard()
                raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its dtype and shape must be those announced."""
        spec = self._specs[name]
        if name not in self._missing:
            raise ValueError(f"{self.path}: {name} is written twice")
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(
                f"{self.path}: {name} was announced as {spec.dtype} {spec.shape}, "
                f"not {tensor.dtype} {tuple(tensor.shape)}"
            )
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        with disk_errors(self.path):
            self._stream.seek(self._offsets[name])
            self._stream.write(memoryview(data))
        self._missing.discard(name)

    def close(self) -> None:
        """Sync the file and give it its name. `ValueError` if a tensor was never written."""
        if self._missing:
            raise ValueError(f"{self.path}: never written: {', '.join(sorted(self._missing)[:3])}")
        with disk_errors(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._partial, self.path)
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Close and remove the partial file."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not self._stream.closed:
                self.discard()


def write_checkpoint(
    folder: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = STEM,
) -> list[Path]:
    """Write tensors as `<stem>.safetensors`, or as shards and their index if they exceed `max_shard_bytes`.

    `read(name)` is called once per tensor, in the order of `specs`, which is also the order in which shards fill up.
    Returns the files written. A tensor larger than a shard gets a shard to itself.
    """
    folder = Path(folder)
    shards = _cut(specs, max_shard_bytes)
    files = [folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [folder / f"{stem}.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        with SafetensorsWriter(file, shard) as writer:
            for spec in shard:
                writer.write(spec.name, read(spec.name))
    if len(shards) > 1:
        places = {spec.name: file.name for file, shard in zip(files, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": sum(s.nbytes for s in specs)}, "weight_map": dict(sorted(places.items()))}
        atomic_write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return files


def checkpoint_bytes(specs: Sequence[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """What `write_checkpoint` makes of these tensors: bytes of all its safetensors files, headers included."""
    sizes = [_layout(shard) for shard in _cut(specs, max_shard_bytes)]
    return sum(len(header) + data for header, _, data in sizes)


def _cut(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """The tensors of each shard: in order, as many as fit."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new, never a part of it."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path):
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn `OSError` while writing into a `CompressError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CompressError(
                f"{path}: the disk is full. Make room, then give the same command again: it continues where it stopped."
            ) from error
        raise CompressError(f"{path} cannot be written: {error.strerror or error}.") from error


def _reserve(handle: int, size: int) -> None:
    """Take the disk space of a file that is about to be written: a full disk shows now, not when hours are spent."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # file systems that cannot reserve
            raise


def _shards(folder: Path, stem: str) -> dict[str, Path]:
    """Tensor name -> shard, from the index; empty for a single file. Refuses what is no safetensors checkpoint."""
    if not folder.is_dir():
        raise StartError(f"{folder}: there is no such folder.")
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return {}
    if not index.is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise CompressError(
                f"{folder} holds pickled weights only ({pickles[0]}), and opening a pickle can run any code. "
                "Convert them to safetensors first, for instance with save_pretrained in an environment you trust."
            )
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        found = f" (there is {others[0]}, but neither under that name nor with an index)" if others else ""
        raise CompressError(f"{folder} holds no weights: expected {single.name} or {index.name}{found}.")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): folder / str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{index} is damaged: it has no readable weight_map. Get the file again.") from error
    for file in sorted(set(shards.values())):
        if file.parent != folder:
            raise CompressError(f"{index} points outside its folder: {file}.")
        if not file.is_file():
            raise CompressError(f"{index} names the shard {file.name}, which is missing. Get the file again.")
    return shards


def _header(file: Path) -> dict[str, _Place]:
    """Where each tensor of the file lies. The library checks that header, offsets and file size fit together."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CompressError(f"{file} is cut off or no safetensors file ({error}). Get the file again.") from error
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CompressError(f"{file}: {name} has the dtype {entry['dtype']}; readable are {', '.join(_DTYPES)}.")
        info = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        places[name] = _Place(file, 8 + length + entry["data_offsets"][0], info)
    return places


def _layout(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """(header bytes including its length, name -> offset in the file, bytes of data)."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name)):
        starts[spec.name] = end
        entries[spec.name] = {
            "dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes],
        }  # fmt: skip
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header = (len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8)
    return header, {name: len(header) + start for name, start in starts.items()}, end
