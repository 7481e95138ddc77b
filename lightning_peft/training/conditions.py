"""What the numbers of a run depend on beside its module and its data, as a checkpoint says it.

On the same device with the same settings a resumed run computes what the uninterrupted one does. Where a setting is
another, its results differ, if only by rounding, and the resume says so.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core import structure
from lightning_peft.core.run import own_tunings
from lightning_peft.training.random_states import gather


def conditions(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Return the device of each rank, what may be rounded, and the attention of each backbone, as plain values.

    Every rank must call it.
    """
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kinds = sorted(set(gather(name)))
    return {
        "devices": ", ".join(kinds),
        "ranks": trainer.world_size,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "TF32": _rounds_to_tf32() if device.type == "cuda" else False,
        "attention": [structure.attention_implementation(backbone) or "" for _, backbone, _ in own_tunings(module)],
    }


def warn_of_changes(saved: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Warn of what is other than in the run that is resumed; a file of an earlier version does not say it."""
    changes = [f"{key} was {saved[key]!r} and is {now[key]!r}" for key in now if saved and saved.get(key) != now[key]]
    if changes:
        rank_zero_warn(
            f"the run that is resumed ran otherwise: {'; '.join(changes)}. It goes on from the saved state, but not "
            "bit for bit as it would have: resume it as it began if that matters."
        )


def _rounds_to_tf32() -> bool:
    """Tell whether CUDA may round the factors of fp32 products or convolutions to TF32."""
    ways: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)]
    if all(hasattr(way, "fp32_precision") for way in ways):  # since torch 2.9, which refuses that both are asked
        return any(way.fp32_precision == "tf32" for way in ways)
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
