"""Tiny random models of six shapes, a batch for each, and a tokenizer of real words. Nothing is downloaded."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

VOCABULARY = 100
HIDDEN = 32
LABELS = 3
POSITIONS = 64
_IDS: dict[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TEXT = ("bert", "distilbert", "gpt2", "llama", "t5")
KINDS = (*TEXT, "vit")

HEADS = {
    "bert": HIDDEN * LABELS + LABELS,
    "distilbert": HIDDEN * HIDDEN + HIDDEN + HIDDEN * LABELS + LABELS,
    "gpt2": 0,
    "llama": 0,
    "t5": 0,
    "vit": HIDDEN * LABELS + LABELS,
}
"""Number of parameters of the task head, which every method trains; a language model's own head is none."""

MINILM = hf.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
BERT_LARGE = hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
ROBERTA_LARGE = hf.RobertaConfig(
    vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


def tiny(kind: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """Return a model of two layers in eval mode; its weights depend on ``seed`` alone."""
    return copy.deepcopy(_built(kind, dropout, seed))


def batch(kind: str, size: int = 4, length: int = 10, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Return inputs with labels; with ``padded``, odd rows end in two columns of padding (but GPT-2's and Llama's)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if kind == "vit":
        pixels = torch.randn(size, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": draw(0, LABELS, size)}
    ids, mask = draw(5, VOCABULARY, size, length), torch.ones(size, length, dtype=torch.long)
    if kind in ("gpt2", "llama"):
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    ids[:, 0] = 3
    if padded:
        mask[1::2, -2:] = 0
        ids[mask == 0] = 0
    if kind == "t5":
        return {"input_ids": ids, "attention_mask": mask, "labels": draw(5, VOCABULARY, size, 6)}
    return {"input_ids": ids, "attention_mask": mask, "labels": draw(0, LABELS, size)}


def meta(config: hf.PreTrainedConfig, auto: Any = hf.AutoModel) -> nn.Module:
    """Return a model without storage, to count its parameters."""
    with torch.device("meta"):
        return auto.from_config(config)


def save_tokenizer(folder: Path) -> Path:
    """Save a word-level tokenizer of `VOCABULARY` tokens: specials, two unused, ``a b c``, then words by frequency."""
    text = "the of and to in good bad film music people time water light house green river stone bird tree sun"
    words = text.split()
    tokens = ["[PAD]", "[BOS]", "[EOS]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "[unused0]", "[unused1]", "a", "b", "c"]
    tokens += words + [f"{w}{suffix}" for suffix in ("ly", "ness", "ish", "less") for w in words]
    vocabulary = {token: i for i, token in enumerate(tokens[:VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "bos", "eos", "cls", "sep", "unk", "mask")}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


@cache
def _built(kind: str, dropout: float, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _BUILDERS[kind](dropout).eval()


def _bert(dropout: float) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        num_labels=LABELS,
    )
    return hf.BertForSequenceClassification(config)


def _distilbert(dropout: float) -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        n_layers=2,
        n_heads=4,
        hidden_dim=2 * HIDDEN,
        max_position_embeddings=POSITIONS,
        dropout=dropout,
        attention_dropout=dropout,
        seq_classif_dropout=dropout,
        initializer_range=0.3,
        num_labels=LABELS,
    )
    return hf.DistilBertForSequenceClassification(config)


def _gpt2(dropout: float) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.3,
        **_IDS,
    )
    model = hf.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else transformers logs a warning, which torch.compile cannot trace
    return model


def _llama(dropout: float) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        attention_dropout=dropout,
        initializer_range=0.3,
        **_IDS,
    )
    return hf.LlamaForCausalLM(config)


def _t5(dropout: float) -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=HIDDEN // 4,
        d_ff=2 * HIDDEN,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        **_IDS,
    )
    return hf.T5ForConditionalGeneration(config)


def _vit(dropout: float) -> nn.Module:
    config = hf.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        num_labels=LABELS,
    )
    return hf.ViTForImageClassification(config)


_BUILDERS = {"bert": _bert, "distilbert": _distilbert, "gpt2": _gpt2, "llama": _llama, "t5": _t5, "vit": _vit}
