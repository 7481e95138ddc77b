"""A cache of their own for these tests, and models to tokenise for."""

from tests.text import cache, model, valley

__all__ = ["cache", "model", "valley"]
