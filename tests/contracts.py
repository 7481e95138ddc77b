"""The classes of the contract: what tries methods elsewhere takes all of them from here, with their small arguments."""

import copy
from functools import cache

from lightning_peft import Method
from lightning_peft.core.packages import classes_in
from lightning_peft.methods import every_method
from tests.contract import MethodContract
from tests.fresh import ROOT


@cache
def contracts() -> dict[str, type[MethodContract]]:
    """Return name -> class, such as ``test_lora.TestLoRA``, in the order of files and names."""
    found = classes_in("tests.methods", [str(ROOT / "tests/methods")], MethodContract)
    found.sort(key=lambda kind: (kind.__module__, kind.__name__))
    return {f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}": kind for kind in found if hasattr(kind, "method")}


def example(name: str) -> Method:
    """Return a small example of a method: that of the first class of its contract, else its defaults."""
    methods = (kind.method for kind in contracts().values())
    return copy.deepcopy(next((method for method in methods if type(method).__name__ == name), every_method()[name]()))


def without_dropout(kind: type[MethodContract], mode: str) -> Method:
    """Return the method of a class, its backbone in a mode and its own dropout off."""
    method = copy.deepcopy(kind.method)
    method.backbone_mode = mode
    if hasattr(method, "dropout") and mode == "eval":
        method.dropout = 0.0
    return method
