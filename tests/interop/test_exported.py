"""What is exported is loaded and run by PEFT, and gives what is computed here; else it is refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import IA3, HiRA, LoRA, Method, TuningError
from lightning_peft.interop import from_peft, to_peft
from tests.contract import assert_near, shake
from tests.interop.adapters import nested
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)
IDS = torch.arange(3, 15).view(2, 6)


class Held(nn.Module):
    """Layers in containers, a layer of two names, and names that are part of others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(8))])
        self.again = self.heads["b"]
        self.tower = nn.ModuleDict({"first": nn.ModuleDict({"q": nn.Linear(8, 8)})})
        self.config = hf.PreTrainedConfig()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, 8]."""
        x = self.tower["first"]["q"](self.first(x).tanh()).tanh() + self.shifts[0]
        return self.again(self.heads["b"](self.heads["a"](x).tanh()).tanh())


def held() -> nn.Module:
    torch.manual_seed(0)
    return Held()


def tied(kind: str) -> Callable[[], nn.Module]:
    """Return what builds an encoder-decoder of transformers whose tables are tied to each other and to the scores."""
    sizes: dict[str, Any] = {"vocab_size": 20, "d_model": 16, "decoder_start_token_id": 0}
    if kind == "bart":
        config: Any = hf.BartConfig(
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=8, decoder_ffn_dim=8, scale_embedding=True, **sizes,
        )  # fmt: skip
        return lambda: seeded(hf.BartForConditionalGeneration, config)
    config = hf.T5Config(d_kv=8, d_ff=8, num_layers=1, num_heads=2, **sizes)
    return lambda: seeded(hf.T5ForConditionalGeneration, config)


def seeded(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).eval()


def check(build: Callable[[], nn.Module], method: Method, folder: Path, **inputs: Tensor) -> dict[str, Any]:
    """Check that PEFT computes what is computed here, and so does the model that reads the adapter again."""
    bare, model, again = build(), build(), build()
    inputs = inputs or {"x": torch.randn(3, 8)}
    method.apply(model)
    shake(model)
    to_peft(model, folder)
    theirs = peft.PeftModel.from_pretrained(build(), folder).eval()
    from_peft(again, folder)
    outs = []
    for each in (model, theirs, again, bare):
        out = each.eval()(**inputs)
        outs.append(out.detach() if isinstance(out, Tensor) else out.logits.detach())
    assert_near({"": outs[0]}, {"": outs[1]}, 1e-5)
    assert_near({"": outs[0]}, {"": outs[2]}, 1e-6)
    assert not torch.allclose(outs[0], outs[3], atol=1e-3)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_tables_that_are_tied_to_others_are_saved_apart(kind: str, tmp_path: Path) -> None:
    """PEFT would make linear layers of all that is tied, the tables too, and could not run."""
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    config = check(tied(kind), LoRA(r=2, also_train=r".*shared\..*"), tmp_path, **inputs)
    assert not config["ensure_weight_tying"]
    assert any(name.endswith("encoder.embed_tokens") for name in config["modules_to_save"])


def test_a_table_and_the_scores_stay_tied(tmp_path: Path) -> None:
    config = check(lambda: tiny("gpt2"), LoRA(r=2, also_train=r"transformer\.wte\..*"), tmp_path, input_ids=IDS)
    assert config["ensure_weight_tying"]
    theirs = peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path).base_model.model
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


def test_of_a_container_its_layers_are_saved(tmp_path: Path) -> None:
    check(held, LoRA(r=2, target_modules=["q"], also_train=r"heads\.a\..*"), tmp_path / "one")
    config = check(held, LoRA(r=2, target_modules=["q"], also_train=r"(heads|again)\..*"), tmp_path / "all")
    assert config["modules_to_save"] == ["again", "heads.a", "heads.b"]  # and the layer of two names by both


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (LoRA(r=2, target_modules=["q"], also_train=r"shifts\..*"), "PEFT saves no ParameterList alone, and shifts.0"),
        (
            LoRA(r=2, target_modules=["q"], also_train=r"first\..*"),
            r"first, which is trained, would find tower\.first, too",
        ),
        (IA3(target_modules=["heads.b"], feedforward_modules=[]), "PEFT would change one of the two alone"),
        (HiRA(r=2, target_modules=["heads.b"]), "PEFT would change one of the two alone"),
    ],
)
def test_what_peft_could_not_run_is_refused(method: Method, why: str, tmp_path: Path) -> None:
    model = held()
    method.apply(model)
    with pytest.raises(TuningError, match=why):
        to_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


NESTED = [
    IA3(target_modules="foo", feedforward_modules=[]),
    IA3(target_modules="foo", feedforward_modules="module.foo"),
    IA3(target_modules="module.module.foo", feedforward_modules="foo"),
    IA3(target_modules=[], feedforward_modules="foo|module.foo"),
    HiRA(r=2, target_modules="module.foo"),
]


@pytest.mark.parametrize("method", NESTED, ids=repr)
def test_names_that_end_alike(method: Method, tmp_path: Path) -> None:
    check(nested, type(method)(**method.init_args()), tmp_path)


def test_a_layer_of_one_name_scaled_here_at_its_input_and_there_at_its_output(tmp_path: Path) -> None:
    method = IA3(target_modules=["0.self_attn.o_proj"], feedforward_modules=["1.self_attn.o_proj", "down_proj"])
    check(lambda: tiny("llama"), method, tmp_path, input_ids=IDS)
