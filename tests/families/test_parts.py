"""Models whose parts compute their attention in ways of their own, hand it on, or are read before their last block."""

import pytest

from lightning_peft import VPT, MLPHead, PTuningV2, SideTuning
from lightning_peft.core import structure
from lightning_peft.core.method import TuningMethod
from tests.families.every import build_any
from tests.families.matrix import outcome


@pytest.mark.parametrize("family", ["RTDetr", "GroundingDINO"])
def test_each_part_has_its_own_attention_back(family: str) -> None:
    model, batch = build_any(family)
    parts = [module for module in model.modules() if structure.is_pretrained(module)]
    before = [structure.attention_implementation(part) for part in parts]
    assert len(set(before)) > 1
    assert outcome((model, batch), PTuningV2(num_virtual_tokens=2)).end == "works"
    assert [structure.attention_implementation(part) for part in parts] == before


@pytest.mark.parametrize(
    ("family", "method", "expected"),
    [
        ("LLaVA", VPT(num_virtual_tokens=2, dropout=0.0), "works"),
        ("GroundingDINO", MLPHead(dropout=0.0), "works"),
        ("RTDetr", SideTuning(reduction=2), "refused"),
    ],
)
def test_what_no_output_would_depend_on(family: str, method: TuningMethod, expected: str) -> None:
    found = outcome(build_any(family), method)
    assert found.end == expected
    assert expected == "works" or "of the head lies inside of RTDetrModel, which is run without" in found.why
