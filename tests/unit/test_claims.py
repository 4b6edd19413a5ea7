"""`make claims` keeps every result, resumes where it was stopped, and writes only figures that were measured."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edge_ft.artifacts import Bundle
from edge_ft.bench.studies import claims
from edge_ft.bench.studies.claim_cases import CASES, CLAIMS, MODELS, ROWS, Case, Data, Model
from edge_ft.bench.studies.claim_tables import TABLES, document
from edge_ft.errors import EdgeFTError, UsageError
from edge_ft.files import write_json, write_text


class EdgeFT:
    """Commands that take no time: they record their arguments and write the files of real ones."""

    def __init__(self) -> None:
        self.given: list[tuple[str, ...]] = []
        self.dies_at: str | None = None
        self.refuses = False

    def __call__(self, arguments: Sequence[str]) -> int:
        self.given.append(tuple(arguments))
        command, options = arguments[0], dict(pairwise(arguments))
        out = Path(options["--out"]) if "--out" in options else None
        if command == "tune" and out is not None:
            (out / "splits").mkdir(parents=True, exist_ok=True)
        if command == "export" and out is not None:
            assert not out.exists()
            out.mkdir()
        if command == self.dies_at:
            return 70
        if command == "export" and out is not None and self.refuses:
            rejected = out.rename(out.with_name(out.name + ".rejected"))
            write_text(rejected / "model.onnx", "")
            manifest = {"task": "text-classification", "model": "model.onnx", "graphs": {"1": "model.onnx"}}
            manifest |= {"lane": "merged", "rendering": {}, "verification": {"refused": ["too much was lost"]}}
            Bundle.seal(rejected, manifest)
            return 3
        write_json(Path(options["--json"]), {"command": command})
        return 0

    @property
    def commands(self) -> list[str]:
        return [arguments[0] for arguments in self.given]


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(10)]
    monkeypatch.setitem(ROWS, "few", Data("few rows", lambda: rows, ("--prompt", "{question}")))
    monkeypatch.setitem(MODELS, "tiny", Model("tiny", "decoder", lambda: tmp_path / "weights"))
    return Case("tiny-few", "tiny", "few", 6, 2, 2, ("--max-steps", "1"), ("int4", "int8"), 8)


STAGES = ["tune", "export", "export", "eval", "eval", "eval"]


def test_a_case_is_trained_exported_and_scored(case: Case, tmp_path: Path) -> None:
    command = EdgeFT()
    claims.run_case(case, tmp_path / "case", command)
    assert command.commands == STAGES
    tune, first, second, base, tuned, shipped = command.given
    assert {"--max-steps", "--prompt", str(tmp_path / "weights")} <= set(tune)
    assert (first[first.index("--weights") + 1], second[second.index("--weights") + 1]) == ("int4", "int8")
    assert base[1] == tuned[1] == str(tmp_path / "case" / "run")
    assert "--adapter" in base and "--adapter" not in tuned
    assert shipped[1] == str(tmp_path / "case" / "int4")
    lines = (tmp_path / "case" / "rows" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 6


def test_what_is_done_is_not_done_again(case: Case, tmp_path: Path) -> None:
    claims.run_case(case, tmp_path / "case", EdgeFT())
    again = EdgeFT()
    claims.run_case(case, tmp_path / "case", again)
    assert again.commands == []


@pytest.mark.parametrize("died", ["tune", "export", "eval"])
def test_a_stopped_case_resumes_with_its_unfinished_stage(case: Case, tmp_path: Path, died: str) -> None:
    command = EdgeFT()
    command.dies_at = died
    with pytest.raises(EdgeFTError, match=f"edge-ft {died} ended with exit code 70"):
        claims.run_case(case, tmp_path / "case", command)
    done = command.commands[:-1]
    again = EdgeFT()
    claims.run_case(case, tmp_path / "case", again)
    assert done + again.commands == STAGES
    if died == "tune":
        assert again.given[0][-3] == "--resume", "from its checkpoint"


def test_a_partly_written_result_is_not_used(case: Case, tmp_path: Path) -> None:
    write_text(tmp_path / "case" / ".tune.json", "{")
    command = EdgeFT()
    claims.run_case(case, tmp_path / "case", command)
    assert command.commands == STAGES


def test_a_refused_export_is_a_result_and_is_not_scored_on_answers(case: Case, tmp_path: Path) -> None:
    command = EdgeFT()
    command.refuses = True
    claims.run_case(case, tmp_path / "case", command)
    assert command.commands == STAGES[:-1]
    kept = json.loads((tmp_path / "case" / "export-int4.json").read_text())
    assert kept["verification"]["refused"] == ["too much was lost"]


def test_one_case_that_fails_does_not_stop_the_others(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def run_case(case: Case, folder: Path) -> None:
        tried.append(case.name)
        if case.name == "minilm-main":
            raise EdgeFTError("no such weights")

    monkeypatch.setattr(claims, "run_case", run_case)
    with pytest.raises(EdgeFTError, match=r"1 case\(s\) did not finish: minilm-main"):
        claims.main(out=tmp_path, write=tmp_path / "page.md", only="recipe")
    assert tried == list(CLAIMS["recipe"])
    assert "not run" in (tmp_path / "page.md").read_text()


def test_an_unknown_claim_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'recipe'"):
        claims.main(out=tmp_path, only="recipes")


# The page


def metric(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def tables(results: dict[str, dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Claim -> the cells of its rows, the header left out."""
    page = document(results, 2)
    found = {}
    for name in CLAIMS:
        part = page.split(f"(`--only {name}`)")[1].split("\n## ")[0]
        lines = [line for line in part.splitlines() if line.startswith("|")]
        found[name] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
        assert all(len(row) == len(lines[0].strip("|").split("|")) for row in found[name])
    return found


