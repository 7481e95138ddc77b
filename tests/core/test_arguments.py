"""Arguments of all methods: what a field does not take is refused in one sentence, before anything is changed."""

import dataclasses
import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from torch import nn

import lightning_peft
from lightning_peft import LoRA, Method, PrefixTuning, TuningError
from lightning_peft.core.arguments import Bounds, bounds_of, check_arguments
from lightning_peft.core.tuning import Tuning

EXPORTED = [getattr(lightning_peft, name) for name in lightning_peft.__all__]
METHODS = sorted((m for m in EXPORTED if isinstance(m, type) and issubclass(m, Method)), key=lambda m: m.__name__)
ALONE = [
    method
    for method in METHODS
    if not any(f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(method))
]
"""Those that can be made without an argument, and so without another method."""
FIELDS = [(method, field.name) for method in ALONE for field in dataclasses.fields(method)]


def declared(method: type, name: str) -> str:
    """Return the name of a field behind that of the class that declares it first."""
    owner = next(base for base in reversed(method.__mro__) if name in vars(base).get("__annotations__", {}))
    return f"{owner.__name__}.{name}"


OF_THE_MODEL = {
    "Adapter.leave_out", "CoCoOp.reduction", "IVLP.depth", "IVLP.image_depth", "LoRA.alpha", "LoRA.alpha_pattern",
    "LoRA.r", "LoRA.rank_pattern", "MaPLe.depth", "PartialK.k", "VPT.num_deep_layers",
    *(declared(m, name) for m, name in FIELDS if name == "layers" and bounds_of(m, name) == Bounds()),
}  # fmt: skip
"""Numbers whose bounds are the model's, or are told with the place in it; indices of blocks may be."""
ANY = {"DiffPruning.alpha", "DiffPruning.high", "DiffPruning.low", "PromptTuning.seed", "SideTuning.alpha_init"}
"""Numbers that may be any, or are bound by each other."""


def options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def numbers_in(hint: Any) -> set[type]:
    """Return the kinds of numbers that a field takes, alone or in a list."""
    inner = [part for option in options(hint) for part in (get_args(option) or (option,))]
    return {int, float} & set(inner)


def beyond(bounds: Bounds, kind: type) -> list[float]:
    """Return the numbers next to the bounds that are outside of them."""
    ends = [] if bounds.at_least is None else [bounds.at_least - 1, math.nextafter(bounds.at_least, -math.inf)]
    ends += [end for end in (bounds.above, bounds.below) if end is not None]
    return [*(kind(end) for end in ends if kind(end) == end), *([math.nan, math.inf, -math.inf] * (kind is float))]


def nearest(bounds: Bounds, kind: type) -> list[float]:
    """Return the numbers next to the bounds that are within them."""
    ends = [] if bounds.at_least is None else [bounds.at_least]
    ends += [] if bounds.above is None else [math.nextafter(bounds.above, math.inf)]
    ends += [] if bounds.below is None else [math.nextafter(bounds.below, -math.inf)]
    return [kind(end) for end in ends if kind(end) == end] or [kind(1)]


def placed(numbers: list[float], kind: type, hint: Any) -> list[Any]:
    """Return the numbers as a field takes them: alone, in a list, in a dictionary."""
    values: list[Any] = []
    for option in options(hint):
        values += numbers if option is kind else []
        values += [[1, number] for number in numbers] if option == list[kind] else []
        values += [{"query": number} for number in numbers] if option == dict[str, kind] else []
    return values


def wrong(hint: Any, bounds: Bounds) -> list[Any]:
    """Return values that a field does not take."""
    values = [object(), *([] if NoneType in options(hint) else [None])]
    for option in options(hint):
        values += ["no such choice", 7] if get_origin(option) is Literal else []
        values += [[object()]] if get_origin(option) is list else []
        values += (
            [[], ["no such choice"]] if get_origin(get_args(option)[-1] if get_args(option) else 0) is Literal else []
        )
        values += [{"query": object()}] if get_origin(option) is dict and get_args(option)[-1] is not Any else []
        values += [True, "1"] if option in (int, float) else []
        values += [1, "yes"] if option is bool else []
    return values + [value for kind in numbers_in(hint) for value in placed(beyond(bounds, kind), kind, hint)]


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_what_a_field_does_not_take_is_refused(method: type[Method], name: str) -> None:
    hint, bounds = get_type_hints(method)[name], bounds_of(method, name)
    for value in wrong(hint, bounds):
        if isinstance(value, str) and str in options(hint):
            continue
        model = nn.Linear(2, 2)
        with pytest.raises(TuningError) as refused:
            method(**{name: value}).apply(model)
        said = str(refused.value)
        assert said.startswith(f"{method.__name__}'s {name}={value!r} ")
        assert said.count(": take ") + said.count(": give ") == 1
        assert said.endswith(".")
        assert "\n" not in said
        assert Tuning.of(model) is None


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_what_a_field_takes_is_accepted(method: type[Method], name: str) -> None:
    hint, bounds = get_type_hints(method)[name], bounds_of(method, name)
    values = [value for kind in numbers_in(hint) for value in placed(nearest(bounds, kind), kind, hint)]
    for option in options(hint):
        values += get_args(option) if get_origin(option) is Literal else [None] if option is NoneType else []
        values += {str: ["text"], bool: [False, True], list[str]: [["text"], ("text",), []]}.get(option, [])
    assert values or get_origin(hint) is not None
    for value in values:
        check_arguments(method(**{name: value}))


def test_numbers_have_bounds() -> None:
    """A new field says which numbers it takes, or is one of those whose bounds depend on the model."""
    unbound = {
        declared(method, name)
        for method, name in FIELDS
        if numbers_in(get_type_hints(method)[name]) and bounds_of(method, name) == Bounds()
    }
    assert unbound == OF_THE_MODEL | ANY


def test_a_class_that_changes_a_default_keeps_the_bounds() -> None:
    @dataclasses.dataclass(eq=False, kw_only=True)
    class Long(PrefixTuning):
        num_virtual_tokens: int = 100

    class Longer(Long):
        pass

    for method in (Long, Longer):
        check_arguments(method())
        with pytest.raises(TuningError, match=f"{method.__name__}'s num_virtual_tokens=0 is no prefix: take 1 or more"):
            check_arguments(method(num_virtual_tokens=0))


def test_what_is_changed_afterwards_is_checked_too() -> None:
    method = LoRA()
    method.dropout = 1.0
    with pytest.raises(TuningError, match=r"LoRA's dropout=1\.0 is no probability below 1: take 0 or more"):
        method.apply(nn.Linear(2, 2))
