"""Which modules are in training mode and which in eval mode during a fit."""

from collections.abc import Iterator

import lightning as L
from torch import nn

from lightning_peft.core.graft import Graft, grafts
from lightning_peft.core.run import canonical
from lightning_peft.training.record import Life

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def begin(module: L.LightningModule, backbone: nn.Module) -> None:
    """Put a backbone into training mode, and note which of its parts the user has put into eval mode.

    A backbone that is in eval mode itself, as ``from_pretrained`` leaves it, says nothing of its parts.
    """
    life, parts = Life.of(module), dict(_parts(module, backbone))
    found = parts.items() if backbone.training else ()
    in_eval = {name for name, part in found if not part.training and life.modes.get(name, True)}
    life.in_eval = (life.in_eval - parts.keys()) | in_eval
    backbone.train()
    life.modes |= dict.fromkeys(parts, True)
    for name in in_eval:
        parts[name].training = False


def set_modes(module: L.LightningModule, backbone: nn.Module, frozen: bool) -> None:
    """Put what is frozen into a mode and what is trained into training mode, but for what the user has put elsewhere.

    That is what was in eval mode when the fit began, or has been put there since, e.g. a BatchNorm whose statistics
    shall stay.

    Args:
        module: the module.
        backbone: the part of it that is tuned.
        frozen: whether what is frozen is in training mode.
    """
    life, parts = Life.of(module), dict(_parts(module, backbone))
    for name, part in parts.items():
        if part.training:
            life.in_eval.discard(name)
        elif life.modes.get(name):
            life.in_eval.add(name)
    backbone.train(frozen)
    for name, part in parts.items():
        trained = [p.requires_grad for p in part.parameters(recurse=False)]
        if isinstance(part, _BATCH_NORM):  # where its bias alone is trained, its statistics stay
            part.training = bool(trained) and all(trained)
        elif any(trained):
            part.training = True
        life.modes[name] = part.training
        part.training = part.training and name not in life.in_eval
    for place in grafts(backbone):
        place.graft.train(place.graft.owner in ("", *(life.keys or ())))


def _parts(module: L.LightningModule, backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the backbone's own modules, which are in no graft, by canonical name in the module."""
    path = next(name for name, part in module.named_modules() if part is backbone)
    grafted: tuple[str, ...] = ()
    for name, part in backbone.named_modules(prefix=path):
        if isinstance(part, Graft):
            grafted = (*grafted, f"{name}.")
        elif not grafted or not name.startswith(grafted):
            yield canonical(name), part
