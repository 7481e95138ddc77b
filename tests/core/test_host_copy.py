"""Questions about a batch go to its copy on the CPU as long as that has the same values."""

import copy

import torch

from lightning_peft.core.host_copy import ask, keep, note, send


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


def test_what_stays_the_same_is_copied_once_and_asked_there() -> None:
    texts = torch.tensor([[1, 2]])
    asked: list[torch.Tensor] = []
    ask(keep(texts), asked.append)
    assert asked[0] is texts  # it is in host memory
    vars(texts)["_lightning_peft_held"] = id(texts), torch.tensor([[3, 4]]), texts._version
    ask(keep(texts), asked.append)
    assert asked[1].tolist() == [[3, 4]]
    ask(keep(copy.deepcopy(texts)), asked.append)
    assert asked[2].tolist() == [[1, 2]]  # a deep copy has a copy of its own
    texts.add_(1)
    ask(keep(texts), asked.append)
    assert asked[3] is texts


def test_what_is_sent_knows_its_copy() -> None:
    values = torch.tensor([1])
    assert send(values, values.device) is values
    assert send(values, torch.device("meta")).is_meta
    assert ask(send(values, torch.device("meta")), lambda kept: kept) is values
