"""Tiny random models of six shapes, a batch for each, and a tokenizer of real words. Nothing is downloaded."""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from lightning_peft.core import reach

VOCABULARY = 100
HIDDEN = 32
LABELS = 3
POSITIONS = 64
CLIP_POSITIONS = 24
_IDS: dict[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TEXT = ("bert", "distilbert", "gpt2", "llama", "t5")
KINDS = (*TEXT, "vit")
IMAGES = ("vit", "deit", "dinov2", "dinov2_registers", "clip_image", "siglip_image", "swin")
"""Classifiers of images of 16 by 16 pixels."""
CONVOLUTIONS = ("resnet",)
"""Classifiers of such images that have no tokens."""
TWO_TOWERS = ("clip", "siglip")
"""The same with texts of their classes."""

HEADS = {
    "bert": HIDDEN * LABELS + LABELS,
    "distilbert": HIDDEN * HIDDEN + HIDDEN + HIDDEN * LABELS + LABELS,
    "mlm": 0,
    "gpt2": 0,
    "llama": 0,
    "t5": 0,
    "vit": HIDDEN * LABELS + LABELS,
    "deit": HIDDEN * LABELS + LABELS,
    "dinov2": 2 * HIDDEN * LABELS + LABELS,
    "dinov2_registers": 2 * HIDDEN * LABELS + LABELS,
    "clip_image": HIDDEN * LABELS + LABELS,
    "siglip_image": HIDDEN * LABELS + LABELS,
    "swin": HIDDEN * LABELS + LABELS,
    "resnet": HIDDEN * LABELS + LABELS,
    "clip": 0,
    "siglip": 0,
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


def known(kind: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """Return a `tiny` model of which a run has told what nothing depends on; all of a kind share what was found.

    To find it anew takes ten times as long as all else that is done where a method is applied to such a model.
    """
    model = tiny(kind, dropout, seed)
    reach._KNOWN[model] = _found(kind, dropout, seed)
    return model


@cache
def _found(kind: str, dropout: float, seed: int) -> Any:
    model = tiny(kind, dropout, seed)  # a copy of its own, so that others are as no run has seen them
    reach.unreached(model)
    return reach._KNOWN[model]


def batch(kind: str, size: int = 4, length: int = 10, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Return inputs with labels; with ``padded``, odd rows end in two columns of padding (but GPT-2's and Llama's)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if kind in (*IMAGES, *CONVOLUTIONS, *TWO_TOWERS):
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
    if kind == "mlm":
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {"input_ids": ids, "attention_mask": mask, "labels": draw(0, LABELS, size)}


def meta(config: hf.PreTrainedConfig, auto: Any = hf.AutoModel) -> nn.Module:
    """Return a model without storage, to count its parameters."""
    with torch.device("meta"):
        return auto.from_config(config)


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in eval mode whose parameters are all drawn from N(0, 0.2), so that each of them counts."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


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


def _mlm(dropout: float) -> nn.Module:
    return hf.BertForMaskedLM(tiny("bert", dropout).config)


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


_IMAGE: dict[str, int] = {"image_size": 16, "patch_size": 4, "hidden_size": HIDDEN, "num_attention_heads": 4}


def _deit(dropout: float) -> nn.Module:
    config = hf.DeiTConfig(
        **_IMAGE,
        num_hidden_layers=2,
        intermediate_size=2 * HIDDEN,
        hidden_dropout_prob=dropout,
        initializer_range=0.3,
        num_labels=LABELS,
    )
    return hf.DeiTForImageClassification(config)


def _dinov2(dropout: float, registers: bool = False) -> nn.Module:
    common = {
        **_IMAGE,
        "num_hidden_layers": 2,
        "mlp_ratio": 2,
        "hidden_dropout_prob": dropout,
        "initializer_range": 0.3,
        "num_labels": LABELS,
    }
    if registers:
        return hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**common))
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**common))


def _clip_image(dropout: float) -> nn.Module:
    vision = {**_IMAGE, "num_hidden_layers": 2, "intermediate_size": 2 * HIDDEN, "attention_dropout": dropout}
    vision |= {"initializer_factor": 4.0}
    text = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCABULARY, **_IDS}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=HIDDEN, num_labels=LABELS)
    return hf.CLIPForImageClassification(config)


def _siglip_image(dropout: float) -> nn.Module:
    vision = {**_IMAGE, "num_hidden_layers": 2, "intermediate_size": 2 * HIDDEN, "attention_dropout": dropout}
    text = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCABULARY, **_IDS}
    config = hf.SiglipConfig(text_config=text, vision_config=vision, num_labels=LABELS)
    return hf.SiglipForImageClassification(config)


def _swin(dropout: float) -> nn.Module:
    config = hf.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=HIDDEN // 2,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=2,
        mlp_ratio=2.0,
        hidden_dropout_prob=dropout,
        drop_path_rate=0.0,
        initializer_range=0.3,
        num_labels=LABELS,
    )
    return hf.SwinForImageClassification(config)


def _resnet(dropout: float) -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=HIDDEN // 2,
        hidden_sizes=[HIDDEN // 2, HIDDEN],
        depths=[2, 2],
        layer_type="basic",
        num_labels=LABELS,
    )
    return hf.ResNetForImageClassification(config)


class TwoTowers(hf.PreTrainedModel):
    """What a user's own classifier does with CLIP or SigLIP: texts of its classes, and the loss of the logits."""

    base_model_prefix = "towers"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, towers: nn.Module, texts: list[list[int]]) -> None:
        super().__init__(towers.config)
        self.towers = towers
        self.register_buffer("texts", torch.tensor(texts), persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.towers(input_ids=self.texts, pixel_values=pixel_values).logits_per_image
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _towers(dropout: float, **text: int) -> dict[str, Any]:
    common = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_dropout": dropout,
    }
    return {
        "text_config": common | {"vocab_size": VOCABULARY, "max_position_embeddings": CLIP_POSITIONS} | text,
        "vision_config": common | {"image_size": 16, "patch_size": 4},
    }


def _clip(dropout: float) -> nn.Module:
    """Three classes of one, two and three words with a full stop (5), between start (98) and end (99) of the text."""
    towers = _towers(dropout, bos_token_id=98, eos_token_id=99, pad_token_id=99)
    config = hf.CLIPConfig(projection_dim=HIDDEN, initializer_factor=2.0, **towers)
    return TwoTowers(hf.CLIPModel(config), [[98, 20, 5, 99, 99, 99], [98, 31, 7, 5, 99, 99], [98, 31, 40, 57, 5, 99]])


def _siglip(dropout: float) -> nn.Module:
    """The same without full stop, filled up with 1."""
    config = hf.SiglipConfig(**_towers(dropout, bos_token_id=2, eos_token_id=1, pad_token_id=1, projection_size=HIDDEN))
    texts = [[20], [31, 7], [31, 40, 57]]
    return TwoTowers(hf.SiglipModel(config), [text + [1] * (CLIP_POSITIONS - len(text)) for text in texts])


_BUILDERS = {"bert": _bert, "distilbert": _distilbert, "gpt2": _gpt2, "llama": _llama, "t5": _t5, "vit": _vit}
_BUILDERS |= {
    "mlm": _mlm,
    "clip": _clip,
    "siglip": _siglip,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_registers": partial(_dinov2, registers=True),
    "clip_image": _clip_image,
    "siglip_image": _siglip_image,
    "swin": _swin,
    "resnet": _resnet,
}
