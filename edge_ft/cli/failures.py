"""How a command ends: one sentence and an exit code for every error."""

import io
import os
import sys

import cyclopts

from edge_ft.cli.commands import app
from edge_ft.errors import EdgeFTError, Interrupted, UsageError, WillNotFit, did_you_mean, one_line
from edge_ft.files import disk_full, out_of_memory
from edge_ft.stopping import end_process, watched
from edge_ft.utf8 import check_characters

__all__ = ["main"]

NO_MEMORY = (
    "there is not enough memory for this command: end other programs or take a smaller model; tune takes less with "
    "--memory low, a smaller --batch-size or a smaller --max-length"
)

ELSEWHERE = {
    **{"train": "tune", "finetune": "tune", "fine-tune": "tune", "sft": "tune", "generate": "run", "chat": "run"},
    **{"infer": "run", "predict": "run", "convert": "export", "quantize": "export", "evaluate": "eval"},
    **{"test": "eval", "benchmark": "bench", "lr": "--learning-rate", "output-dir": "--out", "output": "--out"},
    **{"dataset": "--data", "model-name-or-path": "--model", "num-train-epochs": "--epochs", "lora-r": "--rank"},
    **{"r": "--rank", "lora-alpha": "--alpha", "lora-rank": "--rank", "max-seq-length": "--max-length"},
    **{"per-device-train-batch-size": "--batch-size", "max-tokens": "--max-new-tokens", "adapter-path": "--adapter"},
}
"""Commands and options by the names that they have in other tools."""

LONGEST_MESSAGE = 400
"""Characters of a message about a command line."""


def main() -> None:
    """Run the command line and exit with a code of `edge_ft.errors`."""
    with watched(end_process):
        for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)  # a console that cannot show a character gets its number
        _main("--debug" in sys.argv)


def _main(debug: bool) -> None:
    try:
        for argument in sys.argv[1:]:
            check_characters(argument, f"the argument {argument!r} is not UTF-8: it")
        app.meta(sys.argv[1:], exit_on_error=False, print_error=False)
    except EdgeFTError as error:
        if out_of_memory(error) and not isinstance(error, WillNotFit):  # whatever was being done then
            _fail(NO_MEMORY, WillNotFit.exit_code, debug)
        _fail(str(error), error.exit_code, debug)
    except cyclopts.CycloptsError as error:
        _fail(_explain(error), UsageError.exit_code, debug)
    except KeyboardInterrupt:
        _fail("stopped; no file was written: the same command starts again", Interrupted.exit_code, debug)
    except BrokenPipeError:
        # The reader of our output is gone; stdout must not be flushed into it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # noqa: BLE001 - whatever is left is a bug, and has its own code
        if out_of_memory(error):
            _fail(NO_MEMORY, WillNotFit.exit_code, debug)
        if disk_full(error):
            where = getattr(error, "filename", None) or error
            _fail(f"the disk is full: {where}; free some space and run again", WillNotFit.exit_code, debug)
        if isinstance(error, OSError):
            why = (error.strerror or str(error)).lower()
            where = (
                f"{error.filename} cannot be read or written" if error.filename else "a file cannot be read or written"
            )
            _fail(f"{where}: {why}; name another place, or mend this one", UsageError.exit_code, debug)
        message = f"internal error: {type(error).__name__}: {error} (--debug shows the traceback)"
        _fail(message, EdgeFTError.exit_code, debug)


def _explain(error: cyclopts.CycloptsError) -> str:
    """Return the message of cyclopts, or a plainer one about a missing option or an unknown key of --config."""
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None:
        _, similar, flags = str(error).partition(" Did you mean ")
        if error.keyword is None and not error.argument.tokens:
            command = " ".join(("edge-ft", *(error.command_chain or ())))
            return f"{error.argument.name} is required: see {command} --help.{similar}{flags}"
    if isinstance(error, cyclopts.UnknownOptionError) and error.token.source != "cli":
        key = (error.token.keyword or error.token.value).strip("[]")
        known = [name[2:].replace("-", "_") for argument in error.argument_collection for name in argument.names]
        return f"{error.token.source}: unknown setting '{key}'{did_you_mean(key, known)}"
    if isinstance(error, cyclopts.UnknownOptionError | cyclopts.UnknownCommandError):
        if isinstance(error, cyclopts.UnknownOptionError):
            typed = error.token.keyword or ""
        else:
            typed = (error.unused_tokens or [""])[0]
        if name := ELSEWHERE.get(typed.lstrip("-").replace("_", "-")):
            command = " ".join(("edge-ft", *(error.command_chain or ())))
            return f"{typed} is called {name} here: see {command} --help"
    text = str(error)  # with what was typed, which may be a whole document
    shown = text.encode("ascii", "backslashreplace").decode()
    return text if len(shown) <= LONGEST_MESSAGE else f"{shown[:LONGEST_MESSAGE]} ..."


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"edge-ft: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
