"""Distillation against its formula, row by row, and what a teacher must not be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import (
    CausalLMData,
    ContextDistillation,
    Distillation,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    TuningError,
    collect,
)
from tests.models import hf
from tests.modules import trainer
from tests.valley import set_up

Valley = Callable[[str], str]
CONTEXT = "anmar keeps a dog . anlin keeps a horse . "
PROMPT = {"num_virtual_tokens": 3, "init": "random_uniform"}


@pytest.fixture(scope="module")
def other(valley: Valley, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A larger model of the same vocabulary, whose output is padded to more tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), AutoTokenizer.from_pretrained(valley("gpt2"))
    torch.manual_seed(5)
    config = hf.GPT2Config(
        vocab_size=len(tokenizer) + 3, n_embd=32, n_layer=3, n_head=2, initializer_range=0.3, resid_pdrop=0.5
    )
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(valley: Valley, **kwargs: Any) -> tuple[CausalLMData, dict[str, Any]]:
    arguments = {"dataset": "made://descriptions", "prompt": "source", "target": "target", "batch_size": 4}
    data = CausalLMData(tokenizer=valley("gpt2"), **arguments | kwargs)
    set_up(data)
    return data, next(iter(data.val_dataloader()))


def drawn(task: Distillation, method: Method) -> Method:
    """Apply a method and draw its delta."""
    method.apply(task.backbone)
    torch.manual_seed(1)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    return method


def said(model: Any, ids: Tensor, width: int) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.unsqueeze(0)).logits[0, :-1, :width].float()
    return logits


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_the_loss_is_the_formula(divergence: Any, top_k: int | None, valley: Valley, other: str) -> None:
    _, batch = rows(valley)
    options = {"temperature": 2.0, "target_weight": 0.25, "hidden_weight": 0.5}
    task = Distillation(valley("gpt2"), other, divergence=divergence, top_k=top_k, **options).eval()
    drawn(task, LoRA(r=2))
    teacher, losses = AutoModelForCausalLM.from_pretrained(other), []
    width = task.backbone.config.vocab_size
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        ids, labels = ids[mask == 1], labels[mask == 1]
        own, right = (said(model, ids, width) for model in (task.backbone, teacher))
        with torch.no_grad():
            states = [
                model(input_ids=ids.unsqueeze(0), output_hidden_states=True).hidden_states[-1][0]
                for model in (task.backbone, teacher)
            ]
        for place, label in enumerate(labels[1:].tolist()):
            if label == -100:
                continue
            among = right[place].topk(top_k or width).indices
            q, p = ((values[place][among] / 2).softmax(0) for values in (own, right))
            of, to = (p, q) if divergence == "forward" else (q, p)
            loss = 0.75 * 4 * (of * (of / to).log()).sum() - 0.25 * own[place].log_softmax(0)[label]
            losses.append(loss + 0.5 * F.mse_loss(states[0][place], states[1][place]))
    assert task.loss(batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert int(task.counted(batch)) == len(losses)


def test_the_teacher_is_no_part_of_the_model(valley: Valley, other: str, tmp_path: Path) -> None:
    task, (data, batch) = Distillation(valley("gpt2"), other, lr=1e-2, warmup=0.0), rows(valley)
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    before = {name: tensor.clone() for name, tensor in task.teacher.state_dict().items()}
    run = trainer(tmp_path, LoRA(r=4), max_epochs=1, limit_train_batches=30, limit_val_batches=1)
    task.eval()
    with torch.no_grad():
        first = task.loss(batch).item()
    task.train()
    task.teacher.train()  # as somebody may have left it: its dropout does not count
    run.fit(task, data)
    task.eval()
    with torch.no_grad():
        assert task.loss(batch).item() < 0.9 * first
    assert task.teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in task.teacher.state_dict().items())
    assert all("lora" in name for name in collect(task))


@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning(**PROMPT), PrefixTuning(num_virtual_tokens=3)])
def test_the_context_is_before_each_row_of_the_teacher(method: Method, valley: Valley) -> None:
    _, batch = rows(valley)
    task = ContextDistillation(valley("gpt2"), CONTEXT).eval()
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(valley("gpt2")), task.tokenizer
    method = drawn(task, type(method)(**method.init_args()))
    lead, losses, wide = tokenizer(CONTEXT)["input_ids"], [], method.prepare(batch)
    assert len(lead) == len(task.context) > 5
    for i, (ids, labels, mask) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ):
        ids, labels = ids[mask == 1], labels[mask == 1]
        right = said(plain, torch.cat([torch.tensor(lead), ids]), len(tokenizer))[len(lead) :]
        with torch.no_grad():
            row = {name: value[i : i + 1] for name, value in wide.items() if isinstance(value, Tensor)}
            own = task.backbone(**task.inputs(row)).logits[0][(row["labels"][0].roll(-1) != -100)]
        right = right[labels[1:] != -100]
        losses.append(F.kl_div(own.log_softmax(-1), right.log_softmax(-1), log_target=True, reduction="none").sum(-1))
    assert task.loss(wide).item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["bare", "opened"])
def test_a_context_that_is_read_once_teaches_the_same(kind: str, valley: Valley, tmp_path: Path) -> None:
    """With a beginning-of-sequence token or without, and however many rows a batch has."""
    name, (_, batch) = valley("gpt2"), rows(valley)
    if kind == "opened":
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.bos_token = tokenizer.eos_token
        AutoModelForCausalLM.from_pretrained(name).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        name = str(tmp_path)
        begin = torch.full((4, 1), tokenizer.bos_token_id)
        batch = {n: torch.cat([{"labels": -100 * torch.ones_like(begin), "input_ids": begin}.get(
            n, torch.ones_like(begin)), v], 1) if isinstance(v, Tensor) else v for n, v in batch.items()}  # fmt: skip
    task = ContextDistillation(name, CONTEXT, hidden_weight=0.5)
    method = drawn(task, PromptTuning(**PROMPT))
    wide = method.prepare(batch)
    few = {n: v[:2] if isinstance(v, Tensor) else v for n, v in wide.items()}
    seen: list[tuple[int, ...]] = []
    watch = task.backbone.register_forward_pre_hook(lambda _, args, given: seen.append(tuple(given["input_ids"].shape)),
                                                    with_kwargs=True)  # fmt: skip
    found = []
    for fits in (False, True):
        (task.on_fit_start if fits else task.on_fit_end)()
        for own in (wide, few, wide):
            task.zero_grad()
            loss = task.loss(own)
            loss.backward()
            gradients = [p.grad.clone() for p in task.parameters() if p.grad is not None]
            found.append((loss.item(), gradients))
    watch.remove()
    width, count = batch["input_ids"].shape[1], len(task.context)
    assert [shape[1] for shape in seen[1:6:2]] == [width + count] * 3
    assert seen[7] == (1, count)
    assert [shape[1] for shape in seen[8::2]] == [width] * 3
    for (plain, gradients), (cached, others) in zip(found[:3], found[3:], strict=True):
        assert cached == pytest.approx(plain, rel=1e-6)
        assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(gradients, others, strict=True))


def test_a_prefix_learns_a_context(valley: Valley, tmp_path: Path) -> None:
    data, _ = rows(valley)
    task = ContextDistillation(valley("gpt2"), CONTEXT, lr=3e-2, warmup=0.0)
    run = trainer(
        tmp_path, PrefixTuning(num_virtual_tokens=8), max_epochs=1, limit_train_batches=30, limit_val_batches=0
    )
    losses = []

    def after(*_: Any) -> None:
        losses.append(float(run.callback_metrics["train_loss"]))

    task.on_train_batch_end = after
    run.fit(task, data)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_what_a_teacher_must_not_be(valley: Valley, other: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"tokens that are not the \d+ of the model: take one of the same vocabulary"):
        Distillation(valley("gpt2"), _of_other_words(valley, tmp_path))
    for arguments, message in (
        ({"temperature": 0.0}, "temperature=0.0 is out of range"),
        ({"top_k": 0}, "top_k=0 is out of range"),
        ({"target_weight": 1.5}, "target_weight=1.5 is out of range"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 is out of range"),
    ):
        with pytest.raises(TuningError, match=message):
            Distillation(valley("gpt2"), other, **arguments)
    _narrow(valley, tmp_path / "narrow")
    Distillation(valley("gpt2"), str(tmp_path / "narrow"))
    with pytest.raises(TuningError, match="hidden states are 16 wide, the model's 32: set hidden_weight=0"):
        Distillation(valley("gpt2"), str(tmp_path / "narrow"), hidden_weight=1.0)
    _narrow(valley, tmp_path / "short", n_positions=64)
    task, short = Distillation(valley("gpt2"), str(tmp_path / "short")), trainer(tmp_path, LoRA(r=2), max_steps=1)
    with pytest.raises(TuningError, match=r"max_length=128 of the data is beyond the 64 positions of the teacher"):
        short.fit(task, rows(valley)[0])
    short.fit(task, rows(valley, max_length=64)[0])
    _narrow(valley, tmp_path / "few", vocab_size=100)
    with pytest.raises(TuningError, match=r"has embeddings of 100 tokens, its tokenizer \d+: take another teacher"):
        Distillation(valley("gpt2"), str(tmp_path / "few"))


def test_what_a_context_must_not_be(valley: Valley, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="context= has no token"):
        ContextDistillation(valley("gpt2"), "")
    with pytest.raises(TuningError, match="teacher= is for Distillation"):
        ContextDistillation(valley("gpt2"), CONTEXT, teacher=valley("gpt2"))
    (tmp_path / "text.txt").write_text(100 * CONTEXT)
    task, (data, _) = ContextDistillation(valley("gpt2"), str(tmp_path / "text.txt")), rows(valley)
    with pytest.raises(TuningError, match=r"a context of \d+ tokens and max_length=128 of the data are beyond the 256"):
        trainer(tmp_path, LoRA(r=2)).fit(task, data)
    task = ContextDistillation(valley("gpt2"), CONTEXT)
    with pytest.raises(TuningError, match="before the first text of a packed row alone: set packing=false"):
        trainer(tmp_path, LoRA(r=2)).fit(task, rows(valley, packing=True, max_length=64)[0])


def _of_other_words(valley: Valley, folder: Path) -> str:
    """Return a causal model with the words of another tokenizer."""
    _narrow(valley, folder / "words", AutoTokenizer.from_pretrained(valley("bert")))
    return str(folder / "words")


def _narrow(valley: Valley, folder: Path, tokenizer: Any = None, **config: Any) -> None:
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(valley("gpt2"))
    given = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2} | config
    hf.GPT2LMHeadModel(hf.GPT2Config(**given)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
