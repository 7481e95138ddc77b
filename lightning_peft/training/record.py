"""The record that a LightningModule keeps of the methods that tune it and of their run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L

if TYPE_CHECKING:
    from lightning_peft.training.method import Method

_ATTRIBUTE = "_lightning_peft_life"


class Pause(NamedTuple):
    """The random state of a save between two batches.

    Attributes:
        random: the state of the random generators to go on with.
        in_validation: whether a validation was running, which is then done again as a whole.
    """

    random: dict[str, Any]
    in_validation: bool


@dataclass
class Life:
    """The record of a LightningModule that methods tune; it is kept on the module.

    Attributes:
        methods: the methods, in the order in which they are applied.
        resumed: metadata and optimizer states of the checkpoint that fit resumes from, until they are restored.
        pause: where a save stands that falls between two batches; None: at the hook that saves.
        validation_random: the random state before the latest validation during fit.
        gradients: whether each parameter that an optimizer has stepped has got a gradient yet, by name; it is kept in
            the first epoch of manual optimization.
        is_extended: whether the hooks of the module are extended; see `lifecycle.extend_hooks`.
    """

    methods: list["Method"] = field(default_factory=list)
    resumed: dict[str, Any] | None = None
    pause: Pause | None = None
    validation_random: dict[str, Any] | None = None
    gradients: dict[str, bool] = field(default_factory=dict)
    is_extended: bool = False

    @classmethod
    def of(cls, module: L.LightningModule) -> "Life":
        """Return the record of this module; the first call makes it."""
        life: Life = vars(module).setdefault(_ATTRIBUTE, cls())
        return life

    def end_run(self) -> None:
        """Clear the state of one run: an exception may have ended it before a checkpoint was restored."""
        self.resumed = self.pause = self.validation_random = None
        self.gradients = {}


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """Return the Trainer that a module is attached to, if there is one."""
    try:
        return module.trainer
    except RuntimeError:  # it is attached to none
        return None
