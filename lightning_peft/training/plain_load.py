"""Lets Lightning refuse to load a delta into a plain module, which would then compute without its grafts.

That is ``load_from_checkpoint`` of a plain class, and a Trainer without the method that is given a ``ckpt_path``.

It would list the frozen weights as missing, or with ``strict=False`` leave out silently what was trained.
https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/core/saving.py
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L
from lightning.pytorch.strategies import Strategy

from lightning_peft.core.delta_file import META
from lightning_peft.core.errors import TuningError
from lightning_peft.core.tuning import tunings
from lightning_peft.training import patches

load: Callable[..., Any] = L.LightningModule.load_from_checkpoint.__func__  # type: ignore[attr-defined]
"""Lightning's own, whose first argument is the class."""
load_state: Callable[..., None] = Strategy.load_model_state_dict
_table = patches.Patches()


def guard() -> None:
    """Extend ``LightningModule.load_from_checkpoint`` and what a Trainer loads by, if that has not been done."""
    if not _table:
        own = vars(L.LightningModule)["load_from_checkpoint"]
        _table.patch(L.LightningModule, "load_from_checkpoint", type(own)(_guarded))
        _table.patch(Strategy, "load_model_state_dict", _load_state)


@wraps(load)
def _guarded(cls: type[L.LightningModule], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
    def on_load_checkpoint(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if META in checkpoint and not any(tunings(module)):
            raise TuningError(
                f"{checkpoint_path} is a delta, of whose method {type(module).__name__} knows nothing: load it by "
                f"lightning_peft.load_from_checkpoint({type(module).__name__}, path)."
            )
        restore()
        module.on_load_checkpoint(checkpoint)

    with patches.patched(cls, "on_load_checkpoint", on_load_checkpoint) as restore:
        return load(cls, checkpoint_path, *args, **kwargs)


@wraps(load_state)
def _load_state(strategy: Strategy, checkpoint: dict[str, Any], strict: bool = True) -> None:
    module = strategy.lightning_module
    if META in checkpoint and module is not None and not any(tunings(module)):
        raise TuningError(
            f"the checkpoint is a delta, of whose method {type(module).__name__} knows nothing: give the Trainer the "
            f"method as a callback, or the module that lightning_peft.load_from_checkpoint({type(module).__name__}, "
            "path) returns."
        )
    load_state(strategy, checkpoint, strict)
