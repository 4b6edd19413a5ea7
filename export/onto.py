"""Keep an adapter in a bundle, which answers with it from then on: on the device, without torch or ONNX libraries.

All new files are written under names that no bundle holds yet; replacing manifest.json is the one moment of the change.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_ft.artifacts import Bundle, RunFolder, is_added, kind_of
from edge_ft.config import ExportConfig, Task
from edge_ft.data import Rendering, SpecialIds, TextTokenizer, encode_rows, read_rows, trained_rendering
from edge_ft.errors import GateRefused, UsageError
from edge_ft.evaluate.gate import FEWEST_ROWS, MOST_ROWS, Limits, evaluate_gate, task_metric_for
from edge_ft.evaluate.scoring import RowScores, scorable
from edge_ft.evaluate.verify import largest_difference
from edge_ft.export.figures import ExportRows, compared_figures, score_rows, test_scores
from edge_ft.export.lora_defaults import adapter_name, write_default_graph, write_values
from edge_ft.files import file_sha256
from edge_ft.progress import Progress, heartbeat
from edge_ft.runtime import load
from edge_ft.runtime.adapters import Bound, adapter_inputs, bind, given_inputs, neutral_shape
from edge_ft.runtime.probes import SAME, probe_examples, score_scale
from edge_ft.runtime.session import open_session

__all__ = ["add_adapter"]


@dataclass(frozen=True)
class _Added:
    """An adapter for a bundle, and the rows that judge it."""

    bundle: Bundle
    """As it was."""
    bound: Bound
    """The bundle with the adapter's values bound to its LoRA inputs."""
    name: str
    tokenizer: TextTokenizer
    rendering: Rendering
    rows: ExportRows
    run: RunFolder | None
    """None for an adapter from elsewhere."""

    @property
    def task(self) -> Task:
        """The bundle's task."""
        return self.rendering.task


def add_adapter(source: Path, target: Path, config: ExportConfig, progress: Progress) -> Bundle:
    """Add the adapter of `source` to a bundle, as its default, if it passes the gate against the bundle's base.

    Args:
        source: A run folder, or an adapter in PEFT's format.
        target: The bundle; at any moment it is as before or as after.
        config: Name of the adapter, rows of an adapter that is no run, limits of the gate, threads.
        progress: Receives the steps.

    Returns:
        The changed bundle.

    Raises:
        UsageError: the bundle takes no adapter, or not this one.
        GateRefused: nothing was learned, or too much is lost; the bundle is as before.
    """
    with heartbeat(progress, f"opening {target}"):
        bundle = Bundle.open(target)
        bundle.remove_leftovers()
        added = _find(source, bundle, config)
    try:
        with heartbeat(progress, f"writing the adapter {added.name}"):
            values, manifest = _write(added)
        verification, passed = _verify(added, Bundle(target, manifest), config, progress)
        if reasons := verification["refused"]:
            fix = ""
            if (verification.get("gain") or {"low": 1})["low"] <= 0:
                fix = ". Train with more rows, more --epochs or another --learning-rate"
            raise GateRefused(f"{source} was not added, {target} is as before: {'; '.join(reasons)}{fix}")
        with heartbeat(progress, "writing the manifest"):
            return bundle.change(_manifest(added, manifest, values, verification, passed))
    except BaseException:
        with suppress(OSError):
            Bundle.open(target).remove_leftovers()
        raise


def _find(source: Path, bundle: Bundle, config: ExportConfig) -> _Added:
    """Return the adapter and its rows.

    Raises:
        UsageError: the bundle takes no adapter, or not this one.
    """
    manifest, path = bundle.manifest, bundle.path
    if manifest["lane"] == "merged":
        raise UsageError(
            f"{path} has its adapter merged into the weights, and its base is gone: export the base, or the run with "
            "--lane adapter, and add the adapter to that"
        )
    if refused := manifest.get("verification", {}).get("refused"):
        raise UsageError(f"{path} is a bundle that its export refused ({refused[0]}): export it again")
    if not manifest.get("adapters", {}).get("graphs"):
        raise UsageError(
            f"{path} has no graph that takes another adapter (made by an earlier version, or with int8 activations): "
            "export the model again, with --weights int4, int8, fp16 or fp32"
        )
    run = RunFolder.open(source) if kind_of(str(source)) == "run" else None
    if run is not None and config.data is not None:
        raise UsageError(f"--data is for an adapter from elsewhere: the run folder {source} has its own rows")
    bound = bind(bundle, source.absolute())
    tokenizer = TextTokenizer.of_bundle(path)
    rendering = Rendering.from_dict(bound.bundle.manifest["rendering"])
    if rendering.task != bundle.task:
        raise UsageError(f"{source} was trained for {rendering.task}, and {path} is for {bundle.task}")
    data = config.data if run is None else str(run.split("validation"))
    validation = read_rows(data)[:MOST_ROWS] if data is not None else []
    if run is None and validation:
        rendering = trained_rendering(rendering, config, validation, tokenizer, bundle.max_length)
    test = read_rows(str(run.split("test"))) if run is not None and run.split("test").stat().st_size else []
    rows = ExportRows(
        validation=scorable(encode_rows(rendering, tokenizer, validation)),
        test=scorable(encode_rows(rendering, tokenizer, test)),
        calibration=[],
        read=validation,
    )
    rows = rows.first(FEWEST_ROWS)
    return _Added(bundle, bound, _name(source, bundle, config), tokenizer, rendering, rows, run)


