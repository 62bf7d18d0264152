"""The folder of a run: who works in it, what is finished, and where to go on.

`DIR/.compress/` holds what a run needs to continue: `run.json` (the recipe it belongs to), a folder a pass under
`stages/`, and small results under their names. A file is there whole or not at all, so the folder's content is the
journal: a block is finished when its `.json` exists, a stage when `complete.json` does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint import SafetensorsWriter, TensorSource, TensorSpec, atomic_write_text, disk_errors
from compress.errors import CompressError, StartError
from compress.maths.grid import QuantSpec
from compress.model import Block, QuantSpecs
from compress.nn.bnb_linear import BnbSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from compress.recipe import Recipe

FOLDER = ".compress"
_SAMPLED_BYTES = 1 << 20
_OUTSIDE = "outside"
_DROPPED = "dropped.json"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer"


def read_json(path: Path) -> Any:
    """The content of a JSON file written by `atomic_write_text`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressError(f"{path} cannot be read ({error}). Start over with --fresh.") from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        write_json(path, make())
    result: dict[str, Any] = read_json(path)
    return result


class Stage:
    """The blocks that one pass has finished: a safetensors file and a record for each; and likewise, where the pass
    changes them, the tensors that belong to no block."""

    def __init__(self, folder: Path):
        self.folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def complete(self) -> bool:
        return (self.folder / "complete.json").exists()

    def result(self) -> dict[str, Any]:
        """What `finish` was given."""
        result: dict[str, Any] = read_json(self.folder / "complete.json")
        return result

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.folder / "complete.json", result)

    def kept(self, block: Block) -> dict[str, Any] | None:
        """The record of a finished block, or None."""
        path = self.folder / f"{block.name}.json"
        if not path.exists():
            return None
        record: dict[str, Any] = read_json(path)["record"]
        return record

    def keep(self, block: Block, record: dict[str, Any]) -> None:
        """Writes a finished block; from then on a continued run takes it from here."""
        self._write(block.name, block.state(), record, block.quantized())

    def keep_outside(
        self, tensors: Mapping[str, torch.Tensor], quantized: QuantSpecs | None = None, record: Any = None
    ) -> None:
        """Writes what the pass made of the tensors outside the blocks: those that it changed, by their name in the
        model, with the specs of packed layers among them. `read_outside` gives it back to a continued run."""
        self._write(_OUTSIDE, tensors, record, quantized or {})

    def keep_config(self, config: PretrainedConfig) -> None:
        """Writes the config of the model that the pass leaves, where it is another than it found."""
        write_json(self.folder / _CONFIG, config.to_dict())

    def read_config(self, like: PretrainedConfig) -> PretrainedConfig | None:
        """What `keep_config` was given, of the class of `like`; None where the pass does not change it."""
        path = self.folder / _CONFIG
        return type(like).from_dict(read_json(path)) if path.exists() else None

    def keep_tokens(self, kept: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes which tokens a pass leaves (for each new id, the old one), and the tokenizer cut to them."""
        from compress.vocabulary import write_cut

        if self.read_kept_tokens() is None:
            write_cut(tokenizer, kept, self.folder / _TOKENIZER)
            write_json(self.folder / f"{_TOKENIZER}.json", {"kept": kept})

    def read_kept_tokens(self) -> list[int] | None:
        """The old ids that `keep_tokens` was given; None where the pass leaves all tokens, or has not come so far."""
        path = self.folder / f"{_TOKENIZER}.json"
        if not path.exists():
            return None
        kept: list[int] = read_json(path)["kept"]
        return kept

    def read_tokenizer(self, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer that `keep_tokens` cut from this one."""
        from compress.vocabulary import read_cut

        return read_cut(self.folder / _TOKENIZER, like)

    def kept_outside(self) -> Any:
        """The record that `keep_outside` was given, or None."""
        path = self.folder / f"{_OUTSIDE}.json"
        return read_json(path)["record"] if path.exists() else None

    def read_outside(self, device: torch.device) -> tuple[dict[str, torch.Tensor], QuantSpecs] | None:
        """What `keep_outside` was given; None where this pass changes nothing there, or has not come so far."""
        if not (self.folder / f"{_OUTSIDE}.json").exists():
            return None
        source = TensorSource.of_file(self.folder / f"{_OUTSIDE}.safetensors")
        return {name: source.read(name).to(device) for name in source.names()}, self._specs(_OUTSIDE)

    def _write(self, stem: str, tensors: Mapping[str, torch.Tensor], record: Any, quantized: QuantSpecs) -> None:
        """The tensors first: they are there when the record is."""
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with SafetensorsWriter(self.folder / f"{stem}.safetensors", specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        entries = {name: asdict(spec) for name, spec in quantized.items()}
        write_json(self.folder / f"{stem}.json", {"record": record, "quantized": entries})

    def read(self, block: Block, device: torch.device) -> tuple[dict[str, torch.Tensor], QuantSpecs]:
        """A finished block's tensors by their name inside it, and the specs of its packed layers."""
        source = self.source(block)
        tensors = {name: source.read(name).to(device) for name in source.names()}
        return tensors, self.quantized(block)

    def source(self, block: Block) -> TensorSource:
        """The finished block's tensors, to be read one by one."""
        return TensorSource.of_file(self.folder / f"{block.name}.safetensors")

    def quantized(self, block: Block) -> QuantSpecs:
        return self._specs(block.name)

    def _specs(self, stem: str) -> QuantSpecs:
        entries = read_json(self.folder / f"{stem}.json")["quantized"]
        return {name: (BnbSpec if "code" in spec else QuantSpec)(**spec) for name, spec in entries.items()}

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result kept under `name`; made and kept if it is not there yet."""
        return _once(self.folder / f"{name}.json", make)

    def holds_blocks(self) -> bool:
        """Whether the finished blocks can still be read."""
        return not (self.folder / _DROPPED).exists()

    def drop_blocks(self) -> None:
        """Frees the room of the blocks, which a later stage holds as well. Its records, and what it changed outside the
        blocks, stay: the stage is as complete as it was."""
        write_json(self.folder / _DROPPED, {})  # first: half of the blocks is of no use
        for path in self.folder.glob("*.safetensors"):
            if path.stem != _OUTSIDE:
                path.unlink()


class Guest(Stage):
    """A stage of another process's run: read, never written."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _write(self, stem: str, tensors: Mapping[str, torch.Tensor], record: Any, quantized: QuantSpecs) -> None:
        """What this process made, the run's own process keeps."""

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """As the run's own process does: what that one has kept is not made again, for processes may make it
        together."""
        path = self.folder / f"{name}.json"
        return dict(read_json(path)) if path.exists() else make()


class Workspace(AbstractContextManager["Workspace"]):
    """A run's folder, locked while it is open. Made by `Workspace.open`, used as a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.hidden = folder / FOLDER
        #: The word of this start, where several processes train together; see `compress.processes`.
        self.start = ""

    @classmethod
    def check(cls, folder: Path, recipe: Recipe, fingerprints: dict[str, str], fresh: bool) -> None:
        """Refuses, before any work, a folder that belongs to another recipe or holds files that are not a run's."""
        run = folder / FOLDER / "run.json"
        if fresh or not folder.exists():
            return
        if not folder.is_dir():
            raise StartError(f"output: {folder} is a file; a run writes a folder.")
        if run.exists():
            _refuse_change(folder, read_json(run), recipe, fingerprints)
        elif any(entry.name != FOLDER for entry in folder.iterdir()):
            raise StartError(
                f"output: {folder} holds files that are not a run's. Name another folder with --output, or give "
                "--fresh to have what a run writes there replaced."
            )

    @classmethod
    def open(cls, folder: Path, recipe: Recipe, fingerprints: dict[str, str], fresh: bool = False) -> Workspace:
        """Makes or continues the folder of a run. A second run on it is refused while the first is alive."""
        cls.check(folder, recipe, fingerprints, fresh)
        work = cls(folder)
        with disk_errors(folder):
            work.hidden.mkdir(parents=True, exist_ok=True)
        work._lock()
        try:
            if fresh:
                work._clear()
            if not (work.hidden / "run.json").exists():
                started = {"digest": recipe.digest(), "recipe": recipe.canonical(), "fingerprints": fingerprints}
                write_json(work.hidden / "run.json", started)
        except BaseException:
            work.close()
            raise
        return work

    def _lock(self) -> None:
        from filelock import FileLock, Timeout

        self._file_lock = FileLock(self.hidden / "lock")
        try:
            self._file_lock.acquire(timeout=0)
        except Timeout:
            raise CompressError(
                f"{self.folder} is in use by another run. Wait for it, or give this one a folder of its own with "
                "--output."
            ) from None

    def _clear(self) -> None:
        for name in ("model", "adapter", "exports"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("report.json", "report.md", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        for entry in self.hidden.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def close(self) -> None:
        self._file_lock.release()

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        return (self.folder / "report.json").exists()

    def stage(self, index: int, name: str) -> Stage:
        """The stage of the pass that stands at `index` in the recipe."""
        return Stage(self.hidden / "stages" / f"{index:02d}-{name}")

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result kept under `name`; made and kept if it is not there yet."""
        return _once(self.hidden / f"{name}.json", make)

    def remove_intermediate(self) -> None:
        """Frees what only an unfinished run needs."""
        for name in ("stages", "measure"):
            shutil.rmtree(self.hidden / name, ignore_errors=True)


def _refuse_change(folder: Path, old: dict[str, Any], recipe: Recipe, fingerprints: dict[str, str]) -> None:
    from compress.recipe import changes_since

    changed = []
    if old["digest"] != recipe.digest():
        changed = changes_since(old["recipe"], recipe)
    for name, value in fingerprints.items():
        if old["fingerprints"].get(name, value) != value:
            changed.append(f"{name}: its content is not what it was")
    if changed:
        raise StartError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Give --fresh to start over in it, or --output for "
            "another folder."
        )


def free_bytes(folder: Path) -> int:
    """Free disk space in bytes where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fingerprint_folder(folder: Path) -> str:
    """What tells one model folder from another: names, sizes, and both ends of the content of its files."""
    digest = hashlib.sha256()
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            stream.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16]
