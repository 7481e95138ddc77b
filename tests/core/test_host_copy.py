"""Questions about a batch go to its copy on the CPU as long as that has the same values."""

import torch

from lightning_peft.core.host_copy import ask, note


def test_a_moved_tensor_is_asked_on_the_cpu_until_it_is_written_to() -> None:
    before = {"ids": torch.tensor([1, 2]), "more": [torch.tensor([3])]}
    moved = {"ids": before["ids"].clone(), "more": [torch.tensor([3])], "new": torch.tensor([4])}
    note(moved, before)
    asked = []
    for tensor in (moved["ids"], moved["more"][0], moved["new"], moved["ids"] + 0):
        ask(tensor, asked.append)
    assert asked[0] is before["ids"]
    assert asked[1] is before["more"][0]
    assert asked[2] is moved["new"]
    assert asked[3] is not before["ids"]
    moved["ids"].add_(1)
    assert ask(moved["ids"], lambda ids: ids) is moved["ids"]


def test_a_tensor_of_inference_mode_is_asked_itself() -> None:
    with torch.inference_mode():
        before = torch.ones(2)
        moved = before.clone()
    assert ask(moved, lambda ids: ids) is moved
