"""Batches that are mappings, pairs and tensors, and others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, PromptTuning, RanPAC, TuningError
from lightning_peft.core.batches import entry_of, inputs_of
from tests.models import batch, tiny
from tests.modules import OfPairs, Tuned, loader, pairs, trainer

IMAGES, LABELS = torch.ones(2, 3, 16, 16), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "given",
    [{"pixel_values": IMAGES, "names": ["a", "b"]}, (IMAGES, LABELS), [{"pixel_values": IMAGES}, LABELS], IMAGES],
)
def test_what_a_model_takes_of_a_batch(given: Any) -> None:
    (found,) = inputs_of(given, tiny("vit")).values()
    assert found is IMAGES


def test_a_module_without_a_main_input_takes_its_first_argument() -> None:
    assert inputs_of((IMAGES, LABELS), nn.Linear(2, 2)) == {"input": IMAGES}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"x": IMAGES},
            r"ViTForImageClassification takes none of what the batch has \(dict of x\): give batches that are",
        ),
        ((IMAGES, IMAGES, LABELS), r"takes none of what the batch has \(tuple of 3\)"),
        ((None, LABELS), r"takes none of what the batch has \(tuple of 2\)"),
        (None, r"takes none of what the batch has \(NoneType\)"),
    ],
)
def test_a_batch_of_nothing_that_a_model_takes(given: Any, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        inputs_of(given, tiny("vit"))


def test_labels_by_name_and_by_place() -> None:
    assert entry_of({"labels": LABELS}, "labels", 1) is entry_of((IMAGES, LABELS), "labels", 1) is LABELS
    for given in ({"pixel_values": IMAGES}, IMAGES, (IMAGES, None)):
        with pytest.raises(
            TuningError, match="shows no labels: give batches that are mappings with labels, or pairs of"
        ):
            entry_of(given, "labels", 1)


def test_pairs_train_what_mappings_do(tmp_path: Path) -> None:
    """A soft prompt is then put in by the model, not by the Trainer."""
    found = []
    for module, rows in ((Tuned(), loader("bert")), (OfPairs(), pairs(loader("bert")))):
        torch.manual_seed(0)
        trainer(tmp_path, PromptTuning(num_virtual_tokens=3, init="random_uniform")).fit(module, rows, rows)
        found.append({n: p.detach() for n, p in module.model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_methods_that_read_batches_take_pairs() -> None:
    models = [tiny("vit"), tiny("vit")]
    rows = batch("vit")
    for model, given in zip(models, [rows, (rows["pixel_values"], rows["labels"])], strict=True):
        torch.manual_seed(0)
        method = RanPAC(width=8, ridge=1.0)
        method.apply(model)
        method.fill(model, [given])
    assert torch.equal(*(model(rows["pixel_values"]).logits for model in models))


def test_initial_values_from_pairs() -> None:
    models = [tiny("vit"), tiny("vit")]
    rows = batch("vit", size=16)
    for model, given in zip(models, [rows, (rows["pixel_values"], rows["labels"])], strict=True):
        method = LoRA(r=2, init="eva")
        method.apply(model)
        method.initialise(model, [given])
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
