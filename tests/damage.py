"""Ways in which a file comes to harm: bits that flip, contents edited beside their checksums, an end that is lost."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_peft.core.delta_file import META

NAME = "model.bert.encoder.layer.0.attention.self.query.lora.A"
"""A tensor that is changed, of a `LoRA` on `tests.modules.Tuned`."""


def flips(whole: bytes, number: int, begin: int = 0) -> Iterator[bytes]:
    """Yield contents of a file in which one bit after the first ``begin`` bytes is another, always the same ones."""
    draw = random.Random(0)
    for _ in range(number):
        data = bytearray(whole)
        data[draw.randrange(begin, len(data))] ^= 1 << draw.randrange(8)
        yield bytes(data)


def cuts(whole: bytes) -> Iterator[bytes]:
    """Yield contents of a file of which the end is lost."""
    for size in (0, 3, len(whole) // 4, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        yield whole[:size]


def edited(file: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a file again with other contents and the checksums that it had."""
    copy = folder / file.name
    if file.suffix == ".ckpt":
        checkpoint = torch.load(file, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, copy)
    else:
        with safe_open(file, "pt") as opened:
            checkpoint = {"state_dict": load_file(file), META: json.loads(opened.metadata()[META])}
        change(checkpoint)
        save_file(checkpoint["state_dict"], copy, metadata={META: json.dumps(checkpoint[META])})
    return copy


def swapped(c: dict[str, Any]) -> None:
    """Let two tensors of a file change places."""
    other = NAME.replace("layer.0", "layer.1")
    c["state_dict"][NAME], c["state_dict"][other] = c["state_dict"][other], c["state_dict"][NAME]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "swap": swapped,
    "cast": lambda c: c["state_dict"].update({NAME: c["state_dict"][NAME].half()}),
    "nan": lambda c: c["state_dict"][NAME].view(-1)[0].fill_(torch.nan),
    "zero": lambda c: c["state_dict"][NAME].zero_(),
    "gone": lambda c: c["state_dict"].pop(NAME),
    "more": lambda c: c["state_dict"].update({NAME + "2": torch.ones(2)}),
    "alpha": lambda c: c[META]["methods"][0]["init_args"].update(alpha=1),
    "other backbone": lambda c: c[META]["backbones"]["model"].update(fingerprint="float32:0:0:0"),
    "no seal": lambda c: c[META].pop("seal"),
    "no checksums": lambda c: c[META].pop("checksums"),
    "said to be checked": lambda c: (swapped(c), c[META].update(checked=True)),
}
"""Edits of a file, by name."""
