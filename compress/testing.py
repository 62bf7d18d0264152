"""Tiny random models of many families, and the checks that any pass must stand: for our tests and for yours.

from compress.testing import check_pass
def test_my_pass_conforms():
    check_pass(MyPass(strength=0.5))
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from compress.passes.base import Pass

VOCABULARY = 96
CONTEXT = 64
#: Ids that `byte_tokenizer` needs a model to have; the last few stand for nothing.
BYTE_VOCABULARY = 272
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

#: Family -> (configuration class, its arguments); the class of the model follows from the configuration.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", {**_GROUPED, "pad_token_id": 0}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT},
    ),
    "opt": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "gpt_oss": (
        "GptOssConfig",
        {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "norm_topk_prob": True},
    ),
    "bert": ("BertConfig", _COMMON),
    "roberta": ("RobertaConfig", {**_COMMON, "max_position_embeddings": CONTEXT + 2}),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "num_labels": 3,
         "max_position_embeddings": CONTEXT},
    ),
    "modernbert": (
        "ModernBertConfig",
        {**_COMMON, "num_hidden_layers": 5, "local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": (
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 3,
         "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "vit": (
        "ViTConfig",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "image_size": 16, "patch_size": 4, "num_labels": 3},
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
#: The class of the model, where it is not the language model of the configuration.
_CLASSES = {
    "bert": "BertModel",
    "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForSequenceClassification",
    "modernbert": "ModernBertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}
#: Those that say token by token what comes next.
CAUSAL = tuple(family for family in FAMILIES if family not in _CLASSES)


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of a family in `FAMILIES`, a few tens of thousands of weights; `changes` to its config.

    Weights are larger than at a usual initialisation, so that the blocks matter to the output.
    """
    config_name, arguments = _FAMILIES[family]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tokens = {} if family == "vit" else tokens
    config = getattr(transformers, config_name)(**{**tokens, **copy.deepcopy(arguments), **changes})
    torch.manual_seed(seed)
    if family in _CLASSES:
        model = getattr(transformers, _CLASSES[family])(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, ids within `tiny_model`'s vocabulary; `<bos>` is 1, `<eos>` 2."""
    import string

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = ["<pad>", "<bos>", "<eos>", "<unk>", *string.ascii_letters, *string.digits, *" .,;:!?'-\n"]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `BYTE_VOCABULARY` ids, as formats with tokenizers of their own can hold it; `<bos>` is 1 and
    stands before a text, `<eos>` is 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("1", "2")]
    pieces = ["<pad>", "<bos>", "<eos>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def save_tiny(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Writes `tiny_model` and `tiny_tokenizer` (or an image processor) as a Hugging Face folder, and returns it."""
    tiny_model(family, **changes).save_pretrained(folder)
    if family == "vit":
        words = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(words))
    else:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def small_options(cls: type[Pass]) -> dict[str, Any]:
    """Options with which a pass fits `tiny_model`, where its defaults do not (a group of 128 in 32 columns)."""
    if cls.name == "bnb":
        return {"format": "int8"}
    if cls.name == "lora":
        return {"learn_from": "original", "init_lora_weights": "pissa", "r": 4, "tokens": 512}
    if cls.name == "depth":
        return {"layers": 2}
    if cls.name == "width":
        return {"intermediate_size": 40}
    if cls.name == "distill":  # two of three blocks, or there would be nothing to learn
        return {"tokens": 512, "student": {"layers": 2}}
    if cls.name == "vocab":
        return {"keep": 88}
    if cls.name == "experts":
        return {"experts": 3}
    small = {"group_size": 16, "tokens": 512, "iterations": 10, "preset": "fast"}
    return {name: value for name, value in small.items() if name in cls.model_fields}


