"""A method of tuning: what it does to a backbone, by torch alone. Its life in a Trainer is `training.method.Method`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

from torch import Tensor, nn

from lightning_peft.core import anatomy, arguments, compatibility, master_weights, placement, select, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.folding import Folding
from lightning_peft.core.graft import Graft, Grafted, grafts, owned_by
from lightning_peft.core.hosts import check_has_shapes, check_takes_hooks
from lightning_peft.core.nested import pad_rows
from lightning_peft.core.pattern import matcher, matches_noted
from lightning_peft.core.rates import ADDED, Rates
from lightning_peft.core.reach import reached
from lightning_peft.core.tuning import Tuning
from lightning_peft.core.twin import Twin

G = TypeVar("G", bound=Graft)
M = TypeVar("M")
_FEW = 16


@dataclass(eq=False, kw_only=True)
class TuningMethod:
    """Freezes a backbone, adds what is to be trained, and can remove all of it again.

    Several methods on one backbone add up: the first one freezes. A task head (what lies outside the base model of a
    model that is no language model) is trained beside them.

    Args:
        backbone: where the backbone is in the module, as a dotted name; None: its one pretrained model.
        also_train: a regex for names of further parameters of the backbone to train.
        exclude: a regex for names of modules and parameters that this method leaves alone.
        backbone_mode: whether dropout of the frozen backbone is active in training; BatchNorm statistics never move.
            Of several methods, one that says 'train' is enough.
        keep_fp32: store what trains in fp32 even where the Trainer or the backbone's checkpoint says half precision.
        name: of the delta, so that a backbone can have several of one method; letters, digits, _ and -. Methods of one
            name are one delta. A named delta has copies of its own of what it trains of the backbone's tensors, such as
            biases and the task head. None: the delta goes by the name of its method in small letters.
    """

    backbone: str | None = None
    also_train: str | None = None
    exclude: str | None = None
    backbone_mode: Literal["train", "eval"] = "eval"
    keep_fp32: bool = True
    name: str | None = None

    kind: ClassVar[str] = ""
    """What sort of tensors it adds: weights, biases, prompts, head ..."""
    trains: ClassVar[str] = ""
    """What it trains, in a few words, for tables."""
    paper: ClassVar[str] = ""
    """Authors, year and arXiv number."""
    advised: ClassVar[Rates] = ADDED
    """The learning rates that it recommends for what it trains and for a head, under AdamW, and where they are from."""
    may_change: ClassVar[frozenset[str]] = frozenset({"backbone", "backbone_mode", "keep_fp32", "name"})
    """Arguments that may differ between a delta file and the module that loads it."""
    needs: ClassVar[frozenset[str]] = frozenset({compatibility.GRADIENTS})
    """What it counts on that another method on the same backbone may break; the words are those of `together`."""
    breaks: ClassVar[frozenset[str]] = frozenset()
    """What other methods on the same backbone cannot count on any more."""
    shards: ClassVar[bool] = True
    """Whether it works under strategies that shard parameters."""
    keeps_originals: ClassVar[bool] = True
    """Whether the values of base tensors trained in place are kept, so that `remove` can give them back."""
    twin: ClassVar[Twin | None] = None
    """What adapters of PEFT call it, where they hold the same tensors."""

    def advice(self) -> Rates:
        """Return the learning rates that it recommends with these arguments; `advised` are those of the defaults."""
        return self.advised

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach grafts to the frozen backbone; return the names of its own parameters that are to be trained."""
        raise NotImplementedError

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch as the backbone gets it."""
        return batch

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return the penalty that is added to the loss of each training batch, or None."""
        return None

    def expect(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Bring the method's grafts into the form of saved tensors before these are loaded, where it has several forms.

        Args:
            backbone: the tuned backbone.
            tensors: what was saved of it, by names below the backbone.
        """

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Return the optimizer options of the trained parameter ``name`` of the backbone, where it has some of its own.

        ``lr_ratio`` multiplies the learning rate of its group; every other name is an option of the optimizer, such as
        ``lr`` and ``weight_decay``.
        """
        return {}

    @property
    def learns(self) -> bool:
        """Whether an optimizer trains something of it."""
        return True

    @property
    def delta(self) -> str:
        """The name of the delta that this method is of."""
        return self.name or type(self).__name__.lower()

    @property
    def key(self) -> str:
        """The name of this method in the backbone's record, and of its grafts in their hosts."""
        kind = type(self).__name__.lower()
        return kind if self.name is None else f"{kind}_{self.name}"

    @property
    def keys(self) -> frozenset[str]:
        """The names in the backbone's record of the methods that this one applies."""
        return frozenset({self.key})

    def init_args(self) -> dict[str, Any]:
        """Return the arguments that rebuild this method, as plain values."""
        found = {field.name: vars(self)[field.name] for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, str) else value for name, value in found.items()}

    def apply(self, model: nn.Module) -> None:
        """Freeze the backbone of ``model`` and add what this method trains. On any error nothing has changed.

        Raises:
            TuningError: an argument is out of range, the method is applied already or does not fit the backbone, or the
                model is compiled or scripted, or lazy.
        """
        arguments.check_arguments(self)
        self._check_name()
        backbone = select.backbone_of(model, self.backbone)
        for module in dict.fromkeys((model, backbone)):
            check_takes_hooks(module)
        check_has_shapes(backbone)
        tuning = Tuning.of(backbone) or Tuning.begin(backbone)
        if self.key in tuning.methods:
            raise TuningError(
                f"{type(self).__name__} is applied to this {type(backbone).__name__} already"
                f"{'' if self.name is None else f' as {self.name!r}'}: give this one another name=, or remove that one."
            )
        try:
            with owned_by(self.key, tuning.switch), matches_noted() as matched:
                self._check_exclude(backbone)
                own = set(self.graft(backbone))
                pad_rows(backbone, self.key)
                trained = self._kept({*own, *self._head(backbone), *self._also(backbone)})
                placement.check_trainable(backbone, trained)
                for place in grafts(backbone, owner=self.key):
                    if place.graft.weights:
                        placement.check_readable(place.host, type(place.graft).__name__)
                tuning.add(backbone, self.key, self, trained, self.keeps_originals)
            given = {name: value for name, value in self.init_args().items() if isinstance(value, str)}
            tuning.matched[self.key] = {name: [*matched[text]] for name, text in given.items() if text in matched}
            compatibility.check_compatible(backbone, tuning, tuning.switch.off)
        except BaseException:
            tuning.undo(backbone, self.key)
            raise
        if self.keep_fp32:
            master_weights.hold_fp32(backbone)

    def remove(self, model: nn.Module) -> None:
        """Give the backbone back as it was before `apply`: output, names and ``requires_grad``, bit for bit.

        Raises:
            TuningError: this method is not applied, or it trained tensors in place and kept no copies.
        """
        self.applied_to(model)
        backbone = self._tuned(model)
        tuning = Tuning.of(backbone)
        assert tuning is not None
        tuning.undo(backbone, self.key)
        master_weights.release(backbone)

    def is_applied(self, model: nn.Module) -> bool:
        """Tell whether `apply` has been done to ``model``."""
        return self.applied(model) is not None

    def applied(self, module: nn.Module) -> Self | None:
        """Return the method of this class that is applied to the backbone of ``module``: this one, or its equal."""
        tuning = Tuning.of(self._tuned(module))
        method = tuning.methods.get(self.key) if tuning is not None else None
        return method if isinstance(method, type(self)) else None

    def applied_to(self, model: nn.Module) -> Self:
        """Return the method of this class that is applied to the backbone of ``model``: this one, or its equal.

        Raises:
            TuningError: none is.
        """
        method = self.applied(model)
        if method is None:
            kind = type(self._tuned(model)).__name__
            raise TuningError(f"{type(self).__name__} is not applied to this {kind}: apply it first.")
        return method

    def own_grafts(self, model: nn.Module, kind: type[G]) -> list[Grafted[G]]:
        """Return the grafts of this kind that this method has attached to the backbone of ``model``, with their places.

        Raises:
            TuningError: the method is not applied to it.
        """
        self.applied_to(model)
        found = grafts(self._tuned(model), owner=self.key)
        return [cast(Grafted[G], place) for place in found if isinstance(place.graft, kind)]

    def finds_backbone(self, module: nn.Module) -> bool:
        """Tell whether the backbone is there already; some modules build it in ``configure_model``."""
        if self.backbone is not None:
            return self.backbone in dict(module.named_modules())
        return bool(structure.pretrained_models(module))

    def without_excluded(self, modules: dict[str, M]) -> dict[str, M]:
        """Return the modules that ``exclude`` does not name."""
        kept = self._kept(modules)
        return {name: module for name, module in modules.items() if name in kept}

    def _check_name(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise TuningError(f"name={self.name!r} is no name of a delta: take letters, digits, _ and -.")

    def _tuned(self, model: nn.Module) -> nn.Module:
        """Return ``model`` if it is a tuned backbone itself, else the backbone in it."""
        return model if Tuning.of(model) is not None else select.backbone_of(model, self.backbone)

    def _head(self, backbone: nn.Module) -> list[str]:
        """Return the parameters of the head, but those of a layer that this method updates instead."""
        places = [place for place in grafts(backbone, owner=self.key) if isinstance(place.graft, Folding)]
        layers = {place.path for place in places}
        layers |= {f"{p.path}.{weight}".lstrip(".").rpartition(".")[0] for p in places for weight in p.graft.weights}
        head = [name for name in anatomy.head_names(backbone) if name.rpartition(".")[0] not in layers]
        # A network of many layers, such as a decoder of depths, may have some that its configuration does not use.
        return reached(backbone, head) if len(head) > _FEW else head

    def _also(self, backbone: nn.Module) -> list[str]:
        if self.also_train is None:
            return []
        names = dict(backbone.named_parameters(remove_duplicate=False))  # a tied weight goes by each of its names
        first = {id(parameter): name for name, parameter in backbone.named_parameters()}
        chosen = [first[id(names[name])] for name in select.match(names, self.also_train)[self.also_train]]
        if not chosen:
            raise TuningError(
                f"also_train={self.also_train!r} matches no parameter of {type(backbone).__name__}"
                f"{select.near(self.also_train, names)}."
            )
        return chosen

    def _check_exclude(self, backbone: nn.Module) -> None:
        names = [name for name, _ in (*backbone.named_modules(), *backbone.named_parameters()) if name]
        if self.exclude is not None and self._kept(names) == set(names):
            raise TuningError(
                f"exclude={self.exclude!r} matches no module or parameter of {type(backbone).__name__}"
                f"{select.near(self.exclude, names)}."
            )

    def _kept(self, names: Iterable[str]) -> set[str]:
        if self.exclude is None:
            return set(names)
        return {name for name in names if not matcher(self.exclude).fullmatch(name)}
