"""What PEFT has of embeddings and convolutions, and forms of a method: equal both ways, in steps, and once merged."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import IA3, OFT, HiRA, LoRA, MiSS, PromptTuning, PTuning, TuningError, merge
from lightning_peft.core.graft import grafts
from lightning_peft.interop import from_peft, to_peft
from tests.contract import assert_near, shake
from tests.interop.exchange import computed, exchange
from tests.interop.stand_ins import call as stand_in_call
from tests.interop.stand_ins import rows, stand_in
from tests.models import tiny

# PEFT takes the bias of an update for a matrix that was not gathered.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. . LoRA tensor:peft.utils.warning.PeftWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
IDS = torch.arange(2 * 12).view(2, 12) % 20


class Layers(nn.Module):
    """An embedding, convolutions of each number of dimensions, the last one in groups, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.conv1d = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2d = nn.Conv2d(6, 4, (3, 1), stride=2, padding=(1, 0))
        self.conv3d = nn.Conv3d(4, 4, (2, 1, 1))
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.lin0, self.lin1 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.end = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.config = hf.PreTrainedConfig()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1d(self.emb(ids).mT).tanh()
        x = self.conv2d(x.unflatten(-1, (4, 3))).tanh()
        x = self.grouped(self.conv3d(x.unsqueeze(-1)).squeeze(-1)).tanh()
        return self.end(self.lin1(self.lin0(x.mean((-1, -2))).tanh()))


def layers() -> nn.Module:
    """Return such a network, the same at each call."""
    torch.manual_seed(0)
    return Layers()


def call(model: nn.Module, method: Any = None) -> Tensor:
    return model(IDS)


