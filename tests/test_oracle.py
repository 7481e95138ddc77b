"""Hugging Face PEFT as a differential oracle: from equal weights, equal logits, equal training, equal merged weights.

Where we differ on purpose (peft 0.21.2), so that nobody mends us towards it:

* A soft prompt on BERT: peft puts it before [CLS] and pools the first virtual token; ours goes after [CLS].
* Token labels under a soft prompt: peft raises; ours are widened. Answer spans: peft does not shift them; ours move.
* The first token of a causal text: peft predicts it from the prompt and counts that in the loss, ours has no output
  for the prompt's positions, so that a text counts as much as without a prompt.
* A soft prompt on T5: peft's default makes rows for the decoder too, which no gradient ever reaches; ours has none.
  Here it is asked for one set (``num_transformer_submodules=1``).
* The task head: peft trains it when ``task_type`` says so, in the dtype of the backbone; ours always, in fp32. Here it
  is left out.
* Names: peft wraps layers, so the keys of the backbone change; ours stay.
"""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, Method, PromptTuning, merge
from lightning_peft.graft import grafts
from tests.contract import assert_near
from tests.models import batch, tiny

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 calls names that transformers 5.23 has renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)

TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
KINDS = pytest.mark.parametrize("kind", TARGETS)
TABLES = {"bert": "word_embeddings", "llama": "embed_tokens"}


def theirs(kind: str, **settings: Any) -> nn.Module:
    """Return the tiny model under peft's LoRA, A and B random."""
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 16.0, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | settings
    )
    model = peft.get_peft_model(tiny(kind), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def ours(kind: str, like: nn.Module, **arguments: Any) -> tuple[nn.Module, Method]:
    """Return the tiny model under our LoRA, with the A and B of peft's."""
    head = "classifier.*" if kind == "bert" else None
    model, method = tiny(kind), LoRA(**{"r": 2, "target_modules": TARGETS[kind], "exclude": head} | arguments)
    method.apply(model)
    with torch.no_grad():
        for place in grafts(model):
            place.graft.A.copy_(pair(like, place.path)[0])
            place.graft.B.copy_(pair(like, place.path)[1])
    return model, method


def pair(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Return peft's A and B at the host of this path."""
    host = model.get_submodule(f"base_model.model.{path}")
    if hasattr(host, "lora_embedding_A") and "default" in host.lora_embedding_A:
        return host.lora_embedding_A["default"], host.lora_embedding_B["default"]
    return host.lora_A["default"].weight, host.lora_B["default"].weight


def train(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Take three SGD steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


def deltas(mine: nn.Module, other: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return our A and B and peft's, by our names."""
    left = {f"{place.path}.{n}": p for place in grafts(mine) for n, p in place.graft.named_parameters()}
    right = {
        f"{place.path}.{n}": p for place in grafts(mine) for n, p in zip("AB", pair(other, place.path), strict=True)
    }
    return left, right


@KINDS
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_gives_the_logits_of_peft(kind: str, rslora: bool) -> None:
    other = theirs(kind, use_rslora=rslora)
    model, _ = ours(kind, other, use_rslora=rslora)
    with torch.no_grad():
        assert_near({"": other(**batch(kind)).logits}, {"": model(**batch(kind)).logits}, 1e-5)
        assert not torch.allclose(model(**batch(kind)).logits, tiny(kind)(**batch(kind)).logits, atol=0.1)


@KINDS
def test_lora_trains_as_peft_does(kind: str) -> None:
    other = theirs(kind)
    model, _ = ours(kind, other)
    start = {name: p.detach().clone() for name, p in deltas(model, other)[0].items()}
    for each in (model, other):
        train(each, batch(kind))
    left, right = deltas(model, other)
    assert_near(right, left, 1e-5)
    assert all(not torch.allclose(left[name], start[name], atol=1e-4) for name in start)


@KINDS
def test_lora_merges_as_peft_does(kind: str) -> None:
    other = theirs(kind)
    model, _ = ours(kind, other)
    merged = other.merge_and_unload()
    assert_near(dict(merged.state_dict()), dict(merge(model).state_dict()), 1e-5)
    assert not torch.equal(merged(**batch(kind)).logits, tiny(kind)(**batch(kind)).logits)


@pytest.mark.parametrize("kind", TABLES)
def test_lora_on_the_embedding_is_that_of_peft(kind: str) -> None:
    other = theirs(kind, target_modules=[TABLES[kind]])
    model, _ = ours(kind, other, target_modules=[TABLES[kind]])
    with torch.no_grad():
        assert_near({"": other(**batch(kind)).logits}, {"": model(**batch(kind)).logits}, 1e-5)
    for each in (model, other):
        train(each, batch(kind))
    assert_near(*reversed(deltas(model, other)), 1e-5)
    assert_near(dict(other.merge_and_unload().state_dict()), dict(merge(model).state_dict()), 1e-5)


def test_patterns_of_rank_and_alpha_are_those_of_peft() -> None:
    patterns = {"rank_pattern": {"value": 4}, "alpha_pattern": {"query": 3.0}}
    other = theirs("bert", **patterns)
    model, _ = ours("bert", other, **patterns)
    with torch.no_grad():
        assert_near({"": other(**batch("bert")).logits}, {"": model(**batch("bert")).logits}, 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_prompt_tuning_is_that_of_peft(kind: str) -> None:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4, num_transformer_submodules=1)
    other = peft.get_peft_model(tiny(kind), config).eval()
    model, method = tiny(kind), PromptTuning(num_virtual_tokens=4, init="random_uniform")
    method.apply(model)
    with torch.no_grad():
        prompt = other.prompt_encoder["default"].embedding.weight.copy_(method.rows(model))
    inputs = batch(kind, padded=False)
    if kind != "t5":
        inputs["labels"][:, 0] = -100
    with torch.no_grad():
        ours, theirs = model(**method.prepare(inputs)).logits, other(**inputs).logits
        assert_near({"": theirs[:, -ours.shape[1] :]}, {"": ours}, 1e-5)
        assert_near({"": other(**inputs).loss}, {"": model(**method.prepare(inputs)).loss}, 1e-5)
    start = method.rows(model).detach().clone()
    train(other, inputs)
    train(model, dict(method.prepare(inputs)))
    assert_near({"": prompt}, {"": method.rows(model)}, 1e-5)
    assert not torch.allclose(prompt, start, atol=1e-4)
