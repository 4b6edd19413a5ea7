"""The command line: flags, progress bars and exit codes; each command is one call of the Python API."""

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from edge_ft import __version__
from edge_ft.artifacts import disk_full
from edge_ft.config import (
    BenchConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    RunConfig,
    TuneConfig,
    VerifyConfig,
    as_plain,
    preset_file,
)
from edge_ft.errors import EdgeFTError, UsageError, WillNotFit
from edge_ft.progress import Lines, Progress, ProgressBars, Silent

__all__ = ["main"]

FLAT = Parameter(name="*", negative_iterable=())

app = App(
    name="edge-ft",
    version=__version__,
    help="Fine-tune a small model over the 4-bit codes it ships in, export it to ONNX, run and measure it.",
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,  # `main` says what was kept
)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What every command takes."""

    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    """Write the result as JSON to this file; - is stdout, and then nothing else goes there."""
    quiet: bool = False
    """No progress."""
    debug: bool = False
    """Show the traceback of an error."""


@app.command
def tune(
    *,
    settings: Annotated[TuneConfig, Parameter(name="*", negative_iterable=(), consume_multiple=True)],
    print_config: bool = False,
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Train a LoRA adapter over a frozen base: model + rows -> run folder.

    Parameters
    ----------
    print_config
        Print the resolved settings as YAML and stop.
    """
    if print_config:
        import yaml

        print(yaml.safe_dump(as_plain(settings), sort_keys=False), end="")
        return
    from edge_ft.tune import tune as run_tune

    with _progress(output) as progress:
        run = run_tune(settings, progress)
    report = run.report()
    table: list[tuple[str, ...]] = [("", "base", "tuned")]
    nll = report["nll"]
    table.append(("validation loss (nats/token)", _figure(nll["base"]), _figure(nll["best"])))
    if nll["test"] is not None:
        table.append(("test loss (nats/token)", _figure(nll["test_base"]), _figure(nll["test"])))
    for name, values in report["metrics"].items():
        split = "test" if "test" in values else "validation"
        table.append((f"{split} {name} [95%]", _interval(values[f"{split}_base"]), _interval(values[split])))
    if answers := report["answers"]:
        table.append(
            (f"{answers['rows']} {answers['split']} answers, up to {answers['max_new_tokens']} tokens:", "", "")
        )
        table += [
            (name, _interval(found["base"]), _interval(found["tuned"])) for name, found in answers["metrics"].items()
        ]
    _show(
        output,
        report,
        table,
        f"{run.path}: best at step {report['best_step']} of {report['steps']}, "
        f"{report['seconds']:.0f} s, {report['tokens_per_second']:.0f} tok/s, "
        f"peak {report['peak_rss_bytes'] / 1e6:.0f} MB\nnext: edge-ft export {run.path} --out BUNDLE",
    )


