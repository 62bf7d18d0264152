"""Answers that a model writes to items of prompt + completion."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.measure.benchmark import measure_compressed, measure_original
from compress.measure.comparison import compare
from compress.measure.measurements import BenchmarkJob
from compress.testing import tiny_tokenizer


@pytest.mark.usefixtures("same_process")
def test_exact_match_is_what_greedy_decoding_writes_up_to_the_lines_wanted(pair, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pair[0]).eval(), tiny_tokenizer()
    items = []
    for number, word in enumerate(["bee", "fig", "hen", "ink", "jam", "kit", "lamp", "moss"]):
        ids = tokenizer(word, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(3 + 8):  # three wanted letters, and a little more
                following = model(ids).logits[:, -1:].argmax(-1)
                if int(following) == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, following], 1)
        written = tokenizer.decode(ids[0, len(word) :], skip_special_tokens=True).split("\n")[0].strip()
        items.append({"prompt": f"{word} ", "completion": written if number % 2 else "abc"})
    job = BenchmarkJob(items={"words": items}, metrics=("exact_match", "rouge_l"), threads=1)
    first = measure_original(str(pair[0]), job=job, workdir=tmp_path)
    assert first.records["written"][0] != "abc"
    assert first.figures["exact_match"].n == 8
    assert first.figures["exact_match"].value < 1
    second = measure_compressed(pair[1], str(pair[0]), first, job=job, workdir=tmp_path)
    found = compare(first, second)
    for name in ("exact_match", "rouge_l"):
        assert found[name].ci_low <= found[name].delta <= found[name].ci_high
    assert "accuracy" not in first.figures
    assert "exact_match" not in BenchmarkJob(items=job.items).names()
