"""What all verbs of the command line share: Ctrl-C, errors in one line, exit codes."""

import gc
import logging
import sys
from typing import Any

import typer
from typer.core import TyperGroup

import wanrt
from wanrt.clock import Clock, process_began
from wanrt.errors import WanrtError


class _Verbs(TyperGroup):
    """Ctrl-C in any verb is one line and exit code 130; typer's versions do not agree on it."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("wanrt: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


def new_app() -> typer.Typer:
    """A command line without verbs."""
    return typer.Typer(
        cls=_Verbs,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help=wanrt.__doc__,
    )


def run(app: typer.Typer, args: list[str] | None) -> None:
    """Run a command line and exit with its code; a user's mistake never shows a traceback.

    args: those of the process where left out; then its clock began with the process.
    """
    clock = Clock(process_began() if args is None else None)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="wanrt: %(message)s")
    try:
        app(args, prog_name="wanrt", obj=clock)
    except WanrtError as error:
        print("wanrt:", "\\n".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        if args is None:  # the process ends: not to search all of PyTorch for cycles saves 0.3 s
            gc.freeze()
