"""FSDP: every process keeps a share of what is trained, and the whole of one block at a time.

`accelerate launch --config_file fsdp.yaml -m compress run recipe.yaml` asks for it. The model itself stays as it is:
what is shared out, by torch's `fully_shard` (version 2 of FSDP), is a copy of the objective's structure, and what its
parameters have become is copied back by name. So whatever comes before and after training sees ordinary parameters.

Parameters are shared out, frozen ones too, and with them gradients and the optimizer's state; buffers, as the integers
of packed layers are, stay whole in every process. One unit is one block, the rest of the objective another.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import StartError
from compress.processes import process_count
from compress.stacks import find_stacks

#: Set by accelerate's launcher; what they ask for is another way to train than those that there are here.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "FSDP with fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "FSDP with fsdp_activation_checkpointing (lora has gradient_checkpointing)",
}


def _is_set(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("1", "true", "yes")


def sharded() -> bool:
    """Whether the processes that train together share out what they train."""
    return _is_set("ACCELERATE_USE_FSDP") and process_count() > 1


def check_launch() -> None:
    """StartError where accelerate was configured for what there is not here."""
    fsdp = _is_set("ACCELERATE_USE_FSDP")
    for name, title in _REFUSED.items():
        if _is_set(name) and (fsdp or not name.startswith("FSDP_")):
            raise StartError(
                f"accelerate's config asks for {title}, which training here does not do: use FSDP version 2 without "
                "it, or distributed_type: MULTI_GPU."
            )
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise StartError("accelerate's config asks for FSDP version 1: set fsdp_version: 2 in its fsdp_config.")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each process reads the weights for itself


@contextmanager
def unseen_by_accelerate() -> Iterator[None]:
    """While it lasts, accelerate is not asked to share anything out: it would do so on GPUs alone, and to the model
    itself."""
    before = os.environ.get("ACCELERATE_USE_FSDP")
    if before is not None:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ["ACCELERATE_USE_FSDP"] = before


@contextmanager
def set_aside(objective: nn.Module, device: torch.device) -> Iterator[None]:
    """While it lasts, the parameters, of which the shares are copies, are in main memory and not on the device."""
    moved = list(objective.parameters()) if sharded() and device.type != "cpu" else []
    for parameter in moved:
        parameter.data = parameter.data.cpu()
    try:
        yield
    finally:
        for parameter in moved:
            parameter.data = parameter.data.to(device)


def shared_out(objective: nn.Module, device: torch.device, title: str) -> nn.Module:
    """A copy of the objective that holds this process's shares, on `device`; its parameters have the names of the
    objective's. All processes call it together. StartError where zeros are held by hooks, which see no shares."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(parameter._backward_hooks for parameter in objective.parameters()):
        raise StartError(
            f"{title}: zeros that are to stay zero cannot be held where the weights are shared out (FSDP): train with "
            "distributed_type: MULTI_GPU."
        )
    shares = _same_structure(objective)
    mesh = init_device_mesh(device.type, (process_count(),))
    free = _is_set("FSDP_RESHARD_AFTER_FORWARD", "true")
    for block in _units(shares):
        fully_shard(block, mesh=mesh, reshard_after_forward=free)
    return fully_shard(shares, mesh=mesh)


def _same_structure(objective: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have the memory of the objective's; what it refers to without being made of
    it, as a teacher, is the same object."""
    own = {id(module) for module in objective.modules()}
    memo: dict[int, Any] = {id(buffer): buffer for buffer in objective.buffers()}
    for parameter in objective.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for name, value in vars(objective).items():
        if not name.startswith("_") and id(value) not in own:
            memo[id(value)] = value
    return copy.deepcopy(objective, memo)


def _units(objective: nn.Module) -> list[nn.Module]:
    """The blocks, without those that have a parameter in common with something outside them."""
    blocks = [block for stack in find_stacks(objective) for block in stack.modules]
    uses = Counter(id(p) for _, p in objective.named_parameters(remove_duplicate=False))
    return [
        block
        for block in blocks
        if all(uses[name] == count for name, count in Counter(
            id(p) for _, p in block.named_parameters(remove_duplicate=False)
        ).items())
    ]  # fmt: skip


def free_gathered(shares: nn.Module) -> None:
    """Frees what a forward without a gradient gathered: the next one is to see what the shares are then."""
    from torch.distributed.fsdp import FSDPModule

    for module in shares.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Of a share the whole tensor, which all processes gather together; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Of a share this process's own part, rows of the whole; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class WholeAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW whose state is given and taken as whole tensors, so that a checkpoint fits any number of processes.

    With shares, all processes ask for the state together, and are given the same.
    """

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "state": {index: _whole_values(values) for index, values in state["state"].items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        super().load_state_dict(state_dict)
        for parameter, values in self.state.items():
            if not isinstance(parameter, DTensor):
                continue
            for name, value in values.items():
                if value.shape == parameter.shape and not isinstance(value, DTensor):
                    values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _whole_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
