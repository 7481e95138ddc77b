"""A cache of their own for these tests, and a model to tokenise for."""

from tests.text import cache, model

__all__ = ["cache", "model"]
