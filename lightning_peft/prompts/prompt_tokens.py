"""Which tokens of a call are those of its prompt, for grafts that see hidden states alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.cache_argument import cache_in
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.prompts.virtual_tokens import SOURCE


class Positions:
    """What the grafts of one method know of a call; a block that is computed anew in the backward pass asks again.

    Attributes:
        source: which tokens are of the prompt, [B, T]; None: all.
        real: which tokens count, [B, T]; None: all.
        skips: whether the call goes on with what was written.
    """

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.real: Tensor | None = None
        self.skips = False

    def ends(self, out: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return n tokens of each row, [B, n], and which of them are of the beginning and of the end, [2, B, n, 1].

        Args:
            out: hidden states, [B, T, d].
            first: how many tokens at the beginning.
            last: how many tokens at the end; one of both is of the beginning.

        Raises:
            TuningError: there are not as many.
        """
        length = out.shape[1]
        if max(first, last) > length:
            raise TuningError(
                f"first={first} and last={last} are positions beyond a text of {length} tokens: take {length} at "
                "most, or pad the batch."
            )
        real = self.real
        if real is None:
            real = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        real = real.to(out.device)
        number = real.cumsum(1)
        begins = real & (number <= first)
        ends = real & (number > number[:, -1:] - last) & ~begins
        order = (begins | ends).int().argsort(dim=1, descending=True, stable=True)[:, : min(first + last, length)]
        return order, torch.stack([begins.gather(1, order), ends.gather(1, order)]).unsqueeze(-1)


class Prompted(Graft):
    """Takes the argument ``source_mask`` from a whole model, and notes it where that is one that writes."""

    def __init__(self, positions: Positions, writes: bool) -> None:
        super().__init__()
        self.positions, self.writes = positions, writes

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        source = kwargs.pop(SOURCE, None)
        self.positions.source = source if self.writes else None
        try:
            return forward(*args, **kwargs)
        finally:
            self.positions.source = None


class Masked(Graft):
    """Notes which tokens of a call count; the host is the model that has the blocks."""

    def __init__(self, host: nn.Module, positions: Positions) -> None:
        super().__init__()
        self.positions, self.names = positions, structure.arguments_of(host)

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache, mask, source = cache_in(given), given.get("attention_mask"), self.positions.source
        self.positions.skips = cache is not None and cache.get_seq_length() > 0
        ids = given.get("input_ids")
        real = torch.ones_like(ids, dtype=torch.bool) if isinstance(ids, Tensor) and ids.ndim == 2 else None
        real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else real
        if source is not None:
            prompt = source.bool() if real is None else source.bool() & real
            whole = torch.ones_like(prompt) if real is None else real
            real = torch.where(prompt.any(1, keepdim=True), prompt, whole)  # a text without a prompt is its own
        self.positions.real = real
        return forward(*args, **kwargs)


def attach_positions(backbone: nn.Module, positions: Positions, name: str) -> None:
    """Attach what notes the tokens of a call to a model, and to the model around it that may take a task's mask."""
    inner = structure.base_model_of(backbone)
    attach(inner, Masked(inner, positions), name)
    writes = structure.output_embeddings_of(backbone) is not None and not structure.is_encoder(backbone)
    attach(backbone, Prompted(positions, writes), f"{name}_prompt")
