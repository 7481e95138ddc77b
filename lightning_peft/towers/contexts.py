"""Soft contexts in the texts of a two-tower model (CLIP, SigLIP), as CoOp, CoCoOp and DAPL train them.

A context is virtual tokens (`prompts.virtual_tokens`) that a graft around the text tower puts into every text
which the tower reads, wherever the call comes from: ``model(input_ids=..., pixel_values=...)``,
``model.get_text_features(...)`` or a task. A causal tower that is read at the end of the text (CLIP) computes what the
texts have in common once and nothing behind their ends (`towers.packing`); one that reads all tokens and is
read at its last position (SigLIP) is left to compute the full length, since there the padding matters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach, grafts
from lightning_peft.core.host_copy import ask, keep, send
from lightning_peft.core.tracing import is_traced
from lightning_peft.towers.context_tokens import ContextCall, ContextTokens, LongRows
from lightning_peft.towers.text_towers import ends_of, positions_of, reads_end, two_towers, word_table
from lightning_peft.towers.trees import can_pack, read_trees

Position = Literal["end", "middle", "front"]


class PlacedContext(Graft):
    """Knows where a context goes in texts, and puts it there as virtual ids.

    Args:
        layout: the virtual tokens of each text's prompts, as ids, [V, C, M]: V prompts of each text, C of 1 where all
            texts have the same, M tokens.
        call: shared with the other grafts of the method.
        position: where the words of a text stand: behind the context ('end'), in the middle of it or before it. The
            token before the end of the text is the full stop, which stays last.
    """

    def __init__(self, layout: Tensor, call: ContextCall, position: Position = "end") -> None:
        super().__init__()
        self.register_buffer("layout", layout, persistent=False)
        self.layout: Tensor
        self.call = call
        self.position = position

    @property
    def count(self) -> int:
        """The number of tokens of the context."""
        return self.layout.shape[2]

    @property
    def variants(self) -> int:
        """The number of prompts of each text."""
        return self.layout.shape[0]

    def prompts(self, host: nn.Module, texts: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the texts with the context in them, [V C, T'], and the mask widened alike, in host memory.

        Texts of classes are the same in each step, and asking a GPU for them would wait: their copy is asked. A tracer
        follows the texts where they are.

        Raises:
            TuningError: a text has no room for the context, no end, no name where the context goes behind it, or there
                are not as many texts as classes that have a context of their own.
        """
        if is_traced() or texts.is_meta:
            return self._put_in(host, texts, mask, self.layout)
        layout = ask(keep(self.layout), Tensor.cpu)
        mask = None if mask is None else ask(keep(mask), Tensor.cpu)
        return ask(keep(texts), lambda texts: self._put_in(host, texts.cpu(), mask, layout))

    def _put_in(
        self, host: nn.Module, texts: Tensor, mask: Tensor | None, layout: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        texts = texts.view(-1, texts.shape[-1])
        layout = layout if self.call.variant is None else layout[self.call.variant].unsqueeze(0)
        if layout.shape[1] not in (1, len(texts)):
            raise TuningError(
                f"{layout.shape[1]} classes have a context of their own, and there are {len(texts)} texts: "
                "give one text for each class, in their order."
            )
        context = layout.expand(-1, len(texts), -1).flatten(0, 1)
        count, length = self.count, texts.shape[1]
        ends, limit, causal = self._reading(host, texts)
        if not is_traced():
            self._check(texts, mask, ends, limit, causal)
        start = 1 if causal else 0
        close = (ends - 1 if causal else ends).clamp(min=start)
        first = {"end": count, "middle": count // 2, "front": 0}[self.position]
        columns = torch.arange(length + count, device=texts.device)[:limit].expand(len(texts), -1)
        close = close.unsqueeze(1)
        behind = columns >= close + first
        virtual = ((columns >= start) & (columns < start + first)) | (behind & (columns < close + count))
        token = torch.where(behind, columns - close, columns - start).clamp(0, count - 1)
        source = torch.where(columns < start, columns, columns - torch.where(behind, count, first))
        source = source.clamp(0, length - 1)
        times = layout.shape[0]
        virtual, words = virtual.repeat(times, 1), texts.gather(1, source).repeat(times, 1)
        ids = torch.where(virtual, context.gather(1, token.repeat(times, 1)), words)
        if mask is not None:
            mask = torch.where(virtual, 1, mask.gather(1, source).repeat(times, 1)).to(mask.dtype)
        return ids, mask

    def _reading(self, host: nn.Module, texts: Tensor) -> tuple[Tensor, int, bool]:
        """Return where the texts end, [C], how many tokens there is room for, and whether the tower is causal."""
        causal = reads_end(host)
        return ends_of(host, texts), positions_of(host) if causal else texts.shape[1], causal

    def _check(self, texts: Tensor, mask: Tensor | None, ends: Tensor, limit: int, causal: bool) -> None:
        if causal and mask is not None and not bool((mask.cumsum(1).gather(1, ends[:, None])[:, 0] == ends + 1).all()):
            raise TuningError("a text is padded on the left, where the context goes: pad it on the right.")
        longest = int(ends.max()) + 1
        if longest + self.count > limit:
            row = int(ends.argmax())
            remedy = "shorten the text or the context" if causal else "pad to the full length, padding='max_length'"
            raise TuningError(
                f"text {row} has {longest} tokens, which with a context of {self.count} is more than {limit}: {remedy}."
            )
        if causal and self.position != "end":
            if int(ends.min()) < 3:
                raise TuningError(
                    f"text {int(ends.argmin())} has no name and full stop for position={self.position!r}: "
                    "write each as 'name.'."
                )
            last = texts.gather(1, ends[:, None] - 1)
            if bool((last != last[0]).any()):
                raise TuningError(
                    f"position={self.position!r} keeps the full stop behind the context, and the texts end in "
                    "different tokens: end each with a full stop."
                )


class TextContext(PlacedContext):
    """Puts a context into each text that the tower reads. Its host is the text tower.

    Args:
        layout: the virtual tokens of each text's prompts, as ids, [V, C, M]: V prompts of each text, C of 1 where all
            texts have the same, M tokens.
        position: where the words of a text stand: behind the context ('end'), in the middle of it or before it. The
            token before the end of the text is the full stop, which stays last.
        share_prefix: compute what texts have in common once, and nothing behind their ends.
        template: what a caller shall write around the name of a class.
        chunk: at most that many prompts at a time, computed anew in the backward pass; None: all at once.
        call: shared with the other grafts of the method.
    """

    conditional = False
    """Whether the prompts depend on the image."""

    def __init__(
        self,
        layout: Tensor,
        call: ContextCall,
        position: Position = "end",
        share_prefix: bool = True,
        template: str = "{}.",
        chunk: int | None = None,
    ) -> None:
        super().__init__(layout, call, position)
        self.share_prefix = share_prefix
        self.template = template
        self.chunk = chunk

    def around(
        self,
        forward: Callable[..., Any],
        host: nn.Module,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the tower's output for the prompts, V C rows, those of the first variant first."""
        if not self.call.active or input_ids is None:
            return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        if position_ids is not None:
            raise TuningError("position_ids count the tokens without the context that is put in: leave them out.")
        ids, mask = self.prompts(host, input_ids, attention_mask)
        shift = self.call.shift
        images = 1 if shift is None else len(shift)
        size = self._chunk_size(len(ids), images)
        device = input_ids.device
        outs = []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            part = (forward, host, send(ids[rows], device), None if mask is None else send(mask[rows], device))
            if size >= len(ids):
                return self._read(*part, shift, kwargs)
            if torch.is_grad_enabled():
                outs.append(checkpoint(self._read, *part, shift, kwargs, use_reentrant=False))
            else:
                outs.append(self._read(*part, shift, kwargs))
        pooled = [out.pooler_output.unflatten(0, (images, -1)) for out in outs]
        return type(outs[0])(pooler_output=torch.cat(pooled, 1).flatten(0, 1))

    def _chunk_size(self, prompts: int, images: int) -> int:
        return prompts if self.chunk is None else max(1, self.chunk // images)

    def _read(
        self,
        forward: Callable[..., Any],
        host: nn.Module,
        ids: Tensor,
        mask: Tensor | None,
        shift: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Return what the tower gives for the prompts, those of the first image first."""
        self.call.shift, before = shift, self.call.shift  # a checkpoint comes here again in the backward pass
        try:
            if self.share_prefix and can_pack(host, kwargs):
                return read_trees(forward, host, ids, 1 if shift is None else len(shift), kwargs)
            if self.share_prefix and reads_end(host) and not is_traced():
                longest = ask(keep(ids), lambda ids: int(ends_of(host, ids).max())) + 1
                ids, mask = ids[:, :longest], None if mask is None else mask[:, :longest]
            if shift is not None:
                ids = ids.repeat(len(shift), 1)
                mask = mask if mask is None else mask.repeat(len(shift), 1)
            return forward(input_ids=ids, attention_mask=mask, **kwargs)
        finally:
            self.call.shift = before


def check_classes(class_specific: bool, num_classes: int | None) -> None:
    """Check that a context of each class comes with the number of classes.

    Raises:
        TuningError: only one of the two is given.
    """
    if class_specific != (num_classes is not None):
        raise TuningError(
            f"class_specific={class_specific} and num_classes={num_classes} do not go together: "
            "give both for a context of each class, or neither."
        )


def plain_layout(count: int, classes: int | None = None) -> Tensor:
    """Return the layout of one prompt of each text, [1, C, M]: the same for all texts, or for each of its own."""
    return -1 - torch.arange(count * (classes or 1)).view(1, -1, count)


def graft_context(tower: nn.Module, tokens: ContextTokens, context: TextContext, name: str) -> None:
    """Attach the grafts of a context to a text tower."""
    table = word_table(tower)
    attach(table, tokens.to(table.weight.device), name)
    attach(tower, context.to(table.weight.device), name)
    if reads_end(tower):
        attach(tower.embeddings, LongRows(), name)  # type: ignore[arg-type]


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """Switch off the contexts and prompts of the backbone's methods while the context lasts."""
    found = [vars(place.graft).get("call") for place in grafts(backbone)]
    calls = [call for call in found if isinstance(call, ContextCall)]
    for call in calls:
        call.active = False
    try:
        yield
    finally:
        for call in calls:
            call.active = True


def context_of(backbone: nn.Module) -> TextContext | None:
    """Return the context that a method has put into the texts of the backbone, if any."""
    tower = structure.part(two_towers(backbone), "text_model")
    children = tower.children() if tower is not None else ()
    return next((child for child in children if isinstance(child, TextContext)), None)