def _name(source: Path, bundle: Bundle, config: ExportConfig) -> str:
    """Return the name of the adapter in the bundle.

    Raises:
        UsageError: it is no name, or another adapter has it.
    """
    name = adapter_name(source if config.name is None else Path(config.name))
    if config.name is None and name in bundle.manifest["adapters"]["names"]:
        raise UsageError(
            f"{bundle.path} has an adapter {name} already: --name {name} replaces it, another --name keeps both"
        )
    if config.name is not None and name != config.name:
        raise UsageError(
            f"--name {config.name}: a name has up to 64 letters, digits, dots, hyphens and underscores, and is not none"
        )
    return name


def _write(added: _Added) -> tuple[str, dict[str, Any]]:
    """Write the values and the graphs that answer with them.

    Returns:
        Path of the values, relative to the bundle; and the manifest with these graphs.

    Raises:
        UsageError: the adapter is of another model, or has a layer that takes none here.
    """
    bundle, view = added.bundle, added.bound.bundle
    keys = [key for key in ("encoder_graphs", "graphs") if key in view.manifest]
    assert added.bound.values is not None
    unnamed = bundle.path / "onnx" / f".adapter.{os.getpid()}.tmp"
    write_values(unnamed, added.bound.values)
    mark = file_sha256(unnamed)[:8]
    values = unnamed.replace(unnamed.with_name(f"adapter.{mark}.safetensors"))
    changed: dict[str, Any] = {key: {} for key in keys}
    for level in view.manifest["graphs"]:
        sources = [bundle.path / view.manifest[key][level] for key in keys]
        sessions = [open_session(source) for source in sources]
        adapter_inputs(sessions, added.bound)  # refuses what does not fit
        for key, source, session in zip(keys, sources, sessions, strict=True):
            target = source.with_name(f"{source.stem.removeprefix('lora_')}.{mark}.onnx")
            inputs = {name: neutral_shape(shape) for name, shape in given_inputs(session).items()}
            write_default_graph(source, target, inputs, values)
            changed[key][level] = f"onnx/{target.name}"
    changed["model"] = changed["graphs"][_main_level(view)]
    rendering = added.rendering.to_dict()
    return f"onnx/{values.name}", {**bundle.manifest, **changed, "lane": "adapter", "rendering": rendering}


@dataclass(frozen=True)
class _Scores:
    """Of one model."""

    probe: RowScores
    """On the probe texts."""
    validation: RowScores | None
    """On the validation rows; None without rows."""


