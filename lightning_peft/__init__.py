"""Parameter-efficient tuning as PyTorch Lightning plug-ins.

Names are imported when they are first used, so that ``lightning-peft --help`` needs neither torch nor lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_peft.data import StdlibDocstrings, TextClassificationData
    from lightning_peft.delta import collect, convert, load_delta, read_delta, save_delta
    from lightning_peft.errors import TuningError
    from lightning_peft.folding import merge
    from lightning_peft.graft import Graft, attach, detach
    from lightning_peft.method import Method
    from lightning_peft.methods.bitfit import BitFit, BitFitMixin
    from lightning_peft.methods.full_fine_tuning import FullFineTuning, FullFineTuningMixin
    from lightning_peft.methods.linear_probe import LinearProbe, LinearProbeMixin
    from lightning_peft.methods.lora import LoRA, LoRAMixin
    from lightning_peft.methods.prompt_tuning import PromptTuning, PromptTuningMixin
    from lightning_peft.mixin import MethodMixin
    from lightning_peft.rebuild import from_delta, load_from_checkpoint
    from lightning_peft.reports import PredictionWriter, TuningReport
    from lightning_peft.tasks import TextClassification

_EXPORTS = {
    "data": ["StdlibDocstrings", "TextClassificationData"],
    "delta": ["collect", "convert", "load_delta", "read_delta", "save_delta"],
    "errors": ["TuningError"],
    "folding": ["merge"],
    "graft": ["Graft", "attach", "detach"],
    "method": ["Method"],
    "methods.bitfit": ["BitFit", "BitFitMixin"],
    "methods.full_fine_tuning": ["FullFineTuning", "FullFineTuningMixin"],
    "methods.linear_probe": ["LinearProbe", "LinearProbeMixin"],
    "methods.lora": ["LoRA", "LoRAMixin"],
    "methods.prompt_tuning": ["PromptTuning", "PromptTuningMixin"],
    "mixin": ["MethodMixin"],
    "rebuild": ["from_delta", "load_from_checkpoint"],
    "reports": ["PredictionWriter", "TuningReport"],
    "tasks": ["TextClassification"],
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "BitFit",
    "BitFitMixin",
    "FullFineTuning",
    "FullFineTuningMixin",
    "Graft",
    "LinearProbe",
    "LinearProbeMixin",
    "LoRA",
    "LoRAMixin",
    "Method",
    "MethodMixin",
    "PredictionWriter",
    "PromptTuning",
    "PromptTuningMixin",
    "StdlibDocstrings",
    "TextClassification",
    "TextClassificationData",
    "TuningError",
    "TuningReport",
    "attach",
    "collect",
    "convert",
    "detach",
    "from_delta",
    "load_delta",
    "load_from_checkpoint",
    "merge",
    "read_delta",
    "save_delta",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
