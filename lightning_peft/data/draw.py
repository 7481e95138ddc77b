"""Draws of a seed, and what they cost."""

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
