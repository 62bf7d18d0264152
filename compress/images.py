"""Images as calibration data: a local folder of them, through the image processor in the model's folder.

A folder's images are those in it and in its subfolders (a folder for each class, as data sets have them); their labels
are not needed. What the model reads is `pixel_values`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from compress.data import Windows, windows_from
from compress.errors import CompressError, StartError
from compress.recipe.check import IMAGE_ENDINGS

if TYPE_CHECKING:
    from compress.recipe import DataEntry

_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ImageWindows(Windows):
    """Images ready for a model: `tokens` are pixels [n, channels, height, width], in float32; `patches` is how many
    tokens the model makes of one of them, to the nearest it can be told from the config."""

    patches: int = 1
    input_name: ClassVar[str] = "pixel_values"

    @property
    def length(self) -> int:
        return self.patches


def reads_images(config: PretrainedConfig) -> bool:
    """Whether a model of this config is given pixels and no text."""
    return not hasattr(config.get_text_config(), "vocab_size") and hasattr(config, "num_channels")


def patches_of(config: PretrainedConfig) -> int:
    """How many tokens a model makes of an image: one a patch, and one for the whole; 256 where its config has none."""
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(image, int) or not isinstance(patch, int):
        return 256
    return (image // patch) ** 2 + 1


def pixel_bytes(config: PretrainedConfig) -> int:
    """Bytes of one image as the model is given it, in float32."""
    return 4 * int(config.num_channels) * _side(config) ** 2


def image_windows(entry: DataEntry, role: str, folder: Path, config: PretrainedConfig, seed: int) -> ImageWindows:
    """The images that a data entry asks for: `samples` of those in its folder, drawn by its seed without replacement,
    or the first by name. `folder` is the model's, with its image processor.

    StartError for what cannot be (no folder, no processor, a model that reads text), CompressError for a folder without
    images, or with too few, or an image that cannot be read.
    """
    place = f"data.{role}"
    if not reads_images(config):
        raise StartError(f"{place}: {entry.source} is a folder of images, and this model reads text: a .txt or .jsonl.")
    if role != "calibration":
        raise StartError(f"{place}: images are read for calibration only; neither trained on nor evaluated yet.")
    source = Path(entry.source)
    if not source.is_dir():
        raise StartError(f"{place}: {source}: this model reads images, so give a folder of them.")
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    entry = entry.resolved("calibration", seed)
    assert entry.samples is not None
    if len(files) < entry.samples:
        raise CompressError(
            f"{place}: {source} holds {len(files)} images ({', '.join(IMAGE_ENDINGS[:3])}, ...), {entry.samples} are "
            f"asked for. Set {place}.samples lower, or give it more."
        )
    if entry.sampling == "random":
        chosen = np.random.RandomState(entry.seed).permutation(len(files))[: entry.samples]
        files = [files[index] for index in chosen]
    return windows_of_pixels(_pixels(files[: entry.samples], read_processor(folder)), entry.source, config, role)


def read_processor(folder: Path, needed: bool = True) -> Any:
    """The image processor in the model's folder, as its authors stored it. Where there is none: StartError, or None if
    it is not `needed`."""
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in _PROCESSOR):
        if not needed:
            return None
        raise StartError(f"model: {folder} holds no {_PROCESSOR[0]}, so images cannot be made into what it reads.")
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ImportError, ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise StartError(f"model: the image processor in {folder} cannot be used: {first}") from None


def windows_of_pixels(
    pixels: torch.Tensor, source: str, config: PretrainedConfig, role: str = "calibration"
) -> ImageWindows:
    """Pixels [n, channels, height, width] (any float dtype) as they are."""
    if pixels.dim() != 4 or not pixels.is_floating_point() or not pixels.numel():
        shape = list(pixels.shape)
        raise StartError(
            f"{role}: images are given as pixel_values [samples, channels, height, width], floats, not {pixels.dtype} "
            f"{shape}."
        )
    pixels = pixels.detach().float().cpu().contiguous()
    digest = hashlib.sha256(str(list(pixels.shape)).encode())
    digest.update(pixels.numpy().astype("<f4").tobytes())
    return ImageWindows(pixels, digest.hexdigest(), source, len(pixels), role, patches=patches_of(config))


def windows_given(
    given: Iterable[str] | torch.Tensor,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **how: Any,
) -> Windows:
    """Windows of what is given in Python to a model of this config: of pixels where it reads images, else of token ids
    or texts (see `windows_from`, which takes `how`)."""
    if not reads_images(config):
        return windows_from(given, tokenizer, **how)
    if not isinstance(given, torch.Tensor):
        raise StartError("This model reads images: give pixel_values [samples, channels, height, width].")
    return windows_of_pixels(given, "python", config, how.get("role", "calibration"))


def probe_for(config: PretrainedConfig, probe: Windows | None) -> Windows | None:
    """What a pass asks to see a model run on; a model that reads images is given an empty one in its place."""
    if probe is None or not reads_images(config):
        return probe
    return windows_of_pixels(blank_image(config), "probe", config)


def blank_image(config: PretrainedConfig) -> torch.Tensor:
    """One image of zeros, float32 [1, channels, height, width]."""
    side = _side(config)
    return torch.zeros(1, int(config.num_channels), side, side)


def random_images(config: PretrainedConfig, count: int, seed: int) -> ImageWindows:
    """Images of normally distributed pixels, as many."""
    side, generator = _side(config), torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, int(config.num_channels), side, side, generator=generator)
    return windows_of_pixels(pixels, "random", config)


def _side(config: PretrainedConfig) -> int:
    side = getattr(config, "image_size", None)
    return side if isinstance(side, int) else 224


def _pixels(files: Sequence[Path], processor: Any) -> torch.Tensor:
    from PIL import Image

    found = []
    for path in files:
        try:
            with Image.open(path) as image:
                found.append(processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"])
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CompressError(f"{path}: this image cannot be read: {first}") from None
    return torch.cat(found)