def _verify(
    added: _Added, changed: Bundle, config: ExportConfig, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Score the base and the graphs that answer with the adapter.

    Args:
        added: The adapter.
        changed: The bundle with these graphs.
        config: Limits and threads.
        progress: Receives the steps.

    Returns:
        The manifest's `verification`, in which `refused` lists why the adapter is refused; and the accuracy levels
        whose graph passed.
    """
    limits = Limits.of(config)

    def scored(bundle: Bundle, what: str, **options: Any) -> _Scores:
        scorer = load(bundle, threads=config.threads, **options)
        probes, rows = probe_examples(added.tokenizer, added.rendering), added.rows.validation
        probe = score_rows(added, scorer, probes, progress, f"probe, {what}")
        return _Scores(probe, score_rows(added, scorer, rows, progress, f"validation, {what}") if rows else None)

    base = scored(added.bundle, "base", adapter="none", engine="exact")
    levels = {
        level: scored(changed, f"level {level}", accuracy_level=int(level)) for level in changed.manifest["graphs"]
    }
    exact, main = levels[min(levels)], _main_level(changed)
    results = {level: _compare(added, base, exact, found, limits) for level, found in levels.items()}
    reasons = [*results[main][1], *_against_run(added, levels[main].validation, limits)]
    passed = [level for level, (_, problems) in results.items() if level == main or (base.validation and not problems)]
    for level in results.keys() - set(passed):
        progress.say(f"accuracy level {level} is left out: {'; '.join(results[level][1]) or 'there are no rows'}")
    compared = {"base": base.validation, "trained": exact.validation, "shipped": levels[main].validation}
    verification = {
        **compared_figures(added, compared, limits),
        **results[main][0],
        "by_accuracy_level": {
            level: {**_level_figures(found, exact), "passed": level in passed} for level, found in levels.items()
        },
        "test": None,
        "refused": reasons,
    }
    if not reasons and added.rows.test:
        verification["test"] = test_scores(added, load(changed, engine="exact", threads=config.threads), {}, progress)
    return verification, passed


def _main_level(bundle: Bundle) -> str:
    """Return the accuracy level of the graph that `manifest.model` names."""
    return next(level for level, path in bundle.manifest["graphs"].items() if path == bundle.manifest["model"])


def _compare(
    added: _Added, base: _Scores, exact: _Scores, found: _Scores, limits: Limits
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the gate's figures for a graph, and why it fails."""
    changes = largest_difference(found.probe, base.probe.nll) > SAME * score_scale(added.rendering, found.probe.nll)
    if base.validation is None or exact.validation is None or found.validation is None:
        lost = () if changes else ("the adapter does not change the logits of the graph, which answers as the base",)
        return {"adapter_changes_logits": changes}, lost
    metric = task_metric_for(added.rows.validation, added.task, added.rendering.labels)
    verdict = evaluate_gate(base.validation, exact.validation, found.validation, limits, changes, metric)
    return verdict.figures, verdict.reasons


def _level_figures(found: _Scores, exact: _Scores) -> dict[str, Any]:
    """Return the entry of a graph in `by_accuracy_level`; the exact graph is the last that was evaluated."""
    figures: dict[str, Any] = {
        "probe_nll": found.probe.nll.tolist(),
        "shipped_minus_last_evaluated": largest_difference(found.probe, exact.probe.nll),
    }
    if found.validation is None or exact.validation is None:
        return figures
    return figures | {
        "nll": found.validation.mean_nll,
        "accuracy": found.validation.accuracy,
        "argmax_agreement": found.validation.agreement(exact.validation),
        "quantization_tax": found.validation.mean_nll - exact.validation.mean_nll,
    }


def _against_run(added: _Added, found: RowScores | None, limits: Limits) -> list[str]:
    """Return why the adapter does not do here what its run reports: it was trained over other weights."""
    report = {} if added.run is None else added.run.report()
    best = report.get("nll", {}).get("best")
    if found is None or best is None or report["rows"]["validation"] != len(added.rows.read):
        return []
    lost = found.mean_nll - best
    if lost <= limits.max_tax:
        return []
    return [
        f"its validation loss is {found.mean_nll:.4f} here and {best:.4f} in its run ({lost:+.4f} nats per token, more "
        f"than --max-tax {limits.max_tax:g}): it was trained over other weights than this bundle's"
    ]


def _manifest(
    added: _Added, manifest: dict[str, Any], values: str, verification: dict[str, Any], passed: list[str]
) -> dict[str, Any]:
    """Return the manifest of the bundle that answers with the adapter."""
    before, adapters = added.bundle.manifest, dict(added.bundle.manifest["adapters"])
    own = {key: before[key] for key in ("model", "graphs", "encoder_graphs") if key in before}
    if before["lane"] == "base":
        adapters["base"] = own
    replaced = adapters["names"].get(added.name, {}).get("file")
    if adapters["default"] is not None:
        # It keeps its name, and how it reads rows.
        adapters["names"] = {**adapters["names"]}
        entry = adapters["names"][adapters["default"]]
        adapters["names"][adapters["default"]] = {"rendering": before["rendering"], **entry}
    adapters["names"] = {
        **adapters["names"],
        added.name: {"file": values, "nll": verification["nll"]["shipped"], "rendering": added.rendering.to_dict()},
    }
    adapters["default"] = added.name
    found = {**manifest, "adapters": adapters, "verification": verification}
    for key in ("graphs", "encoder_graphs"):
        if key in manifest:
            found[key] = {level: path for level, path in manifest[key].items() if level in passed}
    rendering = added.rendering
    found["tokenization"] = {
        **before.get("tokenization", {}),
        "bos": rendering.bos,
        "appended_eos": rendering.appended_eos,
    }
    if "special_ids" in before:
        found["special_ids"] = asdict(SpecialIds.of(rendering, added.tokenizer))
    if added.run is not None:
        fingerprint = added.run.base().get("data_fingerprint")
        found["provenance"] = {**before["provenance"], "data_fingerprint": fingerprint}
    found["files"] = _files(found, before, replaced)
    return found


def _files(manifest: Mapping[str, Any], before: Mapping[str, Any], replaced: str | None) -> dict[str, Any]:
    """Return the paths of the bundle's files: without the graphs of an adapter that is no longer the default."""
    adapters = manifest["adapters"]
    used = {entry["file"] for entry in adapters["names"].values()}
    for part in (manifest, adapters, adapters.get("base", {})):
        used |= {*part.get("graphs", {}).values(), *part.get("encoder_graphs", {}).values()}
    gone = {*before["graphs"].values(), *before.get("encoder_graphs", {}).values(), replaced}
    kept = (name for name in before["files"] if name in used or not (name in gone and is_added(name)))
    return dict.fromkeys([*kept, *sorted(used - before["files"].keys())])
