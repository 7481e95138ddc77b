"""Adapters of Hugging Face PEFT, both ways; PEFT itself need not be installed."""

from lightning_peft.interop.export import to_peft
from lightning_peft.interop.facts import Facts
from lightning_peft.interop.load import from_peft
from lightning_peft.interop.wrapped import convert_wrapped

__all__ = ["Facts", "convert_wrapped", "from_peft", "to_peft"]
