"""The pages that `make models` writes from what tests recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
from models_table import record, record_client

from edge_ft.bench.studies.models import BEGIN, END, main, render, render_clients, replace_between
from edge_ft.errors import UsageError
from edge_ft.families import FAMILIES

DECODERS = [name for name, family in FAMILIES.items() if family.decoder]


def seen(model: str, refused: str | None = None, **changes: str) -> dict[str, Any]:
    row = {
        "task": "text-generation",
        "weights": "int4",
        "client": "other 1.2",
        "held": "same tokens",
        "test": "test.py",
    }
    return {"model": model, "refused": refused, **row, **changes}


def lines(table: str) -> list[str]:
    """The table's lines, without its head."""
    return table.splitlines()[2:]


def test_a_kind_of_model_has_the_columns_that_its_tests_recorded() -> None:
    page = render([{"model": "opt-350m", "genai": "same tokens"}, {"model": "xlm-roberta", "logits": "1e-06"}])
    assert "## Decoders\n\n| model | onnxruntime-genai |\n| --- | --- |\n| opt-350m | same tokens |\n" in page
    assert (
        "## Encoders\n\n| model | int4 adapter: difference of logits to torch |\n| --- | --- |\n| xlm-roberta | 1e-06 |"
        in page
    )
    assert "## Encoder-decoders" not in page


def test_models_that_a_client_opens_alike_are_one_line() -> None:
    (line,) = lines(render_clients([seen("llama"), seen("opt-350m"), seen("SmolLM2-135M")]))
    assert line == "| text-generation | llama, opt-350m, SmolLM2-135M | int4 | other 1.2 | same tokens | `test.py` |"


def test_lines_that_differ_in_their_weights_alone_are_one() -> None:
    (line,) = lines(render_clients([seen("llama", weights=weights) for weights in ("int4 merged", "int4 adapter")]))
    assert "| int4 merged and int4 adapter |" in line
    assert len(lines(render_clients([seen("llama"), seen("llama", held="same logits")]))) == 2


def test_a_model_that_is_refused_is_named_with_its_reason() -> None:
    rows = [seen("llama"), seen("phi3", "no cache"), seen("gemma2", "no cache"), seen("opt", "no table")]
    (line,) = lines(render_clients(rows))
    held = "same tokens; fails with phi3 and gemma2: no cache; fails with opt: no table"
    assert f"| llama | int4 | other 1.2 | {held} |" in line


def test_all_models_of_a_kind_are_named_together_and_others_by_name() -> None:
    (line,) = lines(render_clients([*map(seen, DECODERS), seen("opt-350m"), seen("phi3 with more keys")]))
    assert "| every decoder, phi3 with more keys |" in line
    (line,) = lines(render_clients([seen("t5"), seen("mt5")]))
    assert "| t5, mt5 |" in line


def test_the_table_takes_the_place_of_the_one_before() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = replace_between(page, "| new |\n", "page.md")
    assert new == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"
    assert replace_between(new, "| new |\n", "page.md") == new


@pytest.mark.parametrize(("page", "missing"), [(f"{END}\n", BEGIN), (f"{BEGIN}\n", END), (f"{END}\n{BEGIN}\n", END)])
def test_a_page_without_a_place_for_the_table_is_refused(page: str, missing: str) -> None:
    with pytest.raises(UsageError, match=f"page.md lacks the line '{missing}'"):
        replace_between(page, "", "page.md")


def test_what_tests_record_is_written_to_both_pages_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, models, clients = tmp_path / "results", tmp_path / "models.md", tmp_path / "bundle.md"
    clients.write_text("no place", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no results"):
        main(results, models, clients)
    monkeypatch.setenv("MODELS", str(results))
    record("llama", genai="same tokens")
    record("llama", openvino="same logits")
    record_client("llama", "text-generation", "int4", "other 1.2", "same tokens")
    assert json.loads((results / "llama.json").read_text())["genai"] == "same tokens"
    with pytest.raises(UsageError, match="lacks the line"):
        main(results, models, clients)
    assert not models.exists()
    clients.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    main(results, models, clients)
    assert "| llama | same tokens | same logits |" in models.read_text()
    assert "| `tests/unit/test_models_page.py` |" in clients.read_text()


def test_nothing_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    record("llama", genai="same tokens")
    record_client("llama", "text-generation", "int4", "other 1.2", "same tokens")
    assert not list(tmp_path.iterdir())
