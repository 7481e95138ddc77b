"""Tiny random models of families whose structure differs, each with a batch: a sample that every change is tried on."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, WIDTH = 60, 16
Built = tuple[nn.Module, dict[str, Any]]

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
_DECODER = _TEXT | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = _DECODER | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
_SOUND: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3,
    "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2, "num_buckets": 8,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}  # fmt: skip
_WHISPER: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": VOCABULARY,
    "num_mel_bins": 8, "max_source_positions": 10, "classifier_proj_size": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 3,
}  # fmt: skip


def ids(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def classes() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": torch.tensor([0, 1])}


def words() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": ids()}


def image(size: int = 16) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def sound() -> dict[str, Tensor]:
    waves = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    return {"input_values": waves, "labels": torch.tensor([0, 1])}


def spectrum() -> dict[str, Tensor]:
    waves = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    return {"input_features": waves, "labels": torch.tensor([0, 1])}


class Pipeline(nn.Module):
    """A network as users write them: a stem, blocks in an ``nn.Sequential``, one fused projection, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.trunk = nn.Sequential(Mixing(), Mixing())
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.trunk(self.stem(x)).mean(1))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fused, self.back = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second, self.grow = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32)
        self.shrink = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.linear(self.first(x), self.fused.weight, self.fused.bias).chunk(3, -1)
        x = x + self.back(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.shrink(self.grow(self.second(x)).relu())


def pipeline() -> Built:
    return Pipeline(), {"x": torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))}


def _jamba() -> Built:
    config = hf.JambaConfig(
        **_DECODER, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=3, mamba_d_state=4, mamba_dt_rank=2,
    )  # fmt: skip
    return hf.JambaForCausalLM(config), words()


def _deberta() -> Built:
    config = hf.DebertaConfig(
        **_TEXT, pos_att_type=["c2p", "p2c"], relative_attention=True, max_relative_positions=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.DebertaForSequenceClassification(config), classes()


def _mamba() -> Built:
    config = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=4)
    return hf.MambaForCausalLM(config), words()


def _llama4() -> Built:
    config = hf.Llama4TextConfig(
        **_EXPERTS, intermediate_size_mlp=32, moe_layers=[1], no_rope_layers=[1, 0], tie_word_embeddings=False
    )
    return hf.Llama4ForCausalLM(config), words()


def _t5() -> Built:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    return hf.T5ForQuestionAnswering(config), {"input_ids": ids(), "decoder_input_ids": ids()}


def _resnet() -> Built:
    config = hf.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 2], embedding_size=8, num_labels=3)
    return hf.ResNetForImageClassification(config), image()


SAMPLE: dict[str, Callable[[], Built]] = {
    "bert_mlm": lambda: (hf.BertForMaskedLM(hf.BertConfig(**_TEXT)), words()),
    "bloom": lambda: (
        hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=2)), words(),
    ),
    "deberta": _deberta,
    "jamba": _jamba,
    "llama4": _llama4,
    "mamba": _mamba,
    "mixtral": lambda: (hf.MixtralForCausalLM(hf.MixtralConfig(**_EXPERTS)), words()),
    "modernbert": lambda: (
        hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**_TEXT, cls_token_id=3, sep_token_id=4)), classes(),
    ),
    "t5_answers": _t5,
    "xlnet": lambda: (
        hf.XLNetForSequenceClassification(
            hf.XLNetConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=2, n_head=2, d_inner=32, num_labels=3)
        ),
        classes() | {"token_type_ids": torch.zeros(2, 8, dtype=torch.long)},  # which its tokenizer makes
    ),
    "convnext": lambda: (
        hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, patch_size=2, num_labels=3)
        ),
        image(),
    ),
    "dinov2": lambda: (hf.Dinov2ForImageClassification(hf.Dinov2Config(**_IMAGE)), image()),
    "resnet": _resnet,
    "wavlm": lambda: (hf.WavLMForSequenceClassification(hf.WavLMConfig(**_SOUND)), sound()),
    "whisper_sounds": lambda: (hf.WhisperForAudioClassification(hf.WhisperConfig(**_WHISPER)), spectrum()),
    "pipeline": pipeline,
}  # fmt: skip
"""Name of a family -> its builder."""


def build(family: str) -> Built:
    """Return a model in eval mode whose weights depend on the family alone, and a batch for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = SAMPLE[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model.eval(), batch
