"""The command line: flags, progress and exit codes; each command is one call of the Python API."""

import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from edge_ft import __version__
from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.config import (
    TEXT_TASKS,
    BenchConfig,
    EvalConfig,
    ExportConfig,
    Group,
    PlanConfig,
    RunConfig,
    TuneConfig,
    VerifyConfig,
    as_plain,
    preset_file,
    unescape,
    without_retired,
)
from edge_ft.errors import (
    BudgetFailed,
    EdgeFTError,
    Interrupted,
    MissingExtra,
    UsageError,
    WillNotFit,
    did_you_mean,
    one_line,
    require,
)
from edge_ft.files import cache_folder, disk_full, out_of_memory, write_json, write_text
from edge_ft.progress import Lines, Progress, ProgressBars, Silent
from edge_ft.stopping import end_process, watched
from edge_ft.system import Available, default_threads, device_memory, total_memory_bytes, usable_cpus
from edge_ft.utf8 import check_characters, lines_of, read_utf8

__all__ = ["main"]

FLAT = Parameter(name="*", negative_iterable=())
LIBRARIES = (
    *("onnxruntime", "numpy", "tokenizers", "safetensors", "torch", "transformers", "peft", "bitsandbytes", "onnx"),
    *("accelerate", "datasets", "gguf", "openvino", "onnxruntime-genai", "ctranslate2", "xllamacpp"),
)
"""What `--version -v` lists: the libraries on which results and speed depend."""

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
HEADINGS = {group: cyclopts.Group(group.value, sort_key=at) for at, group in enumerate(Group)}


def _default_text(value: Any) -> Any:
    """A default as --help shows it: as one would type it, and not at all where the flag is simply left out."""
    if value is False or value == ():
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


app = App(
    name="edge-ft",
    version_flags=(),  # the command `version` below takes -v
    help="Fine-tune a small model with LoRA on 4-bit weights, export it to ONNX, run it and measure it.",
    default_parameter=Parameter(negative_iterable=(), show_default=_default_text),
    suppress_keyboard_interrupt=False,  # `main` reports what was saved
)
app.meta.suppress_keyboard_interrupt = False


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of every command."""

    json: Annotated[str | None, Parameter(group=HEADINGS[Group.OUTPUT], allow_leading_hyphen=True)] = None
    """Write the result as JSON to this file; - is stdout, which then gets nothing else."""
    quiet: Annotated[bool, Parameter(group=HEADINGS[Group.OUTPUT])] = False
    """Do not report progress."""
    debug: Annotated[bool, Parameter(group=HEADINGS[Group.OUTPUT])] = False
    """Show the traceback of an error."""


def _group_options(settings: type) -> None:
    """Annotate the fields of a dataclass for cyclopts, which `edge_ft.config` does not import, with their headings."""
    for kind in settings.__mro__:
        for name, hint in getattr(kind, "__annotations__", {}).items():
            for group in getattr(hint, "__metadata__", ()):
                if isinstance(group, Group):
                    kind.__annotations__[name] = Annotated[hint, Parameter(group=HEADINGS[group])]


for _settings in (TuneConfig, PlanConfig, ExportConfig, VerifyConfig, EvalConfig, RunConfig, BenchConfig):
    _group_options(_settings)


@app.command
def tune(
    *,
    settings: Annotated[TuneConfig, Parameter(name="*", negative_iterable=(), consume_multiple=True)],
    print_config: Annotated[bool, Parameter(group=HEADINGS[Group.FILES])] = False,
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Train a LoRA adapter on a frozen base model (4-bit by default) and write a run folder.

    Args:
        print_config: Print the settings as YAML, in the format of --config, and stop.
    """
    if print_config:
        import yaml

        print(yaml.safe_dump(as_plain(settings), sort_keys=False), end="")
        return
    from edge_ft.tune import tune as run_tune

    was_finished = settings.resume and RunFolder(settings.out).report_path.is_file()
    with _progress(output) as progress:
        run = run_tune(settings, progress)
    if was_finished and output.quiet:  # a script must see that its settings had no effect
        from edge_ft.tune.checkpoint import finished_note

        print(f"edge-ft: {finished_note(settings)}", file=sys.stderr)
    report = run.report()
    nll, unit = report["nll"], _unit(report["task"])
    table: list[tuple[str, ...]] = [
        ("", "base", "tuned"),
        (f"validation loss ({unit})", _figure(nll["base"]), _figure(nll["best"])),
    ]
    if nll["test"] is not None:
        table.append((f"test loss ({unit})", _figure(nll["test_base"]), _figure(nll["test"])))
    for name, values in report["metrics"].items():
        split = "test" if "test" in values else "validation"
        table.append((f"{split} {name} [95%]", _interval(values[f"{split}_base"]), _interval(values[split])))
    if answers := report["answers"]:
        heading = f"{answers['rows']} {answers['split']} answers, up to {answers['max_new_tokens']} tokens:"
        figures = (
            (name, _interval(found["base"]), _interval(found["tuned"])) for name, found in answers["metrics"].items()
        )
        table += [(heading, "", ""), *figures]
    ships = f"--onto {settings.model}" if kind_of(settings.model) == "bundle" else "--out BUNDLE"
    advice = f"{run.page_path} shows the curves; next: edge-ft export {run.path} {ships}"
    if report["best_step"] == 0:
        advice = (
            "nothing was learned: no step lowered the validation loss. Try more rows, more --epochs or another "
            "--learning-rate"
        )
    _show(
        output,
        report,
        table,
        f"{run.path}: best at step {report['best_step']} of {report['steps']}, "
        f"{report['seconds']:.0f} s, {report['tokens_per_second']:.0f} tok/s, "
        f"peak {report['peak_rss_bytes'] / 1e6:.0f} MB\n" + "\n".join([*_warnings(report), advice]),
    )


