"""`tune` writes a complete run folder, every option does what it promises, and what would train nothing is refused."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tiny_models import write_bert

from edge_ft.artifacts import RunFolder
from edge_ft.config import EvalConfig, TuneConfig
from edge_ft.data import TextTokenizer, encode_rows, read_rows
from edge_ft.errors import AuditRefused, DataError, Interrupted, ModelError, UsageError, WillNotFit
from edge_ft.evaluate.loading import open_source
from edge_ft.families import FAMILIES, Family
from edge_ft.models.base_model import find_base
from edge_ft.progress import Silent
from edge_ft.tune import tune
from edge_ft.tune.prepare import prepare_job
from edge_ft.tune.torch_backend import TorchBackend

FAST: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "split": (0.6, 0.2, 0.2),
    "base_format": "int4",
    "compute": "fp32",
}


def adapter(run: RunFolder) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(run.adapter / "adapter_model.safetensors").items()}


@pytest.fixture(scope="module")
def plain_run(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("plain") / "run"
    return tune(TuneConfig(model=str(llama), data=str(sums), out=out, finish_steps=1, **FAST))


def test_the_run_folder_holds_what_the_documentation_lists(plain_run: RunFolder) -> None:
    files = {path.relative_to(plain_run.path).as_posix() for path in plain_run.path.rglob("*") if path.is_file()}
    assert files == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "base.json",
        "codes.safetensors",
        "config.yaml",
        "files.json",
        "merged/codes.safetensors",
        "merged/merged.json",
        "metrics.jsonl",
        "plan.json",
        "rendering.json",
        "report.html",
        "report.json",
        "scores.safetensors",
        "splits/test.jsonl",
        "splits/train.jsonl",
        "splits/validation.jsonl",
        "tokenizer/chat_template.jinja",
        "tokenizer/generation_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    report = plain_run.report()
    assert report["nll"]["best"] < report["nll"]["base"]
    assert report["nll"]["test"] < report["nll"]["test_base"]
    assert report["steps"] == 3
    assert report["tokens_per_second"] > 0 < report["peak_rss_bytes"]
    assert report["metrics"]["token_accuracy"]["test"]["low"] <= report["metrics"]["token_accuracy"]["test"]["value"]
    steps = [json.loads(line)["step"] for line in (plain_run.path / "metrics.jsonl").read_text().splitlines()]
    assert {1, 2, 3} <= set(steps)


def test_splits_hold_every_row_once_as_it_was_given(plain_run: RunFolder, sums: Path) -> None:
    rows = [line for name in ("train", "validation", "test") for line in plain_run.split(name).read_text().splitlines()]
    assert sorted(map(json.loads, rows), key=str) == sorted(map(json.loads, sums.read_text().splitlines()), key=str)


def test_the_same_seed_gives_the_same_adapter(plain_run: RunFolder, llama: Path, sums: Path, tmp_path: Path) -> None:
    again = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **FAST))
    assert adapter(again) == adapter(plain_run)


def test_the_saved_config_gives_the_same_run(plain_run: RunFolder, tmp_path: Path) -> None:
    saved = yaml.safe_load((plain_run.path / "config.yaml").read_text())
    saved |= {"out": tmp_path / "run", "split": tuple(saved["split"]), "target_modules": tuple(saved["target_modules"])}
    assert adapter(tune(TuneConfig(**saved))) == adapter(plain_run)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_what_is_left_open_is_the_familys_recipe(family: Family) -> None:
    asked: dict[str, Any] = {"model": "m", "data": "d", "out": Path("o")}
    found = family.resolve(TuneConfig(**asked), 576)
    assert (found.epochs, found.batch_size) == (2.0 if family.decoder else 3.0, 8)
    assert found.learning_rate == (1e-3 if family.kind == "encoder" else 2e-3)
    given = TuneConfig(**asked, epochs=0.5, batch_size=2, learning_rate=1e-4)
    assert family.resolve(given, 576) == given


def test_the_rate_of_a_decoder_falls_with_its_width() -> None:
    decoder, encoder = FAMILIES["llama"], FAMILIES["bert"]
    assert [decoder.rate(hidden) for hidden in (64, 576, 896, 2048)] == [2e-3, 2e-3, 1.4e-3, 7.4e-4]
    assert encoder.rate(2048) == 1e-3


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_size": 64}])
def test_the_default_rate_is_known_from_the_model_alone(settings: dict[str, Any], llama: Path, sums: Path) -> None:
    asked = {"model": str(llama), "data": str(sums), "out": Path("unused")}
    assert prepare_job(TuneConfig(**asked, **settings), Silent()).config.learning_rate == 2e-3
    assert prepare_job(TuneConfig(**asked, **settings, learning_rate=5e-4), Silent()).config.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (8, 1)),
        ({"pass_tokens": 100}, (2, 4)),  # most rows have fewer than 50 tokens, and more than 25
        ({"pass_tokens": 1}, (1, 8)),
        ({"pass_tokens": 1, "batch_size": 4}, (4, 1)),
        ({"pass_tokens": 1, "gradient_accumulation": 2}, (8, 2)),
    ],
)
def test_a_step_of_long_rows_is_computed_in_several_passes(
    settings: dict[str, Any], expected: tuple[int, int], llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_ft.tune.defaults.PASS_TOKENS", settings.pop("pass_tokens", 1024))
    job = prepare_job(TuneConfig(model=str(llama), data=str(sums), out=Path("unused"), **settings), Silent())
    assert (job.config.batch_size, job.config.gradient_accumulation) == expected


def test_evaluations_watch_as_many_rows_as_take_a_tenth_of_the_training(llama: Path, sums: Path) -> None:
    def watched(**settings: Any) -> tuple[int | None, int]:
        asked = {"model": str(llama), "data": str(sums), "out": Path("unused"), "split": (0.4, 0.6, 0.0)}
        job = prepare_job(TuneConfig(**asked | settings), Silent())
        return job.config.eval_rows, len(job.watched)

    rows = 24
    assert watched(epochs=1.0) == (16, 16)  # of 16 train rows 1.2, but never fewer than 16
    assert watched(epochs=100.0) == (rows, 0)
    assert watched(eval_rows=5) == (5, 5)
    assert watched(eval_rows=1000) == (1000, 0)


OPTIONS: dict[str, dict[str, Any]] = {
    "one step": {},
    "few weights": {"rank": 2, "target_modules": ("q_proj", "v_proj"), "layers": "last:1"},
    "decayed": {"weight_decay": 0.5},
    "clipped": {"max_grad_norm": 1e-10, "alpha": 32.0},
    "dropped": {"dropout": 0.3},
    "an epoch": {"max_steps": None, "epochs": 1.0, "batch_size": 8, "schedule": "constant", "warmup": 0.0},
    "accumulated": {"max_steps": None, "epochs": 1.0, "gradient_accumulation": 2, "warmup": 0.9, "learning_rate": 2e-2},
    "two steps": {"max_steps": 2, "warmup": 0.0, "block_size": 16},
    "without turns": {"chat_template": "none"},
    "written": {"prompt": "{prompt}:", "completion": "{completion}"},
    "cut": {"max_length": 40, "split": (0.5, 0.3, 0.2)},
    "another seed": {"seed": 1},
    "fp32": {"base_format": "fp32"},
    "bf16": {"base_format": "bf16"},
    "int8": {"base_format": "int8"},
    "nf4": {"base_format": "nf4"},
}
"""A training for each test, or for several options that do not disturb each other: one step where that is enough."""


Trained = Callable[[str], RunFolder]


@pytest.fixture(scope="module")
def trained(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run of a name in OPTIONS."""

    @cache
    def run(name: str) -> RunFolder:
        settings = {**FAST, "max_steps": 1, "batch_size": 4, "compute": "fp32", **OPTIONS[name]}
        return tune(
            TuneConfig(model=str(llama), data=str(sums), out=tmp_path_factory.mktemp("run") / "run", **settings)
        )

    return run


