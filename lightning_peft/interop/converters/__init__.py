"""One converter for each type of adapter that PEFT and this package both have."""

from lightning_peft.interop.converters.base import Converter
from lightning_peft.interop.converters.ia3 import IA3Converter
from lightning_peft.interop.converters.lora import LoRAConverter
from lightning_peft.interop.converters.prefix import PrefixConverter
from lightning_peft.interop.converters.prompt import PromptConverter, PTuningConverter

CONVERTERS: tuple[Converter, ...] = (
    LoRAConverter(),
    IA3Converter(),
    PromptConverter(),
    PTuningConverter(),
    PrefixConverter(),
)
"""A new type is a file with its converter, and a place in this tuple."""

__all__ = ["CONVERTERS", "Converter"]
