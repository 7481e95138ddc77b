"""The configurations of PEFT's own tests of small networks, both ways: ``make test-peft``.

They are read from the tests in PEFT's source distribution, the folder that is the argument. Each gives an adapter,
which is imported and must give PEFT's numbers, exported and must give them in PEFT, and trained for three steps of
AdamW on both sides, which must give one adapter. What cannot be is refused by a TuningError; anything else is a crash.
"""

import ast
import copy
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn

from lightning_peft.interop.adapter_config import DEFAULTS
from tests.interop.exchange import exchange

FILE = "tests/test_custom_models.py"
LEAST = {"import": 94, "export": 94}
"""How many are to be equal at least."""
X = torch.arange(90).view(9, 10)


class Case(NamedTuple):
    """A configuration of a test: its name, the network's, the class and its arguments."""

    name: str
    network: str
    config: type[peft.PeftConfig]
    arguments: dict[str, Any]


def read(folder: Path) -> tuple[list[Case], Callable[[str], nn.Module]]:
    """Return the configurations that have a twin here, and what builds a network of theirs, always the same."""
    tree = ast.parse((folder / FILE).read_text())
    wanted = [node for node in tree.body if _is_declared(node)]
    found: dict[str, Any] = {"__name__": "peft_tests"}
    exec(compile(ast.Module(wanted, []), FILE, "exec"), found)
    cases = [Case(*row) for row in found["TEST_CASES"]]
    return [case for case in cases if _type(case) in DEFAULTS], found["MockTransformerWrapper"].from_pretrained


def _is_declared(node: ast.stmt) -> bool:
    """Tell whether a statement imports from a package, lists the configurations, or is the class of a network."""
    if isinstance(node, ast.ImportFrom):
        return node.level == 0
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Name) and node.targets[0].id == "TEST_CASES"
    return isinstance(node, ast.Import) or (isinstance(node, ast.ClassDef) and not node.name.startswith("Test"))


def _type(case: Case) -> str:
    return str(peft.utils.PeftType(case.config(**copy.deepcopy(case.arguments)).peft_type).value)


def _computed(model: nn.Module, _: Any) -> Tensor:
    return model(X)


def main() -> None:
    """Check every configuration, print what is not equal, and end with an error if too much is not."""
    warnings.simplefilter("ignore")
    cases, build = read(Path(sys.argv[1]))
    told: Counter[tuple[str, str]] = Counter()
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = case.config(**copy.deepcopy(case.arguments))
                said = list(exchange(partial(build, case.network), config, _computed, Path(folder)))
            except Exception as error:
                said = [("crash", f"{type(error).__name__}: {error}".splitlines()[0])]
            for part, how in said:
                kind = how if how in ("equal", "WRONG") else "refused"
                told[part, kind] += 1
                if how != "equal":
                    print(f"{case.name} | {part} | {how.replace(folder, 'FOLDER')}")
    print(f"{len(cases)} configurations: {dict(told)}")
    bad = any(part == "crash" or kind == "WRONG" for part, kind in told)
    if bad or any(told[part, "equal"] < least for part, least in LEAST.items()):
        sys.exit("too few are equal, or something is wrong")


if __name__ == "__main__":
    main()