def weights(run: RunFolder) -> dict[str, Any]:
    """The adapter's matrices by their short names, such as 0.self_attn.q_proj.lora_A."""
    found = load_file(run.adapter / "adapter_model.safetensors")
    return {name.partition("layers.")[2].removesuffix(".weight"): tensor for name, tensor in found.items()}


def steps(run: RunFolder) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_rank_is_the_size_of_both_matrices(trained: Trained) -> None:
    found = weights(trained("few weights"))
    assert {tensor.shape[0 if name.endswith("A") else 1] for name, tensor in found.items()} == {2}
    report = trained("few weights").report()
    assert report["trainable_parameters"] == sum(tensor.size for tensor in found.values())
    assert report["trainable_parameters"] < trained("one step").report()["trainable_parameters"] / 4


def test_target_modules_are_the_layers_that_are_adapted(trained: Trained) -> None:
    assert {name.split(".")[2] for name in weights(trained("few weights"))} == {"q_proj", "v_proj"}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[2] for name in weights(trained("one step"))} == every


def test_layers_last_k_adapts_exactly_the_last_k(trained: Trained) -> None:
    assert {name.split(".")[0] for name in weights(trained("few weights"))} == {"1"}
    assert {name.split(".")[0] for name in weights(trained("one step"))} == {"0", "1"}


