"""Train a LoRA adapter over a frozen base: model and rows in, run folder out."""

import json
import platform
import resource
import shutil
import time
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from edge_ft.artifacts import RunFolder, refuse_existing, write_json, write_text
from edge_ft.config import TuneConfig, as_plain
from edge_ft.data import TextTokenizer
from edge_ft.errors import Interrupted, ModelError, require
from edge_ft.evaluate.score import RowScores, score, summary
from edge_ft.families import family_of
from edge_ft.progress import Progress, Silent
from edge_ft.tune.loop import Fit, fit
from edge_ft.tune.plot import plot_losses
from edge_ft.tune.prepare import Prepared, prepare, write_splits

__all__ = ["tune"]


def tune(config: TuneConfig, progress: Progress | None = None) -> RunFolder:
    """Train a LoRA adapter and write the run folder.

    The test rows are read once, after the best weights were chosen on the validation rows.

    Returns:
        The finished run folder at `config.out`.

    Raises:
        UsageError: a model, rows or options that cannot be used.
        AuditRefused: the rows would train nothing, or overlap between splits.
        Interrupted: stopped from the keyboard; the best adapter so far is in the folder.
    """
    torch, yaml = require("torch", "train"), require("yaml", "train")
    require("peft", "train")
    from edge_ft.base.adapter import add_lora
    from edge_ft.base.linear import codes_sha256
    from edge_ft.base.load import find_base, load_model
    from edge_ft.tune.torch_backend import TorchBackend

    progress = progress or Silent()
    started = time.monotonic()
    refuse_existing(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = find_base(config.model, config.task)
    tokenizer = TextTokenizer.load(base.path)
    prepared = prepare(
        config,
        tokenizer,
        decoder=base.family.decoder,
        model_limit=base.max_length,
        model_labels=base.labels,
        progress=progress,
    )
    task = prepared.task
    family_of(base.family.name, task)  # a guessed task too
    longest = max(max(example.input_ids) for rows in prepared.examples.values() for example in rows)
    if longest >= int(base.config["vocab_size"]):
        raise ModelError(f"{base.path}: its tokenizer gives id {longest}, its model knows {base.config['vocab_size']}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress.say(f"loading {base.name} as {config.base_format} on {device}")
    model = load_model(base, task, config.base_format, config.block_size, prepared.rendering.labels, config.seed)
    codes = codes_sha256(model) if config.base_format == "int4" else None
    peft_model = add_lora(model, base.family, task, config).to(device)
    peft_model.peft_config["default"].base_model_name_or_path = base.name
    backend = TorchBackend(peft_model, base.family, config.weight_decay)

    run = RunFolder(config.out)
    run.path.mkdir(parents=True)
    write_splits(prepared, run.path / "splits")
    write_json(run.path / "rendering.json", prepared.rendering.to_dict())
    write_json(
        run.path / "base.json",
        {
            "model": base.name,
            "path": str(base.path.resolve()),
            "model_type": base.family.name,
            "content_sha256": base.content_sha256,
            "format": config.base_format,
            "block_size": config.block_size,
            "codes_sha256": codes,
            "data_fingerprint": prepared.fingerprint,
        },
    )
    # Opens the same run again: edge-ft tune --config config.yaml --out ANOTHER
    write_text(run.path / "config.yaml", yaml.safe_dump({**as_plain(config), "task": task}, sort_keys=False))
    for file in tokenizer.files():
        write_text(run.tokenizer / file.name, file.read_text(encoding="utf-8"))

    with (run.path / "metrics.jsonl").open("w", encoding="utf-8") as metrics:

        def log(line: dict[str, Any]) -> None:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()

        try:
            result = fit(
                backend,
                prepared.examples["train"],
                prepared.examples["validation"],
                config,
                task=task,
                pad_id=tokenizer.pad_id,
                progress=progress,
                log=log,
                on_best=lambda: backend.save(run.adapter),
            )
        except KeyboardInterrupt:
            kept = f"the best adapter so far is in {run.adapter}" if run.adapter.is_dir() else "nothing was better yet"
            raise Interrupted(f"stopped; {kept}; the run is not finished and will not export") from None
        except Exception:
            if not run.adapter.is_dir():
                shutil.rmtree(run.path)  # nothing was learned yet: the same command can be given again
            raise
    backend.save(run.adapter)

    test: dict[str, RowScores] = {}
    if prepared.examples["test"]:
        for name in ("test_base", "test"):
            with peft_model.disable_adapter() if name == "test_base" else nullcontext():
                test[name] = score(
                    backend,
                    prepared.examples["test"],
                    task=task,
                    pad_id=tokenizer.pad_id,
                    batch_size=config.batch_size,
                    progress=progress,
                    stage="test rows, base" if name == "test_base" else "test rows, tuned",
                )
    report = {
        "model": base.name,
        "family": base.family.name,
        "task": task,
        "rows": {name: len(examples) for name, examples in prepared.examples.items()},
        "findings": prepared.findings,
        "trainable_parameters": sum(p.numel() for p in backend.parameters),
        "seconds": round(time.monotonic() - started, 2),
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "resumed_from_step": None,
        "tokens_per_second": round(result.tokens / result.seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        **_scores(result, test, prepared),
        "seed": config.seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("edge-ft", "torch", "transformers", "peft")},
        "machine": platform.platform(),
    }
    plot_losses(run.path / "metrics.jsonl", run.path / "loss.png", progress)
    write_json(run.report_path, report)
    return run


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _scores(result: Fit, test: dict[str, RowScores], prepared: Prepared) -> dict[str, Any]:
    """`nll` and `metrics` of the report: validation rows choose, test rows report."""
    nll: dict[str, float | None] = {"base": result.base.mean_nll, "best": result.best.mean_nll, "last": result.last_nll}
    nll |= {name: test[name].mean_nll if name in test else None for name in ("test_base", "test")}
    metrics: dict[str, dict[str, Any]] = {}
    for column, scores, split in (
        ("validation_base", result.base, "validation"),
        ("validation", result.best, "validation"),
        ("test_base", test.get("test_base"), "test"),
        ("test", test.get("test"), "test"),
    ):
        if scores is not None:
            summed = summary(scores, prepared.examples[split], prepared.task, prepared.rendering.labels)
            for name, value in summed["metrics"].items():
                metrics.setdefault(name, {})[column] = value
    return {"nll": nll, "metrics": metrics}
