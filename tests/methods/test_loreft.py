"""LoReFT: ``h + Rᵀ (W h + b - R h)`` at the first and last tokens, its counts, and whatever pads a text."""

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoReFT, PrefixLM, TuningError, merge
from lightning_peft.core.graft import grafts
from lightning_peft.methods.loreft import Intervention
from tests.contract import MethodContract, assert_near, descend, shake
from tests.families.every import build_any
from tests.models import HIDDEN, batch, tiny

R = 3


class TestLoReFT(MethodContract):
    method = LoReFT(r=R, first=2, last=1)
    backbones = ("bert", "gpt2")
    on_families = (("loreft", LoReFT(r=2)),)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """L (2 r d + r)."""
        return 2 * (2 * R * HIDDEN + R)


def tuned(kind: str, **arguments: object) -> tuple[nn.Module, LoReFT]:
    model = tiny(kind)
    method = LoReFT(**{"r": R, "first": 2, "last": 1} | arguments)
    torch.manual_seed(1)
    method.apply(model)
    shake(model, 0.5)
    return model, method


def expected_states(graft: Intervention, states: Tensor, first: list[list[int]], last: list[list[int]]) -> Tensor:
    """Return the hidden states, changed token by token; R by the Gram-Schmidt process in double precision."""
    changed = states.double().clone()
    for number, places in enumerate((first, last)):
        k = min(number, len(graft.rotation) - 1)
        rows: list[Tensor] = []
        for row in graft.rotation[k].double():
            rest = row - sum(((row @ other) * other for other in rows), torch.zeros_like(row))
            rows.append(rest / rest.norm())
        r = torch.stack(rows)
        for i, own in enumerate(places):
            for t in own:
                h = states[i, t].double()
                changed[i, t] = h + r.t() @ (graft.source[k].double() @ h + graft.bias[k].double() - r @ h)
    return changed


def seen(model: nn.Module, block: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a block computes for these inputs without its graft, and with it."""
    found: list[Tensor] = []
    graft = next(child for child in block.children() if isinstance(child, Intervention))
    own = graft.after

    def spy(out: object, host: nn.Module, *args: object, **kwargs: object) -> object:
        if isinstance(out, tuple):
            return own(out, host)
        found.append(out)
        found.append(own(out, host))
        return found[-1]

    vars(graft)["after"] = spy
    with torch.no_grad():
        model(**inputs)
    del vars(graft)["after"]
    return found[0], found[1]


SIDES = {
    "right": ([1] * 8 + [0] * 2, [0, 1], [7]),
    "left": ([0] * 3 + [1] * 7, [3, 4], [9]),
    "both": ([0] + [1] * 7 + [0] * 2, [1, 2], [7]),
    "none": ([1] * 10, [0, 1], [9]),
    "two tokens": ([1] * 2 + [0] * 8, [0, 1], []),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_it_is_the_formula_at_the_ends_of_the_text(kind: str, side: str, tied: bool) -> None:
    model, _ = tuned(kind, tied=tied)
    mask, first, last = SIDES[side]
    inputs = {"input_ids": batch(kind)["input_ids"], "attention_mask": torch.tensor([mask] * 3 + [[1] * 10])}
    place = next(place for place in grafts(model) if isinstance(place.graft, Intervention))
    before, after = seen(model, place.host, inputs)
    wanted = expected_states(place.graft, before, [*[first] * 3, [0, 1]], [*[last] * 3, [9]])
    assert_near({"": wanted}, {"": after.double()}, 1e-5)
    assert len(place.graft.rotation) == (1 if tied else 2)


def test_of_a_decoder_the_prompt_alone_is_changed_also_when_it_writes() -> None:
    model, method = tuned("gpt2")
    rows = batch("gpt2")
    rows["labels"][:, :6] = -100
    place = next(place for place in grafts(model) if isinstance(place.graft, Intervention))
    before, after = seen(model, place.host, dict(method.prepare(rows)))
    wanted = expected_states(place.graft, before, [[0, 1]] * 4, [[5]] * 4)
    assert_near({"": wanted}, {"": after.double()}, 1e-5)
    prompt = {name: value[:, :6] for name, value in rows.items() if name != "labels"}
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    written = model.generate(**prompt, **options)
    labels = torch.cat([torch.full((4, 6), -100), written[:, 6:]], 1)
    full = {"input_ids": written, "attention_mask": torch.ones_like(written), "labels": labels}
    with torch.no_grad():
        again = model(**method.prepare(full)).logits[:, 5:-1].argmax(-1)
    assert torch.equal(again, written[:, 6:])


def test_rows_stay_orthonormal_and_nothing_can_be_merged() -> None:
    model, method = tuned("bert")
    descend(model, "bert", method, steps=100, lr=1e-2, optimizer=torch.optim.Adam)
    for place in grafts(model):
        if isinstance(place.graft, Intervention):
            rows = place.graft.rows().detach()
            assert (rows @ rows.mT - torch.eye(R)).abs().max() < 1e-6
    with pytest.raises(TuningError, match="computes what no weight can"):
        merge(model)


def test_beside_a_prefix_lm_it_takes_the_same_prompt() -> None:
    model, method = tuned("gpt2")
    PrefixLM().apply(model)
    rows = batch("gpt2")
    rows["labels"][:, :6] = -100
    model(**method.prepare(rows)).loss.backward()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("bert", {"r": 33}, r"r=33 is wider than .*layer\.0, whose hidden states have 32 features"),
        ("bert", {"first": 0, "last": 0}, "first=0 and last=0 leave no token"),
        ("bert", {"first": -1}, "first=-1 is no number of tokens"),
        ("bert", {"layers": [2]}, "layers has 2"),
        ("t5", {}, "LoReFT changes the tokens of one stack"),
    ],
)
def test_bad_arguments_are_refused(kind: str, arguments: dict, message: str) -> None:
    model = tiny(kind)
    with pytest.raises(TuningError, match=message):
        LoReFT(**arguments).apply(model)
    assert not list(grafts(model))


def test_positions_beyond_the_text_are_refused() -> None:
    model, _ = tuned("bert", first=11)
    with pytest.raises(TuningError, match="first=11 and last=1 are positions beyond a text of 10 tokens: take 10"):
        model(**batch("bert"))


@pytest.mark.parametrize("family", ["xlnet", "MobileBert"])
def test_blocks_of_other_states_than_those_of_the_text_are_refused(family: str) -> None:
    """XLNet has the tokens before the texts, the blocks of MobileBERT are narrower inside."""
    model, inputs = build_any(family)
    LoReFT(r=2).apply(model)
    with pytest.raises(TuningError, match=r"which are no hidden states of a text of \[\d, \d+\] tokens of width 16"):
        model(**inputs)
