"""The confusion matrix as a table."""

from collections.abc import Sequence

from rich.table import Table
from torch import Tensor


def confusion_table(matrix: Tensor, labels: Sequence[str]) -> Table:
    """Return a table of how often class i (row) was taken for class j (column); the diagonal is right.

    Args:
        matrix: counts, [classes, classes].
        labels: names of the classes.
    """
    table = Table(title="Confusions (row: true)", title_justify="left", show_lines=False)
    table.add_column("")
    for label in labels:
        table.add_column(label[:4], justify="right")
    for i, (label, row) in enumerate(zip(labels, matrix.tolist(), strict=True)):
        cells = [f"[bold]{count}[/]" if i == j else str(count or "·") for j, count in enumerate(row)]
        table.add_row(label, *cells)
    return table
