"""Properties that hold for any rows: formats read alike, masks mark the answer, a sealed bundle opens as it was."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, write_bpe

from edge_ft.artifacts import Bundle
from edge_ft.config import RowsConfig
from edge_ft.data import IGNORED, Row, TextTokenizer, encode_rows, find_columns, make_rendering, read_rows
from edge_ft.data.readers import column_names
from edge_ft.errors import BundleError

MANY = settings(
    max_examples=int(os.environ.get("EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
texts = st.text(st.characters(codec="utf-8"), max_size=40)
answers = texts.filter(lambda text: text.strip() != "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_bpe(tmp_path_factory.mktemp("bpe")))


@MANY
@given(st.lists(st.fixed_dictionaries({"a": answers, "b": texts}), min_size=1, max_size=4))
@example([{"a": 'a"b,\n"', "b": "\u2028\x85\x0b"}])
def test_all_formats_hold_the_same_rows(tmp_path: Path, records: list[dict[str, str]]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([["a", "b"], *([row["a"], row["b"]] for row in records)])
        (tmp_path / name).write_bytes(file.getvalue().encode())
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv"):
        assert [row.fields for row in read_rows(str(tmp_path / name))] == records, name


@MANY
@given(answers, answers, st.sampled_from([None, CHATML]))
def test_the_loss_is_over_the_answer_and_its_end_alone(
    tokenizer: TextTokenizer, prompt: str, answer: str, template: str | None
) -> None:
    rows = [Row(1, {"prompt": prompt, "completion": answer})]
    config = RowsConfig(chat_template="auto" if template else "none")
    columns = find_columns(column_names(rows), config, "text-generation")
    rendering = make_rendering(config, columns, "text-generation", tokenizer, 2048)
    (encoded,) = encode_rows(rendering, tokenizer, rows)
    trained = [int(label) for label in encoded.labels if label != IGNORED]
    shown = tokenizer.decode(trained[:-1], skip_special_tokens=False)
    assert trained[-1] == tokenizer.eos_id
    assert shown == tokenizer.decode(tokenizer.encode(answer), skip_special_tokens=False)
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


@MANY
@given(
    st.dictionaries(st.text("abcxyz", min_size=1, max_size=8), st.binary(max_size=50), min_size=2, max_size=5),
    st.data(),
)
def test_a_sealed_bundle_opens_as_it_was_and_not_otherwise(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    for name, content in files.items():
        (folder / f"{name}.bin").write_bytes(content)
    graph = f"{next(iter(files))}.bin"
    manifest = {"task": "fill-mask", "model": graph, "graphs": {"1": graph}, "lane": "base", "rendering": {}}
    Bundle.seal(folder, manifest)
    opened = Bundle.open(folder).manifest
    assert {name: opened[name] for name in manifest} == manifest
    assert opened["files"].keys() == {f"{name}.bin" for name in files}
    name = data.draw(st.sampled_from(sorted(files)))
    changed = data.draw(st.binary(max_size=50).filter(lambda content: content != files[name]))
    (folder / f"{name}.bin").write_bytes(changed)
    with pytest.raises(BundleError, match="is not the file that was exported"):
        Bundle.open(folder)
