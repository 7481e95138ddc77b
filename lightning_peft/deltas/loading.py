"""Loads a delta file under a name beside other deltas, with its methods, and swaps one for another."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.core import delta_load, select
from lightning_peft.core.delta import identity_of, not_frozen
from lightning_peft.core.delta_file import read_delta
from lightning_peft.core.delta_fit import check_backbones, fitted
from lightning_peft.core.errors import TuningError
from lightning_peft.core.fingerprint import fingerprint_of, same_weights
from lightning_peft.core.run import canonical, selected, unwrapped
from lightning_peft.core.sharded import like
from lightning_peft.core.tuning import Tuning, tunings
from lightning_peft.deltas.named_files import Content, content_of, renamed, with_stand_ins
from lightning_peft.deltas.newcomer import newcomer
from lightning_peft.deltas.swapping import fits, slot, swap
from lightning_peft.training.method import Method
from lightning_peft.training.rebuild import methods_of


def load_delta(
    module: nn.Module,
    path: str | Path,
    name: str | None = None,
    allow_other_backbone: bool = False,
    max_r: int | None = None,
) -> None:
    """Load a delta file (safetensors or a checkpoint) into ``module``.

    Without a name the methods of the module must be those of the file; a module without any gets them. So does a
    backbone under a name that it does not have: that delta computes from then on, alone; `activate` lets others, too.
    Under a name that is there, it takes the place of that delta, in the same tensors, so that a compiled model runs on:
    a LoRA may have another scale, a lower rank and fewer layers than it finds there. All is checked before any changes.

    Args:
        module: a backbone, or a module with one.
        path: the file.
        name: what the delta is to go by; of a file with several deltas, the one that is wanted.
        allow_other_backbone: load it whatever backbone it was trained on.
        max_r: of a LoRA, the rank that others which are to take its place may have; None: its own.

    Raises:
        TuningError: the file is no whole delta, or was made for another backbone, method or set of tensors.
    """
    if name is None and max_r is not None:
        raise TuningError(f"max_r={max_r} is for a delta under a name: give name=, too.")
    module = unwrapped(module)
    tensors, meta = read_delta(path)
    if name is None:
        with _with_methods(module, meta):
            delta_load.fill(module, tensors, meta, str(path), allow_other_backbone)
        return
    content = renamed(content_of(tensors, meta, name, str(path)), name)
    backbone = select.backbone_of(module, None)
    tuning = Tuning.of(backbone)
    is_there = tuning is not None and tuning.of_delta(name)
    with nullcontext() if is_there else newcomer(backbone, name):
        entries = [] if is_there else [entry | {"backbone": ""} for entry in content.meta["methods"]]
        for method in methods_of({"methods": entries}):
            (method if max_r is None else slot(method, max_r)).apply(module)
        _fill(module, backbone, content, name, str(path), allow_other_backbone)


@contextmanager
def _with_methods(module: nn.Module, meta: Mapping[str, Any]) -> Iterator[None]:
    """Give a module that has no methods those of a file; on any error they are gone again."""
    done: list[Method] = []
    try:
        if next(tunings(module), None) is None:
            paths = dict(module.named_modules())
            for method in methods_of(meta):
                method.backbone = method.backbone if method.backbone in paths else None
                method.apply(module)
                done.append(method)
        yield
    except BaseException:
        for method in reversed(done):
            method.remove(module)
        raise


def _fill(
    module: nn.Module, backbone: nn.Module, content: Content, name: str, source: str, allow_other_backbone: bool
) -> None:
    """Put the tensors of a file into a delta that is there, after checking all of them."""
    tuning = Tuning.of(backbone)
    assert tuning is not None
    tensors = with_stand_ins(content, backbone, name)
    if not allow_other_backbone:
        _check_backbone(backbone, tuning, content, source)
    if fits(tuning, name, content):
        swap(backbone, tuning, name, content, tensors, source)
        return
    with selected(module, tuning.of_delta(name)):
        tensors = fitted(module, tensors, content.meta, source, allow_other_backbone=True)
    live = {canonical(name): tensor for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for tensor, value in tensors.items():
            live[tensor].copy_(like(live[tensor], value))


def _check_backbone(backbone: nn.Module, tuning: Tuning, content: Content, source: str) -> None:
    """Check that a backbone is that of a file, in what no delta of the file has values of its own of."""
    names = {name.replace(".", "_"): name for name, _ in backbone.named_parameters()} if content.changed else {}
    changed = {names.get(name.replace(".", "_"), name) for name in content.changed}
    view = replace(tuning, trains={}, replaces={"": changed})
    (theirs,) = content.meta["backbones"].values()
    mine = fingerprint_of(backbone, view, partial(not_frozen, backbone, view))
    if not same_weights(mine, theirs["fingerprint"]):
        check_backbones({"": theirs}, {"": identity_of(backbone, view)}, source)  # says what it is