@app.command
def plan(
    *,
    settings: Annotated[PlanConfig, Parameter(name="*", negative_iterable=(), consume_multiple=True)],
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Say what a tune with these settings would take, and what is odd about the rows; writes nothing."""
    from edge_ft.tune.plan import duration, megabytes
    from edge_ft.tune.plan import plan as run_plan

    with _progress(output) as progress:
        result = run_plan(settings, progress)
    table: list[tuple[str, ...]] = [("layers", "memory mode", "trained", "time", "memory", "disk", "")]
    for choice in result["choices"]:
        mark = "recommended" if choice == result["recommended"] else "" if choice["fits"] else "does not fit"
        figures = (duration(choice["seconds"]), megabytes(choice["peak_rss_bytes"]), megabytes(choice["disk_bytes"]))
        trained = f"{choice['trainable_parameters'] / 1e6:.2f} M"
        table.append((choice["layers"], choice["memory"], trained, *figures, mark))
    tokens, rows = result["tokens"], ", ".join(f"{count} {name}" for name, count in result["rows"].items())
    lines = [
        f"{rows} rows; a train row has {tokens['p50']} tokens (p50), {tokens['p95']} (p95), {tokens['max']} (max), "
        f"all have {tokens['total']}; {result['steps']} steps",
        *(f"{found['severity']}: {found['message']} [{found['code']}]" for found in result["findings"]),
        f"recommended: --layers {result['recommended']['layers']} --memory {result['recommended']['memory']}; "
        f"{result['reason']}",
        *result.get("shown", []),
    ]
    _show(output, result, table, "\n".join(lines))


@app.command
def export(
    source: str, /, *, settings: Annotated[ExportConfig, FLAT], output: Annotated[Output, FLAT] = Output()
) -> None:
    """Turn a run folder, or a model with or without an adapter, into a bundle, and judge it.

    Parameters
    ----------
    source
        A run folder, or a model: hub id, folder or GGUF file.
    """
    from edge_ft.export import export as run_export

    with _progress(output) as progress:
        bundle = run_export(source, settings, progress)
    found = bundle.manifest["verification"]
    table: list[tuple[str, ...]] = [("", "base", "trained", "shipped")]
    for name, part in (("validation", found), ("test", found["test"])):
        if part is not None and part["rows"]:
            loss = part["nll"]
            table.append((f"{name} loss (nats/token)", *(_figure(loss[key]) for key in ("base", "trained", "shipped"))))
            for metric, values in part["metrics"].items():
                cells = (_interval(values.get(key)) for key in ("base", "trained", "shipped"))
                table.append((f"{name} {metric} [95%]", *cells))
    lines = f"{bundle.path}: {bundle.size_bytes / 1e6:.1f} MB, lane {bundle.manifest['lane']}"
    if found["quantization_tax"] is not None:
        lines += f", quantization tax {found['quantization_tax']:+.4f} nats/token"
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
    """Check a bundle's files and graphs on this machine, and its scores on --data; needs no torch."""
    from edge_ft.evaluate.verify import verify as run_verify

    with _progress(output) as progress:
        result = run_verify(bundle, settings, progress)
    lines = f"{bundle}: {result['files']} files as exported, probe texts score the same here"
    if "nll" in result:
        lines += f"; {result['rows']} rows at {result['nll']:.4f} nats/token"
    _show(output, result, [], lines)


@app.command(name="eval")
def evaluate(
    source: str, /, *, settings: Annotated[EvalConfig, FLAT], output: Annotated[Output, FLAT] = Output()
) -> None:
    """Score a run, a bundle or a model on rows.

    Parameters
    ----------
    source
        A run folder, a bundle, or a model: hub id, folder or GGUF file.
    """
    from edge_ft.evaluate import evaluate as run_evaluate

    with _progress(output) as progress:
        result = run_evaluate(source, settings, progress)
    table: list[tuple[str, ...]] = [
        ("metric", "value [95%]"),
        ("loss (nats/token)", _figure(result["nll"])),
        ("perplexity", _figure(result["perplexity"])),
    ]
    table += [(name, _interval(value)) for name, value in result["metrics"].items()]
    left_out = (
        f" ({result['dropped']} without an answer, {result['cut']} cut)" if result["dropped"] or result["cut"] else ""
    )
    _show(output, result, table, f"{source}: {result['rows']} rows{left_out}, {result['seconds']:.0f} s")


@app.command
def run(
    bundle: Path,
    prompt: str | None = None,
    /,
    *,
    interactive: Annotated[bool, Parameter(alias="-i")] = False,
    jsonl: Path | None = None,
    out: Path | None = None,
    settings: Annotated[RunConfig, FLAT] = RunConfig(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Answer with a bundle; needs no torch.

    Parameters
    ----------
    prompt
        The prompt, or the text to classify; without it, it is read from stdin.
    interactive
        Hold a conversation.
    jsonl
        Answer every row of this file, into --out.
    out
        File for the answers to --jsonl, a row for each row in its order.
    """
    from edge_ft.runtime.run import run_chat, run_file, run_text

    if (jsonl is None) != (out is None):
        raise UsageError("--jsonl IN and --out OUT go together")
    if jsonl is not None and out is not None:
        with _progress(output) as progress:
            summary = run_file(bundle, jsonl, out, settings, progress)
        _show(output, summary, [], _answered(summary))
    elif interactive:
        run_chat(bundle, settings, sys.stdin, sys.stdout)
    else:
        # echo and editors end a text with a newline that is not part of it.
        text = prompt if prompt is not None else sys.stdin.read().removesuffix("\n")
        result = run_text(bundle, text, settings, None if output.json == "-" else sys.stdout)
        if output.json is not None:
            _write_json(output.json, result)


def _answered(summary: dict[str, Any]) -> str:
    failed = f", {summary['failed']} of them without an answer (their lines say why)" if summary["failed"] else ""
    return f"{summary['out']}: {summary['rows']} rows{failed}, {summary['seconds']:.1f} s"


@app.command
def bench(
    *subjects: str, settings: Annotated[BenchConfig, FLAT] = BenchConfig(), output: Annotated[Output, FLAT] = Output()
) -> None:
    """Measure bundles, runs and models side by side; bundles need no torch.

    Parameters
    ----------
    subjects
        Bundles, run folders, or models.
    """
    from edge_ft.bench import bench as run_bench
    from edge_ft.bench.report import budget_failures, table

    with _progress(output) as progress:
        records = run_bench(subjects, settings, progress)
    _show(output, records, table(records), "")
    if failures := budget_failures(records, settings):
        from edge_ft.errors import BudgetFailed

        raise BudgetFailed("; ".join(failures))


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
    preset: str | None = None,
) -> Any:
    """Read flags from files first.

    Parameters
    ----------
    config
        YAML file with settings; flags win over it.
    preset
        Settings that come with edge-ft, for tune and plan: default, final-layers, thorough or low-memory; flags and
        --config win over them.
    """
    files = [*([config] if config is not None else []), *([preset_file(preset)] if preset is not None else [])]
    for file in files:
        if not file.is_file():
            raise UsageError(f"--config {file}: there is no such file")
    app.config = [cyclopts.config.Yaml(file, use_commands_as_keys=False) for file in files]
    return app(tokens, exit_on_error=False, print_error=False)


def main() -> None:
    """Run the command line and exit with a documented code (see `edge_ft.errors`)."""
    debug = "--debug" in sys.argv
    try:
        app.meta(exit_on_error=False, print_error=False)
    except EdgeFTError as error:
        _fail(str(error), error.exit_code, debug)
    except cyclopts.CycloptsError as error:
        _fail(str(error), UsageError.exit_code, debug)
    except KeyboardInterrupt:
        _fail("stopped", 130, debug)
    except BrokenPipeError:
        # The reader of our output is gone; stdout must not be flushed into it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if disk_full(error):
            _fail(
                f"the disk is full: {error.filename or error}; free some space and run again",
                WillNotFit.exit_code,
                debug,
            )
        _fail(str(error), UsageError.exit_code, debug)
    except MemoryError:
        _fail("out of memory: give a smaller --batch-size or --max-length", WillNotFit.exit_code, debug)
    except Exception as error:  # noqa: BLE001 - whatever is left is a defect, and gets its own code
        if disk_full(error):
            _fail("the disk is full: free some space and run again", WillNotFit.exit_code, debug)
        _fail(f"a defect of ours, {type(error).__name__}: {error} (--debug shows where)", EdgeFTError.exit_code, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"edge-ft: {message}", file=sys.stderr)
    sys.exit(code)


def _progress(output: Output) -> AbstractContextManager[Progress]:
    if output.quiet:
        return nullcontext(Silent())
    if not sys.stderr.isatty():
        return nullcontext(Lines())
    return ProgressBars()


def _show(output: Output, result: Any, table: list[tuple[str, ...]], lines: str) -> None:
    """The result as JSON where asked for, and for people on stdout unless JSON goes there."""
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes the first one speaks
    if output.json is not None:
        _write_json(output.json, result)
    if output.json == "-":
        return
    if table:
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        for row in table:
            cells = (
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join(cells).rstrip())
    if lines:
        print(lines)


def _write_json(target: str, result: Any) -> None:
    if target == "-":
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    from edge_ft.artifacts import write_json

    write_json(Path(target), result)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
