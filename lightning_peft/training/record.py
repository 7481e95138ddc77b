"""The record that a LightningModule keeps of the methods that tune it and of their run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L

from lightning_peft.core.run import ATTRIBUTE, Run

if TYPE_CHECKING:
    from lightning_peft.training.method import Method


class Pause(NamedTuple):
    """The random state of a save between two batches.

    Attributes:
        random: the state of the random generators to go on with.
        in_validation: whether a validation was running, which is then done again as a whole.
    """

    random: dict[str, Any]
    in_validation: bool


@dataclass
class Life(Run):
    """What is known of a LightningModule that methods tune: what its run trains, and how far it is.

    Attributes:
        methods: the methods, in the order in which they are applied.
        resumed: metadata and optimizer states of the checkpoint that fit resumes from, until they are restored.
        pause: where a save stands that falls between two batches; None: at the hook that saves.
        validation_random: the random state before the latest validation during fit.
        without_gradient: names of the trained parameters that have had no gradient yet; None before the first step.
        steps: how many optimizer steps have looked for gradients.
        modes: whether training mode is what each module of a backbone was last put into.
        in_eval: the names of those that the user has put into eval mode instead.
        is_extended: whether the hooks of the module are extended; see `lifecycle.extend`.
    """

    methods: list["Method"] = field(default_factory=list)
    resumed: dict[str, Any] | None = None
    pause: Pause | None = None
    validation_random: dict[str, Any] | None = None
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

    def end_run(self) -> None:
        """Clear the state of one run: an exception may have ended it before a checkpoint was restored."""
        self.resumed = self.pause = self.validation_random = None
        self.without_gradient, self.steps = None, 0


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """Return the Trainer that a module is attached to, if there is one."""
    try:
        return module.trainer
    except RuntimeError:  # it is attached to none
        return None
