"""Parameter-efficient tuning as PyTorch Lightning plug-ins."""

from lightning_peft.delta import collect, convert, load_delta, merge, read_delta, save_delta
from lightning_peft.errors import TuningError
from lightning_peft.graft import Graft, attach, detach
from lightning_peft.method import Method
from lightning_peft.methods.bitfit import BitFit, BitFitMixin
from lightning_peft.methods.full_fine_tuning import FullFineTuning, FullFineTuningMixin
from lightning_peft.methods.linear_probe import LinearProbe, LinearProbeMixin
from lightning_peft.methods.lora import LoRA, LoRAMixin
from lightning_peft.methods.prompt_tuning import PromptTuning, PromptTuningMixin
from lightning_peft.mixin import MethodMixin
from lightning_peft.rebuild import from_delta, load_from_checkpoint

__version__ = "0.1.0"

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
    "PromptTuning",
    "PromptTuningMixin",
    "TuningError",
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
