"""A tuned model that is called without its callback computes with its prompt, or says that it cannot."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PrefixTuning, PromptTuning, PTuning, TuningError
from lightning_peft.prompts import in_model
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer

P = 3
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.* trained parameters got no gradient",
)


def prompt(**kwargs: Any) -> PromptTuning:
    return PromptTuning(num_virtual_tokens=P, init="random_uniform", **kwargs)


def tuned(kind: str, method: Any = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model, method = tiny(kind), method or prompt()
    method.apply(model)
    return model, method


@pytest.mark.parametrize("kind", ["bert", "distilbert", "mlm", "t5"])
def test_a_model_puts_its_prompt_in_itself(kind: str) -> None:
    model, method = tuned(kind)
    given = batch(kind)
    prepared = dict(method.prepare(given))
    assert prepared["input_ids"].shape[1] == given["input_ids"].shape[1] + P
    for one, two in zip(model(**given).values(), model(**prepared).values(), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, two)
    del given["labels"], prepared["labels"]
    if kind != "t5":
        ids, mask = given["input_ids"], given["attention_mask"]
        assert torch.equal(model(ids, mask).logits, model(**prepared).logits)


def test_a_part_that_is_called_alone_does_so_too() -> None:
    model, method = tuned("bert")
    given = {name: t for name, t in batch("bert").items() if name != "labels"}
    assert torch.equal(model.bert(**given).pooler_output, model.bert(**method.prepare(given)).pooler_output)


def test_text_is_generated_with_the_prompt() -> None:
    model, method = tuned("t5")
    given = {name: t for name, t in batch("t5").items() if name != "labels"}
    options = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True}
    for more in ({"do_sample": False}, {"num_beams": 2}):
        mine, right = (model.generate(**b, **options, **more) for b in (given, method.prepare(given)))
        assert torch.equal(mine.sequences, right.sequences)
        assert all(torch.equal(a, b) for a, b in zip(mine.scores, right.scores, strict=True))


def test_a_trainer_without_the_method_predicts_with_it(tmp_path: Path) -> None:
    module, method = Tuned("bert"), prompt()
    trainer(tmp_path, method, max_epochs=1).fit(module, loader("bert"))
    plain = [{n: t for n, t in row.items() if n != "labels"} for row in loader("bert").dataset]
    with_it, without = (trainer(tmp_path, *c).predict(module, DataLoader(plain, 4)) for c in ((method,), ()))
    assert torch.equal(torch.cat(with_it), torch.cat(without))


def test_copies_prepare_by_their_own_prompt() -> None:
    model, _ = tuned("bert")
    given = batch("bert")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**given).logits, model(**given).logits)
        with torch.no_grad():
            other.get_input_embeddings().prompttuning.weight.add_(1)
        assert not torch.equal(other(**given).logits, model(**given).logits)


def test_a_method_that_is_removed_prepares_nothing() -> None:
    model, method = tuned("bert")
    method.remove(model)
    assert torch.equal(model(**batch("bert")).logits, tiny("bert")(**batch("bert")).logits)
    assert "forward" not in vars(model)


def test_a_template_is_asked_for() -> None:
    model, _ = tuned("mlm", PTuning(template="{v:2} {sub} {mask}", encoder="none"))
    with pytest.raises(TuningError, match="the batch has none: give the data module the same template"):
        model(**batch("mlm"))


def test_embeddings_without_the_prompt_are_refused() -> None:
    model, method = tuned("bert")
    given = {name: t for name, t in batch("bert").items() if name != "labels"}
    table = model.get_input_embeddings()
    with pytest.raises(TuningError, match=r"embed the ids that method\.prepare\(batch\) returns"):
        model(inputs_embeds=table(given["input_ids"]), attention_mask=given["attention_mask"])
    prepared = dict(method.prepare(given))
    ids = prepared.pop("input_ids")
    assert torch.equal(model(inputs_embeds=table(ids), **prepared).logits, model(**given).logits)


def test_a_mask_of_four_dimensions_is_refused() -> None:
    model, method = tuned("bert")
    given = batch("bert")
    wide = given | {"attention_mask": torch.ones(4, 1, 10, 10)}
    with pytest.raises(TuningError, match=r"call it with what method\.prepare\(batch\) returns"):
        model(**wide)
    assert model(**method.prepare(given)).logits.shape[0] == 4


def test_an_infix_is_put_in_too() -> None:
    model, method = tuned("gpt2", PrefixTuning(form="infix", num_virtual_tokens=2, mid_dim=None))
    given = batch("gpt2")
    given["labels"][:, :4] = -100
    assert torch.equal(model(**given).logits, model(**method.prepare(given)).logits)


def test_in_a_fit_no_values_are_looked_at_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the callback has prepared is known by its identity: to look at its values would wait for the GPU."""
    monkeypatch.setattr(in_model, "is_widened", lambda _: pytest.fail("the ids were looked at"))
    trainer(tmp_path, prompt(), max_epochs=1).fit(Tuned("bert"), loader("bert"), loader("bert"))


class Pairs(Tuned):
    """A bi-encoder that reads two texts of a flat batch."""

    first, second = "", "pos_"
    behind = ""

    def encode(self, batch: dict[str, Tensor], before: str, behind: str = "") -> Tensor:
        ids, mask = batch[f"{before}input_ids{behind}"], batch[f"{before}attention_mask{behind}"]
        states = self.model.bert(ids, mask).last_hidden_state
        assert states.shape[1] == mask.shape[1] == 10 + P * isinstance(self.trainer.callbacks[-1], PromptTuning)
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        one, two = self.encode(batch, self.first), self.encode(batch, self.second, self.behind)
        self.shapes = {name: tuple(t.shape) for name, t in batch.items()}
        return nn.functional.cross_entropy(one @ two.T, torch.arange(len(one)))


class Chosen(Pairs):
    first, second = "chosen_", "rejected_"


class Suffixed(Pairs):
    second, behind = "", "_b"


@pytest.mark.parametrize("kind", [Pairs, Chosen, Suffixed])
def test_every_text_of_a_batch_gets_the_prompt(kind: type[Pairs], tmp_path: Path) -> None:
    texts = [{n: t for n, t in batch("bert", padded=False, seed=s).items() if n != "labels"} for s in (0, 1)]
    one = {f"{kind.first}{name}": t for name, t in texts[0].items()}
    two = {f"{kind.second}{name}{kind.behind}": t for name, t in texts[1].items()}
    rows = [{name: t[i] for name, t in (one | two).items()} for i in range(4)]
    module = kind("bert")
    method = prompt(exclude=r"classifier.*|bert\.pooler.*")
    trainer(tmp_path, method).fit(module, DataLoader(rows, 4))
    assert set(module.shapes.values()) == {(4, 10 + P)}
    prepared = method.prepare(one | two | {"decoder_input_ids": texts[0]["input_ids"]})
    for part, text in ((one, texts[0]), (two, texts[1])):
        for (name, _), right in zip(part.items(), method.prepare(text).values(), strict=True):
            assert torch.equal(prepared[name], right)
    assert prepared["decoder_input_ids"] is texts[0]["input_ids"]
    trainer(tmp_path / "other", LoRA(r=2, exclude=r"classifier.*|bert\.pooler.*")).fit(
        kind("bert"), DataLoader(rows, 4)
    )
