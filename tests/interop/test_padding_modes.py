"""Convolutions that pad otherwise than by zeros: equal to PEFT once it is merged, and said to differ before."""

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA
from lightning_peft.interop import from_peft, to_peft


class Circular(nn.Module):
    """A convolution around the edges of an image."""

    def __init__(self, mode: str = "circular", padding: int | str = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_an_adapter_of_peft_is_what_it_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Circular(), torch.randn(2, 4, 9, 9)
    config = peft.LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="conv pads by 'circular', and so does its update in .* unmerged, PEFT pads"):
        from_peft(base, tmp_path / "adapter")
    with torch.no_grad():
        ours, unmerged = base(x), theirs(x)
        assert (ours - unmerged).abs().max() > 0.1, "PEFT has come to pad as the layer does: warn no more"
        assert torch.allclose(ours, theirs.merge_and_unload()(x), atol=1e-5)


def test_our_export_says_so(tmp_path: Path) -> None:
    model = Circular("reflect", "same")
    LoRA(r=2, target_modules=["conv"]).apply(model)
    with pytest.warns(UserWarning, match="conv pads by 'reflect'"):
        to_peft(model, tmp_path / "adapter")


@pytest.mark.parametrize(("mode", "padding"), [("zeros", 1), ("circular", 0)])
def test_others_are_not_warned_of(tmp_path: Path, mode: str, padding: int) -> None:
    model = Circular(mode, padding)
    LoRA(r=2, target_modules=["conv"]).apply(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_peft(model, tmp_path / "adapter")
