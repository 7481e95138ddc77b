"""One run of a comparison: a model, its data and a method, as a configuration and a `Trial` say."""

import contextlib
import gc
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_peft.commands import controls, using
from lightning_peft.commands.method_words import methods_of
from lightning_peft.commands.trainer import TuningCLI
from lightning_peft.commands.trials import Result, Trial
from lightning_peft.core.delta import save_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.data.continual import ContinualData
from lightning_peft.data.splits import GivenSplits
from lightning_peft.data.token_data import TokenData
from lightning_peft.tasks.base import Task
from lightning_peft.tasks.class_scores import ClassScores
from lightning_peft.tasks.nearest_demonstrations import NearestDemonstrations
from lightning_peft.tasks.optimizer import rates_in
from lightning_peft.tasks.text_classification import TextClassification
from lightning_peft.tasks.two_towers import TwoTowerTask
from lightning_peft.training.method import Method

NEAREST, ZERO_SHOT = "nearest demonstrations", "zero-shot"
"""Rows of a table that train nothing."""
_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class TrialCLI(TuningCLI):
    """`TuningCLI` that builds model, data and a silent Trainer, and runs nothing.

    Args:
        words: the arguments of the configuration.
        seed: of all that is random.
        callbacks: of the Trainer, in place of those of the configuration.
        share: of the training that the configuration asks for.
        folder: where the Trainer writes.
    """

    tells = False

    def __init__(self, words: Sequence[str], seed: int, callbacks: list[Callback], share: float, folder: str) -> None:
        self.own: dict[str, Any] = {"callbacks": callbacks, "default_root_dir": folder, **_QUIET}
        self.share = share
        super().__init__(
            args=[*words, "--seed_everything", str(seed), "--method", "null"],
            run=False,
            save_config_callback=None,
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer with the callbacks of this run, for its share of the epochs or steps."""
        given = self.argument(self.config_init, "trainer", default={})
        shorter: dict[str, Any] = {}
        epochs, steps = given.get("max_epochs"), given.get("max_steps")
        if isinstance(self.datamodule, ContinualData):
            shorter |= stream_of(self.datamodule, self.share)
        elif self.share < 1 and steps and steps > 0:
            shorter["max_steps"] = max(1, round(steps * self.share))
        elif self.share < 1 and epochs and epochs > 0:
            shorter["max_epochs"] = max(1, round(epochs * self.share))
            part = self.share * epochs / shorter["max_epochs"]
            shorter |= {"limit_train_batches": part} if part < 1 and given.get("limit_train_batches") is None else {}
        return super().instantiate_trainer(**self.own, **shorter, **kwargs)


def stream_of(data: ContinualData, share: float) -> dict[str, Any]:
    """Let a stream of tasks be scored by validation rows after each task, trained for a share of its epochs.

    Returns:
        What the Trainer is given for it.
    """
    data.score = "validation"
    data.epochs_per_task = max(1, round(data.epochs_per_task * share))
    return {"max_epochs": data.num_tasks * data.epochs_per_task, "check_val_every_n_epoch": data.epochs_per_task}


class Counted(Callback):
    """Notes the scores of validations, the learning rates and, of classes, which rows of a test were right."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.curve: list[float] = []
        self.hits: list[int] = []
        self.rates: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the learning rates."""
        self.rates = rates_in(trainer.optimizers)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the score."""
        if self.monitor in trainer.callback_metrics:
            self.curve.append(float(trainer.callback_metrics[self.monitor]))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to look at what a task of classes computes."""
        if isinstance(pl_module, ClassScores):
            self.handle = pl_module.register_forward_hook(self._note)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look no more."""
        if isinstance(pl_module, ClassScores):
            self.handle.remove()

    def _note(self, task: Any, given: Any, logits: Any) -> None:
        labels = given[0].get("labels") if isinstance(given[0], dict) else None
        if isinstance(labels, Tensor) and isinstance(logits, Tensor) and logits.ndim == 2:
            self.hits += (logits.argmax(1) == labels).int().tolist()


def describe(words: Sequence[str]) -> tuple[Task, str]:
    """Return the task that a configuration builds, and the configuration as text.

    Raises:
        TuningError: it is no task of this package.
    """
    with tempfile.TemporaryDirectory() as folder:
        cli = TrialCLI(words, 0, [], 1.0, folder)
    if not isinstance(cli.model, Task):
        raise TuningError(
            f"{type(cli.model).__name__} does not say which score counts: compare takes a task of lightning_peft."
        )
    return cli.model, cli.parser.dump(cli.config, skip_none=False)


def size_of(words: Sequence[str]) -> int:
    """Return how many parameters the model of a configuration has, before any method."""
    return sum(parameter.numel() for parameter in describe(words)[0].backbone.parameters())


def untrained(task: Task) -> list[str]:
    """Return the rows of a table that train nothing, for a task."""
    return [NEAREST] if isinstance(task, TextClassification) else [ZERO_SHOT] if isinstance(task, TwoTowerTask) else []


def higher_is_better(monitor: str) -> bool:
    """Tell whether a higher score is better."""
    return not monitor.endswith(("loss", "perplexity"))


def picks(data: Any) -> bool:
    """Tell whether validation rows pick an epoch: not where they were trained on, or where each task adds classes."""
    return not isinstance(data, ContinualData) and not is_whole(data)


def is_whole(data: Any) -> bool:
    """Tell whether validation rows are trained on, too."""
    return isinstance(data, GivenSplits) and data.whole


def score_of(scores: Sequence[Mapping[str, float]], monitor: str) -> Result:
    """Return the test score of the monitored kind; of base and new classes apart, the harmonic mean, with its name.

    >>> score_of([{"test_accuracy_task_0": 0.5}, {"test_accuracy": 0.7}], "val_accuracy")
    {'test': 0.7}
    >>> score_of([{"test_base_accuracy": 0.9, "test_harmonic_mean": 0.6}, {}], "val_accuracy")
    {'test': 0.6, 'metric': 'harmonic_mean'}
    """
    found = {name: value for one in scores for name, value in one.items()}
    name = monitor.replace("val_", "test_", 1)
    return {"test": found[name]} if name in found else {"test": found["test_harmonic_mean"], "metric": "harmonic_mean"}


def run(words: Sequence[str], monitor: str, trial: Trial, other: Sequence[str] = ()) -> Result:
    """Run one trial; test rows are looked at only where it says so, after its checkpoint has been chosen.

    Args:
        words: the arguments of the configuration.
        monitor: the score that counts.
        trial: what to run.
        other: texts of another kind, of which it is asked how far their embeddings have moved.
    """
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        found = _run(words, monitor, trial, other, folder)
    gc.collect()
    return found | {"memory": _peak()}


def _run(words: Sequence[str], monitor: str, trial: Trial, other: Sequence[str], folder: str) -> Result:
    is_frozen, mode = trial.method in (NEAREST, ZERO_SHOT), "max" if higher_is_better(monitor) else "min"
    counted = Counted(monitor)
    best = ModelCheckpoint(folder, monitor=monitor, mode=mode, save_weights_only=True)
    method, control = controls.split(trial.method)
    methods: list[Method] = [] if is_frozen else methods_of(method)
    learns = any(each.learns for each in methods)
    callbacks: list[Callback] = [*methods, counted, *([best] if learns else [])]
    callbacks += [controls.ShuffledLabels(trial.seed)] if control == controls.SHUFFLED else []
    cli = TrialCLI(words, trial.seed, callbacks, trial.share, folder)
    task, data, trainer = cli.model, cli.datamodule, cli.trainer
    if control == controls.RANDOM:
        controls.randomise(task)
    if trial.method == NEAREST:
        task = NearestDemonstrations(task.model_name, task.labels)
    found: Result = {"validation": None, "rates": {}, "trained": 0, "bytes": 0, "steps": 0, "curve": []}
    before = using.embedded(task, other) if other and trial.tests and methods else None
    if methods and not learns:
        (scores,) = trainer.validate(task, data, verbose=False)
        found["validation"] = scores[monitor]
    if learns:
        task.rate_scale = trial.scale
        trainer.fit(task, data)
        if best.best_model_score is None:
            raise TuningError(f"no validation has logged {monitor}: give the data a validation split.")
        found |= {"rates": counted.rates, "steps": trainer.global_step}
        if not is_whole(data):  # what was trained on validates nothing
            found["validation"] = float(best.best_model_score) if picks(data) else counted.curve[-1]
            found["curve"] = counted.curve
        found["trained"] = sum(p.numel() for p in task.parameters() if p.requires_grad)
    if trial.tests:
        if isinstance(data, TokenData):
            data.bucket = False  # the rows of a test are in one order for every method
        tested = trainer.test(task, data, ckpt_path="best" if learns and picks(data) else None, verbose=False)
        found |= {**score_of(tested, monitor), "hits": counted.hits}
        if not is_frozen:
            found["bytes"] = save_delta(task, Path(folder) / "delta.safetensors").stat().st_size
            using.ready(task)
            found["kept"] = None if before is None else using.kept(before, using.embedded(task, other))
            found["batch"] = using.seconds_a_batch(task, data, trainer.strategy.root_device)
    return found


def _peak() -> int:
    """Return the most bytes that the GPU held since this was asked last, or 0 without one."""
    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
