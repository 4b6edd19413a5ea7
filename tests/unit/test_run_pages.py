"""The pages of a run and of an export: what was learned and lost, and no row of the user's unless it was asked for."""

import re
from pathlib import Path

import pytest
from html_elements import Elements, needs_matplotlib
from recorded_runs import LOG, PLAN, SECRET_ROW, manifest, report

from edge_ft.export.page import page_beside, page_of_export
from edge_ft.plots import Curve, curves
from edge_ft.tune.page import page_of_run


def text_of(page: str) -> str:
    return " ".join(" ".join(Elements(page).texts).split())


def test_the_page_of_a_run_says_what_was_learned_dropped_and_spent() -> None:
    text = text_of(page_of_run(report(), LOG, PLAN, with_samples=False))
    assert "fell from 3.0000 to 2.1000 nats per target token by step 10 of 10, on 90 rows, in 12 s" in text
    assert "2 to 5 tokens 3 3.2000 2.4000 -0.8000" in text
    assert "cut-rows warning 2 2 rows were cut after 64 tokens" in text
    assert "21 s: 1.8 of 2 threads on average" in text
    assert "train 10.0 83% 9.0" in text  # seconds, share, as planned


def test_rows_of_the_user_are_shown_only_when_asked_for() -> None:
    assert "4711" not in page_of_run(report(), LOG, PLAN, with_samples=False)
    with_samples = page_of_run(report(), LOG, PLAN, with_samples=True)
    assert SECRET_ROW not in with_samples and "my account is &lt;b&gt;4711&lt;/b&gt;" in with_samples
    assert "4711" not in page_of_export("bundle", manifest(), None)


def test_a_run_that_learned_nothing_and_was_not_planned_says_so() -> None:
    text = text_of(page_of_run(report(best_step=0, findings=[], slices=[]), LOG, None, with_samples=False))
    assert "Nothing was learned" in text
    assert "Nothing was dropped or cut" in text
    assert "By length" not in text


def test_the_page_of_an_export_says_what_was_lost() -> None:
    text = text_of(page_of_export("bundle", manifest(), None))
    assert "Shipping bundle cost +0.0300 nats per target token on 9 validation rows, 96.7% of what was learned" in text
    assert "loss, nats per target token 3.0000 2.1000 2.1300" in text
    assert "all 8.00 onnx/model_q4.onnx_data 7.00 tokenizer.json 1.00" in text


@pytest.mark.parametrize(
    ("verification", "lead"),
    [
        (
            {"refused": ["quantization tax +0.03 is above --max-tax 0.02"]},
            "was refused: quantization tax +0.03 is above",
        ),
        ({"quantization_tax": None, "retained_gain": None}, "is a base without an adapter, scored on 9 rows"),
        ({"quantization_tax": None, "rows": 0, "test": None}, "was not scored: an export with --data ROWS"),
    ],
)
def test_an_export_that_was_refused_or_not_scored_says_so(verification: dict[str, object], lead: str) -> None:
    assert lead in text_of(page_of_export("bundle", manifest(**verification), None))


def test_the_page_of_an_export_lies_beside_the_bundle_whose_files_are_all_listed() -> None:
    assert page_beside(Path("out/bundle")) == Path("out/bundle.report.html")


def test_without_matplotlib_the_pages_have_the_tables_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ft.tune.page.can_plot", lambda: False)
    monkeypatch.setattr("edge_ft.export.page.can_plot", lambda: False)
    for page in (page_of_run(report(), LOG, PLAN, with_samples=False), page_of_export("bundle", manifest(), None)):
        assert "pip install &#39;edge-ft[metrics]&#39;" in page
        assert "<svg" not in page and "<table" in page


@needs_matplotlib
def test_curves_have_a_line_each_and_named_ticks() -> None:
    svg = curves([Curve([(0, 3.0), (1, 2.0)], "train"), Curve([(0, 3.1)], "test", 1)], "", "nats", ("base", "shipped"))
    assert {"var(--series-0)", "var(--series-1)"} <= set(re.findall(r"var\(--series-\d\)", svg))
    assert all(name in svg for name in ("train", "test", "base", "shipped", "nats"))