def tiny_tokens(samples: int = 8, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids [samples, length] (int64) for `tiny_model`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def tiny_inputs(family: str, samples: int = 8, length: int = 32, seed: int = 0) -> torch.Tensor:
    """What `tiny_model(family)` reads: `tiny_tokens`, or random pixels [samples, 3, 16, 16] (float32)."""
    if family != "vit":
        return tiny_tokens(samples, length, seed)
    return torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, or an encoder's last hidden state. An encoder-decoder's decoder is given the text one place later."""
    from compress.inputs import with_decoder

    out = model(**with_decoder({model.main_input_name: tokens}, model.config))
    result: torch.Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return result


def check_pass(pass_: Pass, family: str = "llama", make: Callable[[str], PreTrainedModel] = tiny_model) -> None:
    """Raises AssertionError where a pass breaks a rule that the engine relies on.

    It must change the weights it says it covers and nothing outside the blocks (unless it declares
    `changes_outside`), leave finite outputs, be reproducible, be rebuilt equal from its own options, and declare known
    states.
    """
    from compress.model import find_stacks
    from compress.passes.base import STATES, reason_against
    from compress.passes.rtn import RTN

    assert type(pass_)(**pass_.options()) == pass_, f"{pass_.name}: options() do not rebuild the pass"
    assert set(pass_.accepts) <= set(STATES), f"{pass_.name} accepts unknown states"
    assert pass_.leaves in STATES, f"{pass_.name} leaves an unknown state"
    reason = reason_against(pass_, make(family))
    if reason is not None:
        _check_refusal(pass_, make(family), reason, tiny_inputs(family))
        return
    if not pass_.changes_weights:
        _check_run_time_pass(pass_, make(family))
        return
    tokens = tiny_inputs(family)
    results = []
    for _ in range(2):
        model = make(family)
        if "dense" not in pass_.accepts:
            RTN(bits=4, group_size=16, targets=None)(model, min_coverage=0.0)
        elif pass_.needs_teacher:
            _shrink_blocks(model)  # or there would be nothing to learn
        stacks = tuple(stack.name + "." for stack in find_stacks(model))
        outside = {n: p.clone() for n, p in model.named_parameters() if not n.startswith(stacks)}
        before = outputs(model, tokens)
        result = pass_(
            model,
            calibration=tokens if pass_.takes_calibration else None,
            training=tokens if pass_.needs_training else None,
            original=make(family) if pass_.needs_teacher else None,
            min_coverage=0.0,
        )
        after = outputs(model, renumbered(tokens, result.kept_tokens))
        assert result.model is model, f"{pass_.name} does not change the model in place"
        assert 0 < result.coverage <= 1, f"{pass_.name} covers {result.coverage}"
        assert torch.isfinite(after).all(), f"{pass_.name} leaves outputs that are not finite"
        assert before.shape != after.shape or not torch.equal(before, after), f"{pass_.name} changed nothing"
        if pass_.structural:
            _check_shape(pass_, model, make(family), renumbered(tokens, result.kept_tokens))
        for name, old in outside.items() if not pass_.changes_outside else ():
            assert torch.equal(old, model.get_parameter(name)), f"{pass_.name} changed {name}, which is in no block"
        results.append(after)
    assert torch.equal(*results), f"{pass_.name} is not reproducible"


def renumbered(tokens: torch.Tensor, kept: list[int] | None) -> torch.Tensor:
    """Token ids as they are after a pass that left `kept` (old ids in their new order); 0 for those that are gone."""
    if kept is None:
        return tokens
    new = torch.zeros(max(VOCABULARY, max(kept) + 1), dtype=torch.int64)
    new[torch.tensor(kept)] = torch.arange(len(kept))
    return new[tokens]


def _check_shape(pass_: Pass, model: PreTrainedModel, before: PreTrainedModel, tokens: torch.Tensor) -> None:
    """The smaller model is what plain transformers makes of its folder, to the last bit, and no tensor of it is larger
    than its config says; the plan foresees as many parameters."""
    from compress.model import ModelHandle
    from compress.reshaping import parameters_of
    from compress.shapes import ModelShape

    assert parameters_of(model) < parameters_of(before), f"{pass_.name} removed no parameter"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
    assert parameters_of(again) == parameters_of(model), f"{pass_.name}: config.json says another size"
    assert torch.equal(outputs(again, tokens), outputs(model, tokens)), f"{pass_.name} does not reload"
    planned = ModelShape.of(before.config, before.dtype, type(before).__name__)
    planned.apply(pass_)
    assert parameters_of(planned.handle.model) == parameters_of(model), f"{pass_.name}: the plan foresees another size"
    assert not any(p.is_meta for p in model.parameters()), f"{pass_.name} left a tensor without content"
    ModelHandle.wrap(model)


@torch.no_grad()
def _shrink_blocks(model: PreTrainedModel) -> None:
    """Takes a tenth off every matrix in the blocks."""
    from compress.model import find_stacks

    for stack in find_stacks(model):
        for parameter in stack.modules.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(0.9)


def _check_refusal(pass_: Pass, model: PreTrainedModel, reason: str, tokens: torch.Tensor) -> None:
    """A model that the pass refuses is left as it was, and the reason is a sentence."""
    from compress.errors import StartError

    assert reason.endswith("."), f"{pass_.name}: {reason!r} is no sentence"
    said = None
    try:
        pass_(model, calibration=tokens if pass_.needs_calibration else None, min_coverage=0.0)
    except StartError as error:
        said = str(error)
    assert said is not None, f"{pass_.name} refuses {type(model).__name__} and works on it all the same"
    assert reason in said, f"{pass_.name} refuses with other words than its reason"


@torch.no_grad()
def _check_run_time_pass(pass_: Pass, model: PreTrainedModel) -> None:
    """A pass that changes no weight: none is changed, and what the model computes as it writes is, but not by much.

    The text is read in two parts, the second from what the model kept of the first.
    """
    from transformers import DynamicCache

    def second_part(cache: DynamicCache | None) -> torch.Tensor:
        tokens = tiny_tokens(length=CONTEXT)
        first = model(input_ids=tokens[:, :-8], use_cache=True, past_key_values=cache)
        result: torch.Tensor = model(input_ids=tokens[:, -8:], past_key_values=first.past_key_values).logits
        return result

    exact = second_part(None)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = pass_(model, min_coverage=0.0)
    assert result.model is model, f"{pass_.name} does not change the model in place"
    assert result.coverage == 0, f"{pass_.name} changes no weights and covers {result.coverage}"
    for name, old in before.items():
        assert torch.equal(old, model.get_parameter(name)), f"{pass_.name} changed {name}"
    after = second_part(None)
    assert torch.equal(after, second_part(None)), f"{pass_.name} is not reproducible"
    assert not torch.equal(exact, after), f"{pass_.name} changed nothing"
    off = float((after - exact).square().mean() / exact.square().mean())
    assert off < 0.1, f"{pass_.name} changes the outputs by {off:.0%}"
    own = second_part(DynamicCache(config=model.config))
    assert torch.equal(exact, own), f"{pass_.name} cannot be told not to"
