"""The loss in chunks has the value and the gradients of the plain one, and keeps less for the backward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_peft import (
    CausalLM,
    CausalLMData,
    Distillation,
    FullFineTuning,
    LadderSideTuning,
    Lean,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    TextClassification,
    TuningError,
)
from lightning_peft.tasks.chunked_loss import chunked_cross_entropy
from tests.models import hf
from tests.modules import trainer
from tests.valley import set_up

Valley = Callable[[str], str]
METHODS: dict[str, Method] = {
    "lora": LoRA(r=2),
    "head": LoRA(r=2, target_modules=["lm_head", "c_attn"]),
    "prompt": PromptTuning(num_virtual_tokens=3, init="random_uniform"),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "all": FullFineTuning(),
}


def batch_of(folder: str, **kwargs: Any) -> dict[str, Any]:
    data = CausalLMData(tokenizer=folder, dataset="made://descriptions", prompt="source", target="target", **kwargs)
    set_up(data)
    return next(iter(data.val_dataloader()))


def gradients(
    folder: str, method: Method, batch: dict[str, Any], size: int | None
) -> tuple[float, dict[str, Tensor], int]:
    """Return the loss, what it gives, and the bytes of the largest tensor that is kept."""
    task, kept = CausalLM(folder, loss_chunk=size), [0]
    method.apply(task.backbone)
    torch.manual_seed(1)
    for parameter in task.parameters():
        if parameter.requires_grad and not isinstance(method, FullFineTuning):
            parameter.data.normal_(0, 0.05)
    task.eval()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = task.loss(method.prepare(batch))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in task.named_parameters() if p.requires_grad}, max(kept)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_whole(name: str, valley: Valley) -> None:
    batch = batch_of(valley("gpt2"), batch_size=8)
    found = []
    for size in (None, 7):
        method = type(METHODS[name])(**METHODS[name].init_args())
        found.append(gradients(valley("gpt2"), method, batch, size))
    (one, plain, _), (two, chunked, _) = found
    assert two == pytest.approx(one, rel=1e-6)
    assert plain.keys() == chunked.keys()
    for key, gradient in plain.items():
        if gradient is None:
            assert chunked[key] is None
            continue
        assert (gradient - chunked[key]).abs().max() <= 1e-6 * max(1, gradient.abs().max()), key


def test_no_logits_of_all_tokens_are_kept(valley: Valley) -> None:
    batch = batch_of(valley("gpt2"), batch_size=32)
    size = [gradients(valley("gpt2"), LoRA(r=2), batch, chunk)[2] for chunk in (None, 16)]
    words = CausalLM(valley("gpt2")).backbone.config.vocab_size
    assert size[0] >= 4 * words * int((batch["labels"] != -100).sum())
    assert 4 * size[1] <= size[0]


def test_training_with_and_without_a_target(valley: Valley, tmp_path: Path) -> None:
    arguments = {"dataset": "made://descriptions", "prompt": "source", "target": "target"}
    data = CausalLMData(tokenizer=valley("gpt2"), batch_size=16, **arguments)
    run = trainer(tmp_path, LoRA(r=2), max_steps=2, limit_val_batches=1, accumulate_grad_batches=2)
    task = CausalLM(valley("gpt2"), loss_chunk=64)
    run.fit(task, data)
    batch = batch_of(valley("gpt2"), batch_size=2)
    batch["labels"][:] = -100
    loss = task.loss(batch)
    loss.backward()
    assert loss.item() == 0


def test_models_that_do_more_than_call_their_head(valley: Valley, tmp_path: Path) -> None:
    batch = batch_of(valley("gpt2"), batch_size=2)
    config = hf.Gemma2Config(
        vocab_size=700, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1,
    )  # fmt: skip
    hf.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    task = CausalLM(valley("gpt2"), loss_chunk=8)
    task.backbone = hf.Gemma2ForCausalLM.from_pretrained(tmp_path / "gemma")
    with pytest.raises(
        TuningError, match="Gemma2ForCausalLM, as it is tuned, does more between hidden states and logits"
    ):
        task.loss(batch)
    task = CausalLM(valley("gpt2"), loss_chunk=8).eval()
    LadderSideTuning().apply(task.backbone)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    with pytest.raises(TuningError, match="does more between hidden states and logits"):
        task.loss(batch)
    with pytest.raises(TuningError, match="loss_chunk=0 is out of range: take 1 or more, or null"):
        CausalLM(valley("gpt2"), loss_chunk=0)
    with pytest.raises(TuningError, match="loss_chunk=4 is for CausalLM: Distillation compares all logits"):
        Distillation(valley("gpt2"), loss_chunk=4)


def test_the_callback_says_the_size(valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of language has it by itself, another one of its arguments takes its place, another task has none."""
    seen: list[tuple[int, bool]] = []

    def note(backbone: Any, inputs: Any, targets: Tensor, size: int, check: bool) -> tuple[Tensor, Tensor]:
        seen.append((size, check))
        return chunked_cross_entropy(backbone, inputs, targets, size, check)

    monkeypatch.setattr("lightning_peft.tasks.causal_lm.chunked_cross_entropy", note)
    data = CausalLMData(
        tokenizer=valley("gpt2"), batch_size=4, dataset="made://descriptions", prompt="source", target="target"
    )
    for callbacks in ([], [Lean(loss_chunk=3)], [Lean(loss_chunk=None)]):
        run = trainer(tmp_path, LoRA(r=2), *callbacks, max_steps=2, limit_val_batches=1)
        run.fit(CausalLM(valley("gpt2")), data)
        assert len([c for c in run.callbacks if isinstance(c, Lean)]) == 1
    assert seen == [(512, True), (512, False), (3, True), (3, False)]
    task = CausalLM(valley("gpt2"))
    LadderSideTuning().apply(task.backbone)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    trainer(tmp_path, LadderSideTuning(), max_steps=2, limit_val_batches=1).fit(task, data)
    assert seen[4:] == [(512, True)]
    assert not TextClassification.lean
