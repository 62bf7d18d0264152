"""What a teacher says of a text, kept on disk, so that it says it once for all epochs and all recipes.

Of every token the k likeliest next ones are kept, the mass of all others, and, where asked for, hidden states. Bytes a
token: 2 for each log-probability (as float16, less that of the likeliest), 2 or 4 for each index (by the vocabulary), 4
for the tail at each temperature, 2 for each value of a hidden state (bfloat16): 132 or 196 at k = 32. The likeliest
one's own log-probability is not kept, because all of them and the tail add up to 1.

A cache is a folder named by the fingerprint of all that decides its content: teacher, tokenizer, tokens, settings. It
is written in shards, each whole or not there, so a killed run goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from compress.checkpoint import SafetensorsWriter, TensorSource, TensorSpec, disk_errors
from compress.errors import CompressError
from compress.maths.divergence import TopK, top_k
from compress.progress import Progress
from compress.workspace import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.data import Windows

#: Counts up when the content of a cache changes its meaning.
VERSION = 1
#: Tokens in a shard: what a killed run loses at most.
SHARD_TOKENS = 1 << 16
#: Largest vocabulary whose indices take two bytes, the sign being used.
_TWO_BYTES = 1 << 16


@dataclass(frozen=True)
class Kept:
    """What is kept of a teacher: the `k` likeliest of the first `vocabulary` tokens, the tail at each of
    `temperatures`, the outputs of the blocks in `layers`. `k` 0: no probabilities."""

    k: int
    vocabulary: int
    temperatures: tuple[float, ...] = (1.0,)
    layers: tuple[int, ...] = ()

    def bytes_per_token(self, hidden_size: int) -> int:
        """Of the tensors, headers not counted."""
        index = 2 if self.vocabulary <= _TWO_BYTES else 4
        logits = self.k * (2 + index) + 4 * len(self.temperatures) if self.k else 0
        return logits + 2 * hidden_size * len(self.layers)


#: A teacher's logits [..., vocabulary] (None: it has none) and its blocks' outputs [batch, length, hidden], by block.
Said = tuple[Tensor | None, dict[int, Tensor]]
#: Runs the teacher on `input_ids` (and `attention_mask`).
Ask = Callable[[dict[str, Tensor]], Said]


def default_folder() -> Path:
    """Where caches are, unless a recipe says otherwise: `$XDG_CACHE_HOME/compress/teacher`, or `~/.cache/...`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compress" / "teacher"


def cache_folder(named: str) -> Path:
    """The folder that a recipe's `cache` names; of `auto` and `off` the default one, since what a teacher writes is
    kept even where its likelihoods are not."""
    return default_folder() if named in ("auto", "off") else Path(named).expanduser()


