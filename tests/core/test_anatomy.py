"""Blocks, heads and sublayers of models whose names nobody knows, and weights that are read without a call."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    Adapter,
    DiffPruning,
    LinearProbe,
    LoRA,
    Method,
    PrefixTuning,
    PTuning,
    TuningError,
    collect,
    merge,
)
from lightning_peft.core import anatomy, select, sublayers
from lightning_peft.core.graft import grafts
from lightning_peft.core.reads import passed_by, reads_below
from tests.contract import assert_near, shake
from tests.models import tiny

T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50, "num_mel_bins": 8, "max_source_positions": 30,
    "classifier_proj_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def tops(model: nn.Module) -> set[str]:
    return {name.partition(".")[0] for name in anatomy.head_names(model)}


def test_the_head_is_what_the_task_adds() -> None:
    assert tops(hf.WhisperForAudioClassification(hf.WhisperConfig(**WHISPER))) == {"projector", "classifier"}
    assert tops(hf.T5ForQuestionAnswering(hf.T5Config(**T5, decoder_start_token_id=0))) == {"qa_outputs"}
    assert anatomy.head_names(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT))) == []
    assert anatomy.head_names(hf.CLIPModel(tiny("clip").config)) == []


@pytest.mark.parametrize("method", [PTuning(), PrefixTuning()])
def test_the_network_of_a_prompt_is_no_head(method: Method) -> None:
    """It hangs on the whole model, and so it would have the learning rate of a head."""
    model = tiny("bert")
    before = anatomy.head_names(model)
    method.apply(model)
    assert anatomy.head_names(model) == before


def test_a_head_that_the_decoder_refers_to_is_one() -> None:
    small = hf.RTDetrResNetConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], embedding_size=8, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.RTDetrForObjectDetection(hf.RTDetrConfig(backbone_config=small, encoder_in_channels=[8, 8, 8]))
    assert {name.split(".")[2] for name in anatomy.head_names(model)} == {"class_embed", "bbox_embed"}


class Block(nn.Module):
    """A pre-norm block under names of its own, as a user's network may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.mixer = nn.LayerNorm(8), nn.ModuleDict({"into": nn.Linear(8, 8), "back": nn.Linear(8, 8)})
        self.norm_b, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer["back"](self.mixer["into"](self.norm_a(x)).tanh())
        return x + self.mlp(self.norm_b(x))


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(4, 8), nn.Sequential(Block(), Block())
        self.out = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.stem(x)).mean(1))


class Timm(Net):
    def get_classifier(self) -> nn.Module:
        return self.out


def test_a_pipeline_of_equal_blocks_is_a_list_of_blocks() -> None:
    model = Net()
    assert {name: len(entries) for name, entries in anatomy.block_lists(model).items()} == {"body": 2}
    assert [name for name, _ in anatomy.blocks(model)["body"]] == ["body.0", "body.1"]
    assert sublayers.ends(model, "body.0", "attention")[0].name == "body.0.mixer.back"
    assert sublayers.ends(model, "body.0", "ffn")[0].name == "body.0.mlp.2"


def test_blocks_of_several_classes_are_blocks_and_other_lists_are_none() -> None:
    class Other(Block):
        pass

    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList([Block(), Other()]),
            "positions": nn.ModuleList([nn.Sequential(nn.Conv1d(2, 2, 3), nn.GELU()) for _ in range(2)]),
            "maps": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
        }
    )
    assert list(anatomy.block_lists(model)) == ["layers"]
    assert anatomy.block_index(anatomy.block_lists(model), "layers.1.mlp.0") == ("layers", 1)


def test_a_plain_network_is_tuned_with_its_last_layer() -> None:
    x = torch.randn(2, 5, 4)
    for model in (Net(), Timm()):
        assert anatomy.head_names(model) == ["out.weight", "out.bias"]
        before = model(x)
        method = LoRA(r=2)
        method.apply(model)
        assert {place.path.rpartition(".")[2] for place in grafts(model)} == {"0", "2", "into", "back"}
        assert {"out.weight", "out.bias"} < set(collect(model))
        assert torch.equal(model(x), before)
        method.remove(model)
        LinearProbe().apply(model)
        assert sorted(collect(model)) == ["out.bias", "out.weight"]


def test_a_target_in_the_last_layer_of_a_plain_network_is_updated_in_place_of_trained() -> None:
    model = Net()
    LoRA(r=2, target_modules=["out"]).apply(model)
    assert sorted(collect(model)) == ["out.lora.A", "out.lora.B"]
    with pytest.raises(TuningError, match="'out' matches no"):  # timm's is trained whole, as any head that is said
        LoRA(r=2, target_modules=["out"]).apply(Timm())


def test_what_scores_words_is_no_head() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    assert anatomy.head_names(model) == []


def test_a_probe_of_nothing_is_refused_and_changes_nothing() -> None:
    model = tiny("bert").bert
    with pytest.raises(TuningError, match="has no head to train: take a classifier"):
        LinearProbe().apply(model)
    assert all(p.requires_grad for p in model.parameters())
    outer = nn.ModuleDict({"net": model, "head": nn.Linear(32, 2)})  # the head is the user's
    LinearProbe().apply(outer)


def test_each_tower_is_looked_at_by_itself() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    towers = {"visual": nn.ModuleList([Fused(), Fused()]), "text": nn.ModuleList([Apart(), Apart()])}
    model = nn.ModuleDict(towers)
    found = select.hosts(model, (nn.Linear,), select.by_role(model, ["query", "value"], (nn.Linear,)))
    assert {name.rpartition(".")[2] for name in found} == {"qkv", "q_proj", "v_proj"}


