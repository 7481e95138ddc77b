"""One converter for each type of adapter that PEFT and this package both have."""

from lightning_peft.interop.converters.base import Converter
from lightning_peft.interop.converters.ia3 import IA3Converter
from lightning_peft.interop.converters.lora import LoRAConverter
from lightning_peft.interop.converters.prefix import PrefixConverter
from lightning_peft.interop.converters.prompt import PromptConverter, PTuningConverter
from lightning_peft.interop.converters.tokens import TokensConverter
from lightning_peft.interop.converters.twin import twin_converters

CONVERTERS: tuple[Converter, ...] = (
    LoRAConverter(),
    IA3Converter(),
    PromptConverter(),
    PTuningConverter(),
    PrefixConverter(),
    TokensConverter(),
    *twin_converters(),
)
"""A type whose tensors are those of a method is declared by the method; any other is a file, and a place here."""

__all__ = ["CONVERTERS", "Converter"]
