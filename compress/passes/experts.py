"""Expert pruning: whole experts of a mixture leave, those that the router makes least use of, its rows with them.

`use`: Muzio, Sun, He: "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts", 2024, arXiv
2404.05089, section 3 (soft counts: the probability that the router gave each expert, summed over tokens).
`output`: Lasby, Lazarevich, Sinnadurai and others: "REAP the Experts: Why Pruning Prevails for One-Shot MoE
Compression", 2025, arXiv 2510.13999 (over the tokens that an expert is given, the mean of its gate times the norm of
its output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from compress.errors import StartError
from compress.maths.masks import parse_sparsity
from compress.passes.base import Context, PassResult
from compress.passes.structural import StructuralPass, keep_smaller

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.model import Block, ModelHandle
    from compress.stream import CalibrationStream

#: Where configs say how many experts a block has.
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def gate_mass(chosen: Tensor, gates: Tensor, experts: int) -> Tensor:
    """The gates that each expert was given, summed over tokens: float64 `[experts]`.

    `chosen`: indices of the experts of each token, int `[tokens, k]`; `gates`: their weights `[tokens, k]`.

    >>> gate_mass(torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), 3).tolist()
    [0.75, 0.5, 0.75]
    """
    total = torch.zeros(experts, dtype=torch.float64, device=gates.device)
    return total.index_add_(0, chosen.flatten(), gates.double().flatten())


def weighted_outputs(chosen: Tensor, gates: Tensor, experts: int, output: Callable[[int, Tensor], Tensor]) -> Tensor:
    """For each expert, its gate times the norm of what it gives, summed over the tokens that it is given: float64
    `[experts]`. `output(expert, tokens)`: what an expert gives `[n, hidden]` for the tokens at these indices `[n]`."""
    total = torch.zeros(experts, dtype=torch.float64, device=gates.device)
    for expert in range(experts):
        token, place = torch.where(chosen == expert)
        if len(token):
            norms = output(expert, token).double().norm(dim=-1)
            total[expert] = (gates[token, place].double() * norms).sum()
    return total


class Experts(StructuralPass):
    """Remove whole experts of a mixture-of-experts model, those least used on the calibration text."""

    name: ClassVar[str] = "experts"
    needs_calibration: ClassVar[bool] = True
    streams_text: ClassVar[bool] = True

    experts: int | None = Field(default=None, ge=1, description="How many experts shall remain in each block.")
    amount: Annotated[float, BeforeValidator(parse_sparsity), Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Instead of a number: the least share of the blocks' parameters to remove, as 0.25 or 25%.",
    )
    importance: Literal["use", "output"] = Field(
        default="use",
        description="What keeps an expert: `use`, the probability that the router gives it over all tokens; `output`, "
        "for the tokens that it is given, its gate times the norm of its output, on average.",
    )

    @model_validator(mode="after")
    def _one_target(self) -> Experts:
        if (self.experts is None) == (self.amount is None):
            raise ValueError("give either experts, how many shall remain, or amount, the share to remove")
        return self

    def refuses(self, model: PreTrainedModel) -> str | None:
        text = model.config.get_text_config()
        if not _count(model.config):
            return "it removes experts, and this model is no mixture of experts."
        if (getattr(text, "n_group", None) or 1) > 1:
            return "its router chooses among groups of experts, which must stay equally large."
        if not any(_mixture(block.module, _count(model.config)) for block in _blocks(model)):
            return "no block of this model holds its experts in one tensor beside their router."
        return None

    def smaller_config(self, model: PreTrainedModel) -> PretrainedConfig:
        return _with_experts(model.config, self._remaining(model))

    def _remaining(self, model: PreTrainedModel) -> int:
        """How many experts stay in each block. StartError where that cannot be."""
        count, visited = _count(model.config), int(model.config.get_text_config().num_experts_per_tok)
        remaining = self.experts
        if remaining is None:
            assert self.amount is not None
            blocks = _blocks(model)
            tensors = [t for block in blocks for t in _mixture(block.module, count).values()]
            removed = self.amount * sum(p.numel() for block in blocks for p in block.module.parameters())
            remaining = int(count - -(-removed // (sum(t.numel() for t in tensors) / count)))
        asked = f"experts: {self.experts}" if self.experts is not None else f"amount: {self.amount:.0%}"
        if remaining > count:
            raise StartError(f"experts: {asked} shall remain, and a block has {count}.")
        if remaining == count:
            raise StartError(f"experts: {asked} shall remain, and that is all: there is nothing to remove.")
        if remaining < visited:
            left = "" if self.experts is not None else f" leaves {max(remaining, 0)} of {count}, and"
            raise StartError(f"experts: {asked}:{left} each token visits {visited} experts, so as many must remain.")
        return remaining

    def extra_bytes(self, shape: Any) -> int | None:
        """The tensors that are cut, beside the old ones."""
        model = shape.handle.model
        share = self._remaining(model) / _count(model.config)
        tensors = [t for block in _blocks(model) for t in _mixture(block.module, _count(model.config)).values()]
        return int(share * sum(t.nbytes for t in tensors))

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.reshaping import parameters_of

        remaining = self._remaining(model.model)
        measured = self._measured(model, context)
        keep = [_strongest(scores, remaining) for scores in measured["importance"]]
        before = parameters_of(model.model)
        config = _with_experts(model.config, remaining)
        total = sum(p.numel() for block in model.block_list() for p in block.module.parameters())
        records = keep_smaller(model, context, config, _drawn(model, keep, measured))
        after = parameters_of(model.model)
        found = {"experts": remaining, "kept": keep, "parameters_before": before, "parameters": after, **measured}
        return PassResult(model, records, (before - after) / total, found)

    def _measured(self, model: ModelHandle, context: Context) -> dict[str, Any]:
        """`importance` and `use` (the share of all gates) of each expert of each block; both empty for a block without
        experts."""

        def measure() -> dict[str, Any]:
            from compress.stream import CalibrationStream

            assert context.calibration is not None
            stream = CalibrationStream(model, context.calibration, context.tokens_per_batch)
            found: dict[str, list[list[float]]] = {"importance": [], "use": []}
            with context.progress.step("experts: use", total=len(model.block_list())) as step:
                for block in model.blocks():
                    importance, use = _block_use(block, stream, _count(model.config), self.importance)
                    found["importance"].append(importance)
                    found["use"].append(use)
                    step.advance(block.name)
            return found

        return context.stage.once("use", measure) if context.stage else measure()


def _block_use(block: Block, stream: CalibrationStream, count: int, importance: str) -> tuple[list[float], list[float]]:
    """Importance, and share of all gates, of each expert of a block; the text moves on through the block."""
    names = _expert_modules(block.module, count)
    mass = torch.zeros(count, dtype=torch.float64)
    visits, outputs = mass.clone(), mass.clone()

    def seen(module: nn.Module, args: tuple[Any, ...], mask: Tensor | None) -> None:
        hidden, chosen, gates = args
        counted = gates if mask is None else gates * mask.to(gates.device).reshape(-1, 1)
        mass.add_(gate_mass(chosen, counted, count).cpu())
        visits.add_(gate_mass(chosen, (counted > 0).double(), count).cpu())
        if importance == "output":

            def output(expert: int, token: Tensor) -> Tensor:
                one = torch.full((len(token), 1), expert, dtype=chosen.dtype, device=chosen.device)
                result: Tensor = module.forward(hidden[token], one, torch.ones_like(gates[token, :1]))
                return result

            outputs.add_(weighted_outputs(chosen, counted, count, output).cpu())

    stream.watch(block, dict.fromkeys(names, seen))
    if not names:
        return [], []
    score = mass if importance == "use" else outputs / visits.clamp_min(1)
    return score.tolist(), (mass / mass.sum().clamp_min(1e-300)).tolist()


def _strongest(scores: list[float], remaining: int) -> list[int]:
    """Indices of the experts with the highest scores, ascending; of equals, the first."""
    return sorted(sorted(range(len(scores)), key=lambda index: -scores[index])[:remaining])


def _drawn(
    model: ModelHandle, keep: list[list[int]], measured: dict[str, Any]
) -> Iterator[tuple[Block, dict[str, Any]]]:
    for block, kept, use in zip(model.block_list(), keep, measured["use"], strict=True):
        model.load(block)
        for name, tensor in _mixture(block.module, _count(model.config)).items():
            path, _, last = name.rpartition(".")
            cut = tensor.detach()[torch.tensor(kept, device=tensor.device)]
            block.module.get_submodule(path)._parameters[last] = nn.Parameter(cut, requires_grad=False)
        lost = 1 - sum(use[index] for index in kept) if kept else 0.0
        yield block, {"name": block.name, "error": None, "kept": kept, "use_lost": max(lost, 0.0)}
        model.release(block)


def _blocks(model: PreTrainedModel) -> list[Block]:
    from compress.model import Block, find_stacks

    return [Block(stack, index) for stack in find_stacks(model) for index in range(len(stack))]


def _count(config: PretrainedConfig) -> int:
    """Experts in each block; 0 where there are none."""
    text = config.get_text_config()
    return next((int(n) for key in COUNTS if isinstance(n := getattr(text, key, None), int) and n > 0), 0)


def _with_experts(config: PretrainedConfig, remaining: int) -> PretrainedConfig:
    from copy import deepcopy

    config = deepcopy(config)
    text = config.get_text_config()
    for key in COUNTS:
        if getattr(text, key, None) is not None:
            setattr(text, key, remaining)
    return config


def _expert_modules(module: nn.Module, count: int) -> list[str]:
    """Names of the modules that hold all experts of a block, each matrix of them in one tensor `[experts, .., ..]`."""
    return [
        name
        for name, child in module.named_modules()
        if any(p.dim() == 3 and p.shape[0] == count for p in child.parameters(recurse=False))
    ]


def _mixture(module: nn.Module, count: int) -> dict[str, Tensor]:
    """The tensors of a block with a first dimension of experts, by their name inside it: the experts' own, and those
    of the router beside them. Empty where the block has no experts, or no router is found."""
    found: dict[str, Tensor] = {}
    for name in _expert_modules(module, count):
        path = name.rpartition(".")[0]
        parent = module.get_submodule(path)
        prefix = f"{path}." if path else ""
        routed = False
        for own, child in parent.named_children():
            for last, tensor in child.named_parameters(recurse=False):
                if tensor.shape[:1] == (count,):
                    found[f"{prefix}{own}.{last}"] = tensor
                    routed |= f"{prefix}{own}" != name
        if not routed:
            return {}
    return found
