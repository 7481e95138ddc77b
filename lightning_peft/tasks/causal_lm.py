"""Causal language modelling: trains any ``AutoModelForCausalLM`` to continue a text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.core.tuning import at_work
from lightning_peft.tasks.chunked_loss import chunked_cross_entropy
from lightning_peft.tasks.generation import Generate, WritingTask
from lightning_peft.training.lean import lean_of


class CausalLM(WritingTask):
    """Continue a text; only the tokens of the target count.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        generate: where texts are generated and scored, besides prediction.
        loss_chunk: how many tokens the output head sees at once in training, in which the logits of a chunk alone
            exist; None: as many as the callback `Lean` says in a Trainer, where the model allows it.
        **kwargs: as in `WritingTask` and `Task`.
    """

    auto = AutoModelForCausalLM
    what = "causal language model"
    of_texts = True
    padding_side = "left"
    lean = True

    def __init__(self, model: str, generate: Generate = "never", loss_chunk: int | None = None, **kwargs: Any) -> None:
        super().__init__(model, generate=generate, **kwargs)
        if loss_chunk is not None and loss_chunk < 1:
            raise TuningError(f"loss_chunk={loss_chunk} is out of range: take 1 or more, or null.")
        self.loss_chunk = loss_chunk
        self._in_chunks: dict[tuple[Any, ...], bool] = {}

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of the next tokens, [B, T, V]."""
        self.check_rows(batch)
        logits: Tensor = self.backbone(**self.inputs(batch), use_cache=False).logits
        return logits

    def check_rows(self, batch: Mapping[str, Any]) -> None:
        """See that rows that are packed have no virtual tokens: a prompt that is not in the rows each text sees.

        Raises:
            TuningError: they have some.
        """
        if "position_ids" in batch and "attention_mask" not in batch and bool((batch["input_ids"] < 0).any()):
            raise TuningError("a soft prompt would be seen by the first text of a packed row alone: set packing=false.")

    def predictions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits [B, T - 1, V] and the next tokens [B, T - 1], -100 outside of targets."""
        return self(batch)[:, :-1], self.targets(batch)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the cross-entropy, the mean over the tokens of the targets, all at once or in chunks."""
        self.check_rows(batch)
        key = at_work(self.backbone)
        size = self.loss_chunk or (self._lean_chunk() if self._in_chunks.get(key, True) else None)
        if size is None:
            return super().loss(batch)
        inputs, check = self.inputs(batch), key not in self._in_chunks
        try:
            total, count = chunked_cross_entropy(self.backbone, inputs, self.targets(batch), size, check)
        except TuningError:
            if self.loss_chunk is not None:
                raise
            self._in_chunks[key] = False
            return super().loss(batch)
        self._in_chunks[key] = True
        return total / count.clamp(min=1)

    def _lean_chunk(self) -> int | None:
        """Return the size of a chunk that the callback of a Trainer says."""
        lean = lean_of(self.attached)
        return None if lean is None else lean.loss_chunk

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the next tokens [B, T - 1], -100 outside of targets."""
        labels: Tensor = batch["labels"]
        return labels[:, 1:]

    def prompts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tokens before the targets, padded on the left."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = (batch["labels"] != IGNORED).int().argmax(1)
        if bool((lengths == 0).any()):
            raise TuningError(
                "a row has no token before its target to write from: give a prompt or a prefix, or set generate=never."
            )
        width = int(lengths.max())
        source = torch.arange(width, device=ids.device) - (width - lengths).unsqueeze(1)
        inside = source >= 0
        source = source.clamp(min=0)
        ids = ids.gather(1, source).masked_fill(~inside, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask.gather(1, source) * inside}