def test_every_claim_has_a_table_and_every_case_a_claim() -> None:
    assert list(TABLES) == list(CLAIMS)
    assert {name for names in CLAIMS.values() for name in names} == set(CASES)


def test_without_results_no_number_is_written() -> None:
    for name, found in tables({}).items():
        assert found, name
        for row in found:
            assert "not run" in row
            assert not [cell for cell in row if re.fullmatch(r"[+-]?\d+\.\d+.*", cell)], row


def test_figures_are_those_of_the_kept_results() -> None:
    test = {
        "nll": {"base": 2.8, "trained": 1.5, "shipped": 1.6},
        "metrics": {
            "accuracy": {"base": metric(0.05), "trained": metric(0.61), "shipped": metric(0.6)},
            "macro_f1": {"base": metric(0.4), "trained": metric(0.4), "shipped": metric(0.41)},
        },
    }
    manifest = {"verification": {"test": test, "refused": []}, "files": {"a": {"bytes": 30_000_000}}}
    whole = {"verification": {"test": test, "refused": []}, "files": {"a": {"bytes": 120_000_000}}}
    report = {
        "trainable_parameters": 490_000, "steps": 200, "cpu_seconds": 90.0,
        "peak_rss_bytes": 1_100_000_000, "nll": {"best": 1.4, "last": 1.9, "test": 1.5},
        "overfitting": {"train_nll": 0.4, "gap": 1.0},
    }  # fmt: skip
    kept = {"tune": report, "export-int4": manifest, "export-fp32": whole}
    found = tables({"minilm-main": kept, "minilm-rows-32": {"tune": report}})
    accuracy, macro = found["understanding"][:2]
    assert accuracy[3:] == [
        *("accuracy", "0.050 [0.030, 0.070]", "0.610 [0.590, 0.630]", "0.600 [0.580, 0.620]", "better")
    ]
    assert macro[-1] == "no difference shown"
    assert found["size"][0][1:4] == ["int4", "30.0", "25%"]
    assert found["overfitting"][0][3:] == ["200", "0.400", "1.400", "1.900", "+1.000", "1.500", "1.5"]
    main = next(row for row in found["compute"] if row[0] == "minilm-main")
    assert main[2:] == ["0.49", "2000", "200", "1.5", "1.10"]
    assert found["recipe"][0][1] == "LoRA on all layers (default)"
    refused = {"verification": {"test": test, "refused": ["too much was lost"]}, "files": {}}
    found = tables({"minilm-main": kept | {"export-int4": refused}})
    assert found["understanding"][0][-1] == "better (bundle refused by the gate)"


def test_a_lower_loss_is_better_and_a_metric_without_phrases_is_a_dash() -> None:
    def answers(nll: float, **metrics: dict[str, float]) -> dict[str, Any]:
        return {"nll": nll, "nll_interval": [nll - 0.1, nll + 0.1], "metrics": metrics}

    kept = {
        "answers-base": answers(3.0, eos_rate=metric(0.1)),
        "answers-tuned": answers(1.0, eos_rate=metric(0.9)),
        "answers-shipped": answers(1.1, eos_rate=metric(0.05)),
    }
    rows = tables({"smollm2-main": kept})["coherence"]
    loss, eos, *phrases = [row[2:] for row in rows[:5]]
    assert loss[0] == "held-out loss"
    assert loss[-1] == "better"
    assert eos[-1] == "worse"
    assert {tuple(row[1:]) for row in phrases} == {("-", "-", "-", "-")}
