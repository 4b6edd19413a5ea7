"""Texts on the command line: escapes, and labels with commas."""

import json
from pathlib import Path

import pytest
from in_process import run_cli
from tiny_bundle import write_decoder

from edge_ft.config import RunConfig, unescape


def test_a_newline_a_tab_and_a_backslash_can_be_escaped() -> None:
    assert unescape(r"a\nb\tc\\n\d") == "a\nb\tc\\n\\d"


def answer(monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: str = "") -> dict[str, object]:
    """The JSON of `edge-ft run`."""
    code, out = run_cli(monkeypatch, "run", *arguments, "--json", "-", stdin=stdin.encode())
    assert code == 0
    result: dict[str, object] = json.loads(out)
    return result


def test_escapes_in_a_prompt_are_resolved_and_those_of_standard_input_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(write_decoder(tmp_path / "bundle"))
    typed, piped, raw = (
        answer(monkeypatch, bundle, *prompt, "--max-new-tokens", "1", stdin=stdin)["prompt_tokens"]
        for prompt, stdin in (((r"0\n1",), ""), ((), "0\n1"), ((), r"0\n1"))
    )
    assert typed == piped
    assert raw != piped


@pytest.mark.parametrize("flag", ["--stop", "--system"])
def test_escapes_in_options_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(
        "edge_ft.runtime.run.run_text", lambda bundle, text, config, stream: seen.append(config) or {"text": text}
    )
    answer(monkeypatch, str(tmp_path), "x", flag, r"a\n")
    assert (seen[0].stop, seen[0].system)[flag == "--system"] in (("a\n",), "a\n")


def test_labels_are_separated_by_commas_or_given_one_by_one() -> None:
    assert RunConfig(labels=("yes, no,",)).labels == ("yes", "no")
    assert RunConfig(labels=("seven, hello", " five")).labels == ("seven, hello", " five")


def test_a_label_may_hold_a_comma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = str(write_decoder(tmp_path / "bundle"))
    found = answer(monkeypatch, bundle, "Is it:", "--labels", "0, 1", "--labels", "2")
    assert set(found["scores"]) == {"0, 1", "2"}  # type: ignore[call-overload]
