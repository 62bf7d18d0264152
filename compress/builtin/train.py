"""Trains the embedded model `tiny` from nothing: tokenizer, then weights.

    python -m compress.builtin.train --output DIR [--steps N] [--seed 0]

The same command continues a run that was interrupted. The folder that results is an ordinary Hugging Face
model; it takes the place of `compress/builtin/tiny/` (whose README.md is the model card).
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from compress.builtin import documents

VOCABULARY = 1024
CONTEXT = 512
WINDOW = 256
BATCH = 16
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: every text encodes, every digit is a token, bos is put in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_windows(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], count: int) -> np.ndarray:
    """Pack texts (for each one: bos, then its tokens) into `count` windows of shape (count, WINDOW)."""
    stream = np.empty(count * WINDOW, dtype=np.uint16)
    filled = 0
    while filled < len(stream):
        encoded = tokenizer(list(islice(texts, 1000)), add_special_tokens=False)["input_ids"]
        joined = [i for document in encoded for i in (tokenizer.bos_token_id, *document)]
        ids = np.array(joined, dtype=np.uint16)
        taken = ids[: len(stream) - filled]
        stream[filled : filled + len(taken)] = taken
        filled += len(taken)
    return stream.reshape(count, WINDOW)


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):  # type: ignore[misc]  # torch is untyped here
    """Token windows as the trainer wants them; the model shifts the labels itself."""

    def __init__(self, windows: np.ndarray) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.windows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model: 3.4 million parameters, all dimensions of its matrices multiples of 128."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class MuonAdamW(torch.optim.Optimizer):  # type: ignore[misc]
    """Muon for the matrices of the blocks and AdamW for the rest, as the one optimizer that a trainer takes.

    On a CPU tokens are what is scarce, and Muon is known to need fewer of them than AdamW alone.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
        ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in ids]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.98)),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """Step both; the learning rates are read from the shared groups."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both; loading replaces their groups, so the shared list is made anew."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def train(output: Path, steps: int, seed: int) -> None:
    """Train tokenizer and model and write both to `output`; checkpoints go to `output/checkpoints`."""
    set_seed(seed)
    tokenizer = train_tokenizer(islice(documents("tiny", "training", seed), 20_000))
    # The text is made once, as long as the whole training needs, so that no window is seen twice.
    windows = token_windows(tokenizer, documents("tiny", "training", seed), steps * BATCH)
    model = new_model(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        # A level rate, then a cosine decay over the last quarter: until the decay begins, runs of different
        # lengths are the same run, so a run can be continued with another --steps than it was started with.
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 4, "decay_type": "cosine"},
        warmup_steps=min(50, steps // 10),
        train_sampling_strategy="sequential",
        bf16=True,  # autocast: the weights stay fp32; on CPUs with bf16 instructions twice as fast
        use_cpu=True,
        seed=seed,
        logging_steps=20,
        save_steps=100,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(windows), optimizers=(MuonAdamW(model), None))
    checkpoints = Path(arguments.output_dir)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded model `tiny` again.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=2000, help=f"steps of {BATCH} x {WINDOW} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.output, options.steps, options.seed)


if __name__ == "__main__":
    main()
