"""What a loaded model's weights take in memory, by the storages that its layers hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

#: How deep tensors are looked for inside objects that are no modules.
_DEEPEST = 6
#: What holds no tensor of the model, or has its own turn.
_LEAVES = (type(None), str, bytes, int, float, type, nn.Module, ModuleType)


def resident_weights(model: nn.Module) -> int:
    """Bytes of the distinct storages behind a model's parameters and buffers, and behind what its layers keep beside
    them to compute with: statistics of bitsandbytes' weights, a kernel's own layout, unpacked zero points.

    What is shared counts once. A tensor that is a view holds all that it is a view of; one mapped from a file counts
    what it spans there, whether or not its pages have been touched yet. Layouts that show no storage count by their
    elements.
    """
    spans: dict[torch.device, set[tuple[int, int]]] = {}
    opaque: dict[int, int] = {}
    for tensor in _of_layers(model):
        if tensor.is_meta:
            continue
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            first = storage.data_ptr()
            spans.setdefault(storage.device, set()).add((first, first + int(storage.nbytes())))
        else:
            opaque[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(map(_union, spans.values())) + sum(opaque.values())


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Every tensor held in lists, tuples, dicts and objects of their own, a few levels deep; of modules only those that
    are given as `vars(module)`."""
    level: list[Any] = list(values)
    seen: dict[int, Any] = {}  # what is in it cannot lend its id to another object
    for _ in range(_DEEPEST + 1):  # nearest first: what is reached by a long way as well must not be cut off there
        found: list[Any] = []
        for value in level:
            if isinstance(value, Tensor):
                yield value
            elif id(value) not in seen and not isinstance(value, _LEAVES):
                seen[id(value)] = value
                found += _inside(value)
        level = found


def _of_layers(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of every module, and those that hang on modules and parameters as plain attributes."""
    parameters = (parameter for module in model.modules() for parameter in module._parameters.values())
    return tensors_in(*map(vars, model.modules()), *(vars(each) for each in parameters if each is not None))


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def _union(spans: Iterable[tuple[int, int]]) -> int:
    """Bytes covered by at least one of the spans (first address, address after the last)."""
    total, end = 0, 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total
