"""Finds the parameters of a model that nothing it gives depends on, by a run with gradients on the meta device.

Such are a pooler that the classifier does not read, a last norm behind the layer from which features are taken, or the
embedding of what is not among the usual inputs. A method that trains all of a kind leaves them out, since they would
get no gradient. Where the model cannot be run without numbers nothing is known, and nothing is left out.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, cache_argument, image_structure, placement, structure
from lightning_peft.core.attention_probe import inputs_on_meta
from lightning_peft.core.empty_inputs import empty_input_of, patches_of
from lightning_peft.core.graft import Graft
from lightning_peft.core.meta_run import depended_on, resting


class _Reach(NamedTuple):
    """Names of parameters that no output depends on, and of those that it depends on by another name alone.

    Attributes:
        without: of the first.
        elsewhere: of the second: a module that is not called has them tied to those of one that is, as in Zamba2.
    """

    without: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()


_KNOWN: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], _Reach]] = WeakKeyDictionary()
_LENGTH = 16
_MAIN = {"input_ids", "pixel_values", "input_values", "input_features"}
_NO_RESULT = ("loss", *cache_argument.NAMES, "hidden_states", "attentions")


def unreached(backbone: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that no output of a transformers model depends on; none where it is unknown.

    What is not run at all counts only where the model has all its main inputs: the tower of images of a model that is
    given a text alone is needed elsewhere. What is found is kept as long as the model has the same modules.
    """
    return _reach(backbone).without


def _reach(backbone: nn.Module) -> _Reach:
    modules = anatomy.without_grafts(backbone)
    known = _KNOWN.get(backbone)
    if known is None or known[0] != tuple(modules):
        known = _KNOWN[backbone] = (tuple(modules), _by_a_run(backbone, modules))
    return known[1]


def _by_a_run(backbone: nn.Module, modules: dict[str, nn.Module]) -> _Reach:
    inputs = _inputs(backbone) if structure.is_pretrained(backbone) else {}
    seen = _Seen({backbone}, set())
    with placement.undispatched(backbone):
        used = seen.run(backbone, inputs)
        if used is None and "pixel_values" in inputs:  # strides may leave nothing of a small image
            small = inputs["pixel_values"]
            used = seen.run(backbone, inputs | {"pixel_values": small.new_empty(*small.shape[:2], 256, 256)})
        if used is None and "pixel_values" in inputs and structure.gives_image_features(backbone):
            image = {"pixel_values": inputs.pop("pixel_values")}
            features, used = seen.run(_Images(backbone), image), seen.run(backbone, inputs)
            if used is not None and features is not None:
                used |= {name.removeprefix("model.") for name in features}
                inputs |= image
    if used is None:
        return _Reach()
    whole = {*structure.arguments_of(backbone)}.isdisjoint(_MAIN - inputs.keys())
    inside = {module for one in seen.unknown for module in one.modules()}
    reached: set[int] = set()
    names: dict[str, int] = {}
    idle: set[str] = set()
    for path, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}".lstrip(".")
            names[full] = id(parameter)
            if full in used or module in inside or not (whole or module in seen.called):
                reached.add(id(parameter))
            else:
                idle.add(full)
    without = frozenset(full for full, parameter in names.items() if parameter not in reached)
    return _Reach(without, frozenset(idle - without))


def reached(backbone: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of modules and parameters that an output depends on; all of them where that would be none."""
    names, found = list(names), _reach(backbone)
    if not found.without and not found.elsewhere:
        return names
    every = [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
    own = {name: [full for full in every if full == name or full.startswith(f"{name}.")] for name in names}
    # What hangs on a module needs its call; a parameter is trained under whatever name.
    out = {name: found.without if own[name] == [name] else found.without | found.elsewhere for name in names}
    return [name for name in names if not own[name] or not out[name].issuperset(own[name])] or names


def are_idle(backbone: nn.Module, layers: Iterable[str]) -> bool:
    """Tell whether no output depends on the weights of layers, as of MRA's attention without its kernel for GPUs."""
    return unreached(backbone).issuperset(f"{name}.weight" for name in layers)


def depends_on(backbone: nn.Module, name: str) -> bool | None:
    """Tell whether an output of a tuned model depends on a parameter; None: it cannot be run without numbers."""
    if placement.is_dispatched(backbone):  # its forward passes are accelerate's, and grafts take part in these
        return None
    used = depended_on(backbone, lambda out: list(_given_by(out)), None, **_inputs(backbone))
    return None if used is None else name in used


class _Images(nn.Module):
    """A model of text and images that is asked for what its text part gets of an image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Any:
        """Return the features, and not what the tower gives besides."""
        return structure.image_features_of(self.model, pixel_values)


class _Seen(NamedTuple):
    """The modules that were called, and those that could not be run without numbers."""

    called: set[nn.Module]
    unknown: set[nn.Module]

    def run(self, part: nn.Module, inputs: dict[str, Tensor]) -> set[str] | None:
        """Return the names of the parameters on which the results of a part depend; None: it cannot be run."""
        called: set[nn.Module] = set()
        unknown: set[nn.Module] = set()
        watch = partial(_watching, called, unknown)
        used = depended_on(part, lambda out: list(_given_by(out)), watch, **inputs) if inputs else None
        if used is not None:
            self.called.update(called)
            self.unknown.update(unknown)
        return used


def _inputs(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the usual inputs of a model, long enough for those that shorten a text, without values."""
    takes = structure.arguments_of(backbone)
    found = inputs_on_meta(backbone, source=_LENGTH, target=_LENGTH)
    if "pixel_values" in takes and "pixel_values" not in found:
        channels = structure.image_channels(structure.config_of(backbone))
        size = image_structure.stated_image_size(backbone) or (224, 224)
        found["pixel_values"] = torch.empty(1, channels, *size, device="meta")
    if "input_ids" in found and "token_type_ids" in takes:
        found["token_type_ids"] = torch.empty_like(found["input_ids"])
    given = patches_of(backbone)
    if structure.main_input_of(backbone) not in found:
        given = given or empty_input_of(backbone)
    return found | {name: tensor.to("meta") for name, tensor in given.items()}


def _watching(called: set[nn.Module], unknown: set[nn.Module], module: nn.Module) -> Any:
    """Return a forward pass that notes its call, and gives its input where it needs numbers."""
    if isinstance(module, Graft):
        return resting
    return partial(_lenient, called, unknown, module, module.forward)


def _lenient(
    called: set[nn.Module],
    unknown: set[nn.Module],
    module: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    called.add(module)
    try:
        return forward(*args, **kwargs)
    except Exception:  # whatever a foreign module raises without numbers
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None or given.ndim != 3 or not given.is_floating_point():
            raise
        unknown.add(module)
        return given


def _given_by(out: Any) -> Iterator[Tensor]:
    """Yield the tensors that a model gives; the whole outputs of models inside are none of its own."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for name, value in out.items():
            if not name.endswith(_NO_RESULT) and not isinstance(value, dict):
                yield from _given_by(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _given_by(value)
