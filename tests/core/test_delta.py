"""The delta: what requires gradients, with the buffers that go along, in a file that is checked before it is read."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import (
    BitFit,
    FullFineTuning,
    LoRA,
    PromptTuning,
    TuningError,
    collect,
    from_delta,
    list_deltas,
    load_delta,
    merge,
    read_delta,
    save_delta,
)
from lightning_peft.core.delta_file import FORMAT, META, write_delta
from lightning_peft.core.delta_load import complete
from lightning_peft.core.fingerprint import fingerprint, same_weights
from lightning_peft.core.run import canonical
from tests.contract import assert_near, assert_same, copy_of, frozen_names, output, shake, snapshot
from tests.models import KINDS, tiny


def tuned(kind: str = "bert", seed: int = 0, method: LoRA | None = None) -> nn.Module:
    """Return a model with LoRA whose delta is random."""
    model = tiny(kind, seed=seed)
    (method or LoRA(r=2)).apply(model)
    shake(model)
    return model


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)


# What it is.


def test_statistics_of_a_trained_norm_go_along() -> None:
    model = WithBatchNorm()
    LoRA(r=2, target_modules=["first"], also_train=r"last\..*").apply(model)
    assert set(collect(model)) == {
        *("first.lora.A", "first.lora.B", "last.weight", "last.bias"),
        *("last.running_mean", "last.running_var", "last.num_batches_tracked"),
    }


def test_collected_tensors_are_live_and_detached() -> None:
    model = tuned()
    delta = collect(model)
    assert not any(tensor.requires_grad for tensor in delta.values())
    delta["classifier.bias"].zero_()
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_tensor_is_collected_once(kind: str) -> None:
    model = tiny(kind)
    FullFineTuning().apply(model)
    assert list(collect(model)) == [name for name, _ in model.named_parameters()]


def test_names_are_those_of_the_plain_module() -> None:
    model = tuned()
    names = list(collect(model))
    assert list(collect(torch.compile(model, backend="eager"))) == names
    assert canonical("_orig_mod.a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c") == "a.b.c"


def test_complete_refers_to_the_live_frozen_tensors() -> None:
    model = tuned()
    new = {name: torch.zeros_like(tensor) for name, tensor in collect(model).items()}
    state, live = complete(model, new), model.state_dict()
    assert list(state) == list(live)
    assert all(state[name].data_ptr() == live[name].data_ptr() for name in frozen_names(model))
    assert all(state[name] is new[name] for name in new)
    model.load_state_dict(state, strict=True)
    assert not any(tensor.any() for tensor in collect(model).values())


# Files.


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_delta_and_no_more(kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    file = save_delta(model, tmp_path / "deep" / "delta.safetensors")
    assert_same(copy_of(collect(model)), load_file(file))
    size = sum(t.numel() * t.element_size() for t in collect(model).values())
    assert file.stat().st_size <= 1.05 * size + 2**16
    fresh = tuned(kind)
    assert not torch.equal(output(fresh, kind), output(model, kind))
    load_delta(fresh, file)
    assert torch.equal(output(fresh, kind), output(model, kind))
    assert [path.name for path in file.parent.iterdir()] == ["delta.safetensors"]


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    model = tuned(method=LoRA(r=2, alpha=5.0, target_modules=["query"]))
    _, header = read_delta(save_delta(model, tmp_path / "delta.safetensors"))
    (method,) = header["methods"]
    assert method["class_path"] == "lightning_peft.methods.lora.LoRA"
    assert LoRA(**method["init_args"]).init_args() == LoRA(r=2, alpha=5.0, target_modules=["query"]).init_args()
    identity = header["backbones"][""]
    assert identity["class"] == "BertForSequenceClassification"
    assert identity["config"]["hidden_size"] == 32
    assert identity["fingerprint"] == fingerprint(tiny("bert"), {"classifier.weight", "classifier.bias"})
    assert header["versions"]["torch"] == torch.__version__


def test_two_methods_are_one_delta(tmp_path: Path) -> None:
    def both() -> nn.Module:
        model = tuned("gpt2")
        PromptTuning(num_virtual_tokens=3, init="random_uniform").apply(model)
        BitFit().apply(model)
        return model

    model, fresh = both(), both()
    shake(model)
    file = save_delta(model, tmp_path / "delta.safetensors")
    assert len(read_delta(file)[1]["methods"]) == 3
    load_delta(fresh, file)
    assert_same(copy_of(model.state_dict()), copy_of(fresh.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_rebuilt_from_a_file(kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    rebuilt = from_delta(save_delta(model, tmp_path / "delta.safetensors"), tiny(kind))
    assert torch.equal(output(rebuilt, kind), output(model, kind))
    assert not rebuilt.training


def test_a_model_is_rebuilt_from_the_folder_it_came_from(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "model")
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    LoRA(r=2).apply(model)
    shake(model)
    file = save_delta(model, tmp_path / "delta.safetensors")
    assert torch.equal(output(from_delta(file), "bert"), output(model.eval(), "bert"))
    assert torch.equal(output(from_delta(file, str(tmp_path / "model")), "bert"), output(model, "bert"))
    with pytest.raises(TuningError, match="does not say where its BertForSequenceClassification came from"):
        from_delta(save_delta(tuned(), tmp_path / "other.safetensors"))


def test_nothing_trained_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="trains nothing"):
        save_delta(tiny("bert").requires_grad_(False), tmp_path / "delta.safetensors")
    assert not (tmp_path / "delta.safetensors").exists()


# What is refused, before a tensor has changed.


def assert_refused(model: nn.Module, file: Path, message: str) -> None:
    before = copy_of(model.state_dict())
    with pytest.raises(TuningError, match=message):
        load_delta(model, file)
    assert_same(before, copy_of(model.state_dict()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_delta(tuned(), tmp_path / "delta.safetensors")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tuned(seed=1), r"was trained on BertFor\w+ \([\d,]+ parameters, \w+\), not on BertFor"),
        (lambda: tuned("distilbert"), r"was trained on BertFor\w+ .*, not on DistilBertFor\w+"),
        (lambda: tuned(method=LoRA(r=3)), "r=2 of LoRA, which is 3 here"),
        (lambda: tuned(method=LoRA(r=2, alpha=1.0)), r"alpha=16\.0 of LoRA, which is 1\.0 here"),
        (lambda: tuned(method=LoRA(r=2, use_rslora=True)), "use_rslora=False of LoRA"),
        (lambda: tuned(method=LoRA(r=2, layers=[0])), r"layers=None of LoRA, which is \[0\] here"),
        (lambda: tuned(method=BitFit()), "was trained with LoRA, but BitFit is applied here"),
    ],
)
def test_another_module_is_refused(file: Path, other, message: str) -> None:
    assert_refused(other(), file, message)


def test_a_module_without_a_method_gets_that_of_the_file(file: Path) -> None:
    model = tiny("bert")
    load_delta(model, file)
    assert_same(copy_of(collect(model)), load_file(file))
    around = nn.ModuleDict({"net": tiny("bert")})
    load_delta(around, file)
    assert [(delta.backbone, delta.methods) for delta in list_deltas(around)] == [("net", ("LoRA",))]


def test_a_method_of_a_file_that_does_not_fit_is_gone_again(file: Path) -> None:
    model = tiny("distilbert")
    before = snapshot(model, "distilbert")
    with pytest.raises(TuningError, match="not on DistilBert"):
        load_delta(model, file)
    assert_same(before, snapshot(model, "distilbert"))


def test_another_backbone_may_be_allowed(file: Path) -> None:
    model = tuned(seed=1)
    load_delta(model, file, allow_other_backbone=True)
    assert_same(copy_of(collect(model)), load_file(file))


def test_dropout_may_differ(file: Path) -> None:
    load_delta(tuned(method=LoRA(r=2, dropout=0.3, backbone_mode="train")), file)


def rewritten(file: Path, change) -> Path:
    """Write a file anew after ``change(tensors)``, as a module of another form would have written it."""
    tensors, meta = read_delta(file)
    change(tensors)
    return write_delta(file, tensors, {key: value for key, value in meta.items() if key not in ("checksums", "seal")})


NAME = "bert.encoder.layer.0.attention.self.query.lora.A"


def test_tensors_that_do_not_match_are_refused(file: Path) -> None:
    pristine = file.read_bytes()
    model = tuned()
    assert_refused(model, rewritten(file, lambda t: t.pop(NAME)), rf"lacks 1 of 10 tensors of the delta, e\.g\. {NAME}")
    file.write_bytes(pristine)
    extra = NAME.replace("query", "key")
    changed = rewritten(file, lambda t: t.update({extra: t[NAME].clone()}))
    assert_refused(model, changed, rf"1 tensors that this module does not train, e\.g\. {extra}; it has e\.g\. ")
    file.write_bytes(pristine)
    changed = rewritten(file, lambda t: t.update({NAME: torch.zeros(3, 32)}))
    assert_refused(model, changed, rf"{NAME} of shape \[3, 32\], this module of \[2, 32\]")


@pytest.mark.parametrize("keep", [0, 5, 300, -4])
def test_a_truncated_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tuned(), file, "is truncated or no safetensors file")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    assert_refused(tuned(), foreign, "is a safetensors file but no delta")
    assert_refused(tuned(), tmp_path / "absent.safetensors", "is no file")
    save_file({"a": torch.zeros(1)}, foreign, metadata={META: json.dumps({"format": 99})})
    assert_refused(tuned(), foreign, rf"has delta format 99, this version reads {FORMAT}")
    torch.save({"state_dict": tiny("bert").state_dict()}, tmp_path / "full.ckpt")
    assert_refused(tuned(), tmp_path / "full.ckpt", r"no delta but a full checkpoint \(\d+ tensors\).*convert")


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    before = file.read_bytes()
    monkeypatch.setattr("lightning_peft.core.delta_file.save_file", fail)
    with pytest.raises(TuningError, match="could not be written"):
        save_delta(tuned(), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# Fingerprints.


def test_a_fingerprint_is_of_the_function() -> None:
    model = tiny("bert")
    same = fingerprint(model)
    assert fingerprint(tiny("bert")) == same
    assert fingerprint(tiny("bert", dropout=0.3)) == same, "dropout changes no inference"
    model.config.id2label = {0: "good", 1: "bad", 2: "other"}
    model.config._name_or_path = "somewhere"
    assert fingerprint(model) == same
    model.config.num_attention_heads = 8
    assert fingerprint(model) != same


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_change_the_fingerprint(kind: str) -> None:
    for method in (LoRA(r=2), FullFineTuning()):
        before, after = tiny(kind), tiny(kind)
        for model in (before, after):
            method.apply(model)
        shake(after)
        prints = [fingerprint(model, set(model.state_dict()) - frozen_names(model)) for model in (before, after)]
        assert prints[0] == prints[1]


def test_a_copy_in_half_precision_is_recognised() -> None:
    known = fingerprint(tiny("bert"))
    for copy in (tiny("bert").bfloat16(), tiny("bert").half()):
        assert same_weights(known, fingerprint(copy))
        assert same_weights(fingerprint(copy), known)
        assert not same_weights(known, fingerprint(tiny("bert", seed=1).to(copy.dtype)))
    stored = fingerprint(tiny("bert").bfloat16())
    assert same_weights(stored, fingerprint(tiny("bert").bfloat16().half()))
    assert not same_weights(stored, fingerprint(tiny("bert").half())), "rounded otherwise"


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_counts_and_so_does_its_place(kind: str) -> None:
    known = fingerprint(tiny(kind))
    names = [name for name, p in tiny(kind).named_parameters() if p.numel() > 1]
    for name in names[:: max(1, len(names) // 8)]:
        for change in (one_bit, two_places):
            model = tiny(kind)
            change(model.get_parameter(name).data.view(-1))
            assert not same_weights(known, fingerprint(model)), f"{name}, {change.__name__}"


def one_bit(values: torch.Tensor) -> None:
    values.view(torch.int32)[len(values) // 2] ^= 1


def two_places(values: torch.Tensor) -> None:
    values[0], values[1] = 1.0, 2.0  # of a bias, all may be zero
    values[[0, -1]] = values[[-1, 0]]
    values[0], values[-1] = values[0] + 3, values[-1] + 4


def test_the_order_of_equal_rows_is_seen() -> None:
    known = fingerprint(tiny("bert"))
    model = tiny("bert")
    words = model.bert.embeddings.word_embeddings.weight.data
    words[[3, 4]] = words[[4, 3]]
    assert not same_weights(known, fingerprint(model))


def test_a_new_row_of_the_vocabulary_is_seen(tmp_path: Path) -> None:
    def resized(row: float) -> nn.Module:
        model = tiny("llama")
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
        model.get_input_embeddings().weight.data[-2:] = row
        LoRA(r=2).apply(model)
        return model

    file = save_delta(resized(1.0), tmp_path / "delta.safetensors")
    load_delta(resized(1.0), file)
    with pytest.raises(TuningError, match="load that backbone"):
        load_delta(resized(2.0), file)


# Merging.


def test_what_was_trained_in_place_stays_as_trained() -> None:
    model = tiny("bert")
    BitFit().apply(model)
    shake(model)
    before = output(model, "bert")
    assert merge(model) is model
    assert torch.equal(output(model, "bert"), before)
    assert all(p.requires_grad for p in model.parameters())


def test_merging_half_precision_keeps_its_dtype() -> None:
    model = tiny("bert").bfloat16()
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    LoRA(r=2).apply(model)
    shake(model, 0.02)
    before = output(model, "bert")
    merge(model)
    assert {name: t.dtype for name, t in model.state_dict().items()} == dtypes
    assert_near({"": before.float()}, {"": output(model, "bert").float()}, 2e-2)


def test_one_graft_that_cannot_be_merged_keeps_all() -> None:
    model = tuned("gpt2")
    prompt = PromptTuning(num_virtual_tokens=3, init="random_uniform")
    prompt.apply(model)
    before = copy_of(model.state_dict())
    with pytest.raises(TuningError, match=r"PromptLoss at the root computes what no weight can"):
        merge(model)
    assert_same(before, copy_of(model.state_dict()))
