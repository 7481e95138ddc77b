"""Root-mean-square norms by the kernels of liger-kernel, https://github.com/linkedin/Liger-Kernel."""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, Grafted, attach


class LigerNorm(Graft):
    """Computes ``(offset + w) x / sqrt(mean(x^2) + eps)`` by one kernel where a gradient goes through it."""

    def __init__(self, eps: float, offset: float) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset

    def around(self, forward: Callable[..., Tensor], host: nn.Module, x: Tensor) -> Tensor:
        """Return the norm of x [..., d]."""
        if not x.requires_grad:
            return forward(x)
        from liger_kernel.transformers.functional import liger_rms_norm

        casting = "gemma" if self.offset else "llama"
        normed: Tensor = liger_rms_norm(x, host.weight, self.eps, self.offset, casting, in_place=False)
        return normed


def check_liger() -> None:
    """Check that the kernels can run.

    Raises:
        TuningError: the package is missing, or a GPU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise TuningError(
            "kernels='liger' needs liger-kernel: run pip install 'lightning-peft[liger]', or give kernels='torch'."
        )
    if not torch.cuda.is_available():
        raise TuningError("kernels='liger' needs a GPU, and there is none: give kernels='torch'.")


def use_liger_norm(backbone: nn.Module, name: str) -> Iterator[Grafted[LigerNorm]]:
    """Attach a graft of this name to each root-mean-square norm, which is found by computing it; yield their places."""
    for path, module in anatomy.without_grafts(backbone).items():
        form = _form_of(module)
        if form is not None:
            yield Grafted(path, module, name, attach(module, LigerNorm(*form), name))


@torch.no_grad()
def _form_of(module: nn.Module) -> tuple[float, float] | None:
    """Return eps and offset of a root-mean-square norm, or None if a module is something else."""
    own = dict(module.named_parameters())
    if [*own] != ["weight"] or own["weight"].ndim != 1 or len(structure.arguments_of(module)) != 1:
        return None
    weight = own["weight"].float()
    x = torch.linspace(0.5, 2, weight.numel(), device=weight.device)
    try:
        out, tiny = (module.forward(values[None]).float()[0] for values in (x, x * 1e-8))
    except RuntimeError:  # a module of another kind, which wants another input
        return None
    for offset in (0.0, 1.0):
        scale = offset + weight
        eps = float(((scale * x * 1e-8 / tiny) ** 2).nanmedian())
        if eps < 1 and torch.allclose(out, scale * x * torch.rsqrt((x * x).mean() + eps), rtol=2e-2, atol=1e-3):
            return float(f"{eps:.2e}"), offset
    return None
