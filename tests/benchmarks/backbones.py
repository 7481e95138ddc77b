"""The backbones that are timed: six blocks (T5: six and six) of width 512, random weights, no dropout, four samples."""

from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

WIDTH, BLOCKS, HEADS, SAMPLES, TOKENS = 512, 6, 8, 4, 64


@dataclass(frozen=True)
class Shape:
    """A backbone and what HF PEFT has to be told of it; lightning_peft finds it out."""

    config: hf.PreTrainedConfig
    auto: type
    task: str | None
    head: list[str] | None = None
    conv1d: bool = False

    @property
    def has_words(self) -> bool:
        return hasattr(self.config, "vocab_size")

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.auto.from_config(self.config).train()

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(high: int, *size: int) -> Tensor:
            return torch.randint(1, high, size, generator=generator)

        if not self.has_words:
            pixels = torch.randn(SAMPLES, 3, self.config.image_size, self.config.image_size, generator=generator)
            return {"pixel_values": pixels, "labels": draw(self.config.num_labels, SAMPLES)}
        ids = draw(self.config.vocab_size, SAMPLES, TOKENS)
        labels = {
            # The first token of a text is in no loss: HF PEFT would predict it from a soft prompt.
            "CAUSAL_LM": ids.masked_fill(torch.arange(TOKENS) == 0, -100),
            "SEQ_2_SEQ_LM": draw(self.config.vocab_size, SAMPLES, TOKENS // 4),
            "SEQ_CLS": draw(2, SAMPLES),
        }
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels[self.task or ""]}


_ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SHAPES = {
    "gpt2": Shape(
        hf.GPT2Config(
            n_embd=WIDTH,
            n_layer=BLOCKS,
            n_head=HEADS,
            vocab_size=8192,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        hf.AutoModelForCausalLM,
        "CAUSAL_LM",
        conv1d=True,
    ),
    "bert": Shape(
        hf.BertConfig(**_ENCODER, vocab_size=16384),
        hf.AutoModelForSequenceClassification,
        "SEQ_CLS",
        ["classifier"],
    ),
    "t5": Shape(
        hf.T5Config(
            d_model=WIDTH,
            d_ff=4 * WIDTH,
            num_layers=BLOCKS,
            num_heads=HEADS,
            vocab_size=8192,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        hf.AutoModelForSeq2SeqLM,
        "SEQ_2_SEQ_LM",
    ),
    "vit": Shape(
        hf.ViTConfig(**_ENCODER, image_size=128, num_labels=100),
        hf.AutoModelForImageClassification,
        None,
        ["classifier"],
    ),
}
