"""Our tasks take the same step from the same rows, however they are cut into batches, and packed or padded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_peft import (
    CausalLM,
    CausalLMData,
    ClozeClassification,
    ClozeClassificationData,
    LMAdaptation,
    LMAdaptationData,
    LoRA,
    Seq2Seq,
    Seq2SeqData,
    TokenClassification,
    TokenClassificationData,
    collect,
)
from tests.contract import assert_near
from tests.modules import trainer

Valley = Callable[[str], str]
PAIR = {"source": "source", "target": "target"}
GAP = {"template": "{text} all in all it was {mask} .", "verbalizer": {"bad": ["bad"], "good": ["good"]}}
CASES: dict[str, tuple[str, Any, Any, str, dict[str, Any]]] = {
    "continue": ("gpt2", CausalLM, CausalLMData, "descriptions", {"prompt": "source", "target": "target"}),
    "write": ("t5", Seq2Seq, Seq2SeqData, "descriptions", PAIR),
    "adapt": ("t5", LMAdaptation, LMAdaptationData, "corpus", {"max_length": 20}),
    "tag": ("bert", TokenClassification, TokenClassificationData, "tags", {}),
    "fill": ("bert", ClozeClassification, ClozeClassificationData, "opinions", GAP),
}


class Descending:
    """Takes plain steps along the gradient."""

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def step(valley: Valley, folder: Path, name: str, size: int, accumulate: int, **more: Any) -> dict[str, Tensor]:
    """Return what one step makes of 7 rows."""
    kind, task, data, rows, arguments = CASES[name]
    arguments = {"tokenizer": valley(kind), "batch_size": size, "validation_share": 0, "test_share": 0} | arguments
    file = folder / f"{rows}.jsonl"
    if not file.exists():
        data(**arguments, dataset=f"made://{rows}").rows("train").select(range(7)).to_json(file)
    read = data(**arguments, train=str(file), **more)
    given = [read.label_names] if name == "tag" else [read.verbalizer, read.label_names] if name == "fill" else []
    L.seed_everything(0, verbose=False)
    module = type(task.__name__, (Descending, task), {})(valley(kind), *given)
    run = trainer(folder, LoRA(r=4), accumulate_grad_batches=accumulate, limit_val_batches=0)
    run.fit(module, read)
    assert run.global_step == 1
    return collect(module)


@pytest.mark.parametrize("name", CASES)
def test_the_step_of_a_task_is_the_same_however_it_is_cut(name: str, valley: Valley, tmp_path: Path) -> None:
    one = step(valley, tmp_path, name, 20, 1)
    assert_near(step(valley, tmp_path, name, 3, 8), one, 2e-6)  # fewer batches than are accumulated


def test_packed_or_padded(valley: Valley, tmp_path: Path) -> None:
    one = step(valley, tmp_path, "continue", 20, 1)
    assert_near(step(valley, tmp_path, "continue", 1, 8, packing=True, max_length=40), one, 2e-6)
