"""Windows on their way into training: which come in a step, and how they are put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from compress.data import Windows


class WindowsDataset(Dataset):  # type: ignore[misc]
    def __init__(self, windows: Windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"row": torch.tensor(index), "input_ids": self.windows.tokens[index]}
        if self.windows.mask is not None:
            item["attention_mask"] = self.windows.mask[index].long()
        if self.windows.labels is not None:
            item["labels"] = self.windows.labels[index]
        return item


class WholeSteps(Sampler[int]):  # type: ignore[misc]
    """The windows of an epoch in an order drawn by seed and epoch, as many as make whole steps: then a step has the
    same windows however it is shared out. Where there are fewer than one step takes, some come twice."""

    def __init__(self, windows: int, batch_size: int, seed: int):
        self.windows, self.seed, self.epoch = windows, seed, 0
        self.length = max(windows // batch_size, 1) * batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        drawn = (self.seed * 1_000_003 + self.epoch) % 2**32  # a generator looks at 32 bits
        order = torch.randperm(self.windows, generator=torch.Generator().manual_seed(drawn))
        return (int(order[place % self.windows]) for place in range(self.length))


def together(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Windows together, without the columns that are padding in all of them."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    if "attention_mask" in batch:
        width = max(1, int(batch["attention_mask"].sum(1).max()))
        length = batch["input_ids"].shape[1]
        by_token = {name for name, tensor in batch.items() if tensor.dim() > 1 and tensor.shape[1] == length}
        batch = {name: tensor[:, :width] if name in by_token else tensor for name, tensor in batch.items()}
    return batch
