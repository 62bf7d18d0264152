"""The model under compression: its blocks, one at a time, and what was done to them.

Two residencies, one interface. `memory`: the whole model is loaded and changed where it stands. `disk`: only what is
outside the blocks is loaded; a block's tensors are read from the safetensors files when its turn comes, and leave
memory with the next step, so that peak memory is one block and not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from compress.allocator import return_freed_memory
from compress.checkpoint import TensorSource, TensorSpec
from compress.ends import put_packed
from compress.errors import CompressError, StartError
from compress.formats.base import Contents
from compress.locating import context_length
from compress.nn.quant_embedding import packed_like
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import selected

if TYPE_CHECKING:
    from compress.maths.grid import QuantSpec
    from compress.passes.base import Pass

QuantSpecs = dict[str, "QuantSpec"]


class Layer:
    """One matrix inside a block that passes can change: a Linear, or GPT-2's Conv1D (its transpose)."""

    def __init__(self, block: Block | None, name: str, module: nn.Module):
        self.block, self.name, self.module = block, name, module
        self.transposed = isinstance(module, Conv1D)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out, in] in the model's dtype: a view of the parameter, not a copy."""
        weight = self.module.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    def set_weight(self, weight: torch.Tensor) -> None:
        """Writes `weight` [out, in], cast to the layer's dtype, into the parameter."""
        self.weight.copy_(weight)

    def quantize(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec) -> None:
        """Makes this a quantized layer: `codes` [out, in] (int8; float8 on a grid of those), `scale` [out, groups],
        `zero` int8 [out, groups].

        Until the block is sealed the dense module stays, holding the dequantized weight, because the calibration
        still runs through it many times and unpacking each time would cost more than the matmul. Where the layer's
        inputs are rounded as well, it is replaced at once: a dense module would not round them.
        """
        packed = QuantLinear.from_codes(
            codes, scale, zero, spec, bias=self.module.bias, dtype=self.dtype, transposed=self.transposed
        )
        self.pack(packed)

    def pack(self, packed: QuantLinear) -> None:
        """Makes `packed` this layer, as `quantize` does."""
        assert self.block is not None
        if packed.spec.activations:
            self.block.module.set_submodule(self.name, packed)
            return
        self.set_weight(packed.dequantize(self.dtype))
        self.block.pending[self.name] = packed


class Block:
    """One transformer block. `index` counts from 0 inside its stack; `name` is its path in the model."""

    def __init__(self, stack: Stack, index: int):
        self.stack, self.index = stack, index
        self.name = f"{stack.name}.{index}"
        self.pending: dict[str, QuantLinear] = {}
        self.sparse = False

    @property
    def module(self) -> nn.Module:
        return self.stack.modules[self.index]

    def layers(self, targets: Sequence[str] | None = None, skip: Sequence[str] = ()) -> dict[str, Layer]:
        """The block's dense matrices by their name inside it: those that `targets` and `skip` (patterns) select."""
        return {
            name: Layer(self, name, module)
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and selected(name, targets, skip)
        }

    def quantized(self) -> QuantSpecs:
        """The quantized layers' specs by their name inside the block."""
        sealed = {n: m.spec for n, m in self.module.named_modules() if isinstance(m, QuantLinear)}
        return sealed | {name: module.spec for name, module in self.pending.items()}

    def seal(self) -> None:
        """Puts the packed layers in the place of the dense ones."""
        for name, packed in self.pending.items():
            self.module.set_submodule(name, packed)
        self.pending = {}

    def state(self) -> dict[str, torch.Tensor]:
        """The block's tensors by their name inside it, as they are to be stored."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}

    def restore(self, tensors: dict[str, torch.Tensor], quantized: QuantSpecs) -> None:
        """Puts stored tensors (as `state` gave them) in place, packed layers included."""
        for name, spec in quantized.items():
            old = self.module.get_submodule(name)
            if not isinstance(old, QuantLinear):
                self.module.set_submodule(name, QuantLinear.like(old, spec))
        place_tensors(self.module, tensors, self.name)

    def matrix_weights(self) -> int:
        """The number of weights in matrices of the block (packed ones counted as unpacked; biases, norms not)."""
        packed = [m for m in self.module.modules() if isinstance(m, QuantLinear)]
        plain = sum(p.numel() for p in self.module.parameters() if p.dim() >= 2)
        return int(plain + sum(m.in_features * m.out_features for m in packed))


class Stack:
    """A list of blocks (`model.layers`), called one after the other."""

    def __init__(self, name: str, modules: nn.ModuleList):
        self.name, self.modules = name, modules

    def __len__(self) -> int:
        return len(self.modules)


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks of blocks: outermost module lists whose members are made of several layers each."""
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(stack.name + ".") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and _are_blocks(module):
            stacks.append(Stack(name, module))
    return stacks


