"""Takes the steps of a LightningModule for each member of a population."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.routing import keeping_activations
from lightning_peft.deltas.one_pass import OnePass
from lightning_peft.training import patches

if TYPE_CHECKING:
    from lightning_peft.deltas.population import Population


def _for_each(name: str) -> Callable[..., None]:
    """Return what stands in for a hook: it is called for each member."""

    def run(self: "MemberSteps", module: L.LightningModule, hook: Any, *args: Any) -> None:
        own = patches.inherited(module, hook, name)
        turns = self.turns(module)
        for i, member in enumerate(self.population.members):
            with self._turn(module, turns, i):
                own(*(member.prepare(arg) if isinstance(arg, Mapping) else arg for arg in args))

    return run


class MemberSteps:
    """The hooks of a module, of which each is called once for each member, that member alone being at work.

    Each member has copies of the module's metrics of its own.
    """

    def __init__(self, population: "Population") -> None:
        self.population = population
        self.metrics: dict[str, list[nn.Module]] = {}

    def install(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Let the hooks of a module be called for each member until the run ends.

        Raises:
            TuningError: the module steps or clips by itself.
        """
        if not module.automatic_optimization:
            raise TuningError(
                f"{type(module).__name__} steps its optimizers itself, for all members together: let "
                "automatic_optimization be true."
            )
        if is_overridden("configure_gradient_clipping", module, L.LightningModule):
            raise TuningError(
                f"{type(module).__name__} clips gradients itself, those of all members together: leave it to the "
                "Trainer's gradient_clip_val."
            )
        table = patches.of_run(trainer)
        patches.extend(table, module, "training_step", self.training_step)
        patches.extend(table, module, "configure_gradient_clipping", self.clip)
        for name, function in self.hooks().items():
            if is_overridden(name, module, L.LightningModule):
                patches.extend(table, module, name, function)

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """Return what stands in for the hooks of validation and test, by name."""
        return {
            "validation_step": self.validation_step,
            "test_step": self.test_step,
            "on_validation_epoch_start": self.on_validation_epoch_start,
            "on_validation_epoch_end": self.on_validation_epoch_end,
            "on_test_epoch_start": self.on_test_epoch_start,
            "on_test_epoch_end": self.on_test_epoch_end,
        }

    validation_step = _for_each("validation_step")
    test_step = _for_each("test_step")
    on_validation_epoch_start = _for_each("on_validation_epoch_start")
    on_validation_epoch_end = _for_each("on_validation_epoch_end")
    on_test_epoch_start = _for_each("on_test_epoch_start")
    on_test_epoch_end = _for_each("on_test_epoch_end")

    def training_step(self, module: L.LightningModule, hook: Any, batch: Any, *args: Any) -> Tensor | None:
        """Return the sum of the members' losses, for which the backbone has run once."""
        own, losses = patches.inherited(module, hook, "training_step"), []
        turns = self.turns(module)
        alone = self.population.backbone_mode == "train" and structure.may_drop(turns.backbone)
        with keeping_activations(turns.backbone), nullcontext() if alone else turns.answering():
            for i, member in enumerate(self.population.members):
                with self._turn(module, turns, i):
                    out = own(member.prepare(batch) if isinstance(batch, Mapping) else batch, *args)
                    losses.append(out["loss"] if isinstance(out, Mapping) else out)
        losses = [loss for loss in losses if loss is not None]
        return torch.stack(losses).sum() if losses else None

    def clip(
        self,
        module: L.LightningModule,
        hook: Any,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each member on its own."""
        if not gradient_clip_val:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for member in self.population.members:
            own = [p for p in self.population.parameters_of(module, member).values() if id(p) in held]
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(own, gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(own, gradient_clip_val)

    def turns(self, module: L.LightningModule) -> OnePass:
        """Return what lets the members take their turns on the backbone of a module."""
        backbone = self.population._tuned(module)
        return OnePass(backbone, self.population.names, self.population.streams)

    @contextmanager
    def _turn(self, module: L.LightningModule, turns: OnePass, member: int) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(turns.turn(member))
            stack.enter_context(self._own_metrics(module, member))
            stack.enter_context(_logging(module, self.population.names[member]))
            yield

    @contextmanager
    def _own_metrics(self, module: L.LightningModule, member: int) -> Iterator[None]:
        """Let the module have, inside the context, the metrics of a member."""
        with ExitStack() as stack:
            for path, metric in _metrics(module).items():
                if path not in self.metrics:
                    self.metrics[path] = [copy.deepcopy(metric) for _ in self.population.members]
                above, _, leaf = path.rpartition(".")
                parent = module.get_submodule(above)
                stack.callback(setattr, parent, leaf, metric)
                setattr(parent, leaf, self.metrics[path][member])
            yield


@contextmanager
def _logging(module: L.LightningModule, member: str) -> Iterator[None]:
    """Let what is logged inside the context be logged under the name of a member, too."""
    log, names = module.log, {id(m): path for path, m in module.named_modules() if isinstance(m, Metric)}

    def both(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if id(value) in names:
            kwargs.setdefault("metric_attribute", names[id(value)])
        log(name, value, *args, **kwargs)
        log(f"{name}_{member}", value, *args, **kwargs if args else kwargs | {"prog_bar": False})

    with patches.patched(module, "log", both):
        yield


def _metrics(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost metrics of a module, by their paths."""
    found: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if path and isinstance(child, (Metric, MetricCollection)) and not inside:
            found[path] = child
    return found
