"""Tuned tiny models, and PEFT's own, as adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import Method
from lightning_peft.interop import to_peft
from tests.contract import shake
from tests.models import batch, tiny


def plain(kind: str) -> dict[str, Tensor]:
    """Return a batch without padding, which a prompt of ours and of PEFT's would put in another place."""
    return batch(kind, padded=False)


def tuned(kind: str, methods: Sequence[Method]) -> tuple[nn.Module, Method]:
    """Return a tiny model with copies of the methods applied and noise in all that they train, and the first copy."""
    model = tiny(kind)
    copies = [eval(repr(m), {type(m).__name__: type(m)}) for m in methods]
    for method in copies:
        method.apply(model)
    torch.manual_seed(3)
    shake(model)
    return model, copies[0]


def logits(model: nn.Module, kind: str, method: Method | None = None) -> Tensor:
    """Return what a model computes for the batch of its kind."""
    inputs = plain(kind) if method is None else dict(method.prepare(plain(kind)))
    with torch.no_grad():
        return model.eval()(**inputs).logits


def theirs_from(folder: Path, kind: str, model: nn.Module | None = None) -> Tensor:
    """Return the logits that PEFT gives with the adapter in a folder."""
    other: Any = peft.PeftModel.from_pretrained(model or tiny(kind), folder).eval()
    with torch.no_grad():
        return other(**plain(kind)).logits


def saved_by_peft(kind: str, config: peft.PeftConfig, folder: Path, model: nn.Module | None = None) -> Tensor:
    """Let PEFT tune a model, with noise in all that it trains, save the adapter, and return its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other: Any = peft.get_peft_model(model or tiny(kind), config).eval()
        shake(other)
    other.save_pretrained(folder)
    with torch.no_grad():
        return other(**plain(kind)).logits


class Nested(nn.Module):
    """Modules whose names end as others do: foo, module.foo, module.module.foo."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.foo = nn.Linear(8, 8)
        self.module = Nested(depth - 1) if depth else None
        self.config = hf.PreTrainedConfig()

    def forward(self, x: Tensor) -> Tensor:
        x = self.foo(x).tanh()
        return x if self.module is None else self.module(x)


def nested() -> Nested:
    """Return such a model, the same at each call."""
    torch.manual_seed(0)
    return Nested()


def after_three_steps(
    kind: str, start: Path, model: nn.Module, folder: Path, lr: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of PEFT's adapter and of ours after three steps of SGD from an adapter that ``model`` has."""
    other: Any = peft.PeftModel.from_pretrained(tiny(kind), start, is_trainable=True).eval()
    for each in (other, model.eval()):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=lr)
        for _ in range(3):
            optimizer.zero_grad()
            each(**plain(kind)).loss.backward()
            optimizer.step()
    other.save_pretrained(folder / "their_steps")
    to_peft(model, folder / "our_steps")
    theirs, ours = (load_file(folder / name / "adapter_model.safetensors") for name in ("their_steps", "our_steps"))
    return theirs, ours
