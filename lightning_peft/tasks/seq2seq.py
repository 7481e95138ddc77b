"""Sequence-to-sequence tasks with any ``AutoModelForSeq2SeqLM``, and its language-model adaptation."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from lightning_peft.tasks.base import Task
from lightning_peft.tasks.generation import Generate, WritingTask


class Seq2Seq(WritingTask):
    """Translate, summarise, describe, answer: a target text for a source text.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        **kwargs: as in `WritingTask` and `Task`.
    """

    auto = AutoModelForSeq2SeqLM
    what = "encoder-decoder language model"
    of_texts = True
    lean = True

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of the tokens of the targets, [B, T, V]."""
        return decoded(self, batch)

    def predictions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits [B, T, V] and the tokens of the targets [B, T]."""
        return self(batch), self.targets(batch)

    def prompts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the sources."""
        return self.inputs(batch)


class LMAdaptation(Seq2Seq):
    """Train an encoder-decoder further as a language model: text goes in, its continuation comes out.

    T5 was trained to fill gaps and hardly writes text of its own, so that a soft prompt cannot steer it: Prompt-Tuning
    first trains all of it on natural text, with `LMAdaptationData` and FullFineTuning (Lester et al. 2021, section
    3.2: up to 100,000 steps). Then any delta can be trained on the model that this writes.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        **kwargs: as in `WritingTask` and `Task`.
    """

    def __init__(self, model: str, generate: Generate = "never", **kwargs: Any) -> None:
        super().__init__(model, generate=generate, **kwargs)


def decoded(task: Task, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits of the tokens of a batch's ``labels`` by the encoder-decoder of a task, [B, T, V]."""
    shift = getattr(task.backbone, "prepare_decoder_input_ids_from_labels", None)
    # Given labels, the model computes a loss of its own, over the whole vocabulary, for nothing.
    target = {"labels": batch["labels"]} if shift is None else {"decoder_input_ids": shift(labels=batch["labels"])}
    logits: Tensor = task.backbone(**task.inputs(batch), **target, use_cache=False).logits
    return logits
