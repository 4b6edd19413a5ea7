"""The command line: a message of one line and a documented exit code for every error, and JSON for scripts."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from tiny_models import write_bert

from edge_ft import __version__
from edge_ft.artifacts import Bundle, RunFolder


def edge_ft(*arguments: str | Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_ft", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    )


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The message of a refused command on stderr."""
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("edge-ft: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_and_version_need_no_model() -> None:
    assert "tune" in edge_ft("--help").stdout
    assert edge_ft("--version").stdout.strip()
    assert "--learning-rate" in edge_ft("tune", "--help").stdout


def test_version_prints_the_version_and_with_v_the_environment(tmp_path: Path) -> None:
    environment = {"EDGE_FT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "3"}
    assert edge_ft("--version", **environment).stdout == f"{__version__}\n"
    lines = edge_ft("--version", "-v", **environment).stdout.splitlines()
    assert lines[0].startswith(f"edge-ft {__version__}, Python ")
    assert f"onnxruntime {version('onnxruntime')}" in lines
    assert lines[-4].startswith("threads: 3 by default, ")
    assert re.fullmatch(r"memory: \d+ MB available of \d+ MB", lines[-3])
    assert lines[-2].startswith("GPU: ")
    assert lines[-1] == f"cache folder: {tmp_path}"


def test_version_v_lists_libraries_that_are_not_installed() -> None:
    script = (
        "import runpy, sys; from importlib import metadata; installed = metadata.version\n"
        "def version(name):\n"
        "    if name == 'torch': raise metadata.PackageNotFoundError(name)\n"
        "    return installed(name)\n"
        "metadata.version = version; sys.modules['torch'] = None; sys.argv = ['edge-ft', '--version', '-v']\n"
        "runpy.run_module('edge_ft', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "torch is not installed\n" in done.stdout
    assert "GPU: none (torch is not installed)\n" in done.stdout


@pytest.mark.parametrize("command", ["tune", "export", "eval"])
def test_the_first_line_comes_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    """That import takes longer than a reader waits."""
    (tmp_path / "torch.py").write_text("raise ImportError('imported now')")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    flags = {
        "tune": ("--model", tmp_path, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run"),
        "export": (tmp_path, "--out", tmp_path / "bundle"),
        "eval": (tmp_path, "--data", tmp_path / "rows.jsonl"),
    }
    done = edge_ft(command, *flags[command], PYTHONPATH=str(tmp_path))
    assert "imported now" in refused(done, 2)
    assert "loading torch and transformers\n" in done.stderr.partition("edge-ft:")[0]


def test_an_unknown_flag_is_refused_with_a_similar_one() -> None:
    assert "--max-steps" in refused(edge_ft("tune", "--model", "m", "--data", "d", "--out", "o", "--max-stps", "3"), 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "--rank"),
        (["--split", "0.5", "0.1", "0.1"], "sum to 1"),
        (["--layers", "first:2"], "last:K"),
        (["--completion", "{a}"], "--prompt"),
        (["--schedule", "linear"], "linear"),
        (["--batch-size", "many"], "many"),
        (["--max-length", "long"], "long"),
        (["--preset", "thorogh"], "did you mean 'thorough'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_invalid_value_is_refused(flags: list[str], message: str) -> None:
    assert message in refused(edge_ft("tune", "--model", "m", "--data", "d", "--out", "o", *flags), 2)


def test_a_missing_option_is_named_as_required() -> None:
    assert "--out is required: see edge-ft tune --help" in refused(edge_ft("tune", "--model", "m", "--data", "d"), 2)
    assert "BUNDLE is required" in refused(edge_ft("run"), 2)
    assert "Did you mean --data instead of --dta?" in refused(edge_ft("eval", "m", "--dta", "d"), 2)
    assert "--out requires an argument" in refused(edge_ft("tune", "--model", "m", "--data", "d", "--out"), 2)


def test_flags_override_the_config_file_and_print_config_prints_the_result(tmp_path: Path) -> None:
    config = tmp_path / "tune.yaml"
    config.write_text("model: m\ndata: d\nout: o\nrank: 4\nsplit: [0.7, 0.2, 0.1]\n")
    printed = edge_ft("tune", "--config", config, "--rank", "2", "--print-config")
    found = yaml.safe_load(printed.stdout)
    assert (found["model"], found["rank"], found["split"], found["alpha"]) == ("m", 2, [0.7, 0.2, 0.1], 16.0)


def test_flags_and_the_config_file_override_a_preset(tmp_path: Path) -> None:
    config = tmp_path / "tune.yaml"
    config.write_text("model: m\ndata: d\nout: o\npatience: 7\n")
    flags = ("--preset", "thorough", "--config", config, "--epochs", "9", "--max-length", "auto")
    found = yaml.safe_load(edge_ft("tune", *flags, "--print-config").stdout)
    assert (found["learning_rate"], found["patience"], found["epochs"]) == (0.0005, 7, 9.0)
    assert found["max_length"] == "auto"


def test_a_plan_is_printed_as_a_table_and_as_json(llama: Path, sums: Path, tmp_path: Path) -> None:
    flags = ("plan", "--model", llama, "--data", sums, "--preset", "low-memory", "--show", "1", "--quiet")
    for_people = edge_ft(*flags, "--json", tmp_path / "plan.json")
    assert for_people.stderr == ""
    assert "recommended: --layers all --memory normal" in for_people.stdout
    assert "⟦" in for_people.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found.keys() == json.loads(edge_ft(*flags, "--json", "-").stdout).keys()
    assert found["recommended"] in found["choices"]


def test_a_plan_has_the_exit_codes_of_a_tune(llama: Path, sums: Path, tmp_path: Path) -> None:
    flags = ("plan", "--model", llama, "--data", sums, "--quiet")
    assert "--allow leak" in refused(edge_ft(*flags, "--validation", sums), 5)
    assert "did you mean 'leak'" in refused(edge_ft(*flags, "--allow", "leek"), 2)
    script = (
        "import runpy, sys; from edge_ft.system import Available; "
        "Available.here = classmethod(lambda cls, out: Available(10, 10)); "
        "sys.argv[0] = 'edge-ft'; runpy.run_module('edge_ft', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, flags)], capture_output=True, text=True)
    assert "take a smaller model" in refused(done, 4)


def test_a_missing_config_file_or_an_unknown_key_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(edge_ft("tune", "--config", tmp_path / "none.yaml"), 2)
    (tmp_path / "typo.yaml").write_text("model: m\ndata: d\nout: o\nrnk: 4\n")
    message = refused(edge_ft("tune", "--config", tmp_path / "typo.yaml"), 2)
    assert message.endswith("typo.yaml: unknown setting 'rnk' (did you mean 'rank'?)")


def test_tune_export_run_eval_and_verify_by_command(llama: Path, sums: Path, tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    tuned = edge_ft(
        *("tune", "--model", llama, "--data", sums, "--out", run, "--epochs", "8", "--learning-rate", "0.01"),
        *("--base-format", "int4", "--split", "0.6", "0.2", "0.2", "--json", "-"),
    )
    assert json.loads(tuned.stdout) == RunFolder(run).report()
    assert "step" in tuned.stderr
    exported = edge_ft(
        "export", run, "--out", bundle, "--lane", "adapter", "--json", tmp_path / "export.json", "--quiet"
    )
    assert exported.stderr == ""
    assert "quantization tax" in exported.stdout
    assert json.loads((tmp_path / "export.json").read_text()) == Bundle.open(bundle).manifest
    answer = json.loads(edge_ft("run", bundle, "hello 3 the answer", "--max-new-tokens", "5", "--json", "-").stdout)
    assert answer["finish_reason"] in ("stop", "length")
    scored = edge_ft("eval", bundle, "--data", run / "splits" / "test.jsonl", "--json", "-", "--quiet")
    assert json.loads(scored.stdout)["rows"] == RunFolder(run).report()["rows"]["test"]
    assert edge_ft("verify", bundle).returncode == 0


def test_a_finished_run_says_even_quietly_that_nothing_was_changed(
    llama_run: RunFolder, llama: Path, sums: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in llama_run.path.rglob("*")}
    given = ("tune", "--config", llama_run.config_path, "--model", llama, "--data", sums, "--out", llama_run.path)
    done = edge_ft(*given, "--resume", "--rank", "63", "--quiet")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 0
    assert "is finished: nothing was changed; it was trained with --rank " in line and "and not 63" in line
    assert {path: path.stat().st_mtime_ns for path in llama_run.path.rglob("*")} == before


def test_a_run_that_learned_nothing_is_not_to_be_exported(llama_run: RunFolder, tmp_path: Path) -> None:
    run = shutil.copytree(llama_run.path, tmp_path / "run")
    (run / "report.json").write_text(json.dumps({**llama_run.report(), "best_step": 0}))
    printed = edge_ft("tune", "--config", run / "config.yaml", "--out", run, "--resume").stdout
    assert "nothing was learned" in printed and "edge-ft export" not in printed
    assert (
        "next: edge-ft export"
        in edge_ft("tune", "--config", llama_run.config_path, "--out", llama_run.path, "--resume").stdout
    )


def test_a_refused_export_exits_with_3(llama_run: RunFolder, tmp_path: Path) -> None:
    done = edge_ft("export", llama_run.path, "--out", tmp_path / "bundle", "--max-tax", "0", "--min-retained", "2")
    assert "--min-retained" in refused(done, 3)


def test_a_missing_extra_is_refused_with_its_pip_command(llama_run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = edge_ft("tune", "--model", "m", "--data", "d", "--out", "o", PYTHONPATH=str(tmp_path))
    assert "pip install 'edge-ft[train]'" in refused(done, 2)


def test_a_changed_bundle_is_refused(llama_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(llama_bundle.path, tmp_path / "bundle")
    (tmp_path / "bundle" / "config.json").write_text("{}")
    for command in ("run", "verify", "bench"):
        assert "sha256" in refused(edge_ft(command, tmp_path / "bundle", *(["x"] if command == "run" else [])), 2)


def test_a_folder_that_is_not_a_bundle_is_refused(llama: Path, tmp_path: Path) -> None:
    assert "not a bundle" in refused(edge_ft("run", llama, "x"), 2)
    for command in (("run", "none", "x"), ("verify", "none")):
        assert "none does not exist" in refused(edge_ft(*command), 2)
    assert "none is not a local folder" in refused(edge_ft("bench", "none"), 2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    assert "no model at" in refused(edge_ft("eval", tmp_path / "none", "--data", rows), 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no rows"), ('{"prompt": "a", "completion": "b"}\nnot json\n', "2"), ("[1]\n", "1")],
    ids=["empty", "not-json", "not-a-row"],
)
def test_rows_that_cannot_be_read_are_named(llama: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    done = edge_ft("tune", "--model", llama, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run")
    assert message in refused(done, 2)


def test_a_full_disk_is_reported_and_leaves_nothing(llama_run: RunFolder, tmp_path: Path) -> None:
    """A file size limit makes every write of the weights fail, as a full disk does."""
    script = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.argv[0] = 'edge-ft'; "
        "runpy.run_module('edge_ft', run_name='__main__')"
    )
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            "export",
            str(llama_run.path),
            "--out",
            str(tmp_path / "out" / "bundle"),
            "--quiet",
        ],
        capture_output=True,
        text=True,
    )
    assert "disk" in refused(done, 4)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_internal_error_has_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ZeroDivisionError('a bug')")
    done = edge_ft("verify", tmp_path, PYTHONPATH=str(tmp_path))
    assert "internal error" in refused(done, 70)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = edge_ft("verify", tmp_path, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_chat_answers_every_line(llama_bundle: Bundle) -> None:
    done = edge_ft(
        "run", llama_bundle.path, "-i", "--max-new-tokens", "4", stdin="hello 1 the answer\nhello 2 the answer\n"
    )
    assert done.returncode == 0
    assert done.stdout.count("> ") == 3


def test_a_file_of_rows_is_answered_in_order(llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path) -> None:
    rows, out = llama_run.split("test"), tmp_path / "answers.jsonl"
    done = edge_ft(
        "run", llama_bundle.path, "--jsonl", rows, "--out", out, "--max-new-tokens", "6", "--json", "-", "--quiet"
    )
    assert json.loads(done.stdout)["rows"] == len(rows.read_text().splitlines())
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    alone = json.loads(edge_ft("run", llama_bundle.path, prompts[2], "--max-new-tokens", "6", "--json", "-").stdout)
    assert answers[2]["text"] == alone["text"]
    assert {"text", "prompt_tokens", "new_tokens", "finish_reason"} <= set(answers[0])
    assert "exists already" in refused(edge_ft("run", llama_bundle.path, "--jsonl", rows, "--out", out), 2)


def test_rows_of_all_kinds_are_answered_and_one_bad_row_fails_alone(llama_bundle: Bundle, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}]
    rows = [{"messages": turns}, {"prompt": "hello " * 300}, {"instruction": "hello", "input": "3"}, {"text": "hello"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    flags = ("--max-new-tokens", "3", "--json", "-", "--quiet")
    done = edge_ft("run", llama_bundle.path, "--jsonl", tmp_path / "rows.jsonl", "--out", out, *flags)
    assert json.loads(done.stdout)["failed"] == 1
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["text" in answer for answer in answers] == [True, False, True, True]
    assert answers[0]["text"] == answers[3]["text"]


def test_the_last_newline_of_stdin_is_not_part_of_the_prompt(llama_bundle: Bundle) -> None:
    flags = ("--max-new-tokens", "3", "--json", "-")
    piped = json.loads(edge_ft("run", llama_bundle.path, *flags, stdin="hello 3\n").stdout)
    given = json.loads(edge_ft("run", llama_bundle.path, "hello 3", *flags).stdout)
    assert piped["prompt_tokens"] == given["prompt_tokens"]


def test_a_chat_that_exceeds_the_model_limit_starts_a_new_one(llama_bundle: Bundle) -> None:
    done = edge_ft("run", llama_bundle.path, "-i", "--max-new-tokens", "40", stdin="hello the answer is seven\n" * 12)
    assert done.returncode == 0, done.stderr
    assert "starting a new one" in done.stdout


def test_a_classifier_prints_labels_and_scores(bert_bundle: Bundle) -> None:
    done = edge_ft("run", bert_bundle.path, stdin="the film was very good")
    assert "praise" in done.stdout.splitlines()[0]
    found = json.loads(edge_ft("run", bert_bundle.path, "the film was bad", "--json", "-").stdout)
    assert found["label"] == "blame"
    assert sum(found["scores"].values()) == pytest.approx(1)


def test_a_classifier_cannot_chat(bert_bundle: Bundle) -> None:
    assert "text-classification bundle" in refused(edge_ft("run", bert_bundle.path, "-i"), 2)


def test_a_broken_model_file_is_refused(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    done = edge_ft("export", folder, "--out", tmp_path / "bundle", "--task", "text-classification")
    refused(done, 2)


def test_peft_alone_does_not_import_bitsandbytes_and_finds_it_afterwards() -> None:
    """Importing it takes a second; whoever uses PEFT with it in the same process must not notice."""
    code = (
        "import sys; from edge_ft.models.libraries import import_libraries; from edge_ft.progress import Silent\n"
        "import_libraries(Silent(), 'peft'); assert 'bitsandbytes' not in sys.modules\n"
        "from peft.import_utils import is_bnb_available; assert is_bnb_available()"
    )
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **paths})
