"""Our tasks take the same step from the same rows, however they are cut into batches, and packed or padded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_ends_as_an_uninterrupted_one(valley: Valley, tmp_path: Path) -> None:
    """The file is written between two steps of two batches each, the tokens of which are counted anew."""

    def run(name: str, **options: Any) -> dict[str, Tensor]:
        arguments = {"dataset": "made://descriptions", "prompt": "source", "target": "target", "batch_size": 4}
        data = CausalLMData(tokenizer=valley("gpt2"), **arguments)
        L.seed_everything(0, verbose=False)
        module = type("CausalLM", (Descending, CausalLM), {})(valley("gpt2"))
        saving = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        path = options.pop("ckpt_path", None)
        settings = {"max_steps": 4, "accumulate_grad_batches": 2, "limit_val_batches": 0}
        trainer(tmp_path, LoRA(r=4), saving, **settings | options).fit(module, data, ckpt_path=path)
        return collect(module)

    whole = run("whole")
    run("part", max_steps=2)
    resumed = run("part", ckpt_path=str(tmp_path / "part" / "step=2.ckpt"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