@app.command
def plan(
    *,
    settings: Annotated[PlanConfig, Parameter(name="*", negative_iterable=(), consume_multiple=True)],
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Estimate the time, memory and disk of a training, and check its rows; writes nothing."""
    from edge_ft.tune.plan import plan as run_plan
    from edge_ft.tune.units import duration, megabytes

    with _progress(output) as progress:
        result = run_plan(settings, progress)
    table: list[tuple[str, ...]] = [("layers", "memory mode", "trained", "time", "memory", "disk", "")]
    for choice in result["choices"]:
        mark = "recommended" if choice == result["recommended"] else "" if choice["fits"] else "does not fit"
        figures = (duration(choice["seconds"]), megabytes(choice["peak_rss_bytes"]), megabytes(choice["disk_bytes"]))
        trained = f"{choice['trainable_parameters'] / 1e6:.2f} M"
        if choice["peak_device_bytes"] is not None:
            figures = (*figures[:1], f"{figures[1]}, GPU {megabytes(choice['peak_device_bytes'])}", figures[2])
        table.append((choice["layers"], choice["memory"], trained, *figures, mark))
    tokens, rows = result["tokens"], ", ".join(f"{count} {name}" for name, count in result["rows"].items())
    lines = [
        f"{rows} rows; a train row has {tokens['p50']} tokens (p50), {tokens['p95']} (p95), {tokens['max']} (max), "
        f"all have {tokens['total']}; {result['steps']} steps",
        *_warnings(result),
        f"recommended: {result['reason']}",
        *result.get("shown", []),
    ]
    _show(output, result, table, "\n".join(lines))


@app.command
def export(
    source: str,
    /,
    *,
    settings: Annotated[ExportConfig | None, FLAT] = None,
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Export a run, or a model with or without an adapter, to an ONNX bundle or GGUF, and check what the export lost.

    Args:
        source: A run folder, or a model (hub id, checkpoint folder or GGUF file).
    """
    from edge_ft.export import GgufExport, export_gguf
    from edge_ft.export import export as run_export

    settings = settings or ExportConfig()  # which says what is missing
    with _progress(output) as progress:
        bundle: Bundle | GgufExport
        if settings.format == "gguf":
            bundle = export_gguf(source, settings, progress)
        else:
            bundle = run_export(source, settings, progress)
    found = bundle.manifest["verification"]
    columns = ("base", "trained", "shipped")
    table: list[tuple[str, ...]] = [("", *columns)]
    for name, part in (("validation", found), ("test", found["test"])):
        if part is not None and part["rows"]:
            table.append((f"{name} loss ({_unit(bundle.task)})", *(_figure(part["nll"][key]) for key in columns)))
            table += [
                (f"{name} {metric} [95%]", *(_interval(values.get(key)) for key in columns))
                for metric, values in part["metrics"].items()
            ]
    lines = f"{bundle.path}: {bundle.size_bytes / 1e6:.1f} MB, lane {bundle.manifest['lane']}"
    if "cosine" in found:
        lines += ", cosine of the vectors with those as trained " + _interval(found["cosine"])
    elif found["quantization_tax"] is not None:
        low, high = found["tax_interval"]
        known = f"[{low:+.4f}, {high:+.4f}] on {found['rows']} rows"
        lines += f", quantization tax {found['quantization_tax']:+.4f} {_unit(bundle.task)} {known}"
        lines += f", retained gain {found['retained_gain']:.1%}" if found["retained_gain"] is not None else ""
    elif not found["rows"]:
        lines += ", not scored (no --data)"
    _show(output, bundle.manifest, table if len(table) > 1 else [], lines)


@app.command
def verify(
    bundle: Path,
    /,
    *,
    settings: Annotated[VerifyConfig, FLAT] = VerifyConfig(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Check the files and graphs of a bundle on this machine, and its scores on --data; needs no torch.

    The bundle reads rows as in its training, unless options of the group "Rows" are given.

    Args:
        bundle: A bundle folder.
    """
    from edge_ft.evaluate.verify import verify as run_verify

    with _progress(output) as progress:
        result = run_verify(bundle, settings, progress)
    lines = f"{bundle}: {result['files']} files as exported, probe texts score the same here"
    if "nll" in result:
        lines += f"; {result['rows']} rows with a loss of {result['nll']:.4f}"
    _show(output, result, [], lines)


@app.command(name="eval")
def evaluate(
    source: str, /, *, settings: Annotated[EvalConfig, FLAT], output: Annotated[Output, FLAT] = Output()
) -> None:
    """Measure loss and task metrics of a run, a bundle or a model on rows.

    A run or bundle reads rows as in its training, unless options of the group "Rows" are given.

    Args:
        source: A run folder, a bundle, or a model (hub id, checkpoint folder or GGUF file).
    """
    from edge_ft.evaluate import evaluate as run_evaluate

    with _progress(output) as progress:
        result = run_evaluate(source, settings, progress)
    table: list[tuple[str, ...]] = [
        ("metric", "value [95%]"),
        (f"loss ({_unit(result['task'])})", _figure(result["nll"])),
        ("perplexity", _figure(result["perplexity"])),
    ]
    table += [(name, _interval(value)) for name, value in result["metrics"].items()]
    left_out = (
        f" ({result['dropped']} without an answer, {result['cut']} cut)" if result["dropped"] or result["cut"] else ""
    )
    lines = [f"{source}: {result['rows']} rows{left_out}, {result['seconds']:.0f} s", *_warnings(result)]
    _show(output, result, table, "\n".join(lines))


@app.command
def run(
    bundle: Path,
    prompt: str | None = None,
    /,
    *,
    interactive: Annotated[bool, Parameter(alias="-i", group=HEADINGS[Group.INPUT])] = False,
    jsonl: Annotated[Path | None, Parameter(group=HEADINGS[Group.INPUT])] = None,
    out: Annotated[Path | None, Parameter(group=HEADINGS[Group.INPUT])] = None,
    settings: Annotated[RunConfig, FLAT] = RunConfig(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    r"""Generate or classify with a bundle; needs no torch.

    In PROMPT, --text-pair, --system, --stop and --labels, as in the templates of other commands, \n is a newline, \t a
    tab, and a doubled backslash is one backslash. Standard input and files are used as they are.

    Args:
        bundle: A bundle folder.
        prompt: The prompt, or the text to classify; default: read from stdin.
        interactive: Chat on the terminal.
        jsonl: File with rows to answer; needs --out.
        out: File to write for --jsonl: one line per row, in the same order.

    Raises:
        UsageError: --jsonl without --out, or the reverse; or no prompt.
    """
    from edge_ft.runtime.run import run_chat, run_file, run_text

    settings = replace(
        settings,
        text_pair=None if settings.text_pair is None else unescape(settings.text_pair),
        system=None if settings.system is None else unescape(settings.system),
        stop=tuple(map(unescape, settings.stop)),
        labels=tuple(map(unescape, settings.labels)),
    )
    if (jsonl is None) != (out is None):
        raise UsageError("--jsonl IN and --out OUT go together")
    if jsonl is not None and out is not None:
        with _progress(output) as progress:
            summary = run_file(bundle, jsonl, out, settings, progress)
        failed = f", {summary['failed']} of them without an answer (their lines say why)" if summary["failed"] else ""
        _show(output, summary, [], f"{out}: {summary['rows']} rows{failed}, {summary['seconds']:.1f} s")
    elif interactive:
        run_chat(bundle, settings, lines_of(sys.stdin), sys.stdout)
    else:
        text = unescape(prompt) if prompt is not None else _read_prompt()
        result = run_text(bundle, text, settings, None if output.json == "-" else sys.stdout)
        if dropped := result.get("dropped_tokens"):
            print(f"{dropped} tokens did not fit the model's limit and were dropped", file=sys.stderr)
        if output.json is not None:
            _write_json(output.json, result)


def _read_prompt() -> str:
    """Read standard input, without the newline with which echo and editors end a text.

    Returns:
        The prompt.

    Raises:
        UsageError: it is empty.
    """
    if sys.stdin.isatty():
        print("type the prompt, and end it with Ctrl-D at the start of a line", file=sys.stderr)
    text = "".join(lines_of(sys.stdin)).removesuffix("\n")
    if not text:
        raise UsageError("there is no prompt: write it after the bundle, or pipe it in")
    return text


bench_app = App(name="bench")
app.command(bench_app)


@bench_app.default
def bench(
    *subjects: str, settings: Annotated[BenchConfig, FLAT] = BenchConfig(), output: Annotated[Output, FLAT] = Output()
) -> None:
    """Measure speed, memory, size and quality of bundles, runs and models; bundles need no torch.

    A run or bundle reads the rows of --data as in its training, unless options of the group "Rows" are given.

    Args:
        subjects: Bundle folders, run folders, or models (hub id, checkpoint folder or GGUF file).

    Raises:
        BudgetFailed: a measured value does not keep its budget.
    """
    from edge_ft.bench import bench as run_bench
    from edge_ft.bench.report import budget_failures, markdown_table, table

    with _progress(output) as progress:
        records = run_bench(subjects, settings, progress)
    rows = table(records)
    if settings.markdown is not None:
        write_text(settings.markdown, markdown_table(rows[0], rows[1:]))
    if settings.html is not None:
        from edge_ft.bench.page import page_of

        write_text(settings.html, page_of(records))
    _show(output, records, rows, "")
    if failures := budget_failures(records, settings):
        raise BudgetFailed("; ".join(failures))


@bench_app.command(name="compare")
def compare_benches(old: Path, new: Path, /, *, output: Annotated[Output, FLAT] = Output()) -> None:
    """Say which figures of two reports differ beyond the noise; exit code 1 if one is worse.

    Args:
        old: What edge-ft bench --json wrote before a change.
        new: What it wrote after the change, for the same subjects under the same conditions.

    Raises:
        BudgetFailed: a figure is worse.
    """
    from edge_ft.bench.compare import compare, read_records

    changes = compare(read_records(old), read_records(new))
    changed = [change for change in changes if change.verdict != "same"]
    header = ("subject", "metric", "old", "new", "new ÷ old", "")
    rows = [header, *(change.cells for change in changed)] if changed else []
    _show(output, [asdict(change) for change in changes], rows, f"{len(changes) - len(changed)} figures are the same")
    if worse := [change for change in changes if change.verdict == "worse"]:
        raise BudgetFailed("worse: " + ", ".join(f"{c.subject} {c.variant} {c.metric}" for c in worse))


@app.command(name="--version")
def version(*, verbose: Annotated[bool, Parameter(alias="-v", negative=())] = False) -> None:
    """Print the version; with -v also those of the libraries, and the threads, memory, GPU and cache folder.

    Args:
        verbose: Print all of these.
    """
    if not verbose:
        print(__version__)
        return
    print(f"edge-ft {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in LIBRARIES:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    memory, total = Available.here(Path("here")).memory_bytes, total_memory_bytes() or 0
    print(f"threads: {default_threads()} by default, {usable_cpus()} usable CPUs")
    print(f"memory: {memory / 1e6:.0f} MB available of {total / 1e6:.0f} MB")
    print(f"GPU: {_gpu()}")
    print(f"cache folder: {cache_folder()}")


def _gpu() -> str:
    """Name and memory of the GPU that a training would use."""
    try:
        torch = require("torch", "train")
    except MissingExtra:
        return "none (torch is not installed)"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = device_memory(device)
    if memory is None:
        return "none"
    free, total = memory.free_bytes / 1e6, memory.total_bytes / 1e6
    return f"{torch.cuda.get_device_name(device)}, {free:.0f} MB free of {total:.0f} MB"


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=HEADINGS[Group.FILES])] = None,
    preset: Annotated[str | None, Parameter(group=HEADINGS[Group.FILES])] = None,
) -> Any:
    """Read settings from files, then run a command.

    Args:
        config: YAML file with settings; flags override it.
        preset: For tune and plan only, settings that come with edge-ft: default, final-layers, thorough or
            low-memory; --config and flags override them.

    Returns:
        What the command returns: nothing.
    """
    files = [*([config] if config is not None else []), *([preset_file(preset)] if preset is not None else [])]
    app.config = [_settings_in(file) for file in files]
    return app(tokens, exit_on_error=False, print_error=False)


def _settings_in(file: Path) -> cyclopts.config.Dict:
    """The settings that a YAML file gives to any command."""
    import yaml

    if not file.is_file():
        raise UsageError(f"--config {file}: there is no such file")
    try:
        settings = yaml.safe_load(read_utf8(file))
    # A ValueError: a date that does not exist.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {file} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict | None):
        raise UsageError(f"--config {file} must hold one `option: value` a line")
    for name, value in (settings or {}).items():
        # Aliases in lists of lists multiply: nine short lines can stand for millions of values.
        if not isinstance(name, str) or not _is_setting(value):
            raise UsageError(
                f"--config {file}: {name} must be an option, with a text, a number, true, false, null or a list of them"
            )
    return cyclopts.config.Dict(
        without_retired(settings or {}, file), source=str(file.absolute()), use_commands_as_keys=False
    )


def _is_setting(value: Any) -> bool:
    return all(isinstance(each, str | int | float | None) for each in (value if isinstance(value, list) else [value]))


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


def _progress(output: Output) -> AbstractContextManager[Progress]:
    if output.quiet or not sys.stderr.isatty():
        return nullcontext(Silent() if output.quiet else Lines())
    return ProgressBars()


def _show(output: Output, result: Any, rows: Sequence[tuple[str, ...]], text: str) -> None:
    """Write the result as JSON if --json is given, and print a table and text unless JSON goes to stdout.

    Args:
        output: Where to write.
        result: What --json writes.
        rows: Of a table, the header first.
        text: Printed below the table.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes only the first one prints
    if output.json is not None:
        _write_json(output.json, result)
    if output.json == "-":
        return
    if rows:
        _print_table(rows)
    if text:
        print(text)


def _warnings(result: dict[str, Any]) -> list[str]:
    return [f"{found['severity']}: {found['message']} [{found['code']}]" for found in result["findings"]]


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns, the first to the left; no cell is cut, however narrow the terminal is."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    columns = (Column(justify="right" if at else "left", no_wrap=True) for at in range(len(rows[0])))
    table = Table(*columns, box=None, show_header=False, pad_edge=False, padding=(0, 1))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=10_000, highlight=False).print(table)


def _write_json(target: str, result: Any) -> None:
    if target == "-":
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    write_json(Path(target), result)


def _unit(task: str) -> str:
    """Unit of the loss: a target is a token only where tokens are predicted."""
    return "nats/token" if task in (*TEXT_TASKS, "fill-mask") else "nats/target"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(value: dict[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
