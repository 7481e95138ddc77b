"""``export`` and ``import``: deltas as adapters of Hugging Face PEFT, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_peft.commands.parsing import ToolParser
from lightning_peft.core import structure
from lightning_peft.core.delta import save_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.folding import merge
from lightning_peft.interop import folder as folders
from lightning_peft.interop import load, serving, to_peft, wrapped
from lightning_peft.interop.check import check_adapter
from lightning_peft.interop.facts import Facts
from lightning_peft.interop.programs import write_program
from lightning_peft.reports.parameters import count
from lightning_peft.training.rebuild import from_delta

_SHORT = {"--onnx": "--to=onnx", "--torch-export": "--to=torch"}
"""Flags -> the arguments that they stand for."""


def run_interchange(command: str, arguments: Sequence[str]) -> None:
    """Run one of the two with the arguments that follow it."""
    parser, function = (_export_parser(), _export) if command == "export" else (_import_parser(), _import)
    function(**parser.parse_args([_SHORT.get(word, word) for word in arguments]).as_dict())


def _export_parser() -> ToolParser:
    parser = ToolParser(prog="lightning-peft export", description="Write a delta as an adapter of PEFT.")
    parser.add_argument("file", type=str, help="a delta, as safetensors or checkpoint")
    parser.add_argument("folder", type=str, help="where to write the adapter: a new folder, or an older adapter")
    parser.add_argument(
        "--to",
        choices=("peft", "onnx", "torch"),
        default="peft",
        help="an adapter of PEFT; or the merged model as ONNX, or as a program of torch.export",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the logits of the adapter, loaded anew, with the delta's"
    )
    parser.add_argument(
        "--for", choices=serving.PROFILES, default=None, help="a server that must be able to serve it; checked first"
    )
    parser.add_argument(
        "--names",
        choices=("memory", "disk"),
        default="memory",
        help="module names of this transformers version, as PEFT wants them, or those of the model's checkpoints",
    )
    parser.add_argument(
        "--backbone", type=str | None, default=None, help="folder or hub id of the backbone; what the delta names"
    )
    parser.add_argument(
        "--metrics",
        type=dict[str, float] | None,
        default=None,
        help="scores for the model card, e.g. '{\"val_accuracy\": 0.91}'; the best one that the checkpoint has",
    )
    for name, what in (("data", "what it was trained on"), ("command", "the command that trained it")):
        parser.add_argument(
            f"--{name}", type=str | None, default=None, help=f"{what}, for the model card; what the checkpoint says"
        )
    return parser


def _import_parser() -> ToolParser:
    parser = ToolParser(prog="lightning-peft import", description="Write an adapter of PEFT as a delta.")
    parser.add_argument("source", type=str, help="an adapter folder, or a full checkpoint of a module wrapped by PEFT")
    parser.add_argument("file", type=str, help="where to write the delta: a .safetensors file")
    parser.add_argument(
        "--backbone", type=str | None, default=None, help="folder or hub id of the backbone; what the adapter names"
    )
    parser.add_argument(
        "--config", type=str | None, default=None, help="adapter_config.json of a checkpoint, which holds none"
    )
    parser.add_argument(
        "--allow_other_base", type=bool, default=False, help="load it on a base of another name or other weights"
    )
    return parser


def _export(file: str, folder: str, backbone: str | None, names: Any, data: str | None, **chosen: Any) -> None:
    facts = Facts.of(file)
    facts.data = data or facts.data
    facts.command = chosen["command"] or facts.command
    facts.metrics = chosen["metrics"] or facts.metrics
    model, console = from_delta(file, backbone), Console(soft_wrap=True)
    if chosen["to"] != "peft":
        folders.check_free(Path(folder))
        written, apart = write_program(merge(model), folder, chosen["to"])
        structure.config_of(model).save_pretrained(folder)  # with the names of the classes
        said = "not compared, since onnxruntime is not installed" if apart is None else f"apart by {apart:.1g}"
        console.print(f"{type(model).__name__} written to {written}; logits {said}.", highlight=False)
        return
    written = to_peft(model, folder, names, chosen["for"], facts)
    adapter = folders.read_adapter(written)
    if chosen["check"]:
        for reader, difference in check_adapter(model, written, backbone).items():
            console.print(f"{reader} computes the same logits from it (apart by {difference:.1g}).", highlight=False)
    held = f"{len(adapter.tensors)} tensors, {count(adapter.tensors.values()):,} values"
    console.print(
        f"{adapter.config['peft_type']} adapter written to {folder}: {held}.",
        highlight=False,
    )
    if chosen["for"]:
        console.print(f"vLLM serves it with {serving.flags(adapter)}.", highlight=False)


def _import(source: str, file: str, backbone: str | None, config: str | None, allow_other_base: bool) -> None:
    if Path(file).suffix != ".safetensors":
        raise TuningError(f"{file} is to be a delta: give it the suffix .safetensors.")
    if Path(source).is_dir():
        adapter = folders.read_adapter(Path(source))
        model = load.load_base(adapter, backbone)
        method = load.apply_adapter(model, adapter, allow_other_base)
    elif config is None:
        raise TuningError(
            f"{source} is no adapter folder, and a full checkpoint does not say alpha and the like: give --config."
        )
    else:
        base, adapter = wrapped.read_wrapped(source, config)
        model = load.load_base(adapter, backbone)
        method = wrapped.load_wrapped(model, base, adapter)
    save_delta(model, file)
    Console(soft_wrap=True).print(
        f"{type(method).__name__} of {type(model).__name__} written to {file}: lightning-peft info {file} shows it.",
        highlight=False,
    )
