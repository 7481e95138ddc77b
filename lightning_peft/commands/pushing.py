"""``push``: an adapter, or a merged model, goes from its folder to a repository of a hub."""

import json
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from rich.console import Console

from lightning_peft.commands.parsing import ToolParser
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic, first_line
from lightning_peft.interop import adapter_config

_MODEL = "config.json"


def run_push(arguments: Sequence[str]) -> None:
    """Run the command with the arguments that follow it."""
    parser = ToolParser(prog="lightning-peft push", description="Put an exported adapter or a merged model on a hub.")
    parser.add_argument("folder", type=str, help="what export or merge has written")
    parser.add_argument("repository", type=str, help="owner/name; it is made if it is not there")
    parser.add_argument(
        "--base", type=str | None, default=None, help="hub id of the base, where the adapter has a path"
    )
    parser.add_argument("--private", type=bool, default=True, help="whether a new repository is for its owner alone")
    given = parser.parse_args(list(arguments))
    address = push(given.folder, given.repository, given.base, given.private)
    Console(soft_wrap=True).print(f"{given.folder} is at {address}", highlight=False)


def push(folder: str | Path, repository: str, base: str | None = None, private: bool = True) -> str:
    """Put what `export` or `merge` has written into a repository of a hub, and return its address.

    Args:
        folder: the adapter, or the model.
        repository: owner/name; it is made if it is not there.
        base: hub id of the adapter's base, in place of a path of this machine.
        private: whether a new repository is for its owner alone.

    Raises:
        TuningError: there is nothing to put there, others could not load it, or the hub refuses.
    """
    folder = Path(folder)
    config = folder / adapter_config.FILE
    if config.is_file():
        _name_base(config, base)
    elif not (folder / _MODEL).is_file():
        raise TuningError(f"{folder} holds no adapter and no model: give a folder that export or merge has written.")
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload by lightning-peft"))
    except LocalTokenNotFoundError:
        raise TuningError("the hub does not know who you are: run hf auth login, or set HF_TOKEN.") from None
    except OfflineModeIsEnabled:
        raise TuningError("HF_HUB_OFFLINE is set, and nothing is sent anywhere: unset it to push.") from None
    except HFValidationError:
        raise TuningError(f"{repository!r} is no name of a repository: write it as owner/name.") from None
    except (HfHubHTTPError, OSError) as error:
        raise TuningError(
            f"the hub does not take {repository} ({first_line(error)[:200]}): see that the name is yours, and that hf "
            "auth whoami knows you."
        ) from error


def _name_base(config: Path, base: str | None) -> None:
    """Write by which name others load the base of an adapter.

    Raises:
        TuningError: it is known by a path of this machine alone.
    """
    known = json.loads(config.read_text(encoding="utf-8"))
    name = base or known.get("base_model_name_or_path")
    if name and (Path(name).is_absolute() or (base is None and Path(name).is_dir())):
        raise TuningError(f"the base of {config.parent} is {name}, which nobody else has: give --base, its hub id.")
    if name != known.get("base_model_name_or_path"):
        with atomic(config) as temporary:
            temporary.write_text(adapter_config.dumps(known | {"base_model_name_or_path": name}), encoding="utf-8")
