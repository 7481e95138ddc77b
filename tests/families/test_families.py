"""Laws of every method on families whose structure differs: as at the start, all trained, merged, taken off."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    Adapter,
    BitFit,
    DiffPruning,
    LadderSideTuning,
    LinearProbe,
    LoRA,
    MLPHead,
    PartialK,
    SideTuning,
    TinyTL,
    TuningError,
    merge,
)  # fmt: skip
from lightning_peft.core.graft import grafts
from tests.contract import shake
from tests.families.builders import SAMPLE, build

METHODS = {
    "lora": LoRA(r=2),
    "all_linear": LoRA(r=2, target_modules="all-linear"),
    "dora": LoRA(r=2, target_modules="all-linear", use_dora=True),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "houlsby": Adapter(bottleneck=2),
    "pfeiffer": Adapter(form="pfeiffer", bottleneck=2),
    "diff_pruning": DiffPruning(),
    "partial_k": PartialK(),
    "linear_probe": LinearProbe(),
    "mlp_head": MLPHead(k=2),
    "side": SideTuning(reduction=2),
    "ladder": LadderSideTuning(reduction=2),
    "tiny_tl": TinyTL(),
}
MERGED = ("lora", "all_linear", "dora", "ia3", "bitfit", "diff_pruning")
STARTS_AS_ANOTHER = ("mlp_head", "side")
LANGUAGE = ("bert_mlm", "bloom", "jamba", "llama4", "mamba", "mixtral")
NO_IMAGES = (*LANGUAGE, "deberta", "modernbert", "t5_answers", "xlnet", "wavlm", "whisper_sounds", "pipeline")
REFUSED = {
    **{(family, name): "no task head" for family in LANGUAGE for name in ("linear_probe", "mlp_head")},
    **{(family, "bitfit"): "no biases" for family in ("llama4", "mixtral", "modernbert", "t5_answers")},
    **{(family, "tiny_tl"): "takes no images|no biases|does not take an image" for family in NO_IMAGES},
    **{("resnet", name): "no sublayers of tokens" for name in ("houlsby", "pfeiffer")},
    ("resnet", "ia3"): "no key or value projection",
    ("pipeline", "side"): "no config",
    **{(family, "ladder"): "hidden|stack|shape" for family in ("xlnet", "convnext", "resnet", "pipeline")},
}  # fmt: skip
"""A family and a method -> what is said where the method cannot be."""


def loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out = model(**batch)
    first = (
        out if isinstance(out, Tensor) else next(out[k] for k in ("logits", "start_logits") if out.get(k) is not None)
    )
    given = first if isinstance(out, Tensor) else out.get("loss")
    return (first.float().square().mean() if given is None or given is first else given.mean()), first


@pytest.mark.parametrize("family", SAMPLE)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_family(family: str, name: str) -> None:
    (model, batch), method = build(family), METHODS[name]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = loss(model, batch)[1]
    if (family, name) in REFUSED:
        with pytest.raises(TuningError, match=REFUSED[family, name]):  # noqa: PT012 (some see it in the first batch)
            method.apply(model)
            loss(model, batch)
        return
    method.apply(model)
    if name not in STARTS_AS_ANOTHER:
        torch.testing.assert_close(loss(model, batch)[1].detach(), before, rtol=1e-4, atol=1e-5)
    shake(model, 0.05)
    error, live = loss(model, batch)
    error.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    assert not torch.allclose(live, before, atol=1e-6)
    model.zero_grad()
    if name in MERGED and not any(place.graft.merged for place in grafts(model)):
        try:
            merged = loss(merge(model), batch)[1]
        except TuningError as error:
            assert "tied to that of another module" in str(error)  # noqa: PT017 (either is right)
            return
        torch.testing.assert_close(merged.detach(), live.detach(), rtol=1e-3, atol=1e-4)
        return
    method.remove(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loss(model, batch)[1], before)