class Reader(nn.Module):
    """Reads ``proj`` without a call, ``both`` besides one, and asks ``called`` for its dtype alone."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.called, self.both = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        x = nn.functional.linear(x, self.proj.weight, self.proj.bias)
        x = self.called(x.to(self.called.weight.dtype))
        return nn.functional.linear(x, self.both.weight, self.both.bias) if fused else self.both(x)


def test_reads_are_found_in_the_source() -> None:
    found = {(read.layer, read.parameter): (read.called, read.whole) for read in reads_below(Reader())}
    assert found == {
        ("proj", "weight"): (False, True),
        ("proj", "bias"): (False, True),
        ("both", "weight"): (True, True),
        ("both", "bias"): (True, True),
    }
    assert set(passed_by(nn.ModuleDict({"a": Reader()}))) == {"a.proj", "a.both"}
    assert "self_attn.out_proj" in passed_by(nn.TransformerEncoderLayer(8, 2))


def test_a_layer_that_is_handed_on_counts_as_read() -> None:
    class Handing(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return self.through(self.proj, x)

        def through(self, layer: nn.Linear, x: Tensor) -> Tensor:
            return x @ layer.weight.T

    assert {(read.layer, read.called) for read in reads_below(Handing())} == {("proj", False)}


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2, target_modules=["proj", "called", "both"]),
        LoRA(r=2, target_modules=["proj", "called", "both"], use_dora=True),
        IA3(target_modules=["proj", "called"], feedforward_modules=["both"]),
        DiffPruning(),
    ],
    ids=["lora", "dora", "ia3", "diff_pruning"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_read_is_tuned_and_merged_as_it_runs(method, fused: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Reader()).eval(), torch.randn(3, 8)

    def run() -> Tensor:
        return model[1](model[0](x), fused)

    before = run()
    method.apply(model)
    assert_near({"": before}, {"": run()}, 1e-6)
    shake(model, 0.3)
    live = run()
    live.sum().backward()
    reads = [p for n, p in model.named_parameters() if p.requires_grad and ("proj" in n or "both" in n)]
    assert len(reads) > 1
    assert all(p.grad is not None for p in reads)
    assert not torch.allclose(before, live, atol=1e-3)
    live = live.detach()
    merge(model)
    assert_near({"": live}, {"": run()}, 1e-5)


def test_dropout_hangs_on_the_call_where_there_is_one() -> None:
    model = nn.ModuleList([Reader()])
    LoRA(r=2, dropout=0.1, target_modules=["both"]).apply(model)
    assert [place.path for place in grafts(model)] == ["0.both"]
    with pytest.raises(TuningError, match=r"read without a call, so dropout=0\.1 has no input"):
        LoRA(r=2, dropout=0.1, target_modules=["proj"]).apply(nn.ModuleList([Reader()]))


def test_adapters_follow_sublayers_under_any_name() -> None:
    model, x = Net(), torch.randn(2, 5, 4)
    before = model(x)
    Adapter(bottleneck=2).apply(model)
    assert {place.path for place in grafts(model)} == {
        f"body.{i}.{end}" for i in range(2) for end in ("mixer.back", "mlp.2")
    }
    assert torch.equal(model(x), before)
    shake(model, 0.3)
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_a_default_by_whole_names_takes_no_layer_whose_name_ends_alike() -> None:
    """A grouped convolution inside a block, say, which is called as the one of the stem (timm's Xception)."""
    inner = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, groups=4), "pointwise": nn.Conv2d(4, 4, 1)})
    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), "block1": inner, "fc": nn.Linear(4, 2)})
    LoRA(r=2).apply(model)
    assert {place.path for place in grafts(model)} == {"conv1", "block1.pointwise"}


class _Sublayer(nn.Module):
    def __init__(self, wide: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(wide, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class _WithPositions(nn.Module):
    """A block whose attention has a small network that makes biases of its heads from places, as timm's MaxxViT has."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"rel_pos": _Sublayer(2, 6, 3), "proj": nn.Linear(8, 8)})
        self.mlp = _Sublayer(8, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](x) * self.attn["rel_pos"](x.new_ones(1, 2)).mean()
        return x + self.mlp(x)


@pytest.mark.parametrize("form", ["houlsby", "parallel"])
def test_a_network_of_places_is_no_feed_forward_sublayer(form: str) -> None:
    model, x = nn.Sequential(_WithPositions(), _WithPositions()), torch.randn(2, 5, 8)
    before = model(x)
    Adapter(form=form, bottleneck=2).apply(model)
    assert not [place.path for place in grafts(model) if "rel_pos" in place.path]
    assert torch.equal(model(x), before)


def test_an_adapter_follows_a_sublayer_that_gives_a_tuple() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    Adapter(bottleneck=2).apply(model)
    paths = {place.path.partition(".")[2].partition(".")[2] for place in grafts(model)} - {""}  # those below a layer
    assert paths == {"self_attn", "linear2"}  # whose out_proj is read without a call
    model(torch.randn(2, 5, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_graft_on_a_pipeline_is_no_step_of_it() -> None:
    pipeline, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 4)
    model = nn.ModuleDict({"blocks": nn.ModuleList([pipeline, nn.Sequential(nn.Linear(4, 4), nn.ReLU())])})
    before = pipeline(x)
    method = Adapter(form="houlsby", bottleneck=2, target_modules=["blocks.0.2"])
    method.apply(model)
    assert torch.equal(pipeline(x), before)
    method.remove(model)
    assert torch.equal(pipeline(x), before)
