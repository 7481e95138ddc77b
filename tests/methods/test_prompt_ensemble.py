"""PromptEnsemble: one run with N prompts is N runs, and what they agree on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import BitFit, PromptEnsemble, PromptTuning, PTuning, TuningError, read_delta, save_delta
from lightning_peft.methods.prompt_ensemble import Ballot
from tests.contract import assert_near, assert_same, output, snapshot
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer

KINDS = ("mlm", "gpt2", "llama", "t5")
"""Language models: a classifier's head would be trained beside each prompt."""


def prompts(kind: str, folder: Path, lengths: list[int]) -> tuple[list[str], list[Tensor]]:
    """Save prompts of a model; return their files and the logits that each gives."""
    files, logits = [], []
    for i, length in enumerate(lengths):
        model, method = tiny(kind), PromptTuning(num_virtual_tokens=length, init="random_uniform")
        torch.manual_seed(i)
        method.apply(model)
        files.append(str(save_delta(model, folder / f"{kind}{i}.safetensors")))
        out = output(model, kind, method)
        logits.append(out[:, length + 1 :] if kind == "mlm" else out[:, -10:])
    return files, logits


def ensembled(kind: str, files: list[str], vote: Any = "majority") -> Tensor:
    model, method = tiny(kind), PromptEnsemble(prompts=files, vote=vote)
    method.apply(model)
    out = output(model, kind, method)
    return out[:, 1:] if kind == "mlm" else out