def open_cache(
    folder: Path, identity: dict[str, str], windows: Windows, kept: Kept, ask: Callable[[], Ask],
    progress: Progress | None = None,
) -> TeacherCache:  # fmt: skip
    """The cache for these windows under `folder`, completed first where it is not whole.

    `identity` tells teachers (and tokenizers) apart. `ask()` gives the teacher, and is called only if something is
    missing. A second run that wants the same cache waits until the first has written it.
    """
    content = {"version": VERSION, **identity, "data": _tokens_digest(windows), "settings": asdict(kept)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    place = folder / digest[:32]
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    cache = TeacherCache(place, len(windows), windows.length, kept)
    if cache.missing():
        with FileLock(place / "lock"):
            write_json(place / "cache.json", content)
            if cache.missing():  # not, where another process has written it meanwhile
                cache.write(windows, ask(), progress or Progress())
    return cache


class TeacherCache:
    """A teacher's outputs for n windows, read one window at a time."""

    def __init__(self, folder: Path, windows: int, length: int, kept: Kept):
        self.folder, self.windows, self.kept = folder, windows, kept
        self.size = max(1, SHARD_TOKENS // length)
        self.tokens = windows * length
        self._open: dict[int, Any] = {}

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [number for number in range(-(-self.windows // self.size)) if not self._path(number).exists()]

    def write(self, windows: Windows, ask: Ask, progress: Progress) -> None:
        """Runs the teacher over what is missing."""
        missing = self.missing()
        with progress.step("teacher", total=len(missing)) as step:
            for number in missing:
                rows = range(number * self.size, min((number + 1) * self.size, self.windows))
                self._write_shard(self._path(number), self._asked(windows, rows, ask))
                step.advance()

    def _asked(self, windows: Windows, rows: range, ask: Ask) -> dict[str, Tensor]:
        """The teacher's outputs for those windows, as they are kept."""
        from compress.measure.likelihood import batches

        parts = []
        for part in batches(len(rows), windows.length, max(1, self.kept.vocabulary)):
            chosen = slice(rows[part].start, rows[part].stop)
            batch = {"input_ids": windows.tokens[chosen]}
            if windows.mask is not None:
                batch["attention_mask"] = windows.mask[chosen].long()
            with torch.no_grad():
                parts.append(compact(*ask(batch), self.kept))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _write_shard(self, path: Path, tensors: dict[str, Tensor]) -> None:
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with SafetensorsWriter(path, specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        """What is kept of one window, as `compact` gives it."""
        number, row = divmod(window, self.size)
        if number not in self._open:
            path = self._path(number)
            TensorSource.of_file(path)  # a damaged file is refused in our words
            self._open[number] = safe_open(path, framework="pt")
        shard = self._open[number]
        return {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118

    @cached_property
    def bytes_per_token(self) -> float:
        """Of the files as they are."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) / self.tokens

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result about the teacher kept beside its outputs under `name`; made and kept if it is not there yet."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        result: dict[str, Any] = read_json(path)
        return result

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def compact(logits: Tensor | None, hidden: dict[int, Tensor], kept: Kept) -> dict[str, Tensor]:
    """What is kept, on the CPU: `values` float16 and `indices` int16 or int32 [..., k], `tails` float32 [..., number of
    temperatures], `hidden.<block>` bfloat16 [batch, length, hidden]."""
    found = {f"hidden.{layer}": hidden[layer].to("cpu", torch.bfloat16) for layer in kept.layers}
    if not kept.k or logits is None:
        return found
    logits = logits[..., : kept.vocabulary]
    rows = logits.reshape(-1, logits.shape[-1])
    at = [top_k(rows, kept.k, temperature) for temperature in kept.temperatures]
    # The likeliest are the same ones at every temperature; the values are kept for temperature 1.
    values = (at[0].log_probs - at[0].log_probs[:, :1]) * kept.temperatures[0]
    narrow = torch.int16 if kept.vocabulary <= _TWO_BYTES else torch.int32
    lead = logits.shape[:-1]
    return found | {
        "values": values.to("cpu", torch.float16).view(*lead, -1),
        "indices": at[0].indices.to("cpu", narrow).view(*lead, -1),  # over the top of int16 it wraps, and back below
        "tails": torch.stack([each.log_tail for each in at], -1).cpu().view(*lead, -1),
    }


def restored(taught: dict[str, Tensor], kept: Kept, temperature: float) -> TopK:
    """The teacher's likeliest tokens at one of the temperatures, rows flattened, from what `compact` kept of them."""
    values = taught["values"].flatten(0, -2).float() / temperature
    indices = taught["indices"].flatten(0, -2).long()
    if taught["indices"].dtype == torch.int16:
        indices = indices % _TWO_BYTES
    tail = taught["tails"].flatten(0, -2)[:, kept.temperatures.index(temperature)]
    mass = torch.log(-torch.expm1(tail)).unsqueeze(-1)
    return TopK(values.log_softmax(-1) + mass, indices, tail)


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 (hex) of a model's tensors and what its config says."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 (hex) of all weights and configs in a model's folder: every byte, unlike the fingerprint of a run."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(path.name.encode())
        try:
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise CompressError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None, texts: Iterable[str] = ()) -> str:
    """sha256 (hex) of what a tokenizer does: its vocabulary, and the ids of a few texts."""
    if tokenizer is None:
        return ""
    samples: Sequence[str] = [*texts, *PROBES]
    ids = tokenizer(list(samples), add_special_tokens=False, verbose=False)["input_ids"]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids])
    return hashlib.sha256(content.encode()).hexdigest()


#: Texts on which tokenizers of equal vocabularies may part.
PROBES = ("The quick brown fox, 1234567 times.", "  two  spaces\nand a line", "naïve café ünder 東京 🦊", "x+=1;//y")


def _tokens_digest(windows: Windows) -> str:
    digest = hashlib.sha256(str(list(windows.tokens.shape)).encode())
    digest.update(windows.tokens.contiguous().numpy().tobytes())
    if windows.mask is not None:
        digest.update(windows.mask.contiguous().numpy().tobytes())
    return digest.hexdigest()
