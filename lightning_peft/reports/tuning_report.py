"""Prints a summary of a run before and after training."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_peft.core.rates import EVERYTHING
from lightning_peft.core.tuning import tunings
from lightning_peft.reports.command_line import shareable
from lightning_peft.reports.confusion import confusion_table
from lightning_peft.reports.parameters import parameter_table, size
from lightning_peft.tasks.base import Task
from lightning_peft.tasks.optimizer import rates_in

COMMAND = "command_line"
"""Where a checkpoint keeps the command that made it."""


class TuningReport(L.Callback):
    """Prints what is tuned before training, the best score and the delta's file after it, and confusions of a test.

    Args:
        command: the console script, for the line that says how to test the delta; None: leave that line out.
        words: its arguments, which a checkpoint keeps for the card of an export.
    """

    def __init__(self, command: str | None = None, words: Sequence[str] = ()) -> None:
        self.command = command
        self.words = words

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the command line, as one may show it."""
        if self.command is not None and self.words:
            checkpoint[COMMAND] = shareable([Path(self.command).name, *self.words])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what is trained and what is frozen."""
        self._config = Path(trainer.log_dir or ".") / "config.yaml"  # all processes must ask for log_dir together
        if trainer.is_global_zero:
            table = parameter_table(pl_module)
            for name, rate in learning_rates(trainer, pl_module).items():
                table.add_row("learning rate", f"{name} {rate}")
            Console().print(table)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print which classes were taken for which, where the module counts that, and how to ask it of a text."""
        count = getattr(pl_module, "confusion_matrix", None)
        if count is not None:
            matrix = count()  # summed over the processes, so all of them must ask
            if trainer.is_global_zero:
                Console().print(confusion_table(matrix, pl_module.labels))  # type: ignore[arg-type]
        asks = isinstance(pl_module, Task) and pl_module.of_texts and trainer.ckpt_path
        if self.command is not None and asks and trainer.is_global_zero:
            words = [Path(self.command).name, "predict", "--ckpt_path", str(trainer.ckpt_path), "--text", "a text"]
            Console(soft_wrap=True).print(f"ask it by: {shlex.join(words)}", highlight=False)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the best score, the delta's path and size, and the command that tests it."""
        callback = trainer.checkpoint_callback
        if not isinstance(callback, ModelCheckpoint):
            return
        path = callback.best_model_path or callback.last_model_path
        if not path or not Path(path).is_file():
            return
        table = Table(show_header=False, title="Result", title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        if callback.best_model_score is not None and callback.monitor:
            table.add_row(f"best {callback.monitor}", f"{float(callback.best_model_score):.4f}")
        table.add_row("delta", str(path))
        table.add_row("size", size(Path(path).stat().st_size))
        Console().print(table)
        if self.command is not None and self._config.is_file():
            words = [Path(self.command).name, "test", "--config", str(self._config), "--ckpt_path", str(path)]
            Console(soft_wrap=True).print(f"test it with: {shlex.join(words)}", highlight=False)


def learning_rates(trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    """Return, by the name of the optimizer's group, its learning rate and who says so, where that is known."""
    said: dict[str, str] = {}
    if isinstance(module, Task):
        tuned = [(backbone, m) for _, backbone, tuning in tunings(module) for m in tuning.methods.values()]
        own = [f"{type(m).__name__}, {module.advised(m, backbone).source}" for backbone, m in tuned]
        sources = "; ".join(own) or EVERYTHING.on(module.backbone).source
        for part, given in (("delta", module.lr), ("head", module.head_lr)):
            times = f", times {module.rate_scale:.2g} as found" if module.rate_scale != 1 else ""
            said[part] = f" (recommended: {sources}{times})" if given is None else f" (given{times})"
    return {
        name: f"{rate:g}{said.get(name.partition(' at ')[0], '')}"
        for name, rate in rates_in(trainer.optimizers).items()
    }
