"""A vote of several prompts on one model: every row of a batch is run with each, and the answers are counted."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.cache_argument import cache_in
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.prompts.virtual_tokens import insert, is_widened


class Ballot(Graft):
    """Runs its host, a whole model, with each prompt, and counts the votes.

    Args:
        lengths: of each prompt [tokens].
        vote: 'majority' or 'mean'.
        after: how many real tokens stand before the prompt.
        encoder_decoder: whether labels are what a decoder writes.
        positions: the first position of the model's table, where it takes ``position_ids``.
        anywhere: the batch has the virtual tokens of the first prompt, where a template puts them.
        trained: in training mode a batch says itself which prompt each row has (`asked_by_all`), and there is no vote.
    """

    def __init__(
        self,
        lengths: list[int],
        vote: str,
        after: int,
        encoder_decoder: bool,
        positions: int | None,
        anywhere: bool = False,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.lengths, self.vote, self.in_front, self.positions = lengths, vote, after, positions
        self.encoder_decoder, self.anywhere, self.trained = encoder_decoder, anywhere, trained

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the model with the logits that the prompts agree on.

        Raises:
            TuningError: it shall keep keys and values for later tokens, of which there would be one set a prompt; or
                a training batch does not say which prompt its rows have.
        """
        names = structure.arguments_of(host)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if self.trained and self.training:
            if not is_widened(inputs):
                raise TuningError(
                    "in training each row is asked by each prompt, and this batch by none: give the model "
                    "method.asked_by_all(batch), or call model.eval() for the vote."
                )
            return forward(*args, **kwargs)
        if cache_in(inputs) is not None:
            raise TuningError("an ensemble votes on whole texts: call generate() with use_cache=False.")
        inputs.update({"use_cache": False} if "use_cache" in names else {})
        out = forward(**self._each(inputs))
        out.logits = self._count(self._text_only(out.logits, inputs["input_ids"]))
        return out

    def _each(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch once for each prompt, [N B, P + T]: all rows with prompt 0, all with prompt 1 ..."""
        longest = max(self.lengths)
        wide = asked_by_all(inputs, len(self.lengths), longest, self.in_front, self.encoder_decoder, self.anywhere)
        if len(set(self.lengths)) == 1:
            return wide
        ids = wide["input_ids"]
        prompts = torch.arange(len(self.lengths), device=ids.device)
        number = prompts.repeat_interleave(len(inputs["input_ids"])).unsqueeze(1)
        count = torch.tensor(self.lengths, device=ids.device)[number]
        place = (-1 - ids) % longest  # of a virtual token in its prompt, of which the last `count` are real
        unused = (ids < 0) & (place < longest - count)
        wide["attention_mask"] = wide["attention_mask"].masked_fill(unused, 0)
        if self.positions is not None:
            wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0) + self.positions
        return wide

    def _text_only(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return logits [N B, ...] without those of virtual tokens."""
        longest = max(self.lengths)
        if self.anywhere or logits.ndim < 3 or logits.shape[1] != ids.shape[1] + longest or self.encoder_decoder:
            return logits
        keep = insert({"input_ids": ids}, longest, self.in_front)["input_ids"] >= 0
        keep = keep.repeat(len(self.lengths), 1)
        return logits[keep].view(logits.shape[0], ids.shape[1], -1)

    def _count(self, logits: Tensor) -> Tensor:
        """Return what the prompts agree on, [B, ..., C], from what each says, [N B, ..., C]."""
        log_p = logits.float().log_softmax(-1).view(len(self.lengths), -1, *logits.shape[1:])
        if self.vote == "mean":
            return (log_p.exp().mean(0)).log().to(logits.dtype)
        votes = torch.zeros_like(log_p).scatter_(-1, log_p.argmax(-1, keepdim=True), 1.0).sum(0)
        tie = log_p.mean(0).softmax(-1)
        return ((votes + tie / 2) / (len(self.lengths) + 0.5)).log().to(logits.dtype)


def asked_by_all(
    batch: Mapping[str, Any], prompts: int, length: int, after: int, targets: bool, anywhere: bool
) -> dict[str, Any]:
    """Return a batch once for each of N prompts, [N B, ...]: all rows with prompt 0, all with prompt 1 ...

    What has an entry a row, tensors and lists, is repeated with the rows.

    Args:
        batch: holds ``input_ids`` [B, T].
        prompts: N.
        length: of each prompt, P [tokens]: virtual token k of prompt n is number n P + k.
        after: how many real tokens stand before a prompt.
        targets: ``labels`` are what a decoder shall write.
        anywhere: the batch has the virtual tokens already, where a template puts them.

    Raises:
        TuningError: the batch has virtual tokens and should have none, or has none and should.
    """
    if is_widened(batch) != anywhere:
        raise TuningError(
            "the batch has virtual tokens, and these prompts stand before the text: give plain texts."
            if not anywhere
            else "these prompts stand where a template puts them, and the batch has no virtual tokens: give the data "
            "module the template that they were trained with."
        )
    rows = len(batch["input_ids"])
    repeated: dict[str, Any] = {
        name: torch.cat([value] * prompts)
        if isinstance(value, Tensor) and value.shape[:1] == (rows,)
        else value * prompts
        if isinstance(value, list) and len(value) == rows
        else value
        for name, value in batch.items()
    }
    ids: Tensor = repeated["input_ids"]
    number = torch.arange(prompts, device=ids.device).repeat_interleave(rows).unsqueeze(1)
    if anywhere:
        return {**repeated, "input_ids": torch.where(ids < 0, ids - number * length, ids)}
    return insert(repeated, length, after, targets, number * length)
