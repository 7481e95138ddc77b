"""The console script: dispatch, help and errors. Heavy imports wait until a command needs them."""

import os
import signal
import sys

from lightning_peft.commands import fail, imports, is_misfit, lightning_words, refusal, sentence
from lightning_peft.training import signals, slurm

_HELP = """\
usage: lightning-peft COMMAND [ARGUMENTS]

Tune a large frozen model with PyTorch Lightning and keep only the delta.

train and use:
  fit         train a method on a task: lightning-peft fit --config quickstart
  validate    score a delta on the validation split
  test        score a delta on the test split:
              test --config CONFIG --ckpt_path DELTA
  predict     write what a tuned model says of new rows:
              predict --config CONFIG --ckpt_path DELTA, or of texts:
              predict --ckpt_path DELTA --text "a text" "another"
  chat        talk to a tuned model in the terminal: lightning-peft chat DELTA
  check       look before GPU hours: a few steps, and what passes:
              check --config CONFIG, or without weights and data, for a model
              that does not fit here: check --config CONFIG --meta true
  search      find a template for a prompted task:
              search --config prompted_classification --model.model MODEL
              --how edits --budget 40 --out prompt.yaml
  compare     methods on your own rows, each at its best learning rate, in one
              table: compare --config CONFIG --methods LoRA BitFit --seeds 3
  submit      write a SLURM script for a fit and submit it:
              submit --config CONFIG --nodes 2 --gpus 8 [--dry-run]

look and convert:
  configs     list the configurations that come with it;
              configs show NAME, configs copy NAME
  methods     list the methods with what they train;
              methods NAME: the arguments of one
  templates   list the wordings of a task: lightning-peft templates FILE.yaml
  info        show what a delta file holds: lightning-peft info FILE
  combine     make one delta of several:
              combine A=0.7 B=0.3 OUT --how linear
  merge       fold a delta into its backbone: lightning-peft merge FILE FOLDER
  plot        draw pictures of results: lightning-peft plot results.csv FOLDER
  export      write a delta as an adapter of Hugging Face PEFT:
              export FILE FOLDER --check, or --for vllm;
              or the merged model: --onnx, --torch-export
  push        put an adapter or a merged model on a hub:
              push FOLDER OWNER/NAME
  import      write an adapter of Hugging Face PEFT as a delta:
              import FOLDER FILE
  completion  let a shell complete words:
              eval "$(lightning-peft completion bash)", or zsh

any command:
  --help      show the arguments of a command; of fit and its like,
              --help all shows every one
  --debug     show the traceback of an error
  --version   show the version

Files of arguments add up, later ones win: --config quickstart --config bitfit
Methods and their arguments work from the shell too: --method LoRA --method.r 4
"""
_TRAINER = ("fit", "validate", "test", "predict", "check", "search")
_SUBMIT, _COMPARE, _COMPLETION = "submit", "compare", "completion"
_TOOLS = ("chat", "methods", "info", "combine", "merge", "plot", "export", "push", "import", "templates", "configs")
_COMMANDS = (*_TRAINER, *_TOOLS, _SUBMIT, _COMPARE, _COMPLETION)
_DEBUG = "LIGHTNING_PEFT_DEBUG"


def main() -> None:
    """Run one command; a user's mistake ends in one sentence and exit code 2."""
    if "--debug" in sys.argv:  # processes that a strategy starts read it from the environment
        sys.argv.remove("--debug")
        os.environ[_DEBUG] = "1"
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(_HELP, end="")
    elif command == "--version":
        from lightning_peft import __version__

        print(f"lightning-peft {__version__}")
    elif command in _COMMANDS:
        _run(command)
    else:
        fail(f"{command!r} is no command{_nearest(command)}: see lightning-peft --help.")


def _run(command: str) -> None:
    if os.getcwd() not in sys.path:  # a console script does not find the user's own modules
        sys.path.insert(0, os.getcwd())
    try:
        if command in (_SUBMIT, _COMPARE, _COMPLETION):
            _run_apart(command, sys.argv[2:])
        elif command in _TRAINER and _shows_short_help(command):
            pass
        elif command == "predict" and any(word.partition("=")[0] == "--text" for word in sys.argv[2:]):
            with imports():
                from lightning_peft.commands.texts import predict
            predict(sys.argv[2:])
        elif command in _TRAINER:
            slurm.check_environment()
            if command == "fit" and (slurm.is_job() or slurm.is_elastic()):
                signals.install_handlers()  # a signal during the imports below would kill the process
            with imports():
                from lightning_peft.commands.running import run
            run()
        else:
            from lightning_peft.commands.tools import run_tool

            run_tool(command, sys.argv[2:])
    except Exception as error:
        if os.environ.get(_DEBUG):
            raise
        where, said = slurm.rank_and_node(), sentence(error)
        fail(f"{where}: {said}" if where and not said.startswith("rank ") else said, 2 if _is_mistake(error) else 1)
    except SystemExit as ended:
        # Lightning ends so on SIGTERM, and half-trained weights are no success.
        if type(ended).__name__ == "SIGTERMException":
            raise SystemExit(128 + signal.SIGTERM) from None
        raise


def _run_apart(command: str, words: list[str]) -> None:
    """Run one of the commands that are neither a Trainer's nor of one file."""
    if command == _SUBMIT:
        from lightning_peft.commands.submit import submit

        submit(words)
    elif command == _COMPARE:
        with imports():
            from lightning_peft.commands.comparing import compare
        compare(words)
    else:
        from lightning_peft.commands.completing import completion

        print(completion((*words, "bash")[0], _COMMANDS), end="")


def _shows_short_help(command: str) -> bool:
    words = sys.argv[2:]
    if not {"-h", "--help"} & {*words}:
        return False
    from lightning_peft.commands import short_help

    asked = short_help.is_asked(words)
    if asked:
        short_help.show(command, words)
    return asked


def _is_mistake(error: Exception) -> bool:
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # without it, it has raised nothing
    return (
        refusal(error) is not None
        or is_misfit(error)
        or lightning_words.said(error) is not None
        or isinstance(
            error,
            (ValueError, OSError) if lightning is None else (ValueError, OSError, lightning.MisconfigurationException),
        )
    )


def _nearest(command: str) -> str:
    import difflib

    close = difflib.get_close_matches(command, _COMMANDS, n=1)
    return f", did you mean {close[0]!r}" if close else ""
