"""A delta file says which names its patterns have matched, and no reader of it runs a pattern again."""

import copy
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_peft import (
    IA3,
    VPT,
    Adapter,
    BitFit,
    DiffPruning,
    LoRA,
    Method,
    SideTuning,
    TinyTL,
    TuningError,
    collect,
    from_delta,
    load_delta,
    load_from_checkpoint,
    read_delta,
    save_delta,
)
from lightning_peft.core import select
from lightning_peft.core.delta_file import META, seal
from lightning_peft.core.name_lists import Names
from lightning_peft.training.rebuild import methods_of
from tests.contract import shake
from tests.models import tiny
from tests.modules import Tuned, loader, trainer

NO_PATTERN = "["
"""What stands in a changed file for each pattern: whoever only compiles it fails."""


@dataclass(eq=False, kw_only=True)
class Norms(Method):
    """A user's own method, with a pattern of its own."""

    which: str = ".*"

    def graft(self, backbone: nn.Module) -> Iterator[str]:
        """Return the weights of the norms that the pattern names."""
        for name in select.hosts(backbone, (nn.LayerNorm,), self.which):
            yield f"{name}.weight"


METHODS = {
    "target_modules": ("bert", LoRA(r=2, target_modules=r".*(query|value)")),
    "exclude and also_train": (
        "bert",
        LoRA(r=2, exclude=r".*layer\.1\..*", also_train=r".*embeddings\.LayerNorm\..*"),
    ),
    "feedforward_modules": ("bert", IA3(target_modules=r".*key", feedforward_modules=r".*\d\.output\.dense")),
    "biases": ("bert", BitFit(biases=r".*(query|LayerNorm)")),
    "adapter": ("bert", Adapter(bottleneck=2, target_modules=r".*\d\.output\.dense", exclude=r".*LayerNorm.*")),
    "blocks": ("resnet", TinyTL(target_modules=r".*stages\.1\.layers\.0", image_size=32)),
    "diff-pruning": ("bert", DiffPruning(exclude=r".*(embeddings|LayerNorm|bias).*")),
    "own parameters": ("vit", SideTuning(reduction=2, exclude=r".*sidetuning\.network.*bias|.*layernorm\.bias")),
    "tokens": ("vit", VPT(also_train=r".*layernorm\.weight")),
    "own": ("bert", Norms(which=r".*output\.LayerNorm")),
}


def no_patterns(file: Path) -> Path:
    """Put what is no pattern into the file for each that its methods have, with checksums that fit."""
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()[META])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    meta = {key: value for key, value in meta.items() if key not in ("checksums", "seal")}
    for entry in meta["methods"]:
        assert entry["matched"]
        entry["init_args"].update(dict.fromkeys(entry["matched"], NO_PATTERN))
    changed = file.with_name("no_patterns.safetensors")
    save_file(tensors, changed, metadata={META: json.dumps(seal(meta, {"state_dict": tensors}))})
    return changed


@pytest.mark.parametrize(("kind", "method"), METHODS.values(), ids=METHODS)
def test_no_pattern_of_a_file_is_run(kind: str, method: Method, tmp_path: Path) -> None:
    model = tiny(kind)
    method.apply(model)
    with torch.no_grad():
        shake(model)
    delta, file = collect(model), save_delta(model, tmp_path / "delta.safetensors")
    changed = no_patterns(file)
    again = collect(from_delta(changed, tiny(kind)))
    assert again.keys() == delta.keys()
    assert all(torch.equal(again[name], delta[name]) for name in delta)
    named = tiny(kind)
    load_delta(named, changed, name="other")
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, named)]
    assert trained[0] == trained[1]
    # What was read is written as it was, and copies know the names, too.
    copied = pickle.loads(pickle.dumps(copy.deepcopy(from_delta(file, tiny(kind)))))
    save_delta(copied, tmp_path / "again.safetensors")
    assert read_delta(tmp_path / "again.safetensors")[1]["methods"] == read_delta(file)[1]["methods"]


