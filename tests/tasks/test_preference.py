"""DPO, IPO and ORPO against their formulas with a second model as the reference, and what is wrong with pairs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_peft import LoRA, Method, Preference, PreferenceData, PrefixTuning, PromptTuning, TuningError, muted
from tests.modules import trainer
from tests.valley import set_up

Valley = Callable[[str], str]
PROMPT = {"num_virtual_tokens": 3, "init": "random_uniform"}


def pairs(valley: Valley, **kwargs: Any) -> PreferenceData:
    return PreferenceData(tokenizer=valley("gpt2"), **{"dataset": "made://preferences", "batch_size": 4} | kwargs)


def tuned(valley: Valley, method: Method, **kwargs: Any) -> Preference:
    """Return a task whose delta is drawn."""
    task = Preference(valley("gpt2"), **kwargs).eval()
    method.apply(task.backbone)
    torch.manual_seed(1)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    return task


def likelihood(model: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, int, Tensor]:
    """Return the log-likelihood of an answer, its tokens, and the cross-entropies of all tokens of one row."""
    ids, labels = ids[mask == 1], labels[mask == 1]
    logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1].float()
    losses = F.cross_entropy(logits, ids[1:], reduction="none")
    return -losses[labels[1:] != -100].sum(), int((labels[1:] != -100).sum()), losses


@pytest.mark.parametrize(
    ("objective", "smooth"), [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("orpo", 0.0)], ids=lambda value: str(value)
)
def test_losses_are_those_of_two_models(objective: Any, smooth: float, valley: Valley) -> None:
    data, beta = pairs(valley), 0.3
    set_up(data)
    batch = next(iter(data.val_dataloader()))
    assert len(batch["input_ids"]) == 8
    task = tuned(valley, LoRA(r=2), objective=objective, beta=beta, label_smoothing=smooth)
    costs, margins = task(batch)
    reference, rows = AutoModelForCausalLM.from_pretrained(valley("gpt2")), []
    policy = copy.deepcopy(task.backbone)
    with torch.no_grad():
        for row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            (own, count, losses), (other, _, _) = likelihood(policy, *row), likelihood(reference, *row)
            rows.append((own, other, count, losses))
    nll = torch.cat([losses for _, _, _, losses in rows[:4]]).mean()
    for i in range(4):
        (a, ra, na, _), (b, rb, nb, _) = rows[i], rows[i + 4]
        d = (a - ra) - (b - rb)
        expected = {
            "dpo": -(1 - smooth) * torch.log(torch.sigmoid(beta * d)) - smooth * torch.log(torch.sigmoid(-beta * d)),
            "ipo": ((a - ra) / na - (b - rb) / nb - 1 / (2 * beta)) ** 2,
        }
        a, b = a / na, b / nb
        odds = (a - torch.log(1 - a.exp())) - (b - torch.log(1 - b.exp()))
        expected["orpo"] = nll - beta * torch.log(torch.sigmoid(odds))
        assert costs[i].item() == pytest.approx(expected[objective].item(), rel=1e-4, abs=1e-5)
        margin = beta * (a - b if objective == "orpo" else d).item()
        assert margins[i].item() == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert task.loss(batch).item() == pytest.approx(costs.mean().item())
    scores = task.val_scores
    task.score(batch, "val")
    assert scores.compute()["val_accuracy"].item() == pytest.approx((margins > 0).float().mean().item())


@pytest.mark.parametrize("method", [PromptTuning(**PROMPT), PrefixTuning(num_virtual_tokens=3)])
def test_the_reference_does_not_see_a_prompt(method: Method, valley: Valley) -> None:
    data = pairs(valley)
    set_up(data)
    batch = next(iter(data.val_dataloader()))
    task = tuned(valley, type(method)(**method.init_args()))
    plain = Preference(valley("gpt2")).eval()
    with torch.no_grad():
        wide = task.prepared(batch)
        torch.testing.assert_close(task._reference(wide), plain._reference(batch))
        assert not torch.allclose(task(batch)[1], torch.zeros(4))
    with muted(task.backbone):
        assert torch.allclose(task(batch)[1], torch.zeros(4), atol=1e-5)


def test_the_reference_leaves_modes_and_gradients_alone(valley: Valley) -> None:
    data = pairs(valley)
    set_up(data)
    task = tuned(valley, LoRA(r=2)).train()
    modes = [module.training for module in task.modules()]
    task.loss(next(iter(data.val_dataloader()))).backward()
    assert [module.training for module in task.modules()] == modes
    gradients = [p.grad for p in task.parameters() if p.requires_grad]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_preferences_are_learned(valley: Valley, tmp_path: Path) -> None:
    task = Preference(valley("gpt2"), lr=1e-2, warmup=0.0)
    run = trainer(tmp_path, LoRA(r=8, target_modules="all-linear"), max_epochs=1, limit_train_batches=40)
    run.fit(task, pairs(valley, batch_size=8))
    assert run.callback_metrics["val_loss"] < 0.68
    assert run.callback_metrics["val_margin"] > 0


def test_numbers_out_of_range(valley: Valley) -> None:
    for arguments, message in (
        ({"beta": 0.0}, "beta=0.0 is out of range"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 is out of range"),
        ({"label_smoothing": 0.1, "objective": "ipo"}, "label_smoothing=0.1 is for objective=dpo"),
        ({"precompute_reference": True, "objective": "orpo"}, "is for a reference, which orpo has not: leave it out"),
    ):
        with pytest.raises(TuningError, match=message):
            Preference(valley("gpt2"), **arguments)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
ROW = {"prompt": "where does anmar live ?", "chosen": "in lund", "rejected": "in berg"}
SAID = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": "in lund"}]
OTHER = [SAID[0], {"role": "assistant", "content": "in berg"}]
MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "same": ({**ROW, "rejected": "in lund"}, {}, "has the same tokens for chosen and rejected: leave the row out"),
    "empty": ({**ROW, "chosen": " "}, {}, "has ' ' for its answer: give a text"),
    "no prompt": ({**ROW, "prompt": ""}, {}, "has '' for its prompt: give a text"),
    "long": (ROW, {"max_length": 4}, "cannot be used: a prompt of .* leaves no room for its target: raise max_length"),
    "other prompt": (
        {"chosen": SAID, "rejected": [{"role": "user", "content": "who ?"}, OTHER[1]]},
        {"prompt": None},
        "has other words before the chosen answer than before the rejected one",
    ),
}


def write(path: Path, *rows: dict[str, Any]) -> str:
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / "rows.jsonl")


def read(valley: Valley, file: str, **kwargs: Any) -> dict[str, Any]:
    options = {"dataset": None, "template": TEMPLATE, "validation_share": 0, "test_share": 0}
    data = pairs(valley, train=file, **options | kwargs)
    set_up(data)
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_pairs_are_named_by_number(name: str, valley: Valley, tmp_path: Path) -> None:
    row, arguments, message = MISTAKES[name]
    good = {"chosen": SAID, "rejected": OTHER} if "prompt" in arguments else ROW
    if "max_length" not in arguments:
        with pytest.warns(UserWarning, match="1 of 2 rows of the train split are left out"):
            assert len(read(valley, write(tmp_path, good, row), skip_bad_rows=True, **arguments)["input_ids"]) == 2
    with pytest.raises(TuningError, match=f"^row [12] of the train split {message}"):
        read(valley, write(tmp_path, good, row), **arguments)


def test_messages_in_three_forms(valley: Valley, tmp_path: Path) -> None:
    whole = read(valley, write(tmp_path, {"chosen": SAID, "rejected": OTHER}), prompt=None)
    split = read(valley, write(tmp_path, {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": OTHER[1:]}))
    mixed = read(valley, write(tmp_path, {**ROW, "prompt": SAID[:1]}))
    for other in (split, mixed):
        assert all(torch.equal(whole[name], other[name]) for name in whole)
    assert bool((whole["labels"] != -100).any(1).all())


def test_the_reference_is_computed_once_if_asked(valley: Valley) -> None:
    """Rows that come again, in another order and padded to another length, are not computed again."""
    data = set_up(pairs(valley))
    batch = next(iter(data.val_dataloader()))
    filler = {"input_ids": data.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    again = {name: F.pad(values.view(2, 4, -1).flip(1).flatten(0, 1), (0, 3), value=filler[name])
             for name, values in batch.items()}  # fmt: skip
    half = {name: torch.cat([values[:2], values[4:6]]) for name, values in batch.items()}
    for method in (LoRA(r=2), PromptTuning(**PROMPT)):
        live, kept = (tuned(valley, type(method)(**method.init_args()), precompute_reference=o) for o in (False, True))
        rows: list[int] = []
        computed = kept._computed_reference

        def noting(*row: Tensor, rows: list[int] = rows, computed: Any = computed) -> Tensor:
            rows.append(len(row[0]))
            return computed(*row)

        kept._computed_reference = noting  # type: ignore[method-assign]
        for each in (half, batch, again, batch):
            torch.testing.assert_close(kept(each)[0], live(each)[0], atol=1e-5, rtol=1e-5)
        assert rows == [4, 4]
