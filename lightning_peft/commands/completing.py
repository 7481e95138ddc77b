"""``completion``: prints the lines by which a shell completes commands, configurations, methods, tasks and data.

The words are those of the installed version, so print them anew after an update. No package is needed for it, and
pressing the key starts no Python.
"""

from collections.abc import Iterable, Sequence

from lightning_peft import data, tasks
from lightning_peft.commands.short_help import TRAINER
from lightning_peft.core import shipped
from lightning_peft.core.errors import TuningError
from lightning_peft.methods import every_method

_BASH = """\
_lightning_peft() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" at=$((COMP_CWORD-1)) before words=""
    [ "$word" = "=" ] && word="" at=$((at+1))
    [ "${{COMP_WORDS[at]}}" = "=" ] && at=$((at-1))
    before="${{COMP_WORDS[at]}}"
    while [[ $at -gt 1 && "${{COMP_WORDS[at]}}" != -* ]]; do at=$((at-1)); done
    [[ "${{COMP_WORDS[at]}}" == --methods && "$word" != -* ]] && before=--methods
    if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; else
        case "$before" in
{cases}
            *) [[ "$word" == -* ]] && words="{options}" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _lightning_peft lightning-peft
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(shell: str, commands: Sequence[str]) -> str:
    """Return the lines for a shell.

    Args:
        shell: bash or zsh.
        commands: what comes behind the name of the program.

    Raises:
        TuningError: it is another shell.
    """
    if shell not in ("bash", "zsh"):
        raise TuningError(f"completion {shell}: there are lines for bash and for zsh.")
    known: dict[str, Iterable[str]] = {
        "--config|-c|show|copy": shipped.configurations(),
        "configs": ("show", "copy"),
        "completion": ("bash", "zsh"),
        "--method|--methods|methods": every_method(),
        "--model": tasks.__all__,
        "--data": data.__all__,
    }
    cases = "\n".join(f'            {option}) words="{" ".join(names)}" ;;' for option, names in known.items())
    options = ["--config", "--model", "--model.model", "--data", "--data.train", "--method", "--ckpt_path", "--help"]
    options += [f"--trainer.{name}" for name in TRAINER]
    lines = _BASH.format(commands=" ".join(commands), cases=cases, options=" ".join(options))
    return lines if shell == "bash" else _ZSH + lines
