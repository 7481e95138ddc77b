"""Rows of unlike lengths in one nested tensor, which ``torch.nn.TransformerEncoder`` hands to its layers.

It does where rows are padded, the layers are in eval mode, and nothing of the first one is trained, as in a frozen
backbone. Grafts compute on tensors [B, T, d], so a layer with grafts gets one.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html, ``enable_nested_tensor``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.graft import Graft, attach, grafts


class PaddedRows(Graft):
    """Lets a layer, and the grafts of its method on it, compute on padded rows [B, T, d] where it gets nested ones."""

    lengths: list[int] | None = None

    def around(self, forward: Callable[..., Tensor], host: nn.Module, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return padded rows; no query has seen the padding."""
        self.lengths = [len(row) for row in src.unbind()] if src.is_nested else None
        if self.lengths is None:
            return forward(src, *args, **kwargs)
        padded = src.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=src.device)
        kwargs["src_key_padding_mask"] = places >= torch.tensor(self.lengths, device=src.device).unsqueeze(1)
        return forward(padded, *args, **kwargs)

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return rows of the lengths that they had."""
        lengths, self.lengths = self.lengths, None
        if lengths is None:
            return out
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(out, lengths, strict=True)])

    def merge(self, host: nn.Module) -> None:
        """Change no weight, since it changes no output."""


def pad_rows(backbone: nn.Module, key: str) -> None:
    """Give each encoder layer of torch in which a method has grafts padded rows; call it behind the last of them."""
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.TransformerEncoderLayer)}
    hosts = [f"{place.path}." for place in grafts(backbone, owner=key)] if layers else []
    for name, layer in layers.items():
        if any(host.startswith(f"{name}." if name else "") for host in hosts):
            attach(layer, PaddedRows(), f"{key}_padded")
