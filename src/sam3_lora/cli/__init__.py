"""The command line. Nothing heavy is imported before a verb runs, and only :func:`main` prints errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sam3_lora.cli import (
    components,
    data,
    demo,
    doctor,
    estimate,
    evaluate,
    plan,
    predict,
    presets,
    suggest,
    train,
    verify,
)
from sam3_lora.cli.arguments import Parser
from sam3_lora.errors import RunStopped, Sam3LoraError, did_you_mean

_VERBS = {
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "demo": demo,
    "presets": presets,
    "components": components,
    "plan": plan,
    "estimate": estimate,
    "suggest": suggest,
    "data": data,
    "verify": verify,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 128 + its number
    for another signal after which a run saved and stopped."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else list(argv))
        with _quiet_imports():
            arguments.run(arguments)
        sys.stdout.flush()
    except SystemExit as exit_of_argparse:
        return int(exit_of_argparse.code or 0)
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except Sam3LoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python complains when it flushes
        return 141
    return 0


def build_parser() -> Parser:
    """Return the parser of all verbs; the parsed arguments hold the verb's function as ``run``."""
    parser = Parser(prog="sam3-lora", description="Fine-tune SAM3 with LoRA on your own images.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, module in _VERBS.items():
        module.add_options(verbs.add_parser(name, **module.HELP))
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    words = [word for word in argv if not word.startswith("-")]
    known: Mapping[str, Any] = _VERBS
    for word in words:
        if word not in known:
            parser.error(f"unknown command {word!r}{did_you_mean(word, known)}")
        if not (known := getattr(known[word], "VERBS", {})):
            break
    arguments, unknown = parser.parse_known_args(argv)
    options = [word for word in unknown if word.startswith("-")]
    if options or (unknown and not hasattr(arguments, "overrides")):
        arguments.parser.refuse((options or unknown)[0])
    if unknown:  # argparse takes positional words from one place between the options only
        arguments.overrides = [*arguments.overrides, *unknown]
    return arguments


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Hide what torch, sam3 and packages that PEFT looks for warn about when they are imported; -W shows it again."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=r"(torch|sam3)\.")
            for name in (
                "torch.utils._pytree",
                "bitsandbytes",
            ):  # torchao and bitsandbytes, where they are installed
                logging.getLogger(name).setLevel(logging.ERROR)
        yield


class _Version(argparse.Action):
    """Looks the version up only when asked: that takes longer than all the rest of the parser."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"sam3-lora {version('sam3-lora')}")
        parser.exit()
