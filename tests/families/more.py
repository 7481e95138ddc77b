"""More families, for the whole table of what works; the sample of `builders` is what every change is tried on."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from tests.families.builders import SAMPLE, VOCABULARY, WIDTH, Built, classes, ids, image, sound, words

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
_DECODER = _TEXT | {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
_IMAGE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
_SEQ = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_SOUND: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3,
    "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
_PYRAMID: dict[str, Any] = {
    "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 1, 1],
    "num_labels": 3,
}  # fmt: skip


def _classifier(name: str, **over: Any) -> Callable[[], Built]:
    """Return a builder of a classifier of texts."""

    def built() -> Built:
        config = getattr(hf, f"{name}Config")(**_TEXT | over)
        return getattr(hf, f"{name}ForSequenceClassification")(config), classes()

    return built


def _writer(name: str, settings: dict[str, Any], **over: Any) -> Callable[[], Built]:
    """Return a builder of a causal language model."""

    def built() -> Built:
        return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**settings | over)), words()

    return built


def _translator(name: str, settings: dict[str, Any], **over: Any) -> Callable[[], Built]:
    """Return a builder of an encoder-decoder of texts."""

    def built() -> Built:
        return getattr(hf, f"{name}ForConditionalGeneration")(getattr(hf, f"{name}Config")(**settings | over)), words()

    return built


def _pictures(name: str, size: int = 16, settings: dict[str, Any] = _IMAGE, **over: Any) -> Callable[[], Built]:
    """Return a builder of a classifier of images."""

    def built() -> Built:
        config = getattr(hf, f"{name}Config")(**settings | over)
        return getattr(hf, f"{name}ForImageClassification")(config), image(size)

    return built


def _sounds(name: str, **over: Any) -> Callable[[], Built]:
    """Return a builder of a classifier of sounds."""

    def built() -> Built:
        config = getattr(hf, f"{name}Config")(**_SOUND | over)
        return getattr(hf, f"{name}ForSequenceClassification")(config), sound()

    return built


def _long(build: Callable[[], Built]) -> Callable[[], Built]:
    """Return the builder with texts of 16 tokens."""

    def built() -> Built:
        model, batch = build()
        return model, batch | {"input_ids": ids(length=16)}

    return built


WHOLE: dict[str, Callable[[], Built]] = SAMPLE | {
    "albert": _classifier("Albert", embedding_size=8),
    "bert": _classifier("Bert"),
    "big_bird": _classifier("BigBird", attention_type="original_full"),
    "canine": _long(_classifier("Canine", num_hash_buckets=64, local_transformer_stride=8, downsampling_rate=4)),
    "deberta_v2": _classifier("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "electra": _classifier("Electra", embedding_size=8),
    "esm": _classifier("Esm", mask_token_id=4),
    "lilt": _classifier("Lilt", hidden_size=24),
    "mpnet": _classifier("MPNet"),
    "roberta": _classifier("Roberta", pad_token_id=1),
    "gemma2": _writer("Gemma2", _DECODER),
    "gpt2": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT)), words()),
    "gptj": _writer("GPTJ", _GPT, rotary_dim=4),
    "llama": _writer("Llama", _DECODER),
    "mamba2": _writer("Mamba2", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}, num_heads=4,
                      head_dim=8, n_groups=1, state_size=8, chunk_size=4),
    "opt": _writer("OPT", _TEXT, ffn_dim=32, word_embed_proj_dim=WIDTH),
    "phi3": _writer("Phi3", _DECODER | {"num_key_value_heads": 2}),
    "qwen3": _writer("Qwen3", _DECODER),
    "qwen3_moe": _writer("Qwen3Moe", _DECODER, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16),
    "bart": _translator("Bart", _SEQ),
    "pegasus": _translator("Pegasus", _SEQ),
    "t5": _translator("T5", _T5),
    "umt5": _translator("UMT5", _T5),
    "beit": _pictures("Beit"),
    "clip_images": lambda: (
        hf.CLIPForImageClassification(hf.CLIPConfig(
            vision_config={k: v for k, v in _IMAGE.items() if k != "num_labels"}, text_config=_DECODER, num_labels=3
        )), image(),
    ),
    "deit": _pictures("DeiT"),
    "pvt_v2": _pictures("PvtV2", 32, _PYRAMID, image_size=32, mlp_ratios=[2] * 4),
    "segformer": _pictures("Segformer", 32, _PYRAMID),
    "swin": _pictures("Swin", 32, {}, image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                      window_size=4, num_labels=3),
    "swinv2": _pictures("Swinv2", 32, {}, image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                        window_size=4, num_labels=3),
    "vit": _pictures("ViT"),
    "hubert": _sounds("Hubert"),
    "wav2vec2": _sounds("Wav2Vec2"),
}  # fmt: skip
"""Name of a family -> its builder, those of the sample first."""


def build_any(family: str) -> Built:
    """Return a model of a family in eval mode, and a batch for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = WHOLE[family]()
    return model.eval(), batch
