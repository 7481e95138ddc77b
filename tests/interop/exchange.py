"""One configuration of PEFT both ways: imported, exported, and trained for three steps on both sides."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


_ROWS, _WHOLE = "prompt_encoder.default.embedding.", ".modules_to_save.default."
"""In PEFT's names: the rows of a prompt, and modules that are trained whole."""


class Case(NamedTuple):
    """A configuration of PEFT.

    Attributes:
        group: the kind of model.
        name: of the case.
        build: builds the model, always the same.
        kind: the class of the configuration.
        arguments: its arguments; of '' the configuration itself.
        call: calls a model.
    """

    group: str
    name: str
    build: Callable[[], nn.Module]
    kind: type[peft.PeftConfig]
    arguments: dict[str, Any]
    call: Call

    def config(self) -> peft.PeftConfig:
        """Return a new configuration."""
        given = copy.deepcopy(self.arguments)
        return given[""] if "" in given else self.kind(**given)


def saved(build: Callable[[], nn.Module], config: peft.PeftConfig, call: Call, folder: Path) -> Tensor:
    """Let PEFT tune a model, with noise in all that it trains, save the adapter, and return what it computes."""
    theirs: Any = peft.get_peft_model(build(), config)
    torch.manual_seed(5)
    shake(theirs)
    theirs.save_pretrained(folder / "theirs")
    return computed(call, theirs)


def exchange(
    build: Callable[[], nn.Module], config: peft.PeftConfig, call: Call, folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield what comes of each part: 'equal', 'WRONG', or why it is refused."""
    yield from exchanged(saved(build, config, call, folder), build, call, folder)


def exchanged(expected: Tensor, build: Callable[[], nn.Module], call: Call, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what comes of each part of an adapter that PEFT has saved, which computes what is expected."""
    model = build()
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
    again = _trainable(build, folder / "ours")
    yield "export", _said(expected, computed(call, again))
    _steps(call, again)
    _steps(call, model, method)
    to_peft(model, folder / "our_steps")
    one, other = _tensors(again, folder), load_file(folder / "our_steps" / "adapter_model.safetensors")
    yield "steps", "equal" if all(_equal(one[name], other[name]) for name in other) else "WRONG"


def _trainable(build: Callable[[], nn.Module], folder: Path) -> Any:
    """Return a model of PEFT that trains the adapter in a folder; of prompts PEFT has no such way, so all is said."""
    prompt = peft.PeftConfig.from_pretrained(folder).is_prompt_learning
    model: Any = peft.PeftModel.from_pretrained(build(), folder, is_trainable=not prompt)
    for name, parameter in model.named_parameters() if prompt else ():
        parameter.requires_grad_(_ROWS in name or _WHOLE in name)
    return model


def _tensors(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of PEFT's adapter as it saves them."""
    if model.peft_config["default"].is_prompt_learning:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return {"prompt_embeddings" if _ROWS in name else name.replace(_WHOLE, "."): p for name, p in trained.items()}
    model.save_pretrained(folder / "their_steps")
    return load_file(folder / "their_steps" / "adapter_model.safetensors")


def computed(call: Call, model: nn.Module, method: TuningMethod | None = None) -> Tensor:
    """Return what a model computes."""
    with torch.no_grad():
        return call(model.eval(), method)


def _said(expected: Tensor, found: Tensor) -> str:
    return "equal" if _equal(expected, found) else "WRONG"


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, atol=1e-5, rtol=1e-4)


def _steps(call: Call, model: nn.Module, method: TuningMethod | None = None) -> None:
    """Take three steps of AdamW, whose epsilon is large, so that gradients that are rounding alone move nothing."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        call(model.eval(), method).square().mean().backward()
        optimizer.step()
