"""The commands and their flags; each command is one call of the Python API."""

import platform
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from edge_ft import __version__
from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.cli.output import HEADINGS, Output
from edge_ft.cli.settings_file import settings_in
from edge_ft.cli.tables import (
    evaluation_lines,
    evaluation_table,
    export_line,
    export_table,
    plan_lines,
    plan_table,
    report_lines,
    report_table,
)
from edge_ft.config import (
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
)
from edge_ft.errors import BudgetFailed, MissingExtra, UsageError, require
from edge_ft.files import cache_folder, write_text
from edge_ft.system import Available, default_threads, device_memory, total_memory_bytes, usable_cpus
from edge_ft.utf8 import lines_of

__all__ = ["app"]

FLAT = Parameter(name="*", negative_iterable=())
LIBRARIES = (
    *("onnxruntime", "numpy", "tokenizers", "safetensors", "torch", "transformers", "peft", "bitsandbytes", "onnx"),
    *("accelerate", "datasets", "gguf", "openvino", "onnxruntime-genai", "ctranslate2", "xllamacpp"),
)
"""What `--version -v` lists: the libraries on which results and speed depend."""


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
    with output.progress() as progress:
        run = run_tune(settings, progress)
    if was_finished and output.quiet:  # a script must see that its settings had no effect
        from edge_ft.tune.opening import finished_note

        print(f"edge-ft: {finished_note(settings)}", file=sys.stderr)
    report = run.report()
    ships = f"--onto {settings.model}" if kind_of(settings.model) == "bundle" else "--out BUNDLE"
    advice = f"{run.page_path} shows the curves; next: edge-ft export {run.path} {ships}"
    output.show(report, report_table(report), report_lines(run.path, report, advice))


@app.command
def plan(
    *,
    settings: Annotated[PlanConfig, Parameter(name="*", negative_iterable=(), consume_multiple=True)],
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Estimate the time, memory and disk of a training, and check its rows; writes nothing."""
    from edge_ft.tune.plan import plan as run_plan

    with output.progress() as progress:
        result = run_plan(settings, progress)
    output.show(result, plan_table(result), plan_lines(result))


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
    with output.progress() as progress:
        bundle: Bundle | GgufExport
        if settings.format == "gguf":
            bundle = export_gguf(source, settings, progress)
        else:
            bundle = run_export(source, settings, progress)
    output.show(
        bundle.manifest, export_table(bundle.manifest), export_line(bundle.path, bundle.size_bytes, bundle.manifest)
    )


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

    with output.progress() as progress:
        result = run_verify(bundle, settings, progress)
    lines = f"{bundle}: {result['files']} files as exported, probe texts score the same here"
    if "nll" in result:
        lines += f"; {result['rows']} rows with a loss of {result['nll']:.4f}"
    output.show(result, [], lines)


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

    with output.progress() as progress:
        result = run_evaluate(source, settings, progress)
    output.show(result, evaluation_table(result), evaluation_lines(source, result))


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
        with output.progress() as progress:
            summary = run_file(bundle, jsonl, out, settings, progress)
        failed = f", {summary['failed']} of them without an answer (their lines say why)" if summary["failed"] else ""
        output.show(summary, [], f"{out}: {summary['rows']} rows{failed}, {summary['seconds']:.1f} s")
    elif interactive:
        run_chat(bundle, settings, lines_of(sys.stdin), sys.stdout)
    else:
        text = unescape(prompt) if prompt is not None else _read_prompt()
        result = run_text(bundle, text, settings, None if output.json == "-" else sys.stdout)
        if dropped := result.get("dropped_tokens"):
            print(f"{dropped} tokens did not fit the model's limit and were dropped", file=sys.stderr)
        output.write(result)


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

    with output.progress() as progress:
        records = run_bench(subjects, settings, progress)
    rows = table(records)
    if settings.markdown is not None:
        write_text(settings.markdown, markdown_table(rows[0], rows[1:]))
    if settings.html is not None:
        from edge_ft.bench.page import page_of

        write_text(settings.html, page_of(records))
    output.show(records, rows, "")
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
    output.show([asdict(change) for change in changes], rows, f"{len(changes) - len(changed)} figures are the same")
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
    app.config = [settings_in(file) for file in files]
    return app(tokens, exit_on_error=False, print_error=False)
