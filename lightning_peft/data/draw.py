"""Draws of a seed, and what they cost."""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any


class Draw:
    """Draws, and counts what it cost: the entropy of all draws so far [nats]."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nats = 0.0

    def one(self, values: Sequence[Any]) -> Any:
        """Return one of the values, each as likely."""
        self.nats += math.log(len(values))
        return self.random.choice(values)

    def several(self, values: Sequence[Any], count: int) -> list[Any]:
        """Return so many different values, in any order."""
        left = list(values)
        found = []
        for _ in range(count):
            found.append(self.one(left))
            left.remove(found[-1])
        return found


def number_of(text: str) -> int:
    """Return a number that is a text's own, the same at any time."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
