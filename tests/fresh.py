"""In a process of its own: build each model from its delta file and save what it computes."""

import sys
from pathlib import Path

import torch

from lightning_peft import from_delta
from lightning_peft.tuning import Tuning
from tests.contract import output
from tests.models import tiny


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    outputs = {}
    for file in sorted(folder.glob("*.safetensors")):
        model = from_delta(file, tiny(file.stem))
        (method,) = Tuning.of(model).methods.values()
        outputs[file.stem] = output(model, file.stem, method)
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
