"""Parameter-efficient tuning as PyTorch Lightning plug-ins.

Names are imported when they are first used, so that ``lightning-peft --help`` needs neither torch nor lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_peft.core.delta import collect, save_delta
    from lightning_peft.core.delta_file import read_delta
    from lightning_peft.core.delta_load import convert, load_delta
    from lightning_peft.core.errors import TuningError
    from lightning_peft.core.folding import merge
    from lightning_peft.core.graft import Graft, attach, detach
    from lightning_peft.data import (
        CausalLMData,
        CLIPData,
        ClozeClassificationData,
        ColouredShapes,
        ContinualData,
        Digits,
        DomainData,
        ImageClassificationData,
        InstructionCausalLMData,
        InstructionSeq2SeqData,
        KnowledgeProbingData,
        LMAdaptationData,
        MultiTaskData,
        QuestionAnsweringData,
        Seq2SeqData,
        StdlibDocstrings,
        TextClassificationData,
        TokenClassificationData,
    )
    from lightning_peft.methods.adapter import Adapter, AdapterMixin
    from lightning_peft.methods.bitfit import BitFit, BitFitMixin
    from lightning_peft.methods.cocoop import CoCoOp, CoCoOpMixin
    from lightning_peft.methods.coop import CoOp, CoOpMixin
    from lightning_peft.methods.dapl import DAPL, DAPLMixin
    from lightning_peft.methods.diff_pruning import DiffPruning, DiffPruningMixin
    from lightning_peft.methods.full_fine_tuning import FullFineTuning, FullFineTuningMixin
    from lightning_peft.methods.ia3 import IA3, IA3Mixin
    from lightning_peft.methods.ivlp import IVLP, IVLPMixin
    from lightning_peft.methods.l2p import L2P, L2PMixin
    from lightning_peft.methods.ladder_side_tuning import LadderSideTuning, LadderSideTuningMixin
    from lightning_peft.methods.linear_probe import LinearProbe, LinearProbeMixin
    from lightning_peft.methods.lora import LoRA, LoRAMixin
    from lightning_peft.methods.maple import MaPLe, MaPLeMixin
    from lightning_peft.methods.mlp_head import MLPHead, MLPHeadMixin
    from lightning_peft.methods.p_tuning import PTuning, PTuningMixin
    from lightning_peft.methods.p_tuning_v2 import PTuningV2, PTuningV2Mixin
    from lightning_peft.methods.partial_k import PartialK, PartialKMixin
    from lightning_peft.methods.prefix_tuning import PrefixTuning, PrefixTuningMixin
    from lightning_peft.methods.prompt_ensemble import PromptEnsemble, PromptEnsembleMixin
    from lightning_peft.methods.prompt_tuning import PromptTuning, PromptTuningMixin
    from lightning_peft.methods.side_tuning import SideTuning, SideTuningMixin
    from lightning_peft.methods.tiny_tl import TinyTL, TinyTLMixin
    from lightning_peft.methods.vpt import VPT, VPTMixin
    from lightning_peft.methods.warp import WARP, WARPMixin
    from lightning_peft.reports import BiasReport, NearestWords, PredictionWriter, ResultRows, TuningReport
    from lightning_peft.tasks import (
        CausalLM,
        CLIPClassification,
        ClozeClassification,
        ContinualClassification,
        DomainAdaptation,
        ImageClassification,
        KnowledgeProbing,
        LMAdaptation,
        MultiTask,
        NearestDemonstrations,
        PromptedClassification,
        PromptedGeneration,
        QuestionAnswering,
        Seq2Seq,
        TextClassification,
        TokenClassification,
    )
    from lightning_peft.training.ema import DeltaEMA
    from lightning_peft.training.method import Method
    from lightning_peft.training.mixin import MethodMixin
    from lightning_peft.training.rebuild import from_delta, load_from_checkpoint
    from lightning_peft.training.requeue import SafeRequeue
    from lightning_peft.training.strategy import FullyShard
    from lightning_peft.training.throughput import Throughput

_EXPORTS = {
    "data": [
        "CLIPData",
        "CausalLMData",
        "ClozeClassificationData",
        "ColouredShapes",
        "ContinualData",
        "Digits",
        "DomainData",
        "ImageClassificationData",
        "InstructionCausalLMData",
        "InstructionSeq2SeqData",
        "KnowledgeProbingData",
        "LMAdaptationData",
        "MultiTaskData",
        "QuestionAnsweringData",
        "Seq2SeqData",
        "StdlibDocstrings",
        "TextClassificationData",
        "TokenClassificationData",
    ],
    "core.delta": ["collect", "save_delta"],
    "core.delta_file": ["read_delta"],
    "core.delta_load": ["convert", "load_delta"],
    "training.ema": ["DeltaEMA"],
    "core.errors": ["TuningError"],
    "core.folding": ["merge"],
    "core.graft": ["Graft", "attach", "detach"],
    "training.method": ["Method"],
    "methods.adapter": ["Adapter", "AdapterMixin"],
    "methods.bitfit": ["BitFit", "BitFitMixin"],
    "methods.cocoop": ["CoCoOp", "CoCoOpMixin"],
    "methods.coop": ["CoOp", "CoOpMixin"],
    "methods.dapl": ["DAPL", "DAPLMixin"],
    "methods.diff_pruning": ["DiffPruning", "DiffPruningMixin"],
    "methods.full_fine_tuning": ["FullFineTuning", "FullFineTuningMixin"],
    "methods.ia3": ["IA3", "IA3Mixin"],
    "methods.ivlp": ["IVLP", "IVLPMixin"],
    "methods.l2p": ["L2P", "L2PMixin"],
    "methods.ladder_side_tuning": ["LadderSideTuning", "LadderSideTuningMixin"],
    "methods.linear_probe": ["LinearProbe", "LinearProbeMixin"],
    "methods.lora": ["LoRA", "LoRAMixin"],
    "methods.maple": ["MaPLe", "MaPLeMixin"],
    "methods.mlp_head": ["MLPHead", "MLPHeadMixin"],
    "methods.p_tuning_v2": ["PTuningV2", "PTuningV2Mixin"],
    "methods.partial_k": ["PartialK", "PartialKMixin"],
    "methods.prefix_tuning": ["PrefixTuning", "PrefixTuningMixin"],
    "methods.p_tuning": ["PTuning", "PTuningMixin"],
    "methods.prompt_ensemble": ["PromptEnsemble", "PromptEnsembleMixin"],
    "methods.warp": ["WARP", "WARPMixin"],
    "methods.prompt_tuning": ["PromptTuning", "PromptTuningMixin"],
    "methods.side_tuning": ["SideTuning", "SideTuningMixin"],
    "methods.tiny_tl": ["TinyTL", "TinyTLMixin"],
    "methods.vpt": ["VPT", "VPTMixin"],
    "training.mixin": ["MethodMixin"],
    "training.rebuild": ["from_delta", "load_from_checkpoint"],
    "training.requeue": ["SafeRequeue"],
    "reports": ["BiasReport", "NearestWords", "PredictionWriter", "ResultRows", "TuningReport"],
    "training.strategy": ["FullyShard"],
    "tasks": [
        "CLIPClassification",
        "CausalLM",
        "ClozeClassification",
        "ContinualClassification",
        "DomainAdaptation",
        "ImageClassification",
        "KnowledgeProbing",
        "LMAdaptation",
        "MultiTask",
        "NearestDemonstrations",
        "PromptedClassification",
        "PromptedGeneration",
        "QuestionAnswering",
        "Seq2Seq",
        "TextClassification",
        "TokenClassification",
    ],
    "training.throughput": ["Throughput"],
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "DAPL",
    "IA3",
    "IVLP",
    "L2P",
    "VPT",
    "WARP",
    "Adapter",
    "AdapterMixin",
    "BiasReport",
    "BitFit",
    "BitFitMixin",
    "CLIPClassification",
    "CLIPData",
    "CausalLM",
    "CausalLMData",
    "ClozeClassification",
    "ClozeClassificationData",
    "CoCoOp",
    "CoCoOpMixin",
    "CoOp",
    "CoOpMixin",
    "ColouredShapes",
    "ContinualClassification",
    "ContinualData",
    "DAPLMixin",
    "DeltaEMA",
    "DiffPruning",
    "DiffPruningMixin",
    "Digits",
    "DomainAdaptation",
    "DomainData",
    "FullFineTuning",
    "FullFineTuningMixin",
    "FullyShard",
    "Graft",
    "IA3Mixin",
    "IVLPMixin",
    "ImageClassification",
    "ImageClassificationData",
    "InstructionCausalLMData",
    "InstructionSeq2SeqData",
    "KnowledgeProbing",
    "KnowledgeProbingData",
    "L2PMixin",
    "LMAdaptation",
    "LMAdaptationData",
    "LadderSideTuning",
    "LadderSideTuningMixin",
    "LinearProbe",
    "LinearProbeMixin",
    "LoRA",
    "LoRAMixin",
    "MLPHead",
    "MLPHeadMixin",
    "MaPLe",
    "MaPLeMixin",
    "Method",
    "MethodMixin",
    "MultiTask",
    "MultiTaskData",
    "NearestDemonstrations",
    "NearestWords",
    "PTuning",
    "PTuningMixin",
    "PTuningV2",
    "PTuningV2Mixin",
    "PartialK",
    "PartialKMixin",
    "PredictionWriter",
    "PrefixTuning",
    "PrefixTuningMixin",
    "PromptEnsemble",
    "PromptEnsembleMixin",
    "PromptTuning",
    "PromptTuningMixin",
    "PromptedClassification",
    "PromptedGeneration",
    "QuestionAnswering",
    "QuestionAnsweringData",
    "ResultRows",
    "SafeRequeue",
    "Seq2Seq",
    "Seq2SeqData",
    "SideTuning",
    "SideTuningMixin",
    "StdlibDocstrings",
    "TextClassification",
    "TextClassificationData",
    "Throughput",
    "TinyTL",
    "TinyTLMixin",
    "TokenClassification",
    "TokenClassificationData",
    "TuningError",
    "TuningReport",
    "VPTMixin",
    "WARPMixin",
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
