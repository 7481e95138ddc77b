"""Packs texts with common prefixes into trees of tokens, so that a causal tower computes each prefix once.

In a causal tower a token depends on those before it alone. Where texts share a beginning (the start token and a soft
context), its tokens are written once; each token sees its ancestors and has the position of its depth. A tower that
takes positions and a mask needs no change, and gives the same numbers but for rounding. What follows the last token of
a text is left out, so nothing is computed behind the end of a text.

>>> packed = pack(((7, 1, 2, 9), (7, 1, 3, 9)), width=64)
>>> packed.ids.tolist(), packed.positions.tolist(), packed.ends.tolist()
([[7, 1, 2, 9, 3, 9]], [[0, 1, 2, 3, 2, 3]], [3, 5])
>>> packed.visible[0].astype(int)[5].tolist()
[1, 1, 0, 0, 1, 1]
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Rows = tuple[tuple[int, ...], ...]


class Packing(NamedTuple):
    """Trees of tokens, each in a row of N tokens, padded with tokens that attend to themselves alone.

    Attributes:
        ids: the tokens, [G, N].
        positions: the depth of each token, [G, N].
        visible: whether token i sees token j, [G, N, N].
        ends: where the last token of each text is, counted through all rows, [R].
    """

    ids: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    ends: np.ndarray


@lru_cache(maxsize=32)
def pack(rows: Rows, width: int) -> Packing:
    """Pack texts into trees of as many texts as cost least in a tower of this width.

    Args:
        rows: the tokens of each text, to its end.
        width: hidden size of the tower; attention over a long row costs more, the wider, the less it matters.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)  # texts that begin alike are neighbours
    texts = [rows[i] for i in order]
    shared = [0, *(_common(one, other) for one, other in pairwise(texts))]
    size = _group_size([len(text) for text in texts], shared, width)
    trees = [_tree(texts[i : i + size], shared[i : i + size]) for i in range(0, len(texts), size)]
    longest = max(len(parents) for _, parents, _, _ in trees)
    ids = np.zeros((len(trees), longest), "int64")
    positions = np.zeros_like(ids)
    visible = np.repeat(np.eye(longest, dtype=bool)[None], len(trees), axis=0)
    ends = np.zeros(len(rows), "int64")
    for g, (tokens, parents, depths, last) in enumerate(trees):
        ids[g, : len(tokens)], positions[g, : len(tokens)] = tokens, depths
        for node, parent in enumerate(parents):
            if parent >= 0:
                visible[g, node] |= visible[g, parent]
        ends[order[g * size : g * size + size]] = np.array(last) + g * longest
    return Packing(ids, positions, visible, ends)


def _tree(texts: list[tuple[int, ...]], shared: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return token, parent and depth of each node, depth first, and the last node of each text."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    last: list[int] = []
    path: list[int] = []
    for text, common in zip(texts, shared, strict=True):
        del path[common if path else 0 :]
        for depth in range(len(path), len(text)):
            parents.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(text[depth])
            depths.append(depth)
        last.append(path[-1])
    return tokens, parents, depths, last


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many tokens two texts begin with alike."""
    unlike = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))


def _group_size(lengths: list[int], shared: list[int], width: int) -> int:
    """Return how many texts to put into a tree.

    A block costs about 24 d² operations a token in its matrices and 4 n d in its attention over n tokens.
    """
    added = np.array(lengths) - np.array(shared)
    best, least = 1, float("inf")
    size = len(lengths)
    while size >= 1:
        starts = range(0, len(lengths), size)
        longest = max(int(added[i : i + size].sum()) + shared[i] for i in starts)
        cost = len(starts) * longest * (24 * width + 4 * longest)
        if cost < least:
            best, least = size, cost
        size = 0 if size == 1 else (size + 1) // 2
    return best
