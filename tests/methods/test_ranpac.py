"""RanPAC: ridge regression on random features over all tasks, whatever their order, and how lambda is chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import ContinualClassification, ContinualData, LoRA, RanPAC, TuningError
from lightning_peft.features.ridge_head import RIDGES
from tests.contract import MethodContract, assert_near
from tests.images import save_vit, shapes
from tests.models import LABELS, batch, tiny
from tests.modules import Tuned, loader, trainer

WIDTH = 16


class TestRanPAC(MethodContract):
    method = RanPAC(width=WIDTH, ridge=0.1)
    backbones = ("vit", "bert")
    compiled = ("vit",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """C M, in place of the head."""
        return LABELS * WIDTH - sum(p.numel() for p in tiny(kind).classifier.parameters())


def applied(seed: int = 0, **arguments: Any) -> tuple[nn.Module, RanPAC, nn.Module]:
    model, method = tiny("vit"), RanPAC(width=WIDTH, **arguments)
    torch.manual_seed(seed)
    method.apply(model)
    return model, method, model.classifier.ranpac


def random_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return h of each row in double precision."""
    with torch.no_grad():
        features = tiny("vit").vit(pixels).last_hidden_state[:, 0]
    return (features @ model.classifier.ranpac.directions).relu().double()


def ridge_regression(hidden: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """Return W of least squares over all rows, with a row ``sqrt(lambda) e_m`` of target 0 for each feature."""
    more = torch.cat([hidden, ridge**0.5 * torch.eye(WIDTH, dtype=torch.float64)])
    targets = torch.cat([F.one_hot(labels, LABELS).double(), torch.zeros(WIDTH, LABELS, dtype=torch.float64)])
    return torch.linalg.lstsq(more, targets).solution.t().float()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_it_is_ridge_regression_on_all_tasks_whatever_their_order(order: tuple[int, ...]) -> None:
    model, method, head = applied(ridge=0.3)
    rows = batch("vit", size=60, seed=1)
    for task in order:
        mine = rows["labels"] == task
        assert mine.sum() > 8
        batches = [{name: c[mine][i : i + 4] for name, c in rows.items()} for i in range(0, int(mine.sum()), 4)]
        method.fill(model, batches)
    expected = ridge_regression(random_features(model, rows["pixel_values"]), rows["labels"], 0.3)
    assert_near({"": head.weight}, {"": expected}, 1e-5)
    inputs = batch("vit")["pixel_values"]
    with torch.no_grad():
        assert_near({"": model(inputs).logits}, {"": random_features(model, inputs).float() @ expected.t()}, 1e-5)


def test_lambda_is_that_of_least_error_on_each_fifth_row() -> None:
    model, method, head = applied()
    rows = batch("vit", size=60, seed=1)
    method.fill(model, [{name: c[i : i + 7] for name, c in rows.items()} for i in range(0, 60, 7)])
    hidden, labels = random_features(model, rows["pixel_values"]), rows["labels"]
    held = torch.arange(60) % 5 == 4
    errors = [
        (hidden[held].float() @ ridge_regression(hidden[~held], labels[~held], ridge).t() - F.one_hot(labels[held], 3))
        .square().sum() for ridge in RIDGES
    ]  # fmt: skip
    best = RIDGES[int(torch.stack(errors).argmin())]
    assert 1e-8 < best < 1e8
    assert head.chosen() == best
    assert_near({"": head.weight}, {"": ridge_regression(hidden, labels, best)}, 1e-5)
    few, other, _ = applied()
    with pytest.raises(TuningError, match="each fifth row chooses ridge=, and there are 4: give ridge= a number"):
        other.fill(few, [batch("vit", size=4)])


def test_a_fit_over_tasks_adds_each_row_once(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "vit")
    data = ContinualData(shapes(processor=path, keep_in_memory=True), tasks=2, epochs_per_task=2)
    task = ContinualClassification(path, labels=shapes().label_names, lr=0.01)
    method = RanPAC(width=WIDTH, ridge=1.0)
    fit = trainer(tmp_path, method, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    fit.fit(task, data)
    head = task.backbone.classifier.ranpac
    rows = [data.data.class_loader("train", classes, False) for classes in data.task_classes]
    assert int(head.rows) == sum(len(each.dataset) for each in rows)
    found = head.weight.detach().clone()
    assert found.any()
    for buffer in (head.rows, head.fitted_products, head.fitted_targets):
        buffer.zero_()
    method.fill(task, [each for loader in reversed(rows) for each in loader])
    assert_near({"": found}, {"": head.weight}, 1e-5)


def test_what_changes_its_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TuningError, match=r"classifier\.bias is trained by lora, but ranpac puts another tensor in its"
    ):
        trainer(tmp_path, RanPAC(width=WIDTH), LoRA(r=2)).fit(Tuned("vit"), loader("vit"), loader("vit"))
    fit = trainer(tmp_path, RanPAC(width=WIDTH), LoRA(r=2, exclude="classifier.*"))
    with pytest.raises(TuningError, match=r"which the training of .*lora.* would change: fit that first"):
        fit.fit(Tuned("vit"), loader("vit"), loader("vit"))
    with pytest.raises(TuningError, match="has 2 layers, and RanPAC reads the features before a head of one"):
        RanPAC().apply(tiny("distilbert"))
    model, method, _ = applied()
    with pytest.raises(TuningError, match=r"labels of shape \[4, 2\] are not one for each of the rows"):
        method.fill(model, [{"pixel_values": batch("vit")["pixel_values"], "labels": torch.zeros(4, 2).long()}])