def test_weight_decay_shrinks_what_has_no_gradient(trained: Trained) -> None:
    """B is 0 before the first step, so that A has no gradient in it."""
    plain, decayed = weights(trained("one step")), weights(trained("decayed"))
    (step,) = steps(trained("decayed"))
    for name in plain:
        if name.endswith("lora_A"):
            np.testing.assert_allclose(decayed[name], plain[name] * (1 - step["learning_rate"] * 0.5), rtol=1e-5)


def test_max_grad_norm_bounds_the_step_and_not_what_is_reported(trained: Trained) -> None:
    """Below AdamW's epsilon of 1e-8 a gradient hardly moves a weight."""
    plain, clipped = weights(trained("one step")), weights(trained("clipped"))
    for name in plain:
        if name.endswith("lora_B"):
            assert np.abs(clipped[name]).max() < np.abs(plain[name]).max() / 10
    assert steps(trained("clipped"))[0]["grad_norm"] > 1e-3


def test_alpha_scales_the_gradient(trained: Trained) -> None:
    (plain,), (doubled,) = steps(trained("one step")), steps(trained("clipped"))
    assert doubled["loss"] == pytest.approx(plain["loss"], rel=1e-5)  # B is 0
    assert doubled["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-3)
    assert json.loads((trained("clipped").adapter / "adapter_config.json").read_text())["lora_alpha"] == 32


def test_dropout_changes_the_training_and_not_the_scores(trained: Trained) -> None:
    (plain,), (dropped,) = steps(trained("one step")), steps(trained("dropped"))
    assert dropped["loss"] == pytest.approx(plain["loss"], rel=1e-5)  # B is 0
    assert dropped["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)
    assert trained("dropped").report()["nll"]["base"] == trained("one step").report()["nll"]["base"]
    assert json.loads((trained("dropped").adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.3


def test_epochs_are_passes_over_the_train_rows(trained: Trained) -> None:
    rows = trained("an epoch").report()["rows"]["train"]
    assert [step["step"] for step in steps(trained("an epoch"))] == list(range(1, round(rows / 8) + 1))
    tokens = sum(step["tokens"] for step in steps(trained("an epoch")))
    assert sum(step["tokens"] for step in steps(trained("accumulated"))) == tokens  # every row once


def test_batch_size_is_the_rows_of_a_step(trained: Trained) -> None:
    (plain,), epoch = steps(trained("one step")), steps(trained("an epoch"))
    assert epoch[0]["tokens"] == pytest.approx(2 * plain["tokens"], rel=0.3)


def test_gradient_accumulation_takes_several_batches_a_step(trained: Trained) -> None:
    rows = trained("accumulated").report()["rows"]["train"]
    accumulated = steps(trained("accumulated"))
    assert len(accumulated) == round(rows / (4 * 2))
    assert accumulated[0]["tokens"] == pytest.approx(2 * steps(trained("one step"))[0]["tokens"], rel=0.3)


def test_max_steps_are_the_steps(trained: Trained) -> None:
    assert [step["step"] for step in steps(trained("two steps"))] == [1, 2]
    assert trained("two steps").report()["steps"] == 2


def test_learning_rate_is_the_peak(trained: Trained) -> None:
    assert max(step["learning_rate"] for step in steps(trained("accumulated"))) == pytest.approx(2e-2)
    assert max(step["learning_rate"] for step in steps(trained("two steps"))) == pytest.approx(1e-2)


def test_warmup_is_the_share_of_steps_in_which_the_rate_rises(trained: Trained) -> None:
    rates = [step["learning_rate"] for step in steps(trained("accumulated"))]
    assert rates == pytest.approx([2e-2 * step / len(rates) for step in range(1, len(rates) + 1)])


def test_the_constant_schedule_keeps_the_rate_and_the_cosine_lowers_it(trained: Trained) -> None:
    assert {step["learning_rate"] for step in steps(trained("an epoch"))} == {1e-2}
    first, second = (step["learning_rate"] for step in steps(trained("two steps")))
    assert second < first == 1e-2


def test_chat_template_none_trains_on_the_rows_as_they_are_written(trained: Trained) -> None:
    run = trained("without turns")
    assert run.rendering()["chat_template"] is None
    assert trained("one step").rendering()["chat_template"] is not None
    assert steps(run)[0]["tokens"] < steps(trained("one step"))[0]["tokens"]


def test_prompt_and_completion_are_what_the_model_reads(trained: Trained) -> None:
    run = trained("written")
    row = json.loads(run.split("test").read_text().splitlines()[0])
    sample = run.report()["samples"][0]
    assert (sample["prompt"], sample["reference"]) == (row["prompt"] + ":", row["completion"])


def test_max_length_cuts_rows_and_is_reported(trained: Trained) -> None:
    run = trained("cut")
    assert run.rendering()["max_length"] == 40
    assert "truncated" in {finding["code"] for finding in run.report()["findings"]}
    assert steps(run)[0]["tokens"] <= 4 * 40


def test_split_gives_the_shares_of_the_rows(trained: Trained, sums: Path) -> None:
    count = len(sums.read_text().splitlines())
    lines = {name: trained("cut").split(name).read_text().splitlines() for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in lines.items()} == {
        "train": count * 5 // 10,
        "validation": count * 3 // 10,
        "test": count * 2 // 10,
    }


def test_seed_draws_the_split_and_the_new_weights(trained: Trained) -> None:
    plain, other = trained("one step"), trained("another seed")
    assert plain.split("train").read_text() != other.split("train").read_text()
    a, b = (weights(run)["0.self_attn.q_proj.lora_A"] for run in (plain, other))
    assert np.isclose(a, b).mean() < 0.1


@pytest.mark.parametrize("base_format", ["fp32", "bf16", "int8", "nf4"])
def test_base_format_is_what_the_base_is_held_in(trained: Trained, base_format: str) -> None:
    """The finer the format, the nearer the untuned loss to that of the float weights."""
    run = trained(base_format)
    assert run.base()["format"] == base_format
    assert (run.base()["codes_sha256"] is None) == (base_format == "fp32")
    assert not run.codes.exists()  # only int4 codes are chosen over rows
    exact = trained("fp32").report()["nll"]["base"]
    distance = abs(run.report()["nll"]["base"] - exact)
    if base_format in ("bf16", "int8"):
        assert distance < abs(trained("one step").report()["nll"]["base"] - exact)
    assert distance < 0.2


def test_block_size_is_the_weights_of_a_scale(trained: Trained) -> None:
    for name, size in (("one step", 32), ("two steps", 16)):
        assert trained(name).base()["block_size"] == size
        scales = load_file(trained(name).codes)["model.layers.0.self_attn.q_proj.scales"]
        assert scales.size == 64 * 64 / size  # of a matrix of 64 x 64


def test_eval_steps_sets_how_often_validation_is_evaluated(llama: Path, sums: Path, tmp_path: Path) -> None:
    run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", eval_steps=2, **FAST))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_nll" in line] == [0, 2, 3]


def test_threads_are_set_and_reported(llama: Path, sums: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            settings = TuneConfig(
                model=str(llama), data=str(sums), out=tmp_path / str(threads), threads=threads, **FAST
            )
            assert tune(settings).report()["threads"] == threads
    finally:
        torch.set_num_threads(before)


def test_given_validation_and_test_files_are_used_as_they_are(llama: Path, sums: Path, tmp_path: Path) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    for name, part in (("train", lines[:20]), ("validation", lines[20:30]), ("test", lines[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    given = {name: str(tmp_path / f"{name}.jsonl") for name in ("validation", "test")}
    run = tune(
        TuneConfig(
            model=str(llama),
            data=str(tmp_path / "train.jsonl"),
            out=tmp_path / "run",
            max_steps=1,
            compute="fp32",
            **given,
        )
    )
    assert run.report()["rows"] == {"train": 20, "validation": 10, "test": 10}


def test_a_row_in_two_given_splits_is_refused_with_its_numbers(llama: Path, sums: Path, tmp_path: Path) -> None:
    leak = tmp_path / "validation.jsonl"
    leak.write_text(sums.read_text().splitlines()[4] + "\n")
    with pytest.raises(AuditRefused, match=r"also in the train split, e.g. train row 5 is validation row 1"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", validation=str(leak), **FAST))
    assert not (tmp_path / "run").exists()


def test_answers_that_are_all_cut_off_are_refused(llama: Path, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(AuditRefused, match="--max-length 10"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", max_length=10, **FAST))


def test_the_end_of_an_answer_is_learned_although_it_is_also_the_padding(llama_run: RunFolder) -> None:
    tokenizer = TextTokenizer.load(llama_run.tokenizer)
    assert tokenizer.pad_id == tokenizer.eos_id
    rows = str(llama_run.split("validation"))
    opened = open_source(str(llama_run.path), EvalConfig(data=rows), read_rows(rows))
    examples = encode_rows(opened.rendering, tokenizer, read_rows(rows))
    answers = [opened.scorer.answer(example.input_ids[: example.prompt_length], 30) for example in examples]
    assert all(len(answer) < 30 for answer in answers)


def test_a_classifier_learns_and_names_its_labels(bert_run: RunFolder) -> None:
    report = bert_run.report()
    assert report["task"] == "text-classification"
    assert bert_run.rendering()["labels"] == ["blame", "praise"]
    assert report["metrics"]["accuracy"]["test"]["value"] > 0.9


def test_a_run_is_never_overwritten(plain_run: RunFolder, llama: Path, sums: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=plain_run.path, **FAST))


def test_an_unknown_architecture_is_refused_before_the_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match=r"'mamba' are not supported; supported are: llama .*bert"):
        tune(TuneConfig(model=str(tmp_path), data="nowhere.jsonl", out=tmp_path / "run"))


def test_a_missing_model_is_answered_with_a_near_one(llama: Path, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model at .*lama.*did you mean 'llama'"):
        tune(TuneConfig(model=str(llama.with_name("lama")), data=str(sums), out=tmp_path / "run"))


def test_a_folder_of_a_like_name_does_not_stand_before_the_hub(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-run").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **_: str(llama))
    assert find_base("gpt2").path == llama

    def unknown(model: str, **_: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    with pytest.raises(ModelError, match=r"gpt2 is not a local folder.*did you mean 'gpt2-run'.*offline"):
        find_base("gpt2")


def test_pickled_weights_are_refused(sums: Path, tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        tune(TuneConfig(model=str(folder), data=str(sums), out=tmp_path / "run"))


@pytest.mark.parametrize(("task", "says"), [("text-classification", "llama model does text-generation")])
def test_a_task_that_the_family_cannot_do_is_refused(
    llama: Path, sums: Path, tmp_path: Path, task: Any, says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", task=task))


def test_a_missing_column_is_answered_with_a_near_one(bert: Path, reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'label'"):
        tune(TuneConfig(model=str(bert), data=str(reviews), out=tmp_path / "run", label="lable"))


def test_one_class_is_refused(bert: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"good {n}", "label": "x"}) + "\n" for n in range(20)))
    for allow in ((), ("one-class",)):
        with pytest.raises(AuditRefused, match="only the class 'x' in all rows") as refusal:
            tune(TuneConfig(model=str(bert), data=str(rows), out=tmp_path / "run", allow=allow))
        assert refusal.value.exit_code == 5


def test_ctrl_c_keeps_the_best_adapter_and_says_so(llama: Path, sums: Path, tmp_path: Path) -> None:
    class Impatient:
        def say(self, text: str) -> None:
            if text.startswith("step 2"):
                raise KeyboardInterrupt  # not a signal: a job in the background ignores SIGINT

        def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
            pass

    settings = TuneConfig(
        model=str(llama), data=str(sums), out=tmp_path / "run", **{**FAST, "max_steps": 50}, eval_steps=2
    )
    with pytest.raises(Interrupted, match="best adapter so far"):
        tune(settings, Impatient())
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(UsageError, match="no finished run"):
        RunFolder.open(tmp_path / "run")


def test_a_gpu_that_is_too_small_is_said(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TorchBackend, "gradient", full)
    with pytest.raises(WillNotFit, match=r"GPU's memory is too small.*--batch-size"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **FAST))
    assert not (tmp_path / "run").exists()


def test_rows_that_differ_only_in_an_unused_column_stay_together(llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"id": n, "prompt": f"hello {n % 4}", "completion": " seven"} for n in range(40)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tune(
        TuneConfig(
            model=str(llama), data=str(rows), out=tmp_path / "run", split=(0.5, 0.25, 0.25), max_steps=1, compute="fp32"
        )
    )
    prompts = [
        {json.loads(line)["prompt"] for line in run.split(name).read_text().splitlines()}
        for name in ("train", "validation", "test")
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 4


def test_a_saved_set_of_splits_is_used_as_it_is(llama: Path, sums: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    parts = {"train": rows[:20], "validation": rows[20:28], "test": rows[28:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        str(tmp_path / "set")
    )
    run = tune(
        TuneConfig(model=str(llama), data=str(tmp_path / "set"), out=tmp_path / "run", max_steps=1, compute="fp32")
    )
    assert run.report()["rows"] == {"train": 20, "validation": 8, "test": 12}


def test_the_page_shows_rows_only_with_include_samples(
    plain_run: RunFolder, llama: Path, sums: Path, tmp_path: Path
) -> None:
    shown = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", include_samples=True, **FAST))
    prompt = shown.report()["samples"][0]["prompt"].splitlines()[-2]
    assert prompt.partition("&")[0] in shown.page_path.read_text(encoding="utf-8").replace("&lt;", "<").replace(
        "&gt;", ">"
    )
    assert "hello" not in plain_run.page_path.read_text(encoding="utf-8")
    assert adapter(shown) == adapter(plain_run)
