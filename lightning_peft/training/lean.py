"""Training that computes the same and keeps less for the backward pass."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import lightning as L
from torch import nn

from lightning_peft.core import select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Grafted, attach, detach
from lightning_peft.core.private_torch import is_compiled
from lightning_peft.features.liger_mlp import use_liger_mlp
from lightning_peft.features.liger_norm import check_liger, use_liger_norm
from lightning_peft.features.no_cache import NoCache, fills_cache
from lightning_peft.features.offload import Offloaded
from lightning_peft.features.one_kernel import fuse
from lightning_peft.training import patches

Kernels = Literal["torch", "liger"]
_NAME = "lean"


class Lean(L.Callback):
    """Makes a step keep less for the backward pass, with the same numbers up to rounding.

    * Activations that the model computes in several kernels, such as GPT-2's GELU, are computed in one.
    * A model that is called for its gradients fills no cache of keys and values, unless the caller asks for one.
    * `CausalLM` computes its loss in chunks of tokens, so that the logits of all tokens never exist at once; where the
      model does more between hidden states and logits than call its head, it computes them all.

    It works by grafts on the frozen backbone while a fit lasts, beside any method, and is gone when the fit ends. Where
    no gradient goes through, as in a validation or with all deltas muted, the backbone computes as it does without, bit
    for bit. Our own language-model tasks have this callback; give one with other arguments to the Trainer in its place.

    Args:
        loss_chunk: how many tokens the output head sees at once; None: all.
        offload_activations: keep what is saved on a GPU in host memory: less memory there, and slower. Works with
            gradient checkpointing, and does nothing on a CPU.
        kernels: liger: root-mean-square norms and gated MLPs (SwiGLU, GeGLU) by the kernels of liger-kernel, which
            needs a GPU; torch: PyTorch's own.
        backbone: where the backbone is in the module; None: its one transformers model, else the module itself.
    """

    def __init__(
        self,
        loss_chunk: int | None = 512,
        offload_activations: bool = False,
        kernels: Kernels = "torch",
        backbone: str | None = None,
    ) -> None:
        if loss_chunk is not None and loss_chunk < 1:
            raise TuningError(f"loss_chunk={loss_chunk} is out of range: take 1 or more, or null.")
        if kernels not in ("torch", "liger"):
            raise TuningError(f"kernels={kernels!r} is unknown: take 'torch' or 'liger'.")
        self.loss_chunk, self.offload_activations = loss_chunk, offload_activations
        self.kernels, self.backbone = kernels, backbone

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the steps of a fit save where they are told to.

        Raises:
            TuningError: the kernels cannot run here.
        """
        if stage != "fit":
            return
        if self.kernels == "liger":
            check_liger()
        if self.offload_activations:
            earlier = patches.inherited(pl_module, vars(pl_module).get("training_step"), "training_step")
            patches.of_run(trainer).patch(pl_module, "training_step", partial(_offloading, pl_module, earlier))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attach the grafts, which go when the run ends."""
        backbone = select.backbone_of(pl_module, self.backbone)
        places = list(self._attached(backbone))
        patches.of_run(trainer).record(self, "grafts", partial(_leave, places))

    def _attached(self, backbone: nn.Module) -> Iterator[Grafted[Any]]:
        if self.kernels == "liger":
            yield from use_liger_norm(backbone, _NAME)
            yield from use_liger_mlp(backbone, _NAME)
        yield from fuse(backbone, _NAME)
        if fills_cache(backbone) and not is_compiled(backbone):
            yield Grafted("", backbone, _NAME, attach(backbone, NoCache(), _NAME))


def lean_of(trainer: L.Trainer | None) -> Lean | None:
    """Return the callback of a Trainer, if there are both."""
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Lean)), None)


def _leave(places: list[Grafted[Any]]) -> None:
    for place in places:
        detach(place.host, place.name)


def _offloading(module: L.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``training_step``."""
    with Offloaded([*module.parameters(), *module.buffers()]):
        return step(*args, **kwargs)