def test_a_file_that_does_not_say_the_names_loads_by_its_patterns(tmp_path: Path) -> None:
    """So did the files of earlier versions; what is written of them says the names."""
    model = tiny("bert")
    LoRA(r=2, target_modules=r".*query").apply(model)
    file = save_delta(model, tmp_path / "delta.safetensors")
    tensors, meta = read_delta(file)
    meta = {key: value for key, value in meta.items() if key not in ("checksums", "seal")}
    (entry,) = meta["methods"]
    assert entry.pop("matched") == {"target_modules": [["bert.encoder.layer.", "0-1", ".attention.self.query"]]}
    old = tmp_path / "old.safetensors"
    save_file(tensors, old, metadata={META: json.dumps(seal(meta, {"state_dict": tensors}))})
    save_delta(from_delta(old, tiny("bert")), tmp_path / "new.safetensors")
    assert read_delta(tmp_path / "new.safetensors")[1]["methods"] == read_delta(file)[1]["methods"]


def test_a_checkpoint_and_a_swap_go_by_the_names(tmp_path: Path) -> None:
    module, pattern = Tuned("bert"), r".*(query|key)"
    save = ModelCheckpoint(tmp_path, filename="delta")
    trainer(tmp_path, LoRA(r=2, target_modules=pattern), save, max_steps=1).fit(module, loader("bert"), loader("bert"))
    checkpoint = torch.load(tmp_path / "delta.ckpt", weights_only=True)
    meta = {key: value for key, value in checkpoint[META].items() if key not in ("checksums", "seal")}
    meta["methods"][0]["init_args"]["target_modules"] = NO_PATTERN
    torch.save(checkpoint | {META: seal(meta, checkpoint)}, tmp_path / "changed.ckpt")
    again = load_from_checkpoint(Tuned, tmp_path / "changed.ckpt")
    assert all(torch.equal(collect(module)[name], tensor) for name, tensor in collect(again).items())
    (method,) = methods_of(read_delta(tmp_path / "changed.ckpt")[1])  # as the command line does
    other = Tuned("bert")
    method.apply(other)
    assert collect(other).keys() == collect(module).keys()
    room = tiny("bert")
    LoRA(r=4, name="a", target_modules=["query", "key", "value"]).apply(room)
    load_delta(room, tmp_path / "changed.ckpt", name="a")
    part = room.bert.encoder.layer[0].attention.self
    assert not part.value.lora_a.B.any()
    assert torch.equal(part.key.lora_a.A[:2], module.model.bert.encoder.layer[0].attention.self.key.lora.A)


def test_a_method_that_is_applied_twice_matches_anew(tmp_path: Path) -> None:
    """The names stand on the backbone, so a method object may go on to another one."""
    method = LoRA(r=2, target_modules=r".*(query|q_proj)")
    for kind, part in (("bert", "query"), ("llama", "q_proj")):
        model = tiny(kind)
        method.apply(model)
        ((entry,),) = read_delta(save_delta(model, tmp_path / f"{kind}.safetensors"))[1]["methods"][0][
            "matched"
        ].values()
        assert entry[-1].endswith(part)
        method.remove(model)
        method.apply(model)
        assert "model.layers.0.self_attn.q_proj" in Names([entry]) or kind == "bert"


@pytest.mark.parametrize(
    "matched",
    [3, [], {"target_modules": 3}, {"target_modules": [3]}, {"r": ["a"]}, {"nope": ["a"]}, {"exclude": []},
     {"target_modules": [["a", "9" * 5000, "b"]]}],
)  # fmt: skip
def test_a_malformed_list_of_names_is_one_sentence(matched: Any, tmp_path: Path) -> None:
    model = tiny("bert")
    LoRA(r=2, target_modules=r".*query").apply(model)
    tensors, meta = read_delta(save_delta(model, tmp_path / "delta.safetensors"))
    meta = {key: value for key, value in meta.items() if key not in ("checksums", "seal")}
    meta["methods"][0]["matched"] = matched
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, metadata={META: json.dumps(seal(meta, {"state_dict": tensors}))})
    with pytest.raises(TuningError, match=r"is damaged: .* is not the names that patterns of .* take another copy"):
        from_delta(bad, tiny("bert"))
