"""The record that a LightningModule keeps of the methods that tune it and of their run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning as L
from torchmetrics import Metric

from lightning_peft.core.run import ATTRIBUTE, Run

if TYPE_CHECKING:
    from lightning_peft.training.method import Method


@dataclass
class Life(Run):
    """What is known of a LightningModule that methods tune: what its run trains, and how far it is.

    Attributes:
        methods: the methods, in the order in which they are applied.
        resumed: metadata and optimizer states of the checkpoint that fit resumes from, until they are restored.
        validation_random: the random state before the latest validation during fit.
        validated: whether a validation is over, whose last hooks may be running.
        steps_before: how many optimizer steps there were when the latest training batch began.
        stepping: whether an optimizer of that batch has begun to step.
        validation_loaders: what validations read from, in the order in which Lightning has asked for them.
        marks: what the metrics of the epoch had summed when the latest training batch began.
        sums: what the metrics of the epoch had summed when a run that is resumed was saved.
        objects: the metric objects of the module by name, and how often each had been updated when the latest training
            batch began.
        summed: names of those that training batches of this epoch have updated.
        validation_states: what each of them goes on from in a run that is resumed.
        without_gradient: names of the trained parameters that have had no gradient yet; None before the first step.
        steps: how many optimizer steps have looked for gradients.
        modes: whether training mode is what each module of a backbone was last put into.
        in_eval: the names of those that the user has put into eval mode instead.
        is_extended: whether the hooks of the module are extended; see `lifecycle.extend`.
    """

    methods: list["Method"] = field(default_factory=list)
    resumed: dict[str, Any] | None = None
    validation_random: dict[str, Any] | None = None
    validated: bool = False
    steps_before: int = 0
    stepping: bool = False
    validation_loaders: list[Any] = field(default_factory=list)
    validation_states: list[Any] = field(default_factory=list)
    marks: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, tuple[Metric, int]] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    without_gradient: set[str] | None = None
    steps: int = 0
    modes: dict[str, bool] = field(default_factory=dict)
    in_eval: set[str] = field(default_factory=set)
    is_extended: bool = False

    @classmethod
    def of(cls, module: L.LightningModule) -> "Life":
        """Return the record of this module; the first call makes it."""
        life = vars(module).get(ATTRIBUTE)
        if not isinstance(life, cls):  # a delta may have been loaded before
            loaded = life.outside if isinstance(life, Run) else set()
            life = vars(module)[ATTRIBUTE] = cls(outside=loaded)
        return life

    def begin_batch(self, steps: int, marks: dict[str, Any]) -> None:
        """Note that a training batch begins, after so many optimizer steps and with these sums of metrics."""
        self.steps_before, self.marks = steps, marks
        self.stepping, self.validated, self.validation_random = False, False, None
        self.objects = {name: (metric, metric.update_count) for name, (metric, _) in self.objects.items()}

    def end_batch(self) -> None:
        """Note which metric objects the training batch has updated."""
        self.summed |= {name for name, (metric, count) in self.objects.items() if metric.update_count != count}

    def begin_epoch(self, module: L.LightningModule) -> None:
        """Look for metric objects; those that an epoch has summed are read at its end."""
        self.objects = {name: (part, 0) for name, part in module.named_modules() if isinstance(part, Metric)}
        self.summed = set()

    def end_run(self) -> None:
        """Clear the state of one run: an exception may have ended it before a checkpoint was restored."""
        self.resumed = self.validation_random = None
        self.validated = self.stepping = False
        self.steps_before, self.validation_loaders, self.validation_states = 0, [], []
        self.marks, self.sums, self.objects, self.summed = {}, {}, {}, set()
        self.without_gradient, self.steps = None, 0


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """Return the Trainer that a module is attached to, if there is one."""
    try:
        return module.trainer
    except RuntimeError:  # it is attached to none
        return None
