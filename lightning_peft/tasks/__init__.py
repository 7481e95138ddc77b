"""Tasks: the LightningModules that the command line trains and tests."""

from lightning_peft.tasks.answer_choice import AnswerChoice
from lightning_peft.tasks.base import Task
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.clip_classification import CLIPClassification
from lightning_peft.tasks.cloze import ClozeClassification
from lightning_peft.tasks.continual_classification import ContinualClassification, ContinualTextClassification
from lightning_peft.tasks.distillation import ContextDistillation, Distillation
from lightning_peft.tasks.domain_adaptation import DomainAdaptation
from lightning_peft.tasks.image_classification import ImageClassification
from lightning_peft.tasks.image_text_contrast import ImageTextContrast
from lightning_peft.tasks.knowledge_probing import KnowledgeProbing
from lightning_peft.tasks.multi_task import MultiTask
from lightning_peft.tasks.multiple_choice import MultipleChoice
from lightning_peft.tasks.nearest_demonstrations import NearestDemonstrations
from lightning_peft.tasks.preference import Preference
from lightning_peft.tasks.prompted_classification import PromptedClassification
from lightning_peft.tasks.prompted_generation import PromptedGeneration
from lightning_peft.tasks.question_answering import QuestionAnswering
from lightning_peft.tasks.sentence_embedding import SentenceEmbedding
from lightning_peft.tasks.seq2seq import LMAdaptation, Seq2Seq
from lightning_peft.tasks.text_classification import TextClassification
from lightning_peft.tasks.text_regression import TextRegression
from lightning_peft.tasks.token_classification import TokenClassification

__all__ = [
    "AnswerChoice",
    "CLIPClassification",
    "CausalLM",
    "ClozeClassification",
    "ContextDistillation",
    "ContinualClassification",
    "ContinualTextClassification",
    "Distillation",
    "DomainAdaptation",
    "ImageClassification",
    "ImageTextContrast",
    "KnowledgeProbing",
    "LMAdaptation",
    "MultiTask",
    "MultipleChoice",
    "NearestDemonstrations",
    "Preference",
    "PromptedClassification",
    "PromptedGeneration",
    "QuestionAnswering",
    "SentenceEmbedding",
    "Seq2Seq",
    "Task",
    "TextClassification",
    "TextRegression",
    "TokenClassification",
]
