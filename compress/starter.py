"""The recipe that `compress init MODEL` prints."""

from __future__ import annotations

import json


def starter_recipe(model: str) -> str:
    """A commented recipe for `model`, ready to run: what `compress init MODEL` prints."""
    builtin = model.startswith("builtin:")
    commented = "" if builtin else "# "
    step, what = ("gptq", "calibrated rounding") if builtin else ("rtn", "rounding without data (gptq: with)")
    return f"""\
# Run it with: compress run recipe.yaml        What it will cost: compress plan recipe.yaml
model: {json.dumps(model)}   # hub id, local folder or builtin:tiny

# Text. A .txt or .jsonl file, or a Hugging Face dataset id; paths start from this file's folder.
{commented}data:
{commented}  calibration: {model if builtin else "calibration.jsonl"}   # what gptq and wanda look at
{commented}  evaluation: {model if builtin else "evaluation.jsonl"}   # what quality is measured on; must be other text

# What is done to the model, in this order. `compress passes` lists them all, `compress passes gptq` one's options.
passes:
  - {step}:   # {what}
      bits: 4          # 2, 3, 4 or 8
      group_size: 64   # weights that share a scale; must divide the columns of the layers; -1: per channel
      # grid: trellis  # 2, 3 or 4 bits with a third less error for the same bytes; runs packed with compress.load alone

# What is measured on the original and on the result. Left out: everything cheap. `benchmark: false`: nothing.
# benchmark:
#   tasks: [items.jsonl]   # test items: question + choices + label, good + bad, or prompt + completion
#   goals:                 # the run ends with exit code 3 where one is missed
#     perplexity: +2%
#     weights_bytes: -60%

# output: runs/my-model   # default: runs/<this file's name>
# residency: disk         # read one block at a time: for models larger than the memory
# memory: 8GB             # refuse to start if the plan needs more
seed: 0
"""
