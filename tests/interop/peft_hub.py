"""Reads the configurations that PEFT's own tests try on models of the hub."""

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import transformers as hf

from tests.interop.exchange import Case
from tests.interop.stand_ins import call, kind_of, rows, stand_in


class Listed(NamedTuple):
    """What a file of tests tries: the names in it of the models and of the configurations, and the automatic class."""

    group: str
    file: str
    models: str
    configs: str
    auto: Any


_LISTS = (
    Listed("decoders", "test_decoder_models.py", "PEFT_DECODER_MODELS_TO_TEST", "ALL_CONFIGS", hf.AutoModelForCausalLM),
    Listed(
        "encoder-decoders",
        "test_encoder_decoder_models.py",
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
        "ALL_CONFIGS",
        hf.AutoModelForSeq2SeqLM,
    ),
    Listed(
        "encoders without a head",
        "test_feature_extraction_models.py",
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
        "ALL_CONFIGS",
        hf.AutoModel,
    ),
    Listed(
        "classifiers of texts",
        "test_seq_classifier.py",
        "PEFT_SEQ_CLS_MODELS_TO_TEST",
        "ALL_CONFIGS",
        hf.AutoModelForSequenceClassification,
    ),
    Listed(
        "classifiers of tokens",
        "test_token_classification_qa.py",
        "PEFT_TOKEN_CLS_MODELS_TO_TEST",
        "TOKEN_CLS_CONFIGS",
        hf.AutoModelForTokenClassification,
    ),
    Listed(
        "answers as spans",
        "test_token_classification_qa.py",
        "PEFT_QA_MODELS_TO_TEST",
        "QA_CONFIGS",
        hf.AutoModelForQuestionAnswering,
    ),
    Listed("experts by `target_parameters`", "test_target_parameters.py", "", "ALL_CONFIGS", hf.AutoModelForCausalLM),
    Listed("ResNet", "test_vision_models.py", "", "CONFIGS", hf.AutoModelForImageClassification),
)
_RESNET = "peft-internal-testing/tiny-random-ResNetForImageClassification"


def cases(folder: Path) -> Iterator[Case]:
    """Yield a case for each model and configuration."""
    for listed in _LISTS:
        found = _declared(folder / "tests" / listed.file, {listed.models, listed.configs})
        for model, kind, arguments in _pairs(found, listed):
            what = f"{listed.file.removesuffix('.py')} {kind_of(model)} {kind.__name__}"
            build = partial(stand_in, model, listed.auto)
            inputs = rows(build())
            yield Case(
                listed.group, what, build, kind, arguments, lambda m, method, inputs=inputs: call(m, inputs, method)
            )


def _pairs(found: dict[str, Any], listed: Listed) -> list[tuple[str, type[peft.PeftConfig], dict[str, Any]]]:
    """Return each model with each configuration: its class and its arguments."""
    configs = found[listed.configs]
    if isinstance(configs, dict):  # configurations that are made already
        return [(_RESNET, type(each), {"": each}) for each in configs.values()]
    if not listed.models:  # each names its model
        return configs
    return [(model, *each) for model in found[listed.models] for each in configs]


def _declared(file: Path, names: set[str]) -> dict[str, Any]:
    """Return what a file has under these names; of it only imports of packages, plain functions and lists are run."""
    tree = ast.parse(file.read_text())
    wanted = [node for node in tree.body if _is_wanted(node, names)]
    found: dict[str, Any] = {"__name__": "peft_tests"}
    exec(compile(ast.Module(wanted, []), file.name, "exec"), found)
    return found


def _is_wanted(node: ast.stmt, names: set[str]) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level == 0
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Name) and (
            node.targets[0].id in names or node.targets[0].id.endswith("_MODELS_TO_TEST")
        )
    return isinstance(node, ast.Import) or (isinstance(node, ast.FunctionDef) and node.name == "_all_configs")
