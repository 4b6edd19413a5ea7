"""The page of a bench: whole in one file, texts escaped, and plots that show what is best."""

import re
from pathlib import Path
from typing import Any

import pytest
from html_elements import Elements, needs_matplotlib
from in_process import run_cli
from recorded_benches import SECRET, classifiers, decoders

from edge_ft.bench.page import page_of
from edge_ft.config import BenchConfig
from edge_ft.errors import UsageError
from edge_ft.page import Section, Table, html_page
from edge_ft.plots import Axis, Point, distributions, frontier, scatter


@pytest.mark.parametrize("records", [decoders(), decoders(nll=False, answers=False), classifiers()])
def test_nothing_points_out_of_the_page(records: list[dict[str, Any]]) -> None:
    page = page_of(records)
    found = Elements(page)
    assert not {"script", "link", "iframe", "img", "base", "object"} & set(found.tags)
    for name, value in found.attributes:
        assert not re.search(r"(https?|file|ftp|data):|//", value), (name, value)
        if name in ("href", "src", "action"):
            assert value.startswith("#")
    for address in re.findall(r"url\(([^)]*)\)", page):
        assert address.startswith("#")
    assert "@import" not in page


@needs_matplotlib
def test_parts_of_a_drawing_are_its_own() -> None:
    page = page_of([*decoders(), *classifiers()])
    named = [value for name, value in Elements(page).attributes if name == "id"]
    used = re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'href="#([^"]+)"', page)
    assert set(used) <= set(named)
    assert len(named) == len(set(named))
    assert not re.search(r"#0102[0-9a-f]{2}", page)  # every colour is one of the page's


def test_texts_from_outside_are_escaped() -> None:
    table = Table(["a"], [["<script>1</script>"]], note="&")
    page = html_page("<i>", "</p>", [Section("<b>", texts=["<u>"], tables=[table])])
    assert not {"i", "u", "b", "script"} & set(Elements(page).tags)
    assert "<script>1</script>" in Elements(page).texts
    assert "What <b>is</b> it?" in Elements(page_of(decoders())).texts


@needs_matplotlib
def test_names_in_plots_are_text_and_not_formulas() -> None:
    svg = scatter([Point(1, 1, "a$b$<c> 模型"), Point(2, 2, "x" * 60)], Axis("x", "lower"), Axis("y", "lower"))
    assert "a$b$&lt;c&gt; 模型" in svg
    assert "x" * 30 not in svg


def test_the_frontier_is_what_no_other_point_beats() -> None:
    low, high = Axis("size", "lower"), Axis("speed", "higher")
    small, fast, beaten = Point(1, 1, "small"), Point(3, 5, "fast"), Point(3, 4, "beaten")
    assert frontier([beaten, fast, small], low, high) == [small, fast]
    assert frontier([beaten, fast, small], low, low) == [small]


@needs_matplotlib
def test_a_point_a_subject_and_a_plot_for_each_cost() -> None:
    page = page_of(decoders())
    assert page.count("<figure") == 4
    for cost in ("size, MB", "decode, tokens per second", "peak memory, MB"):
        assert f"loss, nats per token against {cost}; 2 of 4 subjects lack one of them" in page
    unscored = page_of(decoders(nll=False))
    assert "Quality was not measured: give --data" in unscored
    assert "decode, tokens per second against size, MB" in unscored
    assert "64 tokens classified, ms against size, MB" in page_of(classifiers())


@needs_matplotlib
def test_the_same_records_give_the_same_page() -> None:
    assert page_of(decoders()) == page_of(decoders())


def test_the_best_of_each_row_is_marked_in_its_direction() -> None:
    page = page_of(decoders())
    rows = {row.split("</th>")[0]: row for row in page.split('<th scope="row">')}
    assert '<td class="best">44.0 [' in rows["decode_tps = tg16 @ d64 (tok/s)"]  # more is better
    assert rows["size (MB)"].split("</td>")[0].endswith('<td class="best">90.0')


def test_without_matplotlib_the_page_has_the_tables_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ft.bench.page.can_plot", lambda: False)
    page = page_of(decoders())
    assert "pip install 'edge-ft[metrics]'" in "".join(Elements(page).texts)
    assert "svg" not in Elements(page).tags
    assert "decode_tps = tg16 @ d64 (tok/s)" in page


@needs_matplotlib
def test_a_single_value_and_equal_values_are_drawn() -> None:
    from edge_ft.plots import Distribution

    assert "<svg" in distributions([Distribution([1.0], "one")], "ms")
    assert "<svg" in scatter([Point(1, 1, "a"), Point(1, 1, "b")], Axis("x", "lower"), Axis("y", "lower"))


def test_what_did_not_fit_has_a_page() -> None:
    records = decoders(nll=False, answers=False)
    for record in records:
        if record["metric"] != "size_bytes":
            record |= {"value": None, "samples": [], "note": "does not fit", "times": []}
            record["environment"] = record["environment"] | {"memory_limit_bytes": 10**7}
    assert "did not fit" in page_of(records)


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ft.bench.bench", lambda subjects, config, progress: decoders())
    file = tmp_path / "report.html"
    assert run_cli(monkeypatch, "bench", "b", "--html", str(file))[0] == 0
    assert file.read_text(encoding="utf-8") == page_of(decoders())
    assert SECRET in file.read_text(encoding="utf-8")  # the records had it


def test_rows_without_a_page_or_without_data_are_refused(tmp_path: Path) -> None:
    for settings in ({"html": tmp_path / "p.html"}, {"data": "d.jsonl"}):
        with pytest.raises(UsageError, match="--include-samples shows rows of --data in the page of --html: give both"):
            BenchConfig(include_samples=True, **settings)
