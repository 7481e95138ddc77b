"""Tiny models in place of those of the hub that PEFT's tests take: of the same architectures, with weights drawn."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.models import drawn

_WORDS, _WIDTH, _LAYERS, _HEADS, _POSITIONS = 100, 32, 2, 4, 64
_BERT: dict[str, int] = {
    "vocab_size": _WORDS,
    "hidden_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": 2 * _WIDTH,
    "max_position_embeddings": _POSITIONS,
    "pad_token_id": 0,
}
_LLAMA: dict[str, int] = _BERT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS: dict[str, Any] = _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


def _config(kind: str) -> hf.PreTrainedConfig:
    """Return the configuration of a tiny model of an architecture."""
    makers: dict[str, Callable[[], hf.PreTrainedConfig]] = {
        "OPT": partial(hf.OPTConfig, **_BERT, ffn_dim=2 * _WIDTH, word_embed_proj_dim=_WIDTH),
        "GPT2": partial(hf.GPT2Config, vocab_size=_WORDS, n_positions=_POSITIONS, n_embd=_WIDTH, n_layer=2, n_head=4),
        "GPTJ": partial(
            hf.GPTJConfig, vocab_size=_WORDS, n_positions=_POSITIONS, n_embd=_WIDTH, n_layer=2, n_head=4, rotary_dim=4
        ),
        "Llama": partial(hf.LlamaConfig, **_LLAMA),
        "qwen2": partial(hf.Qwen2Config, **_LLAMA),
        "Gemma3": partial(hf.Gemma3TextConfig, **_LLAMA, head_dim=8),
        "Llama4": partial(hf.Llama4TextConfig, **_EXPERTS, intermediate_size_mlp=2 * _WIDTH),
        "GptOss": partial(hf.GptOssConfig, **_EXPERTS),
        "T5": partial(hf.T5Config, vocab_size=_WORDS, d_model=_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=_HEADS),
        "Bart": partial(
            hf.BartConfig,
            vocab_size=_WORDS,
            d_model=_WIDTH,
            encoder_layers=_LAYERS,
            decoder_layers=_LAYERS,
            encoder_attention_heads=_HEADS,
            decoder_attention_heads=_HEADS,
            encoder_ffn_dim=2 * _WIDTH,
            decoder_ffn_dim=2 * _WIDTH,
            max_position_embeddings=_POSITIONS,
        ),
        "Bert": partial(hf.BertConfig, **_BERT),
        "Roberta": partial(hf.RobertaConfig, **_BERT),
        "Deberta": partial(hf.DebertaConfig, **_BERT),
        "DebertaV2": partial(hf.DebertaV2Config, **_BERT),
        "ResNet": partial(hf.ResNetConfig, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    }
    return makers[kind]()


_ENDS = ("For", "LMHeadModel", "Model")


def kind_of(name: str) -> str:
    """Return the architecture of a model of the hub by its name.

    >>> kind_of("trl-internal-testing/tiny-random-LlamaForCausalLM"), kind_of("x/tiny-dummy-qwen2")
    ('Llama', 'qwen2')
    """
    last = name.rpartition("/")[2].removeprefix("tiny-").removeprefix("random-").removeprefix("dummy-")
    return next((last.partition(end)[0] for end in _ENDS if end in last), last)


def stand_in(name: str, auto: Any) -> nn.Module:
    """Return a tiny model for a name of the hub, the same at each call."""
    model = drawn(lambda: auto.from_config(_config(kind_of(name)), attn_implementation="eager"))
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and "Gemma" not in type(module).__name__:
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.add_(name == "weight")  # else all that comes after is small, and so are its gradients
    return model


def rows(model: nn.Module) -> dict[str, Tensor]:
    """Return inputs without padding, which a prompt of ours and of PEFT's would put in another place."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, hf.ResNetForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, _WORDS, (2, 8), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


def call(model: nn.Module, inputs: dict[str, Tensor], method: Any = None) -> Tensor:
    """Return what a model computes, of ours with the method that prepares its batches."""
    given = inputs if method is None else dict(method.prepare(dict(inputs)))
    out: Any = model(**given)
    found = next(out[name] for name in ("logits", "start_logits", "last_hidden_state") if name in out)
    if found.dim() < 3:
        return found
    length = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"].shape[1]
    return found[:, -length:]  # where there are virtual tokens, what they give is no output
