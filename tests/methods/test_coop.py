"""CoOp: a context of real words is those words; all layouts are those of the formulas, whichever way they are run."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import CoOp, TuningError, collect, load_delta, save_delta
from lightning_peft.towers.clip import similarity, text_features
from lightning_peft.towers.contexts import frozen
from lightning_peft.towers.packing import pack
from tests import two_towers
from tests.contract import MethodContract, assert_near, output, shake
from tests.models import CLIP_POSITIONS, TWO_TOWERS, batch, meta, tiny
from tests.two_towers import CONTEXT, END, NAMES, START, STOP, written

CLIP_B16 = hf.CLIPConfig(
    text_config={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    vision_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 16},
    projection_dim=512,
)


class TestCoOp(MethodContract):
    method = CoOp(num_virtual_tokens=4)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """M d."""
        return 4 * 32


class TestClassSpecific(MethodContract):
    method = CoOp(num_virtual_tokens=3, class_specific=True, num_classes=3, position="middle")
    backbones = ("clip",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """C M d."""
        return 3 * 3 * 32


@pytest.mark.parametrize(("classes", "count"), [(None, 8_192), (100, 819_200)])
def test_counts_of_the_paper(classes: int | None, count: int) -> None:
    model = meta(CLIP_B16)
    CoOp(num_virtual_tokens=16, class_specific=classes is not None, num_classes=classes).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def features(model: nn.Module, ids: Tensor | None = None, **kwargs: Tensor) -> Tensor:
    """Return the features of the texts of a tiny model, or of others."""
    ids = model.texts if ids is None else ids
    return model.towers.get_text_features(input_ids=ids, **kwargs).pooler_output


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_a_context_of_words_is_those_words_bit_for_bit(kind: str, position: str, tmp_path: Path) -> None:
    plain, model = tiny(kind).requires_grad_(False), tiny(kind)
    tokenizer = str(two_towers.save_tokenizer(tmp_path, kind == "siglip"))
    CoOp(init="a photo of a", position=position, share_prefix=False, tokenizer=tokenizer).apply(model)
    plain.texts = written(kind, CONTEXT, position, length=10 if kind == "clip" else None)
    assert plain.texts.shape[1] == (10 if kind == "clip" else CLIP_POSITIONS)
    assert torch.equal(features(plain), features(model))
    assert torch.equal(output(plain, kind), output(model, kind))


def test_texts_of_full_length_stay_so() -> None:
    plain, model = tiny("clip").requires_grad_(False), tiny("clip")
    CoOp(num_virtual_tokens=4, share_prefix=False).apply(model)
    with torch.no_grad():
        rows = model.towers.text_model.embeddings.token_embedding.coop.weight
        rows.copy_(plain.towers.text_model.embeddings.token_embedding.weight[CONTEXT])
    padded = written("clip", [], length=CLIP_POSITIONS)
    assert torch.equal(features(model, padded), features(plain, written("clip", CONTEXT, length=CLIP_POSITIONS)))


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("class_specific", [True, False])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_the_six_layouts_are_those_of_the_formulas(
    kind: str, position: str, class_specific: bool, share_prefix: bool
) -> None:
    model = tiny(kind)
    number = {"class_specific": True, "num_classes": 3} if class_specific else {}
    method = CoOp(num_virtual_tokens=5, position=position, share_prefix=share_prefix, **number)
    method.apply(model)
    shake(model)
    rows = method.context(model)
    contexts = rows if class_specific else rows.expand(3, -1, -1)
    ours, theirs = features(model), two_towers.with_context(model.towers, kind, contexts, position)
    assert_near({"": theirs}, {"": ours}, 1e-5)
    weight = model.towers.text_model.embeddings.token_embedding.coop.weight
    gradients = [torch.autograd.grad(f.sin().sum(), weight)[0] for f in (theirs, ours)]
    assert gradients[0].abs().max() > 0.01
    assert_near({"": gradients[0]}, {"": gradients[1]}, 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("end", [2, END])
def test_a_tree_reads_where_the_model_reads(end: int, attention: str) -> None:
    """Also with the end-of-text token of old configurations, 2, which means the largest id, and in eager attention."""
    shared, whole = tiny("clip"), tiny("clip")
    for model, share_prefix in ((shared, True), (whole, False)):
        model.towers.text_model.eos_token_id = end
        model.towers.set_attn_implementation(attention)
        CoOp(num_virtual_tokens=4, share_prefix=share_prefix).apply(model)
        with torch.no_grad():
            model.towers.text_model.embeddings.token_embedding.coop.weight.copy_(torch.ones(4, 32))
    assert_near({"": features(whole)}, {"": features(shared)}, 1e-5)


def test_a_tree_holds_as_few_tokens_as_there_are() -> None:
    rows = tuple((98, -1, -2, *name, 5, 99) for name in ((20,), (31, 7), (31, 40, 57)))
    packed = pack(rows, 512)
    assert packed.ids.shape == (1, 3 + 3 + 4 + 4)  # 31 is shared by two
    many = pack(tuple((98, *range(-16, 0), i, 5, 99) for i in range(1000)), 64)
    assert len(many.ids) > 1
    assert many.ids.size < 1.5 * (17 + 3 * 1000)
    for row, end in zip(range(1000), many.ends.tolist(), strict=True):
        g, i = divmod(end, many.ids.shape[1])
        seen = many.ids[g][many.visible[g, i]]
        assert seen.tolist() == [98, *range(-16, 0), row, 5, 99]
        assert many.positions[g][many.visible[g, i]].tolist() == list(range(20))


def test_what_follows_the_end_matters_to_siglip_alone() -> None:
    for kind in TWO_TOWERS:
        model = tiny(kind)
        CoOp(num_virtual_tokens=4).apply(model)
        base, other = features(model), model.texts.clone()
        if kind == "clip":
            other[other == END] = 0
            other[range(3), [3, 4, 5]] = END
            wider = torch.nn.functional.pad(model.texts, (0, 9))
            mask = (torch.arange(6) < torch.tensor([[4], [5], [6]])).long()
            for ids, kwargs in ((other, {}), (wider, {}), (model.texts, {"attention_mask": mask})):
                assert_near({"": base}, {"": features(model, ids, **kwargs)}, 1e-5)
        else:
            shorter = features(model, model.texts[:, :-4])
            mask = features(model, attention_mask=(model.texts != 1).long())
            assert min((base - f).abs().max() for f in (shorter, mask)) > 0.01


def test_logits_are_fp32_under_bf16() -> None:
    towers = tiny("clip").towers
    torch.manual_seed(0)
    images, texts = torch.randn(2, 8, 32)
    expected = similarity(towers, images, texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert similarity(towers, images, texts).dtype == torch.float32
        assert torch.equal(similarity(towers, images, texts), expected)
    normal = [f / f.norm(dim=1, keepdim=True) for f in (images, texts)]
    assert_near({"": towers.logit_scale.exp() * normal[0] @ normal[1].t()}, {"": expected}, 1e-6)


def test_a_common_context_fits_other_classes_and_one_of_each_class_does_not(tmp_path: Path) -> None:
    model, other = tiny("clip"), tiny("clip")
    for tuned in (model, other):
        CoOp(num_virtual_tokens=4).apply(tuned)
    shake(model)
    save_delta(model, tmp_path / "common.safetensors")
    load_delta(other, tmp_path / "common.safetensors")
    texts = torch.tensor([[START, 60, STOP, END], [START, 61, STOP, END]])
    assert torch.equal(features(model, texts), features(other, texts))
    model, other = tiny("clip"), tiny("clip")
    CoOp(num_virtual_tokens=4, class_specific=True, num_classes=3).apply(model)
    CoOp(num_virtual_tokens=4, class_specific=True, num_classes=2).apply(other)
    save_delta(model, tmp_path / "own.safetensors")
    with pytest.raises(TuningError, match="num_classes=3"):
        load_delta(other, tmp_path / "own.safetensors")
    with pytest.raises(TuningError, match="3 classes have a context of their own, and there are 2 texts"):
        features(model, texts)


def test_the_frozen_model_is_still_there() -> None:
    plain, model = tiny("clip").requires_grad_(False), tiny("clip")
    CoOp(num_virtual_tokens=4).apply(model)
    with frozen(model):
        assert torch.equal(output(model, "clip"), output(plain, "clip"))
    assert not torch.equal(output(model, "clip"), output(plain, "clip"))


def test_images_do_nothing_to_common_texts() -> None:
    model = tiny("clip")
    CoOp(num_virtual_tokens=4).apply(model)
    ours = text_features(model.towers, model.texts, images=torch.randn(2, 32))
    assert torch.equal(ours, features(model))


def test_nearest_words(tmp_path: Path) -> None:
    model = tiny("clip")
    tokenizer = str(two_towers.save_tokenizer(tmp_path))
    method = CoOp(init="a photo of a", tokenizer=tokenizer)
    method.apply(model)
    nearest = method.nearest_words(model, k=2)
    assert [words[0][0] for words in nearest] == ["a", "photo", "of", "a"]
    assert all(words[0][1] < 1e-3 < words[1][1] for words in nearest)
    for k in (0, 101):
        with pytest.raises(TuningError, match=f"k={k} is out of range: the model has 100 words"):
            method.nearest_words(model, k=k)


def test_copies_have_contexts_of_their_own() -> None:
    model = tiny("clip")
    CoOp(num_virtual_tokens=4).apply(model)
    other = copy.deepcopy(model)
    with frozen(other):
        assert not torch.equal(output(other, "clip"), output(model, "clip"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"position": "back"}, "position='back' is no place of a name: take one of end, middle, front"),
        ({"class_specific": True}, "class_specific=True and num_classes=None do not go together"),
        ({"num_classes": 3}, "class_specific=False and num_classes=3 do not go together"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 is no context: take 1 or more"),
        ({"init": "a photo of a"}, "needs the words of the model: give tokenizer="),
        ({"init": "a photo of a", "num_virtual_tokens": 3, "tokenizer": ""}, "has 4 tokens, and num_virtual_tokens=3"),
        ({"init": " ", "tokenizer": ""}, "init=' ' has no tokens"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, said: str, tmp_path: Path) -> None:
    if "tokenizer" in arguments:
        arguments = arguments | {"tokenizer": str(two_towers.save_tokenizer(tmp_path))}
    with pytest.raises(TuningError, match=said):
        CoOp(**arguments).apply(tiny("clip"))


def test_a_model_without_a_text_tower_is_refused() -> None:
    for kind in ("bert", "vit"):
        with pytest.raises(TuningError, match="has no text tower like that of CLIP or SigLIP"):
            CoOp().apply(tiny(kind))


def test_texts_that_do_not_fit_are_refused() -> None:
    model, siglip = tiny("clip"), tiny("siglip")
    CoOp(num_virtual_tokens=20).apply(model)
    with pytest.raises(TuningError, match="text 2 has 6 tokens, which with a context of 20 is more than 24: shorten"):
        features(model)
    CoOp(num_virtual_tokens=20).apply(siglip)
    with pytest.raises(TuningError, match=r"text 2 has 4 tokens, which .* pad to the full length"):
        features(siglip, siglip.texts[:, :23])
    model = tiny("clip")
    CoOp(num_virtual_tokens=4, position="front").apply(model)
    for texts, said in (
        ([[START, 20, STOP, END], [START, 31, 7, END]], "the texts end in different tokens: end each with a full stop"),
        ([[START, 20, STOP, END], [START, STOP, END, END]], "text 1 has no name and full stop"),
        ([[START, 20, STOP, 60]], r"text 0 has no end-of-text token \(99\)"),
    ):
        with pytest.raises(TuningError, match=said):
            features(model, torch.tensor(texts))
    left = torch.tensor([[0, START, 20, STOP, END]])
    with pytest.raises(TuningError, match="padded on the left"):
        features(model, left, attention_mask=(left > 0).long())
    with pytest.raises(TuningError, match="position_ids count the tokens without the context"):
        features(model, model.texts, position_ids=torch.arange(6).unsqueeze(0))


def test_gradients_reach_the_context_alone() -> None:
    model = tiny("clip")
    CoOp(num_virtual_tokens=4).apply(model)
    model(**batch("clip")).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(collect(model))
    assert len(NAMES) == len(model.texts)
