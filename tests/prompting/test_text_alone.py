"""Prompting works on text: it imports neither torch nor anything that does."""

import subprocess
import sys


def test_prompting_needs_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, lightning_peft.prompting as p\n"
        "[importlib.import_module(f'{p.__name__}.{m.name}') for m in pkgutil.iter_modules(p.__path__)]\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
