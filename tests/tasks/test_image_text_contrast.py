"""Images and captions: the loss by hand, a fit of any method on frozen towers, recall both ways, and bad rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature

from lightning_peft import CaptionedImageData, ImageTextContrast, LoRA, TuningError, collect
from lightning_peft.tasks.retrieval_metrics import CrossRecall
from tests import two_towers
from tests.images import picture
from tests.models import tiny
from tests.modules import trainer

CAPTIONS = ["a red star", "a green ring", "a blue star", "a red ring", "a dark star of blue", "a red star"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(two_towers.save_model(tmp_path_factory.mktemp("clip")))


def file(path: Path, captions: list[Any]) -> str:
    """Write an image for each caption into a Parquet file."""
    text = Sequence(Value("string")) if isinstance(captions[0], list) else Value("string")
    features = Features({"image": ImageFeature(), "text": text})
    columns = {"image": [picture(i % 3, i) for i in range(len(captions))], "text": captions}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def test_the_loss_is_that_of_the_formula(model: str, tmp_path: Path) -> None:
    task = ImageTextContrast(model).eval()
    data = CaptionedImageData(
        train=file(tmp_path / "a.parquet", CAPTIONS), processor=model, validation_share=0, test_share=0
    )
    (batch,) = data.train_dataloader()
    assert sorted(batch["texts"]) == sorted(CAPTIONS)
    towers = tiny("clip").towers
    ids = task.tokenizer(batch["texts"], padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        images = F.normalize(towers.get_image_features(pixel_values=batch["pixel_values"]).pooler_output, dim=-1)
        texts = F.normalize(towers.get_text_features(input_ids=ids).pooler_output, dim=-1)
        logits = towers.logit_scale.exp() * images @ texts.t()
        expected = 0.0
        for i, text in enumerate(batch["texts"]):
            right = [j for j, other in enumerate(batch["texts"]) if other == text]
            expected -= logits.log_softmax(1)[i, right].mean() / 12 + logits.log_softmax(0)[right, i].mean() / 12
        torch.testing.assert_close(task.loss(batch), expected)


def test_a_fit_trains_the_delta_on_frozen_towers(model: str, tmp_path: Path) -> None:
    rows = file(tmp_path / "a.parquet", [[text, text + " of blue"] for text in CAPTIONS])
    data = CaptionedImageData(train=rows, processor=model, validation_share=0.34, test_share=0.34, batch_size=2)
    task = ImageTextContrast(model, lr=1e-2)
    before = {name: value.clone() for name, value in task.backbone.state_dict().items()}
    fit = trainer(tmp_path, LoRA(r=2, target_modules=["q_proj"]), max_epochs=2)
    fit.fit(task, data)
    assert {"val_image_to_text_recall_at_1", "val_text_to_image_recall_at_5"} <= fit.callback_metrics.keys()
    after = task.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(value.any() for name, value in collect(task).items() if name.endswith(".B"))
    assert len(fit.predict(task, data)[0]["embedding"]) == 2
    images = data.images("train")
    assert images.caption(0, 0) != images.caption(1, 0) == images.caption(3, 0)


def test_recall_is_of_both_ways() -> None:
    scores = CrossRecall(at=[1])
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 2]] * torch.tensor([[1.0], [0.5], [1.0]])
    scores.update(images, texts)
    found = scores.compute()
    assert found["image_to_text_recall_at_1"] == pytest.approx(1.0)
    assert found["text_to_image_recall_at_1"] == pytest.approx(2 / 3)


def test_bad_input_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="shots= is of classes, and captions are none: leave it out"):
        CaptionedImageData(train="a.parquet", shots=4)
    rows = file(tmp_path / "a.parquet", ["a red star", " "])
    with pytest.raises(TuningError, match="row 2 of train has ' ' in column 'text': give a text"):
        CaptionedImageData(train=rows, validation_share=0, test_share=0, image_size=16).images("train")
