"""Findings about scores reach report.json, the terminal and `eval`; a good run has none."""

import json
from pathlib import Path
from typing import Any

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, TuneConfig
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.findings import CODES
from edge_ft.tune import tune


class Said:
    """Collects what a command says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)

    def advance(self, stage: str, done: int, total: int, note: str = "") -> None:
        pass


def codes(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["code"] for finding in findings if finding["code"] in (*CODES, "absent-class")]


def test_cut_answers_are_found_where_answers_are_cut(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    assert "cut-answers" not in codes(llama_run.report()["findings"])
    for source in (str(llama_run.path), str(llama_adapter_bundle.path)):
        for tokens, found in ((1, ["cut-answers"]), (8, [])):
            settings = EvalConfig(data=str(llama_run.split("test")), max_new_tokens=tokens)
            assert codes(evaluate(source, settings)["findings"]) == found


def test_a_validation_file_of_one_class_says_so(bert: Path, reviews: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in reviews.read_text().splitlines()]
    held = [line for line in lines[40:] if line["label"] == "blame"], lines[40:]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:40]))
    for name, rows in zip(("one", "both"), held, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
        said = Said()
        settings = {"data": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / f"{name}.jsonl")}
        config = TuneConfig(
            model=str(bert), out=tmp_path / f"{name}-run", max_steps=1, compute="fp32", split=(1, 0, 0), **settings
        )
        found = codes(tune(config, said).report()["findings"])
        assert ("absent-class" in found) == ("constant-metric" in found) == (name == "one")
        assert any(text.endswith("[constant-metric]") for text in said.texts) == (name == "one")
