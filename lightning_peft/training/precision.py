"""Keeps trained parameters in fp32, whatever precision the backbone has or the Trainer asks for.

Grafts look after themselves (`Graft.moving`). A trained head or bias is a parameter of the backbone, which bf16-true
casts like the rest; here it keeps fp32 values, cast to the dtype of its input each time it is used, and so do its
gradients and optimizer moments. In bf16 a step of 1e-4 of a weight is lost by rounding.

Plugins that put layers of a library in the place of a backbone's (bitsandbytes, TransformerEngine) do so before grafts
join it: what is grafted on a layer goes with it.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, HalfPrecision, TransformerEnginePrecision
from torch import nn

from lightning_peft.core import anatomy, structure
from lightning_peft.core.delta import keep_fingerprints
from lightning_peft.core.errors import TuningError
from lightning_peft.core.master_weights import hold_fp32
from lightning_peft.core.tuning import tunings
from lightning_peft.training import patches


def replaces_layers(plugin: Any) -> bool:
    """Tell whether a precision plugin puts other layers in the place of a module's."""
    return isinstance(plugin, (BitsandbytesPrecision, TransformerEnginePrecision))


def patch_plugin(trainer: L.Trainer, keep_fp32: bool) -> None:
    """Make the precision plugin convert modules by our `convert_module`, while this run lasts.

    Around ``configure_model``, which methods extend, `BitsandbytesPrecision` would put its own class in the place of
    ``torch.nn.Linear``: heads would be of it, too, and it refuses to with ``ignore_modules``. `replace_layers` does it
    afterwards.
    """
    plugin, table = trainer.precision_plugin, patches.of_run(trainer)
    if (isinstance(plugin, HalfPrecision) or replaces_layers(plugin)) and "convert_module" not in vars(plugin):
        convert = partial(convert_module, convert=plugin.convert_module, keep_fp32=keep_fp32)
        table.patch(plugin, "convert_module", convert)
        if isinstance(plugin, BitsandbytesPrecision):
            table.patch(plugin, "module_init_context", plugin.tensor_init_context)


def hint(plugin: Any) -> str:
    """Return why the precision plugin may keep a method from fitting a backbone; '' for no reason."""
    if isinstance(plugin, TransformerEnginePrecision) and plugin.replace_layers is not False:
        return (
            " TransformerEnginePrecision has put layers of its own in the place of the backbone's, which few methods "
            "can join: give it replace_layers=False."
        )
    return ""


def replace_layers(module: nn.Module, backbones: Iterable[nn.Module], plugin: Any) -> None:
    """Let a precision plugin replace the layers of backbones that no graft has joined yet.

    bitsandbytes would store heads in few bits, too, which then cannot be trained: they keep their layers, and so does
    what is no part of a backbone, and the output embeddings of a language model.
    """
    if isinstance(plugin, BitsandbytesPrecision):
        stay = {id(child) for child in module.modules() if isinstance(child, nn.Linear)}
        for backbone in backbones:
            head = {name.rpartition(".")[0] for name in anatomy.head_names(backbone)}
            output = structure.output_embeddings_of(backbone)
            inside = {id(child) for name, child in backbone.named_modules() if name not in head and child is not output}
            stay -= inside
        names = {name for name, child in module.named_modules() if id(child) in stay}
        with patches.patched(plugin, "ignore_modules", plugin.ignore_modules | names):
            type(plugin).convert_module(plugin, module)
    else:
        type(plugin).convert_module(plugin, module)


def check_trainable(module: nn.Module) -> None:
    """Check that nothing is trained that will be stored in few bits.

    Raises:
        TuningError: a weight is.
    """
    library = sys.modules.get("bitsandbytes")  # a plugin that replaces layers has imported it
    if library is None:
        return
    wanted = []
    for name, parameter in module.named_parameters():
        few = isinstance(parameter, library.nn.Params4bit)
        few |= isinstance(parameter, library.nn.Int8Params) and not parameter.has_fp16_weights
        if few and parameter.requires_grad:
            wanted.append(name)
            parameter.requires_grad_(False)  # else it cannot be moved, and Lightning does when it tears down
    if wanted:
        raise TuningError(
            f"{wanted[0]} would be trained, but BitsandbytesPrecision stores it in few bits: name "
            f"{wanted[0].removesuffix('.weight')} in its ignore_modules, or take a method that leaves weights alone."
        )


def convert_module(module: nn.Module, convert: Callable[[nn.Module], nn.Module], keep_fp32: bool) -> nn.Module:
    """Run a precision plugin's ``convert_module``; what trains keeps its fp32 values, what was frozen stays so."""
    values = {name: p.data for name, p in module.named_parameters() if p.requires_grad} if keep_fp32 else None
    keep_fingerprints(module)
    module = convert(module)
    if keep_fp32:
        hold_fp32(module, values)
    for _, backbone, tuning in tunings(module):
        tuning.freeze(backbone)
    return module