CONVOLUTIONS = ["conv2d", "conv3d", "grouped"]
CASES: dict[str, peft.PeftConfig] = {
    "IA3 of outputs": peft.IA3Config(target_modules=[*CONVOLUTIONS, "lin0"], feedforward_modules=[]),
    "IA3 of inputs": peft.IA3Config(
        target_modules=["conv2d", "grouped", "lin0"], feedforward_modules=["conv2d", "grouped"]
    ),
    "HiRA": peft.HiraConfig(r=2, target_modules=["emb", "conv1d", "conv2d", "conv3d", "lin0"]),
    "MiSS bat": peft.MissConfig(r=2, target_modules=["lin0", "lin1"], init_weights="bat", miss_dropout=0.1),
    "OFT num_blocks": peft.OFTConfig(r=2, oft_block_size=0, target_modules=["emb", "lin0"]),
    "OFT block_share": peft.OFTConfig(oft_block_size=2, target_modules=["emb", "lin0"], block_share=True),
    "OFT coft": peft.OFTConfig(oft_block_size=2, target_modules=["emb", "lin0"], coft=True, eps=0.2),
    "lora_bias": peft.LoraConfig(r=2, target_modules=["conv1d", "conv2d", "lin0"], lora_bias=True, lora_alpha=6),
    "biases beside a part that is trained whole": peft.LoraConfig(
        r=2, target_modules=["lin0"], bias="all", modules_to_save=["end"]
    ),
    "lora_bias and others": peft.LoraConfig(
        r=2, target_modules=["lin0", "lin1"], lora_bias=True, bias="all", use_rslora=True
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_has_the_same(case: str, tmp_path: Path) -> None:
    assert dict(exchange(layers, copy.deepcopy(CASES[case]), call, tmp_path)) == dict.fromkeys(
        ("import", "export", "steps"), "equal"
    )
    model = layers()
    from_peft(model, tmp_path / "theirs")
    live = computed(call, model)
    assert not torch.allclose(live, computed(call, layers()), atol=1e-3)
    assert_near({"": live}, {"": computed(call, merge(model))}, 1e-5)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (HiRA(r=2, target_modules=["emb"]), 2 * (20 + 8)),
        (HiRA(r=2, target_modules=["conv2d"]), 2 * (6 * 3 + 4)),
        (MiSS(r=2, form="bat", target_modules=["lin0"]), 2 * 8),
        (OFT(num_blocks=2, block_size=None, target_modules=["emb"]), 2 * 4 * 3 // 2),
        (OFT(block_size=2, block_share=True, target_modules=["lin0"]), 1),
    ],
)
def test_counts(method: Any, count: int) -> None:
    model = layers()
    method.apply(model)
    assert sum(p.numel() for place in grafts(model) for p in place.graft.parameters()) == count


def test_constrained_turns_stay_small_and_only_training_changes_them() -> None:
    model = layers()
    OFT(block_size=2, coft=True, eps=1e-2, target_modules=["lin0"]).apply(model)
    shake(model)
    turn = next(iter(grafts(model))).graft
    before = turn.Q.detach().clone()
    live = computed(call, model)
    assert torch.equal(before, turn.Q)
    assert_near({"": live}, {"": model(IDS)}, 1e-6)
    assert_near({"": torch.full((3,), 1e-2 / 3**0.5)}, {"": 2**0.5 * turn.Q.norm(dim=1)}, 1e-6)


@pytest.mark.parametrize(
    ("method", "message", "other"),
    [
        (OFT(num_blocks=2), "block_size=32 and num_blocks=2 say how large", OFT(num_blocks=2, block_size=None)),
        (OFT(num_blocks=4, block_size=None), "num_blocks=4 does not divide 6, .* take 3", OFT(block_size=2)),
        (MiSS(r=3, form="bat"), "r=3 does not divide 8, which is the output of lin0: take 4", MiSS(r=2, form="bat")),
    ],
)
def test_what_cannot_be_is_refused(method: Any, message: str, other: Any) -> None:
    model = layers()
    for each in (method, other):
        each.target_modules = ["lin0"]
    with pytest.raises(TuningError, match=message):
        method.apply(model)
    other.apply(model)


def test_of_groups_peft_has_no_hira(tmp_path: Path) -> None:
    model = layers()
    HiRA(r=2, target_modules=["grouped", "conv2d"]).apply(model)
    shake(model)
    live = computed(call, model)
    with pytest.raises(TuningError, match=r"grouped \(Conv2d\) has 2 groups, .* exclude it, or merge"):
        to_peft(model, tmp_path / "ours")
    assert_near({"": live}, {"": computed(call, merge(model))}, 1e-5)


def test_a_bias_of_an_update_needs_one_of_the_layer(tmp_path: Path) -> None:
    def bare() -> nn.Module:
        model = layers()
        model.lin0.bias = None
        return model

    config = peft.LoraConfig(r=2, target_modules=["lin0"], lora_bias=True)
    with pytest.warns(UserWarning, match="targeted layer of type Linear"):
        ((part, why),) = exchange(bare, config, call, tmp_path)
    assert part == "import"
    assert "lin0 has a bias of shape [8], the layer one of None" in why
    model = layers()
    LoRA(r=2, target_modules=["lin0"], bias="lora_only").apply(model)


def test_of_what_torchs_attention_reads_peft_would_compute_nothing(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)
            self.config = hf.PreTrainedConfig()

        def forward(self, ids: Tensor) -> Tensor:
            x = nn.functional.one_hot(ids % 8, 8).float()
            return self.lin(self.mha(x, x, x)[0])

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Attending()

    for method, config in (
        (HiRA(r=2, target_modules=["out_proj"]), peft.HiraConfig(r=2, target_modules=["out_proj"])),
        (
            IA3(target_modules=["out_proj"], feedforward_modules=[]),
            peft.IA3Config(target_modules=["out_proj"], feedforward_modules=[]),
        ),
    ):
        why = r"nn\.MultiheadAttention reads its weight alone, so that .* would do nothing there: exclude it, or merge"
        model = build()
        method.apply(model)
        shake(model)
        with pytest.raises(TuningError, match=why):
            to_peft(model, tmp_path / "ours")
        assert torch.isfinite(computed(call, merge(model))).all()
        ((_, said),) = exchange(build, config, call, tmp_path / type(method).__name__)
        assert "nn.MultiheadAttention reads its weight alone" in said


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_a_prompt_before_the_first_token_of_an_encoder(kind: type[peft.PeftConfig], tmp_path: Path) -> None:
    build = partial(stand_in, "x/tiny-random-BertForSequenceClassification", hf.AutoModelForSequenceClassification)
    inputs = rows(build())
    inputs["attention_mask"][1, -3:] = 0
    config = kind(task_type="SEQ_CLS", num_virtual_tokens=3)
    said = dict(exchange(build, config, lambda model, method: stand_in_call(model, inputs, method), tmp_path))
    assert said == dict.fromkeys(("import", "export", "steps"), "equal")


def test_a_prompt_after_the_first_token_is_no_adapter_of_peft(tmp_path: Path) -> None:
    model = tiny("bert")
    PromptTuning(num_virtual_tokens=2, init="random_uniform").apply(model)
    with pytest.raises(TuningError, match=r"this one comes after \[CLS\]: .* train with before_cls=True"):
        to_peft(model, tmp_path / "ours")
    model = tiny("bert")
    PromptTuning(num_virtual_tokens=2, init="random_uniform", before_cls=True).apply(model)
    to_peft(model, tmp_path / "ours")
    for method, kind, why in (
        (
            PromptTuning(init="random_uniform", before_cls=True),
            "gpt2",
            "before_cls=True is for encoders .* GPT2LMHeadModel is none",
        ),
        (PTuning(before_cls=True, template="{v:3} {text}"), "bert", "so does before_cls=True: leave one of the two"),
    ):
        with pytest.raises(TuningError, match=why):
            method.apply(tiny(kind))


def test_a_layer_that_is_called_and_read_has_its_own_place(tmp_path: Path) -> None:
    """DeBERTa's ``in_proj``."""
    build = partial(stand_in, "x/tiny-random-DebertaModel", hf.AutoModel)
    inputs = rows(build())
    config = peft.MissConfig(r=2, target_modules=["in_proj"])
    said = dict(exchange(build, config, lambda model, method: stand_in_call(model, inputs, method), tmp_path))
    assert said == dict.fromkeys(("import", "export", "steps"), "equal")
