"""Gated MLPs (SwiGLU, GeGLU) by the kernels of liger-kernel, https://github.com/linkedin/Liger-Kernel."""

from collections.abc import Callable, Iterator
from itertools import permutations

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, structure
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import Graft, Grafted, attach, grafts
from lightning_peft.features.one_kernel import KERNELS, same_function

ACTIVATIONS = ("silu", "gelu_tanh")
"""The activations that liger-kernel has a gated kernel of; its GELU is the one with tanh."""
Places = tuple[str, str, str]
"""The names of the layers that give the gate, what it lets through, and the output; one gives both gate and rest."""


class LigerMLP(Graft):
    """Computes ``down(act(gate(x)) * up(x))``, the product by one kernel where a gradient goes through it.

    The layers are called, so that what methods have put on them computes, too.

    Args:
        activation: one of `ACTIVATIONS`.
        places: the names of its host's layers.
        turned: whether the one layer that gives both gives the gate last.
    """

    def __init__(self, activation: str, places: Places, turned: bool = False) -> None:
        super().__init__()
        self.activation, self.places, self.turned = activation, places, turned

    def around(self, forward: Callable[..., Tensor], host: nn.Module, x: Tensor) -> Tensor:
        """Return the MLP of x [..., d]."""
        if not x.requires_grad:
            return forward(x)
        if self.activation == "silu":
            from liger_kernel.transformers.functional import liger_swiglu as product
        else:
            from liger_kernel.transformers.functional import liger_geglu as product
        return self.computed(host, x, product)

    def computed(self, host: nn.Module, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the MLP of x [..., d]; ``product`` computes ``act(a) * b``."""
        gate, up, down = (host.get_submodule(name) for name in self.places)
        one, two = (gate(x), up(x)) if gate is not up else gate(x).chunk(2, -1)
        out: Tensor = down(product(two, one) if self.turned else product(one, two))
        return out


def use_liger_mlp(backbone: nn.Module, name: str) -> Iterator[Grafted[LigerMLP]]:
    """Attach a graft of this name to each gated MLP, which is found by computing it; yield their places."""
    for path, module in anatomy.without_grafts(backbone).items():
        graft = _graft_for(module)
        if graft is not None:
            yield Grafted(path, module, name, attach(module, graft, name))


def _graft_for(module: nn.Module) -> LigerMLP | None:
    """Return what computes a gated MLP, or None if a module is something else."""
    children = {name: child for name, child in anatomy.without_grafts(module).items() if name and "." not in name}
    layers = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    others = [child for name, child in children.items() if name not in layers]
    if len(layers) not in (2, 3) or len(others) != 1 or len(structure.arguments_of(module)) != 1:
        return None
    (act,) = others
    found = [name for name in ACTIVATIONS if same_function(act, name)]
    if not found or next(grafts(act), None) is not None:
        return None
    return next((graft for graft in _candidates(found[0], list(layers)) if _computes(graft, module, layers)), None)


def _candidates(activation: str, layers: list[str]) -> Iterator[LigerMLP]:
    if len(layers) == 3:
        for one, two, three in permutations(layers):
            yield LigerMLP(activation, (one, two, three))
    for one, two in permutations(layers, 2) if len(layers) == 2 else ():
        for turned in (False, True):
            yield LigerMLP(activation, (one, one, two), turned)


@torch.no_grad()
def _computes(graft: LigerMLP, module: nn.Module, layers: dict[str, nn.Linear]) -> bool:
    """Tell whether a graft computes what its host does, of inputs that reach the bend of the activation."""
    gate, up, down = (layers[name] for name in graft.places)
    wide = down.in_features * (1 if gate is not up else 2)
    if gate.out_features != wide or up.out_features != wide or up.in_features != gate.in_features:
        return False
    x = torch.linspace(-9, 9, 3 * gate.in_features, device=gate.weight.device).sin().view(3, -1)
    x = x.to(gate.weight.dtype) if gate.weight.is_floating_point() else x
    try:
        with in_eval(module):
            x = 3 * x / gate(x).float().std().clamp(min=1e-6).to(x)
            own, found = module.forward(x), graft.computed(module, x, lambda a, b: KERNELS[graft.activation](a) * b)
    except RuntimeError:  # weights that are in parts elsewhere
        return False
    return torch.allclose(own, found, rtol=2e-2, atol=float(2e-2 * own.abs().max()))
