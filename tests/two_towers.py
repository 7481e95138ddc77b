"""For the tests of two-tower models: a tokenizer of their words, prompts written by hand, and a text tower anew."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from tests.models import CLIP_POSITIONS, VOCABULARY, tiny

START, END, STOP = 98, 99, 5
CONTEXT = [10, 11, 12, 10]
"""The ids of "a photo of a"."""
NAMES = ([20], [31, 7], [31, 40, 57])
WORDS = {"a": 10, "photo": 11, "of": 12, "red": 20, "dark": 31, "green": 7, "blue": 40, "star": 57, "ring": 58}


def save_tokenizer(folder: Path, siglip: bool = False) -> Path:
    """Save a tokenizer of whole words with ids as in the tiny models."""
    named = WORDS | {
        ".": STOP,
        "[START]": START,
        "[END]": END,
        "[UNK]": 4,
        "[FILL]": 1,
    }
    rest = (i for i in range(VOCABULARY) if i not in named.values())
    named |= {f"word{i}": i for i in rest}
    tokenizer = Tokenizer(models.WordLevel(named, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A [FILL]" if siglip else "[START] $A [END]"
    special = [(t, named[t]) for t in ("[START]", "[END]", "[FILL]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    fill = "[FILL]" if siglip else "[END]"
    kwargs = {"unk_token": "[UNK]", "pad_token": fill, "eos_token": fill}
    if not siglip:
        kwargs["bos_token"] = "[START]"
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs).save_pretrained(folder)
    return folder


def save_model(folder: Path, kind: str = "clip") -> Path:
    """Save a tiny model with its tokenizer and image processor."""
    tiny(kind).towers.save_pretrained(folder)
    save_tokenizer(folder, kind == "siglip")
    hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def written(kind: str, words: list[int], position: str = "end", length: int | None = None) -> Tensor:
    """Return the ids of the prompts with words in the place of a context, [3, T]."""
    rows = []
    half = {"end": len(words), "middle": len(words) // 2, "front": 0}[position]
    for name in NAMES:
        row = [*words[:half], *name, *words[half:]]
        rows.append(row if kind == "siglip" else [START, *row, STOP, END])
    length = length or (CLIP_POSITIONS if kind == "siglip" else max(map(len, rows)))
    return torch.tensor([row + [1 if kind == "siglip" else END] * (length - len(row)) for row in rows])


def anew(towers: nn.Module, embeddings: Tensor, end: int | None) -> Tensor:
    """Return the feature of one text from its embeddings [T, d], by formulas alone; ``end`` None: SigLIP."""
    text = towers.text_model
    x = embeddings + text.embeddings.position_embedding.weight[: len(embeddings)]
    heads = text.config.num_attention_heads
    hidden = (
        torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if end is not None else torch.zeros(len(x), len(x)).bool()
    )
    for layer in text.encoder.layers:
        y, attention = layer.layer_norm1(x), layer.self_attn
        q, k, v = (
            p(y).view(len(x), heads, -1).transpose(0, 1) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + attention.out_proj((scores @ v).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.layer_norm2(x))
    x = text.final_layer_norm(x)
    return text.head(x[-1]) if end is None else towers.text_projection(x[end])


def with_context(towers: nn.Module, kind: str, contexts: Tensor, position: str) -> Tensor:
    """Return the features of the three classes with a context [M, d] each, [3, p], by formulas alone."""
    table = towers.text_model.embeddings.token_embedding.weight
    features = []
    for name, context in zip(NAMES, contexts, strict=True):
        half = {"end": len(context), "middle": len(context) // 2, "front": 0}[position]
        parts = [context[:half], table[name], context[half:]]
        if kind == "clip":
            parts = [table[[START]], *parts, table[[STOP, END]]]
            features.append(anew(towers, torch.cat(parts), sum(map(len, parts)) - 1))
        else:
            filled = CLIP_POSITIONS - sum(map(len, parts))
            features.append(anew(towers, torch.cat([*parts, table[[1]].expand(filled, -1)]), None))
    return torch.stack(features)
