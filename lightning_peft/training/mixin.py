"""A LightningModule that owns its method."""

from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
from torch import Tensor, nn

from lightning_peft.core import select
from lightning_peft.core.delta import collect
from lightning_peft.core.errors import TuningError
from lightning_peft.core.folding import merge
from lightning_peft.training import rebuild
from lightning_peft.training.method import Method

M = TypeVar("M", bound=Method)


class MethodMixin:
    """For a LightningModule that owns its method: give it a ``method``, and the Trainer needs no callback.

    >>> from lightning_peft import LoRA
    >>> class Classifier(MethodMixin, L.LightningModule):
    ...     default_method = LoRA
    >>> Classifier().configure_callbacks()[0].r
    8
    """

    default_method: ClassVar[type[Method] | None] = None
    method: Method | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.default_method is not None:
            self.method = self.default_method()

    def configure_callbacks(self) -> list[L.Callback]:
        """Hand the method to the Trainer."""
        others = list(super().configure_callbacks())  # type: ignore[misc]
        return others if self.method is None else [*others, self.method]

    def delta_state(self) -> dict[str, Tensor]:
        """Return what is trained, by name."""
        return collect(self)  # type: ignore[arg-type]

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors, the frozen ones too, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}  # type: ignore[attr-defined]

    def merge(self) -> nn.Module:
        """Fold what was trained into the weights and return the plain backbone."""
        assert self.method is not None
        backbone = select.backbone_of(self, self.method.backbone)  # type: ignore[arg-type]
        return merge(backbone)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the module from a delta checkpoint: hyper-parameters, methods and what they trained."""
        return rebuild.load_from_checkpoint(cls, checkpoint_path, *args, **kwargs)  # type: ignore[type-var]


class TunedBy(MethodMixin, Generic[M]):
    """`MethodMixin` with its default in brackets: ``TunedBy[LoRA]``, which is also called ``LoRAMixin``.

    >>> from lightning_peft import LoRA, LoRAMixin
    >>> class Classifier(TunedBy[LoRA], L.LightningModule): ...
    >>> Classifier().method.r, issubclass(Classifier, LoRAMixin)
    (8, True)
    """

    method: M | None = None

    def __class_getitem__(cls, method: Any) -> Any:
        """Return the mixin of a class of methods, always the same one; for other types what typing makes of them."""
        if not isinstance(method, type) or method is Any:
            return super().__class_getitem__(method)  # type: ignore[misc]
        return _mixin_of(method)

    def _owned(self) -> tuple[M, nn.Module]:
        """Return the method and the module that owns it, for the verbs of a method."""
        assert isinstance(self, nn.Module)
        assert self.default_method is not None
        assert isinstance(self.method, self.default_method)
        return self.method, self


@cache
def _mixin_of(method: type[Method]) -> type[MethodMixin]:
    """Return a subclass of `TunedBy`, which pickle finds as ``NewMixin`` beside the method ``New``."""
    if not issubclass(method, Method):
        raise TuningError(f"TunedBy[{method.__name__}] names no method: give a class such as LoRA.")
    text = f"For a LightningModule that is tuned by {method.__name__}: set ``self.method`` to change its arguments."
    members = {"default_method": method, "__module__": method.__module__, "__doc__": text}
    return type(f"{method.__name__}Mixin", (TunedBy,), members)
