"""Folders in every format, written once; and a process that never imports compress, which reads them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from compress.formats.base import Contents, layer_kinds
from compress.formats.folder import write_model_folder
from compress.maths.grid import QuantSpec, find_params, quantize
from compress.nn.quant_linear import QuantLinear
from compress.testing import outputs, tiny_tokens

PLAIN_READER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
folders, target = json.loads(sys.argv[1]), sys.argv[2]
results, failures = {}, {}
for name, (folder, kind, tokens) in folders.items():
    try:
        model, info = {"AutoModel": AutoModel}.get(kind, AutoModelForCausalLM).from_pretrained(
            folder, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            results[name] = model.eval()(input_ids=torch.tensor(tokens))[0].contiguous()
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"
assert not [name for name in sys.modules if name.partition(".")[0] == "compress"]
save_file(results, target)
print(json.dumps(failures))
"""


def quantize_model(
    model: PreTrainedModel, spec: Callable[[str], QuantSpec | None] | QuantSpec, skip: str = "lm_head"
) -> PreTrainedModel:
    """Round the Linears and Conv1Ds of `model` in place; `spec` may choose by layer name (None: leave it)."""
    kinds = layer_kinds(model)
    for name, kind in kinds.items():
        chosen = spec if isinstance(spec, QuantSpec) else spec(name)
        if chosen is None or skip in name or kind == "Embedding":
            continue
        old = model.get_submodule(name)
        weight = old.get_parameter("weight").detach()
        weight = weight.t() if kind == "Conv1D" else weight
        scale, zero = find_params(weight, chosen)
        codes = quantize(weight, scale, zero, chosen)
        bias = getattr(old, "bias", None)
        packed = QuantLinear.from_codes(codes, scale, zero, chosen, bias, model.dtype, transposed=kind == "Conv1D")
        model.set_submodule(name, packed)
    return model


@dataclass(frozen=True)
class Written:
    """A folder, and the outputs of the model in memory that it was written from."""

    folder: Path
    expected: torch.Tensor
    model: PreTrainedModel


class Shelf:
    """Writes models to folders, and reads all of them in one plain transformers process."""

    def __init__(self, root: Path):
        self.root = root
        self.tokens = tiny_tokens(2, 12)
        self.written: dict[str, Written] = {}

    def add(self, name: str, model: PreTrainedModel, format: str | None = None) -> None:
        folder = self.root / name / "model"
        write_model_folder(folder, Contents.of_model(model), format)
        self.written[name] = Written(folder, outputs(model, self.tokens), model)

    def read_plainly(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """(outputs, failures) by name, of a process in which compress is not imported."""
        folders = {
            name: (str(written.folder), "AutoModel" if "bert" in name else "", self.tokens.tolist())
            for name, written in self.written.items()
        }
        target = self.root / "plain.safetensors"
        done = forks.python(PLAIN_READER, json.dumps(folders), target, cwd=self.root)
        assert done.returncode == 0, done.stderr[-3000:]
        failures: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
        return load_file(target), failures


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("folders"))
