"""One converter for each type of adapter that PEFT and this package both have.

A type whose tensors are those of a method is declared by the method (`core.twin`); any other is a file here.
"""

from lightning_peft.core.packages import classes_in
from lightning_peft.interop.converters.base import Converter
from lightning_peft.interop.converters.twin import twin_converters

_OWN = [kind() for kind in classes_in(__name__, __path__, Converter) if "peft_type" in vars(kind)]
CONVERTERS: dict[str, Converter] = {converter.peft_type: converter for converter in (*_OWN, *twin_converters())}
"""Type of an adapter -> its converter."""

__all__ = ["CONVERTERS", "Converter"]
