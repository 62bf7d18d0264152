"""Loads a model by transformers alone and writes what it computes for given tokens.

Run by path (`python -P plain_check.py JOB.json`), never as a part of the package: it shows that somebody who does not
have this package can use the folder. JOB.json: {"model": folder, "ids": safetensors file with `ids` [n, length] int64,
"out": safetensors file to write `output` to, "auto": transformers' class to load with, "adapter": the folder of an
adapter that plain peft puts beside the model, or null, "dtype", "device", "threads"}. `output` is float32: the logits
[n, length, vocabulary] (of a classifier [n, classes]), or an encoder's last hidden state [n, length, hidden].
"""

import json
import sys
from pathlib import Path


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    auto = getattr(transformers, job["auto"])
    model = auto.from_pretrained(job["model"], dtype=job["dtype"], trust_remote_code=False, use_safetensors=True)
    if job["adapter"] is not None:
        from peft import PeftModel

        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # layers of several grids have a weight only after that
        model = PeftModel.from_pretrained(model, job["adapter"])
    model.to(job["device"]).eval()
    ids = load_file(job["ids"])["ids"].to(job["device"])
    rows = []
    with torch.inference_mode():
        for row in ids.split(1):
            result = model(input_ids=row)
            rows.append((result.logits if hasattr(result, "logits") else result.last_hidden_state).float().cpu())
    if "compress" in sys.modules:
        raise SystemExit("The package compress was imported, so this load proves nothing about plain transformers.")
    save_file({"output": torch.cat(rows).contiguous()}, job["out"])


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(lines[0] if lines else type(error).__name__)
