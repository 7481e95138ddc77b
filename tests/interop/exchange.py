"""One configuration of PEFT both ways: imported, exported, and trained for three steps on both sides."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import TuningError
from lightning_peft.core.method import TuningMethod
from lightning_peft.interop import from_peft, to_peft
from tests.contract import shake

Call = Callable[[nn.Module, TuningMethod | None], Tensor]
"""What computes the output of a model, of ours with the method that prepares its batches."""


def exchange(
    build: Callable[[], nn.Module], config: peft.PeftConfig, call: Call, folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield what comes of each part: 'equal', 'WRONG', or why it is refused."""
    theirs: Any = peft.get_peft_model(build(), config)
    torch.manual_seed(5)
    shake(theirs)
    theirs.save_pretrained(folder / "theirs")
    expected, model = computed(call, theirs), build()
    try:
        method = from_peft(model, folder / "theirs")
    except TuningError as error:
        yield "import", str(error)
        return
    yield "import", _said(expected, computed(call, model, method))
    try:
        to_peft(model, folder / "ours")
    except TuningError as error:
        yield "export", str(error)
        return
    again: Any = peft.PeftModel.from_pretrained(build(), folder / "ours", is_trainable=True)
    yield "export", _said(expected, computed(call, again))
    _steps(call, again)
    _steps(call, model, method)
    again.save_pretrained(folder / "their_steps")
    to_peft(model, folder / "our_steps")
    one, other = (load_file(folder / n / "adapter_model.safetensors") for n in ("their_steps", "our_steps"))
    yield "steps", "equal" if all(_equal(one[name], other[name]) for name in other) else "WRONG"


def computed(call: Call, model: nn.Module, method: TuningMethod | None = None) -> Tensor:
    """Return what a model computes."""
    with torch.no_grad():
        return call(model.eval(), method)


def _said(expected: Tensor, found: Tensor) -> str:
    return "equal" if _equal(expected, found) else "WRONG"


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, atol=1e-5, rtol=1e-4)


def _steps(call: Call, model: nn.Module, method: TuningMethod | None = None) -> None:
    """Take three steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        call(model.eval(), method).square().mean().backward()
        optimizer.step()
