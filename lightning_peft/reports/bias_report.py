"""Reports which biases moved most: in the paper of BitFit those of the query and the first feed-forward projection.

The change of a bias is the mean of ``|b - b0|`` over its values, with b0 the backbone's (Ben Zaken et al. 2022, arXiv
2106.10199, section 4); it is 0 for biases that are not trained, which are left out.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.tuning import Tuning, tunings

_BIASES = ("bias", "in_proj_bias", "shift")


class BiasChange(NamedTuple):
    """The distance that a bias has moved.

    Attributes:
        kind: its name inside the block, such as ``attention.self.query``; outside of the blocks, its whole name.
        block: the index of its block; None outside of the blocks.
        change: mean of ``|b - b0|``.
    """

    kind: str
    block: int | None
    change: float


class BiasReport(L.Callback):
    """Prints after training which biases moved most, and draws it.

    Args:
        plot: where to save the plot (png, pdf, svg); None: draw none.
        rows: how many kinds of biases the table has.
    """

    def __init__(self, plot: str | None = None, rows: int = 20) -> None:
        self.plot = plot
        self.rows = rows

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there will be something to report, before training.

        Raises:
            TuningError: no trained bias has a known starting point, or matplotlib is missing.
        """
        bias_changes(pl_module)
        if self.plot is not None:
            _pyplot()

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table and save the plot."""
        changes = bias_changes(pl_module)
        Console().print(bias_table(changes, self.rows))
        if self.plot is not None:
            plot_biases(changes, self.plot)


def bias_changes(module: nn.Module) -> list[BiasChange]:
    """Return how far each trained bias of the backbones in ``module`` has moved since the method was applied.

    Raises:
        TuningError: no bias is trained whose starting point is known.
    """
    found = []
    for _, backbone, tuning in tunings(module):
        lists = anatomy.block_lists(backbone)
        for name, moved in _moved(backbone, tuning):
            place = anatomy.block_index(lists, name)
            kind = name.removeprefix(f"{place[0]}.{place[1]}.") if place else name
            found.append(BiasChange(kind, place[1] if place else None, moved.float().abs().mean().item()))
    if not found:
        raise TuningError(
            f"{type(module).__name__} trains no bias whose starting point is known: use BitFit, which keeps them."
        )
    return found


def bias_table(changes: list[BiasChange], rows: int = 20) -> Table:
    """Return a table of kinds of biases, the one that moved most first: mean over the blocks, and the farthest block.

    Args:
        changes: what `bias_changes` returns.
        rows: how many kinds to show.
    """
    table = Table(title="Biases that moved most", title_justify="left")
    table.add_column("bias")
    for column in ("mean |b - b0|", "most", "in block"):
        table.add_column(column, justify="right")
    for kind, group in _ranked(changes)[:rows]:
        most = max(group, key=lambda change: change.change)
        mean = sum(change.change for change in group) / len(group)
        table.add_row(kind, f"{mean:.2e}", f"{most.change:.2e}", "" if most.block is None else str(most.block))
    return table


def plot_biases(changes: list[BiasChange], path: str | Path) -> Path:
    """Draw the changes as a map of kinds (rows, most first) and blocks (columns), and save it.

    Raises:
        TuningError: matplotlib is missing, or no bias lies in a block.
    """
    pyplot = _pyplot()
    ranked = [(kind, group) for kind, group in _ranked(changes) if group[0].block is not None]
    if not ranked:
        raise TuningError("no trained bias lies in a block, so there is no map of blocks to draw: leave plot= out.")
    blocks = sorted({change.block for _, group in ranked for change in group if change.block is not None})
    values = [[float("nan")] * len(blocks) for _ in ranked]
    for row, (_, group) in zip(values, ranked, strict=True):
        for change in group:
            assert change.block is not None
            row[blocks.index(change.block)] = change.change
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.4 * len(blocks), 1.2 + 0.3 * len(ranked)), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(ranked)), [kind for kind, _ in ranked])
    axes.set_xlabel("block")
    figure.colorbar(image, label="mean |b − b₀|")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return Path(path)


def _moved(backbone: nn.Module, tuning: Tuning) -> list[tuple[str, Tensor]]:
    """Return the name of each module whose bias is trained, and by how much that has moved."""
    parameters = dict(backbone.named_parameters())
    moved = []
    for name, original in tuning.originals.items():
        if name.rpartition(".")[2] in _BIASES and isinstance(original, Tensor):
            now = parameters[name].detach()
            moved.append((name.rpartition(".")[0], now - original.to(now.device, now.dtype)))
    for place in grafts(backbone):  # what was added to a bias, or as one, started at zero
        own = dict(place.graft.named_parameters())
        if len(own) == 1 and next(iter(own)) in _BIASES:
            moved.append((place.path, next(iter(own.values())).detach()))
    return moved


def _ranked(changes: list[BiasChange]) -> list[tuple[str, list[BiasChange]]]:
    groups: dict[str, list[BiasChange]] = defaultdict(list)
    for change in changes:
        groups[change.kind].append(change)
    return sorted(groups.items(), key=lambda item: -sum(change.change for change in item[1]) / len(item[1]))


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise TuningError("a plot needs matplotlib: pip install 'lightning-peft[plot]'.") from None
    matplotlib.use("agg", force=False)
    from matplotlib import pyplot

    return pyplot
