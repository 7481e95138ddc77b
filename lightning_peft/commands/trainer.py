"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a method, a task and its data."""

import operator
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, NoReturn, get_args

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_peft
from lightning_peft.commands import agreement, fail, lightning_words, refusal, sentence
from lightning_peft.commands.config_files import ConfigFile
from lightning_peft.commands.known_names import known_names, missing, names_at_hand, with_place
from lightning_peft.commands.rate_finding import find_rates
from lightning_peft.commands.values import check_seed, check_values
from lightning_peft.commands.wording import one_sentence, unknown_word
from lightning_peft.commands.yaml_check import is_file
from lightning_peft.core import arguments
from lightning_peft.core.delta_file import read_checkpoint, read_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import first_line
from lightning_peft.training import checks, patches
from lightning_peft.training.method import Method
from lightning_peft.training.rebuild import methods_of
from lightning_peft.training.requeue import goes_on

for _name in dir(lightning_peft):  # jsonargparse knows by their short names the classes that have been imported
    getattr(lightning_peft, _name)


class Parser(LightningArgumentParser):
    """Says what is wrong with the arguments in one sentence, with the nearest name that would be right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def add_lightning_class_args(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class; ``limit_val_batches: 1`` is one batch, and not 1.0, which is all of them.

        jsonargparse takes the first type of a Union that fits. Trainer's are int | float, but `typing` gives out one
        object for a Union in any order: that in which it was first made, and Fabric's are float | int.
        https://github.com/python/cpython/blob/3.11/Lib/typing.py (``_tp_cache``),
        https://github.com/omni-us/jsonargparse/blob/v4.53.0/jsonargparse/_typehints.py (``_typehint``)
        """
        added: list[str] = super().add_lightning_class_args(*args, **kwargs)
        for action in self._actions:
            kinds = get_args(getattr(action, "_typehint", None))
            if {int, float} <= set(kinds):
                vars(action)["_typehint"] = reduce(operator.or_, sorted(kinds, key=lambda kind: kind is not int))
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2."""
        lacking = re.search(r"following arguments are required: ([\w., ]+?)\.?$", " ".join(message.split()))
        fail(missing(lacking[1].split(", ")) if lacking else self._sentence(message))

    def _sentence(self, message: str) -> str:
        word, words = unknown_word(message), sys.argv[2:]
        if placed := with_place(word, words):
            return f"the argument {word!r} is not accepted. Did you mean {placed!r}?"
        names = names_at_hand(word, words)
        return one_sentence(message, names or known_names(self))


class TuningCLI(LightningCLI):
    """LightningCLI with ``--method``; labels go from the data to the task, the model's name from it to the data."""

    tells = True
    """Whether there may be other ranks, which have to know when this one cannot begin."""

    def __init__(self, **kwargs: Any) -> None:
        """Take any task and any data."""
        kinds: Any = {"model_class": L.LightningModule, "datamodule_class": L.LightningDataModule}
        kinds |= {"subclass_mode_model": True, "subclass_mode_data": True, "parser_class": Parser}
        super().__init__(**kinds, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose ``--config`` takes the files that come with the package by their names, too."""
        # The action of https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/cli.py.
        parser = self.parser_class(**{"dump_header": [f"lightning.pytorch=={L.__version__}"]} | kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="file of arguments, or the name of a shipped one")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the method, and the links between data and task."""
        self.callback_keys = parser.callback_keys
        parser.add_lightning_class_args(Method, "method", subclass_mode=True, required=False)
        what = "of fit: try a hundred factors of the learning rates on a copy of the model first, and take the best"
        parser.add_argument("--lr_find", type=bool, default=False, help=what)
        parser.link_arguments("model.init_args.model", "data.init_args.tokenizer")
        parser.link_arguments("model.init_args.model", "data.init_args.data.init_args.tokenizer")
        parser.link_arguments("model.init_args.model", "data.init_args.processor")
        # What the data know and the task has to know; a link whose end a class lacks is left out.
        parser.link_arguments("data.label_names", "model.init_args.labels", apply_on="instantiate")
        for known, told in (("verbalizer", "words"), ("candidates", "candidates"), ("style", "lm"), ("lead", "lead")):
            parser.link_arguments(f"data.{known}", f"model.init_args.{told}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and see that a checkpoint is one before Lightning asks it for arguments."""
        super().parse_arguments(parser, args)
        given = self.config.get(self.config.get("subcommand"), {})
        check_seed(given.get("seed_everything"))
        check_checkpoint(given.get("ckpt_path"), str(self.config.get("subcommand")))
        words = sys.argv[1:] if args is None else args
        self._typed = typed(given.get("model"), words) if isinstance(words, list) else None

    def before_instantiate_classes(self) -> None:
        """Give the command line the last word, and see that the values are such as the classes take.

        Lightning puts the arguments of a checkpoint's task in the place of all that were given, without a word. Here
        they go before those of files alone.
        """
        subcommand = str(self.subcommand)
        if self._typed is not None and self.argument(self.config, "ckpt_path"):
            self.config = self.parser.parse_object({subcommand: {"model": self._typed}}, self.config)
        check_values(self.config.get(subcommand, self.config), L.Trainer)

    def instantiate_classes(self) -> None:
        """Build model, data and Trainer; a rank that cannot tells the others, which would wait for it."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if self.tells:
                agreement.tell(self.trainer_class, self._places(), sentence(error))
            if "Does not validate" in str(error) and refusal(error) is None:
                said = f"a class that is asked for cannot be built ({_reason(error)}): change its arguments, or install"
                raise TuningError(lightning_words.said(error) or f"{said} what it needs.") from error
            raise

    def before_fit(self) -> None:
        """Look for learning rates, if that is asked for; a fit that goes on has those of its checkpoint."""
        begins = self.argument(self.config, "ckpt_path") is None and not goes_on(self.trainer)
        if self.argument(self.config, "lr_find") and begins:
            find_rates(self.model, self.datamodule, self.trainer, self._sweeper)

    def _sweeper(self, callbacks: list[Any], **own: Any) -> L.Trainer:
        """Build another Trainer as the configuration says, with other callbacks and limits."""
        given = {**self.argument(self.config_init, "trainer", default={}), **self._places()}  # a strategy is of one
        with building():
            return self.trainer_class(**{**given, **own, "callbacks": callbacks})

    def argument(self, config: Namespace, name: str, default: Any = None) -> Any:
        """Return an argument, whether or not it was given to a subcommand."""
        return config.get(str(self.subcommand), config).get(name, default)

    def _places(self) -> dict[str, Any]:
        """Return the Trainer's arguments with its strategy and plugins built, whatever has become of the rest."""
        parser = LightningArgumentParser()
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        given = self.argument(self.config, "trainer", default={})
        text = parser.parse_object({"trainer": {name: given[name] for name in agreement.PLACES if name in given}})
        return dict(parser.instantiate_classes(text)["trainer"])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer; where no method is given, a delta's own stand in (Lightning would add None)."""
        given = [self.argument(self.config_init, key) for key in self.callback_keys]
        methods = [method for method in given if method is not None]
        config = {**self.argument(self.config_init, "trainer", default={}), **kwargs}
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        found = [callback for callback in [*methods, *callbacks] if isinstance(callback, Method)]
        for method in found:
            arguments.check_arguments(method)  # before the data are prepared, which may take long
        delta = Path(str(self.argument(self.config_init, "ckpt_path")))
        if delta.is_file() and not found:
            methods = methods_of(read_delta(delta)[1])
        trainer = self.build_trainer(config, methods)
        if found or methods:
            checks.check_launcher(trainer)
        if self.tells:
            agreement.agree_to_begin(trainer)
        return trainer

    def build_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> L.Trainer:
        """Build the Trainer from its arguments and further callbacks."""
        # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/cli.py
        with building():
            return self._instantiate_trainer(config, callbacks)

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Build the optimizer of ``--optimizer`` when it is asked for: methods have added their parameters by then.

        LightningCLI builds it from ``model.parameters()`` before any callback runs, and the parameters that a callback
        adds are silently not trained: https://github.com/Lightning-AI/pytorch-lightning/issues/19110. That it does it
        here: https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/cli.py.
        """
        if self.argument(self.config_init, "optimizer"):
            build = partial(super()._add_configure_optimizers_method_to_model, subcommand)
            hook = partial(_build_optimizer, self.model, build)
            patches.Patches.of(self.model).patch(self.model, "configure_optimizers", hook)


def typed(task: Namespace | None, words: list[str]) -> dict[str, Any] | None:
    """Return the class of a task with those of its arguments that the command line names, or None: it names none."""
    given = {} if task is None else task.as_dict()
    values = given.get("init_args", {}) | given.get("dict_kwargs", {})
    found = (re.match(r"--model\.(?:init_args\.|dict_kwargs\.)?(\w+)", word) for word in words)
    named = {match[1]: values[match[1]] for match in found if match and match[1] in values}
    return {"class_path": given["class_path"], "dict_kwargs": named} if named else None


def check_checkpoint(path: str | None, command: str) -> None:
    """Check that ``--ckpt_path`` names a checkpoint, before Lightning asks it for arguments.

    Raises:
        TuningError: it names none.
    """
    if path is None or path in ("last", "hpc"):
        return
    if path in ("", "best"):
        raise TuningError(f"--ckpt_path {path!r} names no checkpoint to {command}: give the path of one, or null.")
    if is_file(path) and "state_dict" not in read_checkpoint(path):
        raise TuningError(f"{path} is no checkpoint of a Trainer: give the path of one.")
    if len(path) > 1000:
        raise TuningError(f"--ckpt_path {path[:60]!r}... is no path: give that of a checkpoint.")


@contextmanager
def building() -> Iterator[None]:
    """Say what Lightning objects to in a Trainer's arguments."""
    try:
        yield
    except TuningError:
        raise
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        said = lightning_words.said(error)
        raise TuningError(
            said or f"the Trainer cannot be built ({first_line(error)}): change what it was given."
        ) from error


def _reason(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return first_line(error)


def _build_optimizer(model: L.LightningModule, build: Any) -> Any:
    with patches.patched(model, "configure_optimizers"):
        try:
            build()
            return model.configure_optimizers()
        except (ValueError, TypeError, ZeroDivisionError) as error:
            said = f"the optimizer or its schedule cannot be built ({first_line(error)})"
            raise TuningError(f"{said}: change their arguments.") from error
