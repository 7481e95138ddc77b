"""The commands of a Trainer: which `TuningCLI` and which Trainer each of them has."""

import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.commands.searching import Searcher
from lightning_peft.commands.trainer import TuningCLI, building
from lightning_peft.commands.yaml_check import check_words
from lightning_peft.core.errors import TuningError
from lightning_peft.reports.predictions import PredictionWriter
from lightning_peft.reports.preflight import Preflight
from lightning_peft.reports.tuning_report import TuningReport
from lightning_peft.training.method import Method


class CheckingCLI(TuningCLI):
    """`TuningCLI` for a Trainer that can be checked."""

    tells = False

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the one command, a method of `Preflight`, with the arguments that are given apart."""
        return {"check": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        """Check the values, and make the model on the meta device, if that is asked for."""
        super().before_instantiate_classes()
        if self.argument(self.config, "meta"):
            self.parser.add_instantiator(_on_meta, L.LightningModule, subclasses=True, prepend=True)

    def build_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> L.Trainer:
        """Build the Trainer that checks."""
        given = config.get("callbacks") or []
        own = given if isinstance(given, list) else [given]
        with building():
            return Preflight.of(**config | {"callbacks": [*own, *callbacks]})


class SearchingCLI(TuningCLI):
    """`TuningCLI` for a Trainer that searches for prompts."""

    tells = False

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the one command, a method of `Searcher`, with the arguments that are given apart."""
        return {"search": {"model", "datamodule"}}


class PredictingCLI(TuningCLI):
    """`TuningCLI` whose ``predict`` takes several deltas."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the files of deltas."""
        super().add_arguments_to_parser(parser)
        what = "files of deltas, each of which says its own of every row, in place of --ckpt_path"
        parser.add_argument("--deltas", type=str, nargs="+", default=None, help=what)

    def build_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> L.Trainer:
        """Build the Trainer; where its writer of predictions loads deltas, the configuration's method is left out."""
        deltas = self.argument(self.config_init, "deltas")
        if not deltas:
            return super().build_trainer(config, callbacks)
        trainer = super().build_trainer(config, [each for each in callbacks if not isinstance(each, Method)])
        found = trainer.callbacks  # type: ignore[attr-defined]
        method = next((type(each).__name__ for each in found if isinstance(each, Method)), None)
        if method is not None or self.argument(self.config_init, "ckpt_path"):
            raise TuningError(
                f"--deltas bring what tunes the backbone: leave out {method or '--ckpt_path'} beside them."
            )
        writers = [each for each in found if isinstance(each, PredictionWriter)]
        if not writers:
            raise TuningError("--deltas are written by a PredictionWriter: leave one in trainer.callbacks.")
        writers[0].deltas = list(deltas)
        return trainer


def run() -> None:
    """Run the command of ``sys.argv``."""
    # lightning 2.6 with torch 2.13: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    words = sys.argv[1:]
    check_words(words[1:])
    sys.argv[1:] = _torch_first(sys.argv[1:])
    own: dict[str, tuple[type[TuningCLI], type[L.Trainer]]] = {
        "check": (CheckingCLI, Preflight),
        "search": (SearchingCLI, Searcher),
        "predict": (PredictingCLI, L.Trainer),
    }
    cli, trainer_class = own.get(sys.argv[1], (TuningCLI, L.Trainer))
    cli(
        trainer_class=trainer_class,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={
            "enable_model_summary": False,
            "callbacks": [TuningReport(command=sys.argv[0], words=words), PredictionWriter()],
        },
    )


def _on_meta(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        try:
            return kind(*args, **kwargs)
        except RuntimeError as error:
            raise TuningError(
                f"{kind.__name__} cannot be made on the meta device ({str(error).splitlines()[0]}): let it build its "
                "model by from_config where torch.get_default_device() is that, or check without --meta."
            ) from None


def _torch_first(words: list[str]) -> list[str]:
    """Let ``--optimizer SGD`` be torch's; other libraries (bitsandbytes) have optimizers of the same names."""
    words = list(words)
    for i, word in enumerate(words):
        option, equals, name = word.partition("=")
        if option == "--optimizer" and not equals and i + 1 < len(words) and hasattr(torch.optim, words[i + 1]):
            words[i + 1] = f"torch.optim.{words[i + 1]}"
        elif option == "--optimizer" and equals and hasattr(torch.optim, name):
            words[i] = f"--optimizer=torch.optim.{name}"
    return words
