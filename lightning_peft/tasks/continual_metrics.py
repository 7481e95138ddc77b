"""Metrics of continual learning, from A[i, t], the accuracy on task i after training on task t.

Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, section 2 (backward transfer); Chaudhry et al. 2018, arXiv
1801.10112, section 3 (forgetting, here with the last task among those that may be best, as in the code of L2P, so that
it is never negative).

>>> A = [[0.9, 0.8, 0.7], [0, 0.85, 0.8], [0, 0, 0.95]]
>>> [round(f(A), 5) for f in (average_accuracy, forgetting, backward_transfer, learning_accuracy)]
[0.81667, 0.125, -0.125, 0.9]
"""

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]
"""A[i][t]; what is below the diagonal, t < i, does not count."""


def average_accuracy(matrix: Matrix, after: int = -1) -> float:
    """Return the mean over the tasks seen so far of the accuracy after task ``after``: ``mean_{i <= t} A[i, t]``."""
    t = _task(matrix, after)
    return sum(matrix[i][t] for i in range(t + 1)) / (t + 1)


def forgetting(matrix: Matrix, after: int = -1) -> float:
    """Return how far earlier tasks are below their best: ``mean_{i < t} (max_{i <= j <= t} A[i, j] - A[i, t])``."""
    t = _task(matrix, after)
    return sum(max(matrix[i][i : t + 1]) - matrix[i][t] for i in range(t)) / max(t, 1)


def backward_transfer(matrix: Matrix, after: int = -1) -> float:
    """Return what later tasks did to earlier ones: ``mean_{i < t} (A[i, t] - A[i, i])``."""
    t = _task(matrix, after)
    return sum(matrix[i][t] - matrix[i][i] for i in range(t)) / max(t, 1)


def learning_accuracy(matrix: Matrix, after: int = -1) -> float:
    """Return the mean accuracy on a task just after it was trained: ``mean_{i <= t} A[i, i]``."""
    t = _task(matrix, after)
    return sum(matrix[i][i] for i in range(t + 1)) / (t + 1)


def _task(matrix: Matrix, after: int) -> int:
    return after % len(matrix)
