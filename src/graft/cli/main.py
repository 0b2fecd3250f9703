"""The `graft` command: one verb per file, errors without tracebacks, exit codes that scripts can rely on.

Exit codes: 0 done, 2 the user's mistake, 1 ours, 3 stopped on request with the state saved.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from graft import __version__
from graft.cli import (
    answer,
    chat,
    compose,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    inspect,
    merge,
    quantize,
    train,
)
from graft.errors import GraftError, StopRequested
from graft.training.stopping import stop_at_once

app = typer.Typer(
    name="graft",
    help="Fine-tune a language model with LoRA or QLoRA on one ordinary machine, and use what comes of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", epilog="Example: graft demo")(demo.demo)
app.command("train", epilog="Example: graft train --data train.jsonl --method qlora --out runs/first")(
    train.train
)
app.command(
    "evaluate", epilog="Example: graft evaluate builtin --adapter runs/first/adapter --data eval.jsonl"
)(evaluate.evaluate)
app.command("generate", epilog='Example: graft generate builtin --prompt "Sort: 3 1 2"')(generate.generate)
app.command("chat", epilog="Example: graft chat builtin --adapter runs/first/adapter")(chat.chat)
app.command("inspect", epilog="Example: graft inspect runs/first --base MODEL --page adapter.html")(
    inspect.inspect
)
app.command("merge", epilog="Example: graft merge runs/first/adapter --out merged/")(merge.merge)
app.command("compose", epilog="Example: graft compose cat runs/a runs/b --weights 0.7,0.3 --out mixed/")(
    compose.compose
)
app.command("quantize", epilog="Example: graft quantize builtin --quant-type nf4 --out base-nf4/")(
    quantize.quantize
)
app.add_typer(data.app, name="data")
app.command("doctor", epilog="Example: graft doctor --json")(doctor.doctor)

# typer carries its own copy of click in some versions; its public BadParameter leads to the right classes.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def _show_version(wanted: bool) -> None:
    if wanted:
        answer.line(f"graft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Tokenizers' threads and forked workers do not mix; graft tokenizes in batches anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    code = run(sys.argv[1:])
    # The answer is given: a signal now would only change the exit code that belongs to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code.

    Args:
        arguments: The words after `graft`.
    """
    debug = "--debug" in arguments
    as_json = "--json" in arguments
    words = [word for word in arguments if word != "--debug"]
    answer.begin()
    try:
        with stop_at_once("before it was done; nothing is half written", "start it again"):
            result = app(train.with_port(words), standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except StopRequested as error:
        return 0 if answer.was_given() else _answered(error, as_json)
    except Exception as error:  # noqa: BLE001 - the edge of the process: nothing passes without an answer
        if debug:
            traceback.print_exc()
        return _answered(error, as_json)


def _answered(error: Exception, as_json: bool) -> int:
    """Tell an error; returns the exit code for it."""
    if isinstance(error, GraftError):
        answer.failure(error, as_json)
        return error.exit_code
    if isinstance(error, USAGE_ERROR):
        answer.usage_failure(error, as_json)
        return 2
    answer.internal_failure(error, as_json)
    return 1


if __name__ == "__main__":
    main()
