"""The rows of `examples/gpu_checks.py`, which run from a tree that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
