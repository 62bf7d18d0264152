"""Where an adapter begins: ranks, scaling, and the first values of its matrices.

Of peft: kaiming-uniform A and zero B (the default), `gaussian`, `pissa` (Meng et al. 2024, arXiv 2404.02948) and `eva`
(Paischer et al. 2024, arXiv 2410.07170). `loftq` (Li et al. 2023, arXiv 2310.08659) is its last step, the base being
rounded already: the best of the adapter's rank for what rounding took away.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress import adapters
from compress.adapters import NAME, Adapter
from compress.errors import CompressError, StartError
from compress.maths.low_rank import best_of_rank, share_ranks, spectrum
from compress.targets import adaptable, pattern, sides, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.data import Windows
    from compress.model import ModelHandle

#: What `eva` looks at: so many batches of so many tokens.
EVA_BATCHES, EVA_TOKENS = 8, 512
#: Passes after which a layer's weight stands in another basis than the original's, so that the two cannot be compared.
MOVING = ("awq", "rotate", "smoothquant")


def damage(name: str, layer: nn.Module, original: PreTrainedModel, pass_: str) -> Tensor:
    """What compression took from a layer: the original weight less the present one, [out, in], float32."""
    try:
        before = weight_of(original.get_submodule(name))
    except AttributeError:
        raise CompressError(f"{pass_}: the original model has no layer {name}, so they cannot be compared.") from None
    now = weight_of(layer)
    if before.shape != now.shape:
        raise CompressError(
            f"{pass_}: {name} is {list(now.shape)} and was {list(before.shape)}, so the two cannot be compared."
        )
    return before - now.to(before.device)


def refuse_moved(model: ModelHandle, pass_: str) -> None:
    """Raises where a pass has moved the weights to another basis."""
    moved = next((entry["pass"] for entry in model.history if entry["pass"] in MOVING), None)
    if moved is not None:
        raise StartError(
            f"{pass_} compares each layer with the original's, and {moved} rescaled or turned them: leave one out."
        )


def ranks_within(budget: int, layers: Mapping[str, nn.Module], original: PreTrainedModel, pass_: str) -> dict[str, int]:
    """The rank of each layer from the spectrum of its damage, within a budget of parameters; StartError where there is
    no damage, or the budget does not reach for one rank."""
    spectra, costs = {}, {}
    for name, layer in layers.items():
        values = spectrum(damage(name, layer, original, pass_))
        # Rounding errors of the comparison itself are no damage.
        spectra[name] = values.where(values > 1e-12 * float(weight_of(layer).double().square().sum()), 0.0)
        costs[name] = sum(sides(layer))
    ranks = share_ranks(spectra, costs, budget)
    if not ranks:
        if any(bool(values.any()) for values in spectra.values()):
            raise StartError(
                f"{pass_}: parameters: {budget} is less than one rank takes: {min(costs.values())} at least."
            )
        raise StartError(f"{pass_}: r: auto shares ranks out by damage, and this model is as the original: give r.")
    return ranks


def budget_of(parameters: int | str, model: ModelHandle) -> int:
    """A number of parameters from a number, or from a share of the model's (`2%`)."""
    if isinstance(parameters, int):
        return parameters
    total = sum(block.matrix_weights() for block in model.block_list())
    total += sum(tensor.numel() for tensor in model.outside().values())
    return int(float(parameters.removesuffix("%")) / 100 * total)


def config_for(ranks: Mapping[str, int], model: ModelHandle, lora_alpha: float | None, **options: Any) -> LoraConfig:
    """peft's config for adapters of these ranks; `lora_alpha` None: twice the rank of each layer."""
    common = max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r))
    others = {name: r for name, r in ranks.items() if r != common}
    alphas = {name: 2 * r for name, r in others.items()} if lora_alpha is None else {}
    layers = adaptable(model)
    turned = any(isinstance(layer, Conv1D) or getattr(layer, "transposed", False) for layer in layers.values())
    return LoraConfig(
        r=common,
        lora_alpha=2 * common if lora_alpha is None else lora_alpha,
        rank_pattern=others,
        alpha_pattern=alphas,
        target_modules=pattern(list(ranks)),
        fan_in_fan_out=turned,
        task_type="CAUSAL_LM" if model.model.can_generate() else None,
        **options,
    )


@torch.no_grad()
def set_product(layer: LoraLayer, left: Tensor, right: Tensor) -> None:
    """Makes `left` [out, r] times `right` [r, in] what the adapter adds to its layer."""
    layer.lora_B[NAME].weight.copy_(left / layer.scaling[NAME])
    layer.lora_A[NAME].weight.copy_(right)


def begin_at_damage(model: nn.Module, original: PreTrainedModel, pass_: str) -> None:
    """LoftQ's step: each adapter is the best of its rank for what its layer lost."""
    for name, layer in adapters.layers_of(model).items():
        set_product(layer, *best_of_rank(damage(name, layer, original, pass_), layer.r[NAME]))


@torch.no_grad()
def begin_with_eva(model: PreTrainedModel, windows: Windows) -> None:
    """A from the principal directions of each layer's inputs, B at zero; the ranks stay as they are. As peft's, the
    directions are found a batch at a time, so that no layer's second moment is held."""
    layers = adapters.layers_of(model)
    sketches: dict[str, Tensor] = {}

    def look(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        seen = torch.cat([sketches[name], x]) if name in sketches else x
        _, values, right = torch.linalg.svd(seen, full_matrices=False)
        kept = 2 * layers[name].r[NAME]
        sketches[name] = values[:kept, None] * right[:kept]

    handles = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    size = max(1, EVA_TOKENS // windows.length)
    try:
        for start in range(0, min(len(windows), EVA_BATCHES * size), size):
            part = {"input_ids": windows.tokens[start : start + size].to(model.device)}
            if windows.mask is not None:
                part["attention_mask"] = windows.mask[start : start + size].long().to(model.device)
            model(**part)
    finally:
        for handle in handles:
            handle.remove()
    for name, sketch in sketches.items():
        first = layers[name].lora_A[NAME].weight
        rows = min(len(first), len(sketch))
        first[:rows].copy_(functional.normalize(sketch[:rows], dim=1))
        layers[name].lora_B[NAME].weight.zero_()


def without_start(adapter: Adapter, start: Mapping[str, Tensor]) -> Adapter:
    """The adapter for the base as it was before `pissa` took its start out of it: of twice the rank, the start
    subtracted, as peft stores it too."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        if name.endswith(".lora_A.weight"):
            tensor = torch.cat([tensor, start[name]])
        elif name.endswith(".lora_B.weight"):
            tensor = torch.cat([tensor, -start[name]], dim=1)
        tensors[name] = tensor
    config = dict(adapter.config)
    # alpha / r (alpha / sqrt(r)) stays the same
    grown = 2**0.5 if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "lora_alpha": grown * config["lora_alpha"], "init_lora_weights": True}
    config["rank_pattern"] = {name: 2 * r for name, r in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: grown * alpha for name, alpha in config["alpha_pattern"].items()}
    return Adapter(config, tensors)