def _are_blocks(modules: nn.ModuleList) -> bool:
    return all(len(list(child.children())) > 1 and _has_matrices(child) for child in modules)


def _has_matrices(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters()) or any(isinstance(m, QuantLinear) for m in module.modules())


def place_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Assigns `tensors` to the parameters and buffers of `module` without copying; all must be there, no others."""
    missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        said = [f"missing: {', '.join(missing)}"] if missing else []
        said += [f"not expected: {', '.join(unexpected)}"] if unexpected else []
        raise CompressError(f"The tensors of {where} do not fit this architecture ({'; '.join(said)}).")
    for parameter in module.parameters():
        parameter.requires_grad_(False)


class _Stored(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class ModelHandle:
    """The model being compressed. Made by `compress.opening.open_model`, or by `wrap` from a loaded model."""

    def __init__(self, model: PreTrainedModel, source: TensorSource | None = None, device: str | torch.device = "cpu"):
        self.model = model.eval()
        self.source = source
        self.device = torch.device(device)
        self.stacks = find_stacks(model)
        self.history: list[dict[str, Any]] = []
        self.states: set[str] = {"dense"}
        #: Where blocks were last written, when they are not in memory (a `Stage`).
        self.latest: Any = None
        #: The adapter (`compress.adapters.Adapter`) that belongs beside the model, which itself is the base.
        self.adapter: Any = None
        self.live_blocks = 0
        if not self.stacks:
            raise StartError(
                f"No stack of transformer blocks was found in {type(model).__name__}: it holds no module list whose "
                "members have several layers each."
            )

    @classmethod
    def wrap(cls, model: PreTrainedModel) -> ModelHandle:
        """A handle on a model that is loaded already."""
        handle = cls(model, device=str(next(model.parameters()).device))
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            handle.states.add("quantized")
        for entry in getattr(model, "compress_history", []):
            handle.history.append(entry)
            handle.states.add(entry["leaves"])
        return handle

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def resident(self) -> bool:
        """Whether the blocks are in memory all the time."""
        return self.source is None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context_length(self) -> int | None:
        return context_length(self.config)

    def block_list(self) -> list[Block]:
        """All blocks, none of them loaded."""
        return [Block(stack, index) for stack in self.stacks for index in range(len(stack))]

    def blocks(self) -> Iterator[Block]:
        """One block at a time, loaded when yielded and let go on the next step."""
        for block in self.block_list():
            with_tensors = self.load(block)
            yield with_tensors
            self.release(block)

    def load(self, block: Block) -> Block:
        """Brings a block's tensors into memory (from where they were last written)."""
        block.sparse = "sparse" in self.states
        if not self.resident:
            self.live_blocks += 1
            if self.latest is not None:
                block.restore(*self.latest.read(block, self.device))
            else:
                state = block.module.state_dict()
                tensors = {name: self._original(f"{block.name}.{name}", old) for name, old in state.items()}
                place_tensors(block.module, tensors, block.name)
        return block

    def release(self, block: Block) -> None:
        """Frees a block's tensors when the model is not kept in memory."""
        if not self.resident:
            _to_meta(block.module)
            self.live_blocks -= 1
        return_freed_memory()

    def _original(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the base model's files by its name in the model, as `like` in dtype, on the device."""
        assert self.source is not None
        tensor = self.source.read(self._checkpoint_name(name))
        return tensor.to(self.device, like.dtype if like.is_floating_point() else tensor.dtype)

    def read_outside(self) -> None:
        """Reads what belongs to no block into memory (for a skeleton whose blocks stay on disk)."""
        self.place_outside({name: self._original(name, old) for name, old in self.outside().items()})

    def place_outside(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts tensors that belong to no block in the place of a skeleton's, and buffers that no file holds on the
        device."""
        for name, tensor in tensors.items():
            self._put(name, tensor)
        self.model.tie_weights()
        for module in self.model.modules():
            for last in module._non_persistent_buffers_set:
                buffer = module._buffers[last]
                module._buffers[last] = buffer.to(self.device) if buffer is not None else None

    def restore_outside(self, tensors: dict[str, torch.Tensor], quantized: QuantSpecs) -> None:
        """Puts tensors that belong to no block in place, as `Stage.read_outside` gives them. A tensor of its own for
        what is tied unties the model."""
        if set(tensors) & self._tied():
            self.untie()
        for name, spec in quantized.items():
            old = self.model.get_submodule(name)
            if not isinstance(old, QuantLinear):
                put_packed(self.model, name, packed_like(old, spec))
        for name, tensor in tensors.items():
            self._put(name, tensor)
        self.model.tie_weights(recompute_mapping=False)  # a head tied to a packed embedding has no tensor to tie

    def untie(self) -> None:
        """Gives each tied weight a tensor of its own, and has the config say so."""
        for name in sorted(self._tied()):
            path, _, last = name.rpartition(".")
            self._put(name, self.model.get_submodule(path)._parameters[last].detach().clone())
        for config in (self.config, self.config.get_text_config()):
            config.tie_word_embeddings = False
        self.model.all_tied_weights_keys = {}

    def _tied(self) -> set[str]:
        return set(getattr(self.model, "all_tied_weights_keys", None) or {})

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        """Makes `tensor` the parameter or buffer called `name`."""
        path, _, last = name.rpartition(".")
        parent = self.model.get_submodule(path)
        if last in parent._parameters:
            parent._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            parent._buffers[last] = tensor

    def outside_quantized(self) -> QuantSpecs:
        """The specs of packed layers that belong to no block, by their name in the model."""
        prefixes = tuple(f"{block.name}." for block in self.block_list())
        modules = self.model.named_modules()
        return {n: m.spec for n, m in modules if isinstance(m, QuantLinear) and not n.startswith(prefixes)}

    def _checkpoint_name(self, name: str) -> str:
        """The name of a tensor in the files: a checkpoint of the bare model lacks the prefix, or has one too many."""
        assert self.source is not None
        prefix = self.model.base_model_prefix + "."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self.source:
                return candidate
        raise StartError(
            f"residency: disk reads tensors by their name, and the files have no {name} (transformers renames or "
            "merges this family's tensors as it loads them). Use residency: memory."
        )

    def outside(self) -> dict[str, torch.Tensor]:
        """The tensors that belong to no block, tied ones once, by their name in the model."""
        tied = self._tied()
        prefixes = tuple(f"{block.name}." for block in self.block_list())
        return {
            name: tensor.detach()
            for name, tensor in self.model.state_dict().items()
            if name not in tied and not name.startswith(prefixes)
        }

    def contents(self, tokenizer: PreTrainedTokenizerBase | None = None, card: str = "") -> Contents:
        """The model as it is to be written: its tensors, to be read one by one, and what belongs beside them."""
        outside = self.outside()
        readers: dict[str, Callable[[], torch.Tensor]] = {name: partial(_same, t) for name, t in outside.items()}
        specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in outside.items()]
        quantized = self.outside_quantized()
        for block in self.block_list():
            state, in_block = self._stored_block(block)
            for name, (dtype, shape, read) in state.items():
                specs.append(TensorSpec(f"{block.name}.{name}", dtype, shape))
                readers[f"{block.name}.{name}"] = read
            quantized |= {f"{block.name}.{name}": spec for name, spec in in_block.items()}
        return Contents(
            config=self.config,
            architecture=type(self.model).__name__,
            dtype=self.dtype,
            tensors=specs,
            read=lambda name: readers[name](),
            quantization=quantized,
            generation_config=self.model.generation_config if self.model.can_generate() else None,
            tokenizer=tokenizer,
            history=self.history,
            card=card,
            adapter=self.adapter is not None,
        )

    def _stored_block(self, block: Block) -> tuple[dict[str, _Stored], QuantSpecs]:
        if self.resident:
            state = {n: _Stored(t.dtype, tuple(t.shape), partial(_same, t)) for n, t in block.state().items()}
            return state, block.quantized()
        if self.latest is None:
            state = {
                name: _Stored(old.dtype, tuple(old.shape), partial(self._original, f"{block.name}.{name}", old))
                for name, old in block.state().items()
            }
            return state, {}
        source = self.latest.source(block)
        state = {
            n: _Stored(source.info(n).dtype, source.info(n).shape, partial(source.read, n)) for n in source.names()
        }
        return state, self.latest.quantized(block)

    def record(self, pass_: Pass) -> None:
        """Adds a finished pass to the history that is stored with the model."""
        from compress import __version__

        entry = {"pass": pass_.name, "options": pass_.options(), "leaves": pass_.leaves, "version": __version__}
        self.history.append(entry)
        self.states.add(pass_.leaves)
        self.model.compress_history = list(self.history)


def _to_meta(module: nn.Module) -> None:
    """Frees parameters and stored buffers; buffers that no file holds (rotary tables) have to stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = buffer.to("meta")
