"""What holds of a method that PEFT has too, tensor by tensor: exchange both ways, equal steps, equal merged weights."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file

from lightning_peft import collect, merge
from lightning_peft.interop import from_peft, to_peft
from tests.contract import assert_near, assert_same, copy_of, shake
from tests.interop.adapters import after_three_steps, logits, saved_by_peft, theirs_from
from tests.models import tiny


def check_twin(kind: str, config: peft.PeftConfig, folder: Path) -> None:
    """Check an adapter of PEFT on a tiny model: its logits, its merged weights, and back; and three steps from it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_enable)?` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
        _check_exchange(kind, config, folder)
        _check_steps(kind, folder)


def _check_exchange(kind: str, config: peft.PeftConfig, folder: Path) -> None:
    expected = saved_by_peft(kind, copy.deepcopy(config), folder / "theirs")
    model, again = tiny(kind), tiny(kind)
    method = from_peft(model, folder / "theirs")
    assert not torch.allclose(expected, logits(tiny(kind), kind), atol=1e-3)
    assert_near({"": expected}, {"": logits(model, kind, method)}, 1e-5)
    to_peft(model, folder / "ours")
    assert_near({"": expected}, {"": theirs_from(folder / "ours", kind)}, 1e-5)
    from_peft(again, folder / "ours")
    assert_same(copy_of(collect(model)), copy_of(collect(again)))
    other: Any = peft.PeftModel.from_pretrained(tiny(kind), folder / "theirs").merge_and_unload()
    assert_near(dict(other.state_dict()), dict(merge(again).state_dict()), 1e-5)


def _check_steps(kind: str, folder: Path) -> None:
    """Check that three steps of SGD give the adapter of PEFT."""
    model, start = tiny(kind), load_file(folder / "theirs" / "adapter_model.safetensors")
    from_peft(model, folder / "theirs")
    theirs, ours = after_three_steps(kind, folder / "theirs", model, folder, lr=0.01)
    assert ours.keys() == theirs.keys()
    assert_near(theirs, ours, 1e-5)
    floats = [key for key in ours if ours[key].is_floating_point()]
    assert all(not torch.equal(start[key], ours[key]) for key in floats)


def shaken(kind: str, method: Any) -> torch.nn.Module:
    """Return a tiny model with a method applied and noise in all that it trains."""
    model = tiny(kind)
    torch.manual_seed(1)
    method.apply(model)
    shake(model)
    return model
