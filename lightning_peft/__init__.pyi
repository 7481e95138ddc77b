"""The public names, one line a module: `__init__.py` reads them here, and imports a module when one is first used."""

from lightning_peft.core.delta import collect as collect
from lightning_peft.core.delta import save_delta as save_delta
from lightning_peft.core.delta_file import read_delta as read_delta
from lightning_peft.core.delta_load import convert as convert
from lightning_peft.core.errors import TuningError as TuningError
from lightning_peft.core.folding import merge as merge
from lightning_peft.core.graft import Graft as Graft, attach as attach, detach as detach
from lightning_peft.core.routing import routed as routed
from lightning_peft.core.switching import (
    Delta as Delta,
    activate as activate,
    list_deltas as list_deltas,
    muted as muted,
    prepare as prepare,
    remove_delta as remove_delta,
)
from lightning_peft.data.captioned_images import CaptionedImageData as CaptionedImageData
from lightning_peft.data.chat import ChatData as ChatData
from lightning_peft.data.clip_data import CLIPData as CLIPData
from lightning_peft.data.cloze import (
    ClozeClassificationData as ClozeClassificationData,
    KnowledgeProbingData as KnowledgeProbingData,
)
from lightning_peft.data.coloured_shapes import ColouredShapes as ColouredShapes
from lightning_peft.data.continual import ContinualData as ContinualData
from lightning_peft.data.digits import Digits as Digits
from lightning_peft.data.domain_data import DomainData as DomainData
from lightning_peft.data.generation import CausalLMData as CausalLMData, Seq2SeqData as Seq2SeqData
from lightning_peft.data.image_classification import ImageClassificationData as ImageClassificationData
from lightning_peft.data.instructions import (
    InstructionCausalLMData as InstructionCausalLMData,
    InstructionSeq2SeqData as InstructionSeq2SeqData,
)
from lightning_peft.data.lm_adaptation import LMAdaptationData as LMAdaptationData
from lightning_peft.data.multi_task import MultiTaskData as MultiTaskData
from lightning_peft.data.answer_choice import AnswerChoiceData as AnswerChoiceData
from lightning_peft.data.multiple_choice import MultipleChoiceData as MultipleChoiceData
from lightning_peft.data.preferences import PreferenceData as PreferenceData
from lightning_peft.data.question_answering import QuestionAnsweringData as QuestionAnsweringData
from lightning_peft.data.span_corruption import SpanCorruptionData as SpanCorruptionData
from lightning_peft.data.sentence_pairs import SentencePairsData as SentencePairsData
from lightning_peft.data.stdlib_docstrings import StdlibDocstrings as StdlibDocstrings
from lightning_peft.data.text_classification import TextClassificationData as TextClassificationData
from lightning_peft.data.text_regression import TextRegressionData as TextRegressionData
from lightning_peft.data.token_classification import TokenClassificationData as TokenClassificationData
from lightning_peft.deltas.combine import combine as combine, combine_deltas as combine_deltas
from lightning_peft.deltas.loading import load_delta as load_delta
from lightning_peft.deltas.per_task import PerTask as PerTask
from lightning_peft.deltas.population import Population as Population
from lightning_peft.deltas.scaling import rescale as rescale
from lightning_peft.deltas.to_lora import to_lora as to_lora
from lightning_peft.methods.adapter import Adapter as Adapter, AdapterMixin as AdapterMixin
from lightning_peft.methods.bitfit import BitFit as BitFit, BitFitMixin as BitFitMixin
from lightning_peft.methods.clip_adapter import ClipAdapter as ClipAdapter, ClipAdapterMixin as ClipAdapterMixin
from lightning_peft.methods.cocoop import CoCoOp as CoCoOp, CoCoOpMixin as CoCoOpMixin
from lightning_peft.methods.coda_prompt import CODAPrompt as CODAPrompt, CODAPromptMixin as CODAPromptMixin
from lightning_peft.methods.coop import CoOp as CoOp, CoOpMixin as CoOpMixin
from lightning_peft.methods.dapl import DAPL as DAPL, DAPLMixin as DAPLMixin
from lightning_peft.methods.diff_pruning import DiffPruning as DiffPruning, DiffPruningMixin as DiffPruningMixin
from lightning_peft.methods.dual_prompt import DualPrompt as DualPrompt, DualPromptMixin as DualPromptMixin
from lightning_peft.methods.full_fine_tuning import (
    FullFineTuning as FullFineTuning,
    FullFineTuningMixin as FullFineTuningMixin,
)
from lightning_peft.methods.hira import HiRA as HiRA, HiRAMixin as HiRAMixin
from lightning_peft.methods.ia3 import IA3 as IA3, IA3Mixin as IA3Mixin
from lightning_peft.methods.ivlp import IVLP as IVLP, IVLPMixin as IVLPMixin
from lightning_peft.methods.kgcoop import KgCoOp as KgCoOp, KgCoOpMixin as KgCoOpMixin
from lightning_peft.methods.l2p import L2P as L2P, L2PMixin as L2PMixin
from lightning_peft.methods.ladder_side_tuning import (
    LadderSideTuning as LadderSideTuning,
    LadderSideTuningMixin as LadderSideTuningMixin,
)
from lightning_peft.methods.linear_probe import LinearProbe as LinearProbe, LinearProbeMixin as LinearProbeMixin
from lightning_peft.methods.lora import LoRA as LoRA, LoRAMixin as LoRAMixin
from lightning_peft.methods.loreft import LoReFT as LoReFT, LoReFTMixin as LoReFTMixin
from lightning_peft.methods.maple import MaPLe as MaPLe, MaPLeMixin as MaPLeMixin
from lightning_peft.methods.miss import MiSS as MiSS, MiSSMixin as MiSSMixin
from lightning_peft.methods.mlp_head import MLPHead as MLPHead, MLPHeadMixin as MLPHeadMixin
from lightning_peft.methods.oft import OFT as OFT, OFTMixin as OFTMixin
from lightning_peft.methods.p_tuning import PTuning as PTuning, PTuningMixin as PTuningMixin
from lightning_peft.methods.p_tuning_v2 import PTuningV2 as PTuningV2, PTuningV2Mixin as PTuningV2Mixin
from lightning_peft.methods.partial_k import PartialK as PartialK, PartialKMixin as PartialKMixin
from lightning_peft.methods.pixel_prompt import PixelPrompt as PixelPrompt, PixelPromptMixin as PixelPromptMixin
from lightning_peft.methods.prefix_lm import PrefixLM as PrefixLM, PrefixLMMixin as PrefixLMMixin
from lightning_peft.methods.prefix_tuning import PrefixTuning as PrefixTuning, PrefixTuningMixin as PrefixTuningMixin
from lightning_peft.methods.prompt_ensemble import (
    PromptEnsemble as PromptEnsemble,
    PromptEnsembleMixin as PromptEnsembleMixin,
)
from lightning_peft.methods.prompt_tuning import PromptTuning as PromptTuning, PromptTuningMixin as PromptTuningMixin
from lightning_peft.methods.promptsrc import PromptSRC as PromptSRC, PromptSRCMixin as PromptSRCMixin
from lightning_peft.methods.ranpac import RanPAC as RanPAC, RanPACMixin as RanPACMixin
from lightning_peft.methods.shira import SHiRA as SHiRA, SHiRAMixin as SHiRAMixin
from lightning_peft.methods.side_tuning import SideTuning as SideTuning, SideTuningMixin as SideTuningMixin
from lightning_peft.methods.tiny_tl import TinyTL as TinyTL, TinyTLMixin as TinyTLMixin
from lightning_peft.methods.tip_adapter import TipAdapter as TipAdapter, TipAdapterMixin as TipAdapterMixin
from lightning_peft.methods.trainable_tokens import (
    TrainableTokens as TrainableTokens,
    TrainableTokensMixin as TrainableTokensMixin,
)
from lightning_peft.methods.vpt import VPT as VPT, VPTMixin as VPTMixin
from lightning_peft.methods.warp import WARP as WARP, WARPMixin as WARPMixin
from lightning_peft.reports.bias_report import BiasReport as BiasReport
from lightning_peft.reports.nearest_words import NearestWords as NearestWords
from lightning_peft.reports.predictions import PredictionWriter as PredictionWriter
from lightning_peft.reports.rows import ResultRows as ResultRows
from lightning_peft.reports.tuning_report import TuningReport as TuningReport
from lightning_peft.tasks.causal_lm import CausalLM as CausalLM
from lightning_peft.tasks.clip_classification import CLIPClassification as CLIPClassification
from lightning_peft.tasks.cloze import ClozeClassification as ClozeClassification
from lightning_peft.tasks.image_text_contrast import ImageTextContrast as ImageTextContrast
from lightning_peft.tasks.knowledge_probing import KnowledgeProbing as KnowledgeProbing
from lightning_peft.tasks.continual_classification import ContinualClassification as ContinualClassification
from lightning_peft.tasks.continual_classification import ContinualTextClassification as ContinualTextClassification
from lightning_peft.tasks.distillation import (
    ContextDistillation as ContextDistillation,
    Distillation as Distillation,
)
from lightning_peft.tasks.domain_adaptation import DomainAdaptation as DomainAdaptation
from lightning_peft.tasks.image_classification import ImageClassification as ImageClassification
from lightning_peft.tasks.multi_task import MultiTask as MultiTask
from lightning_peft.tasks.nearest_demonstrations import NearestDemonstrations as NearestDemonstrations
from lightning_peft.tasks.preference import Preference as Preference
from lightning_peft.tasks.prompt_search import search_prompts as search_prompts
from lightning_peft.tasks.prompted_classification import PromptedClassification as PromptedClassification
from lightning_peft.tasks.prompted_generation import PromptedGeneration as PromptedGeneration
from lightning_peft.tasks.answer_choice import AnswerChoice as AnswerChoice
from lightning_peft.tasks.multiple_choice import MultipleChoice as MultipleChoice
from lightning_peft.tasks.question_answering import QuestionAnswering as QuestionAnswering
from lightning_peft.tasks.sentence_embedding import SentenceEmbedding as SentenceEmbedding
from lightning_peft.tasks.seq2seq import LMAdaptation as LMAdaptation, Seq2Seq as Seq2Seq
from lightning_peft.tasks.text_classification import TextClassification as TextClassification
from lightning_peft.tasks.text_regression import TextRegression as TextRegression
from lightning_peft.tasks.token_classification import TokenClassification as TokenClassification
from lightning_peft.training.ema import DeltaEMA as DeltaEMA
from lightning_peft.training.guard import DeltaGuard as DeltaGuard
from lightning_peft.training.lean import Lean as Lean
from lightning_peft.training.loss_by_token import LossByToken as LossByToken
from lightning_peft.training.method import Method as Method
from lightning_peft.training.mixin import MethodMixin as MethodMixin, TunedBy as TunedBy
from lightning_peft.training.rebuild import from_delta as from_delta, load_from_checkpoint as load_from_checkpoint
from lightning_peft.training.requeue import SafeRequeue as SafeRequeue
from lightning_peft.training.strategy import FullyShard as FullyShard
from lightning_peft.training.throughput import Throughput as Throughput

__version__: str
