"""The table before training: what is tuned, how much of it, and what stays frozen."""

import re
from collections import Counter
from collections.abc import Iterable

import torch
from rich.table import Table
from torch import nn

from lightning_peft.core import anatomy
from lightning_peft.core.delta import collect
from lightning_peft.core.graft import grafts
from lightning_peft.core.tuning import tunings


def parameter_table(module: nn.Module) -> Table:
    """Return a table of the tuned backbones of ``module`` and of what is trained in all.

    Sizes are in bytes of the tensors as they are stored.
    """
    table = Table(show_header=False, title="Tuning", title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for path, backbone, tuning in tunings(module):
        where = f" at {path}" if path else ""
        methods = ", ".join(repr_short(method) for method in tuning.methods.values())
        frozen = [p for p in backbone.parameters() if not p.requires_grad]
        modes = sorted({method.backbone_mode for method in tuning.methods.values()})
        table.add_row("backbone", f"{type(backbone).__name__}{where}")
        table.add_row("method", methods)
        if chosen := places(backbone):
            table.add_row("at", chosen)
        if head := anatomy.head_names(backbone):
            table.add_row("head", ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in head)))
        table.add_row("frozen", f"{count(frozen):,} parameters, {stored(frozen)}, in {' and '.join(modes)} mode")
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    share = count(trained) / max(count(parameters), 1)
    table.add_row("trained", f"{count(trained):,} of {count(parameters):,} parameters ({share:.3%}), {stored(trained)}")
    table.add_row("delta", size(sum(tensor.nbytes for tensor in collect(module).values())))
    return table


def places(backbone: nn.Module, most: int = 12) -> str:
    """Return where methods have attached something: names with ``N`` for numbers, and how many there are of each.

    >>> from lightning_peft import LoRA
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> LoRA(r=1, target_modules=["0", "1"]).apply(net)
    >>> places(net)
    'N (2)'
    """
    names: Counter[str] = Counter()
    for place in grafts(backbone):
        weights = place.graft.weights or ("",)
        names.update(
            re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", f"{place.path}.{w}".strip(".")) or "the whole" for w in weights
        )
    rows = [f"{name} ({times})" for name, times in names.items()]
    return ", ".join([*rows[:most], *([f"and {len(rows) - most} more"] if len(rows) > most else [])])


def repr_short(method: object) -> str:
    """Return the class of a method with the arguments that differ from their defaults.

    >>> from lightning_peft import LoRA
    >>> repr_short(LoRA(r=4))
    'LoRA(r=4)'
    """
    default = type(method)()
    changed = {n: v for n, v in vars(method).items() if not n.startswith("_") and v != vars(default).get(n, v)}
    return f"{type(method).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def count(tensors: Iterable[torch.Tensor]) -> int:
    """Return the number of values in all tensors."""
    return sum(tensor.numel() for tensor in tensors)


def dtypes(tensors: Iterable[torch.Tensor]) -> str:
    """Return the dtypes of the tensors, the one with most values first.

    >>> dtypes([torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)])
    'bfloat16 and float32'
    """
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return " and ".join(dtype for dtype, _ in counts.most_common()) or "none"


def stored(tensors: Iterable[torch.Tensor]) -> str:
    """Return in which dtype tensors are stored, and their bytes.

    >>> stored([torch.zeros(256)])
    'float32, 1.0 KiB'
    """
    tensors = list(tensors)
    return f"{dtypes(tensors)}, {size(sum(tensor.nbytes for tensor in tensors))}"


def size(num_bytes: int) -> str:
    """Return a number of bytes for reading, in powers of 1024.

    >>> size(2048), size(5), size(3 * 2**20)
    ('2.0 KiB', '5 bytes', '3.0 MiB')
    """
    if num_bytes < 1024:
        return f"{num_bytes} bytes"
    value = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024 or unit == "GiB":
            break
    return f"{value:.1f} {unit}"
