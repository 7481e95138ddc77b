"""Compare methods on StdlibDocstrings with MiniLM.

    python examples/compare.py                        # runs/compare has tables and pictures; hours on two cores
    python examples/compare.py --seeds 1 --rates 1 --trainer.max_epochs 1 --data.max_length 32

It is ``lightning-peft compare``, whose arguments may follow.
"""

import sys

from lightning_peft.commands.comparing import compare

METHODS = ("BitFit", "PromptTuning", "LoRA", "Adapter", "PartialK", "FullFineTuning")


def main() -> None:
    """Run what is missing of the comparison, and print its tables."""
    compare(["--config", "quickstart", "--methods", *METHODS, *sys.argv[1:]])


if __name__ == "__main__":
    main()