@pytest.mark.parametrize("lengths", [[3, 3, 3], [2, 4, 3]], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_the_probabilities(kind: str, lengths: list[int], tmp_path: Path) -> None:
    files, logits = prompts(kind, tmp_path, lengths)
    expected = torch.stack([each.softmax(-1) for each in logits]).mean(0)
    found = ensembled(kind, files, "mean")
    real = batch("mlm")["attention_mask"][:, 1:].bool() if kind == "mlm" else torch.ones(found.shape[:2]).bool()
    assert_near({"": expected[real]}, {"": found.exp()[real]}, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_majority(kind: str, tmp_path: Path) -> None:
    files, logits = prompts(kind, tmp_path, [3, 3, 3])
    found = ensembled(kind, files)
    votes = torch.stack([each.argmax(-1) for each in logits])
    counts = torch.nn.functional.one_hot(votes, found.shape[-1]).sum(0)
    assert bool((counts.gather(-1, found.argmax(-1, keepdim=True)).squeeze(-1) == counts.amax(-1)).all())


def test_an_ensemble_of_one_is_that_prompt(tmp_path: Path) -> None:
    files, (logits,) = prompts("mlm", tmp_path, [3])
    assert_near({"": logits.log_softmax(-1)}, {"": ensembled("mlm", files, "mean")}, 1e-5)
    assert torch.equal(ensembled("mlm", files).argmax(-1), logits.argmax(-1))


def test_ties_go_to_the_mean_log_probability() -> None:
    ballot = Ballot([1, 1], "majority", 0, False, None)
    sure, unsure = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    assert ballot._count(torch.cat((sure, unsure))).argmax().item() == 0
    assert ballot._count(torch.cat((unsure, sure))).argmax().item() == 0
    three = Ballot([1, 1, 1], "majority", 0, False, None)
    assert three._count(torch.cat((unsure, unsure, 100 * sure))).argmax().item() == 1, "two votes beat one sure one"
    assert_near({"": torch.ones(1)}, {"": three._count(torch.cat((unsure, unsure, sure))).exp().sum(-1)}, 1e-6)


def test_it_validates_in_a_trainer(tmp_path: Path) -> None:
    files, _ = prompts("gpt2", tmp_path, [3, 2])
    run = trainer(tmp_path, PromptEnsemble(prompts=files, vote="mean"))
    module = Tuned("gpt2")
    (loss,) = run.validate(module, loader("gpt2"), verbose=False)
    assert loss["val_loss"] > 0
    with pytest.raises(TuningError, match="an ensemble only answers: train each prompt"):
        run.fit(module, loader("gpt2"), loader("gpt2"))


def test_remove_gives_the_model_back(tmp_path: Path) -> None:
    files, _ = prompts("t5", tmp_path, [3])
    model, method = tiny("t5"), PromptEnsemble(prompts=files)
    before = snapshot(model, "t5")
    method.apply(model)
    method.remove(model)
    assert_same(before, snapshot(model, "t5"))
    assert "forward" not in vars(model)


def test_a_p_tuning_without_its_network_votes_too(tmp_path: Path) -> None:
    model, method = tiny("mlm"), PTuning(num_virtual_tokens=3)
    method.apply(model)
    live = save_delta(model, tmp_path / "live.safetensors")
    with pytest.raises(TuningError, match=r"holds 0 prompts among .*a PTuning after drop_network"):
        PromptEnsemble(prompts=[str(live)]).apply(tiny("mlm"))
    method.drop_network(model)
    file = save_delta(model, tmp_path / "folded.safetensors")
    PromptEnsemble(prompts=[str(file)]).apply(tiny("mlm"))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"without prompts answers nothing: give prompts=.* or num_prompts="):
        PromptEnsemble().apply(tiny("mlm"))
    files, _ = prompts("mlm", tmp_path, [3])
    with pytest.raises(TuningError, match="an ensemble has its prompts from files or trains them"):
        PromptEnsemble(prompts=files, num_prompts=2).apply(tiny("mlm"))
    with pytest.raises(TuningError, match="vote='best' is no form of a vote"):
        PromptEnsemble(prompts=files, vote="best").apply(tiny("mlm"))
    model, head = tiny("bert"), PromptTuning(num_virtual_tokens=2, init="random_uniform")
    head.apply(model)
    with pytest.raises(TuningError, match=r"trained classifier\.\w+ beside its prompt"):
        PromptEnsemble(prompts=[str(save_delta(model, tmp_path / "head.safetensors"))]).apply(tiny("bert"))
    other = tiny("bert")
    BitFit().apply(other)
    with pytest.raises(TuningError, match="holds 0 prompts"):
        PromptEnsemble(prompts=[str(save_delta(other, tmp_path / "bias.safetensors"))]).apply(tiny("bert"))
    model = tiny("gpt2")
    files, _ = prompts("gpt2", tmp_path, [3])
    PromptEnsemble(prompts=files).apply(model)
    with pytest.raises(TuningError, match=r"call generate\(\) with use_cache=False"):
        model.generate(batch("gpt2")["input_ids"], max_new_tokens=3)
    assert model.generate(batch("gpt2")["input_ids"], max_new_tokens=3, use_cache=False).shape == (4, 13)


def test_a_delta_of_several_prompts_is_as_many_prompts(tmp_path: Path) -> None:
    model = tiny("mlm")
    PromptTuning(num_virtual_tokens=3, num_prompts=2, init="random_uniform").apply(model)
    both = str(save_delta(model, tmp_path / "both.safetensors"))
    rows = read_delta(Path(both))[0].popitem()[1]
    files = []
    for number in range(2):
        single, method = tiny("mlm"), PromptTuning(name=f"p{number}", num_virtual_tokens=3, init="random_uniform")
        method.apply(single)
        method.rows(single).data.copy_(rows[3 * number : 3 * number + 3])
        files.append(str(save_delta(single, tmp_path / f"{number}.safetensors")))
    assert torch.equal(ensembled("mlm", [both], "mean"), ensembled("mlm", files, "mean"))


def placed(folder: Path, template: str, seed: int) -> tuple[str, Tensor]:
    """Save a prompt that stands in a template, and return its file and logits."""
    torch.manual_seed(seed)
    model, method = tiny("mlm"), PTuning(template=template)
    method.apply(model)
    method.drop_network(model)
    with torch.no_grad():
        return str(save_delta(model, folder / f"{seed}.safetensors")), model(IDS).logits


IDS = torch.tensor([[3, -1, -2, 20, 21, -3, -4, 40, 5], [3, -1, -2, 30, 21, -3, -4, 40, 5]])
TEMPLATE = "{v:2} {sub} {v:2} {mask}"


def test_prompts_of_a_template_stand_where_they_were_trained(tmp_path: Path) -> None:
    (one, first), (two, second) = (placed(tmp_path, TEMPLATE, seed) for seed in (0, 1))
    model, method = tiny("mlm"), PromptEnsemble(prompts=[one, two], vote="mean")
    method.apply(model)
    with torch.no_grad():
        found = model(**method.prepare({"input_ids": IDS})).logits
    expected = (first.softmax(-1) + second.softmax(-1)) / 2
    assert_near({"": expected}, {"": found.exp()}, 1e-5)
    with pytest.raises(TuningError, match="the batch has no virtual tokens: give the data module the template"):
        model(input_ids=IDS.clamp(min=7))
    other, _ = placed(tmp_path, "{sub} {v:4} {mask}", 2)
    with pytest.raises(TuningError, match="one place for a prompt: give prompts of one template"):
        PromptEnsemble(prompts=[one, other]).apply(tiny("mlm"))
    files, _ = prompts("mlm", tmp_path, [3])
    model = tiny("mlm")
    PromptEnsemble(prompts=files).apply(model)
    with pytest.raises(TuningError, match="these prompts stand before the text: give plain texts"):
        model(input_ids=IDS)


def test_each_row_is_asked_by_each_prompt_that_trains() -> None:
    """The gradient of each prompt is that of training it alone, over N."""
    model, method = tiny("mlm"), PromptEnsemble(num_prompts=2, num_virtual_tokens=3, init="random_uniform")
    method.apply(model)
    inputs = batch("mlm")
    model.train()
    model(**method.asked_by_all(inputs)).loss.backward()
    (weight,) = (p for p in model.parameters() if p.requires_grad)
    for number in range(2):
        own = slice(3 * number, 3 * number + 3)
        single, alone = tiny("mlm"), PromptTuning(num_virtual_tokens=3, init="random_uniform")
        alone.apply(single)
        alone.rows(single).data.copy_(weight[own])
        single.train()(**alone.prepare(inputs)).loss.backward()
        assert_near({"": alone.rows(single).grad}, {"": 2 * weight.grad[own]}, 1e-5)


def test_prompts_that_trained_together_vote(tmp_path: Path) -> None:
    ensemble = PromptEnsemble(num_prompts=3, num_virtual_tokens=2, init="random_uniform", vote="mean")
    run, module = trainer(tmp_path, ensemble, max_steps=3), Tuned("mlm")
    run.fit(module, loader("mlm"), loader("mlm"))
    file = str(save_delta(module, tmp_path / "three.safetensors"))
    with pytest.raises(TuningError, match=r"give the model method.asked_by_all\(batch\), or call model.eval\(\)"):
        module.model.train()(**batch("mlm"))
    module.eval()
    voted = output(module.model, "mlm", ensemble)
    assert_near({"": voted[:, 1:]}, {"": ensembled("mlm", [file], "mean")}, 1e-5)
