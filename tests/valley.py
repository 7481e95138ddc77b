"""Tiny untrained models with tokenizers of the made-up valley's words, and the tasks that take them."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch

from examples.pretrain_tiny import build, save_tokenizer

TASKS = {
    "causal_lm": "gpt2",
    "chat": "gpt2",
    "cloze_classification": "bert",
    "context_distillation": "gpt2",
    "distillation": "gpt2",
    "knowledge_probing": "bert",
    "lm_adaptation": "t5",
    "multi_task": "bert",
    "preference": "gpt2",
    "question_answering": "bert",
    "sentence_embedding": "bert",
    "seq2seq": "t5",
    "text_to_text": "t5",
    "token_classification": "bert",
}
"""File of configs/tasks whose rows are made by rules -> the kind of model that it needs."""


@cache
def save(kind: str, folder: Path) -> str:
    """Save a model of two layers and its tokenizer, and return the folder."""
    path = folder / kind
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = save_tokenizer(kind, path)
        build(kind, tokenizer, width=32, layers=2).save_pretrained(path)
    return str(path)


def set_up(data: L.LightningDataModule, *stages: str) -> Any:
    """Return a data module that has read its splits."""
    for stage in stages or ("fit",):
        data.setup(stage)
    return data
