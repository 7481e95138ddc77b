"""The configurations of PEFT's own tests, both ways: ``make test-peft``.

They are read from the tests in PEFT's source distribution, the folder that is the argument: those of small networks
with these, those of models of the hub with tiny ones of the same architectures. Each gives an adapter, which is
imported and must give PEFT's numbers, exported and must give them in PEFT, and trained for three steps of AdamW on both
sides, which must give one adapter. What cannot be is refused by a TuningError; anything else is a crash.
"""

import ast
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft.interop.adapter_config import DEFAULTS
from tests.interop import peft_hub
from tests.interop.exchange import Case, exchanged, saved
from tests.interop.peft_page import PARTS, Said, page, reason_of, write

FILE = "tests/test_custom_models.py"
LEAST = {"import": 257, "export": 257}
"""How many are to be equal at least."""
X = torch.arange(90).view(9, 10)


def custom(folder: Path) -> Iterator[Case]:
    """Yield the cases of small networks."""
    tree = ast.parse((folder / FILE).read_text())
    wanted = [node for node in tree.body if _is_declared(node)]
    found: dict[str, Any] = {"__name__": "peft_tests"}
    exec(compile(ast.Module(wanted, []), FILE, "exec"), found)
    build = found["MockTransformerWrapper"].from_pretrained
    for name, network, kind, arguments in found["TEST_CASES"]:
        yield Case("small networks", name, partial(build, network), kind, arguments, _computed)


def _is_declared(node: ast.stmt) -> bool:
    """Tell whether a statement imports from a package, lists the configurations, or is the class of a network."""
    if isinstance(node, ast.ImportFrom):
        return node.level == 0
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Name) and node.targets[0].id == "TEST_CASES"
    return isinstance(node, ast.Import) or (isinstance(node, ast.ClassDef) and not node.name.startswith("Test"))


def _computed(model: nn.Module, _: Any) -> Tensor:
    return model(X)


def _has_twin(case: Case) -> bool:
    return str(peft.utils.PeftType(case.config().peft_type).value) in DEFAULTS


def check(case: Case) -> list[tuple[str, str]]:
    """Return what comes of each part; nothing where PEFT itself has no such adapter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            expected = saved(case.build, case.config(), case.call, folder)
        except Exception as error:
            return [("PEFT", f"{type(error).__name__}: {error}".splitlines()[0])]
        said: list[tuple[str, str]] = []
        try:
            said.extend(exchanged(expected, case.build, case.call, folder))
        except Exception as error:
            said.append(("crash", f"{type(error).__name__}: {error}".splitlines()[0]))
        return [(part, how.replace(name, "FOLDER")) for part, how in said]


def main() -> None:
    """Check every configuration, print what is not equal, and end with an error if too much is not.

    A second argument is the page that the counts are written into.
    """
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    folder = Path(sys.argv[1])
    said: list[Said] = []
    for case in filter(_has_twin, (*custom(folder), *peft_hub.cases(folder))):
        for part, how in check(case):
            said.append(Said(case.group, part, how))
            if how != "equal":
                print(f"{case.name} | {part} | {how}", flush=True)
    print(page(said))
    for file in sys.argv[2:]:
        write(Path(file), page(said))
    equal = Counter(each.part for each in said if each.how == "equal")
    bad = [each for each in said if each.part == "crash" or each.how == "WRONG"]
    refused = [each.how for each in said if each.part in PARTS and each not in bad and each.how != "equal"]
    odd = [how for how in refused if reason_of(how) is None]
    if bad or odd or any(equal[part] < least for part, least in LEAST.items()) or equal["steps"] < equal["export"]:
        sys.exit(f"{len(bad)} are wrong, {len(odd)} are refused without a row in the page, or too few are equal")


if __name__ == "__main__":
    main()
