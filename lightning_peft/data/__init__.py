"""LightningDataModules for text and images."""

from lightning_peft.data.answer_choice import AnswerChoiceData
from lightning_peft.data.captioned_images import CaptionedImageData
from lightning_peft.data.chat import ChatData
from lightning_peft.data.clip_data import CLIPData
from lightning_peft.data.cloze import ClozeClassificationData, KnowledgeProbingData
from lightning_peft.data.coloured_shapes import ColouredShapes
from lightning_peft.data.continual import ContinualData
from lightning_peft.data.digits import Digits
from lightning_peft.data.domain_data import DomainData
from lightning_peft.data.generation import CausalLMData, Seq2SeqData
from lightning_peft.data.image_classification import ImageClassificationData
from lightning_peft.data.image_data import ImageData
from lightning_peft.data.instructions import InstructionCausalLMData, InstructionSeq2SeqData
from lightning_peft.data.lm_adaptation import LMAdaptationData
from lightning_peft.data.multi_task import MultiTaskData
from lightning_peft.data.multiple_choice import MultipleChoiceData
from lightning_peft.data.preferences import PreferenceData
from lightning_peft.data.question_answering import QuestionAnsweringData
from lightning_peft.data.sentence_pairs import SentencePairsData
from lightning_peft.data.sources import SourcedData
from lightning_peft.data.span_corruption import SpanCorruptionData
from lightning_peft.data.stdlib_docstrings import StdlibDocstrings
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.data.text_data import TextData
from lightning_peft.data.text_regression import TextRegressionData
from lightning_peft.data.token_classification import TokenClassificationData
from lightning_peft.data.token_data import TokenData

__all__ = [
    "AnswerChoiceData",
    "CLIPData",
    "CaptionedImageData",
    "CausalLMData",
    "ChatData",
    "ClozeClassificationData",
    "ColouredShapes",
    "ContinualData",
    "Digits",
    "DomainData",
    "ImageClassificationData",
    "ImageData",
    "InstructionCausalLMData",
    "InstructionSeq2SeqData",
    "KnowledgeProbingData",
    "LMAdaptationData",
    "MultiTaskData",
    "MultipleChoiceData",
    "PreferenceData",
    "QuestionAnsweringData",
    "SentencePairsData",
    "Seq2SeqData",
    "SourcedData",
    "SpanCorruptionData",
    "StdlibDocstrings",
    "TextClassificationData",
    "TextData",
    "TextRegressionData",
    "TokenClassificationData",
    "TokenData",
]
