"""Image classification through a Trainer and through the command line."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_peft import (
    VPT,
    ImageClassification,
    ImageClassificationData,
    LinearProbe,
    LoRA,
    TuningError,
    collect,
    load_from_checkpoint,
)
from lightning_peft.cli import main
from tests.images import NAMES, folder, save_vit, shapes
from tests.models import IMAGES
from tests.modules import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
ROOT = Path(__file__).parents[2]


def task(path: str, **kwargs: object) -> ImageClassification:
    L.seed_everything(0, verbose=False)
    return ImageClassification(path, **{"labels": shapes().label_names} | kwargs)


@pytest.mark.parametrize("kind", IMAGES)
def test_any_classifier_of_images(kind: str, tmp_path: Path) -> None:
    path = save_vit(tmp_path, kind)
    module, data = task(path), shapes(processor=path)
    fit = trainer(tmp_path, LinearProbe())
    fit.fit(module, data)
    assert set(collect(module)) == {"backbone.classifier.weight", "backbone.classifier.bias"}
    (scores,) = fit.test(module, data, verbose=False)
    with torch.no_grad():
        pairs = [(module(batch), batch["labels"]) for batch in data.test_dataloader()]
    logits, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    assert scores["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert scores["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert module.confusion_matrix().sum() == len(labels)


def test_a_method_learns_and_its_delta_comes_back(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "vit")
    colours = {"colours": ["red", "green", "blue", "yellow"], "shapes": ["circle"]}
    data = shapes(processor=path, keep_in_memory=True, **colours)
    module = task(path, lr=0.02, labels=data.label_names)
    fit = trainer(tmp_path, VPT(num_virtual_tokens=3), max_epochs=20)
    fit.fit(module, data)
    (scores,) = fit.test(module, data, verbose=False)
    assert scores["test_accuracy"] > 0.7
    fit.save_checkpoint(tmp_path / "delta.ckpt")
    again = load_from_checkpoint(ImageClassification, tmp_path / "delta.ckpt")
    assert trainer(tmp_path).test(again, data, verbose=False) == [scores]


def test_other_classes_are_refused(tmp_path: Path) -> None:
    path = save_vit(tmp_path)
    with pytest.raises(TuningError, match=r"the data have 4 classes .*, the model 3"):
        trainer(tmp_path, LoRA()).fit(task(path, labels=NAMES), shapes(processor=path))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no image classifier can be made of"):
        task(str(tmp_path))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_vit(tmp_path / "vit")
    folder(tmp_path / "images", {"train": 4, "validation": 2, "test": 2})
    base = ["--config", str(ROOT / "configs/tasks/image_classification.yaml")]
    base += ["--config", str(ROOT / "configs/data/images.yaml"), "--model.model", "vit", "--data.batch_size", "4"]
    base += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-peft", *arguments])
        main()
        return capsys.readouterr().out

    assert "VPT(num_virtual_tokens=4)" in run(
        "fit", *base, "--method", "VPT", "--method.num_virtual_tokens", "4", "--trainer.max_epochs", "1"
    )
    (delta,) = tmp_path.rglob("*.ckpt")
    assert "test_accuracy" in run("test", *base, "--ckpt_path", str(delta))


def test_data_without_the_models_processor_are_scaled(tmp_path: Path) -> None:
    data = ImageClassificationData(dataset=folder(tmp_path / "i", {"train": 4, "validation": 1}), image_size=16)
    path = save_vit(tmp_path / "vit", processor=False)
    trainer(tmp_path, LinearProbe()).fit(task(path, labels=NAMES), data)
