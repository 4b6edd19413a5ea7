"""Rows keep the line on which they start, and an error about a file names the line."""

import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from edge_ft.data import Row, column_names, read_rows, split_names
from edge_ft.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_jsonl_counts_blank_lines_and_drops_a_byte_order_mark(tmp_path: Path) -> None:
    source = write(tmp_path, "d.jsonl", '\ufeff{"a": "x"}\n\n{"a": 2}\r\n')
    assert read_rows(source) == [Row(1, {"a": "x"}), Row(3, {"a": 2})]


def test_line_separators_inside_a_json_string_do_not_end_a_line(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "d.ndjson", '{"a": "x\u2028y\x85z"}\n{"a": "b"}'))
    assert [(row.number, row.fields["a"]) for row in rows] == [(1, "x\u2028y\x85z"), (2, "b")]


def test_json_is_a_list_of_objects(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "d.json", '[{"a": 1}, {"a": null}]')) == [Row(1, {"a": 1}), Row(2, {"a": None})]


def test_csv_records_may_span_lines(tmp_path: Path) -> None:
    source = write(tmp_path, "d.csv", '\ufeffq,a\r\n"one\n""two""",1\r\n\r\nthree,\r\n')
    assert read_rows(source) == [Row(2, {"q": 'one\n"two"', "a": "1"}), Row(5, {"q": "three", "a": ""})]


def test_tsv_and_very_long_fields(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert read_rows(write(tmp_path, "d.tsv", f"q\ta\n{long}\tb,c\n")) == [Row(2, {"q": long, "a": "b,c"})]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"p": st.text(), "q": st.text()}), min_size=1, max_size=4))
def test_rows_written_as_json_are_read_back(tmp_path: Path, records: list[dict[str, str]]) -> None:
    source = write(tmp_path, "d.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert [row.fields for row in read_rows(source)] == records


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"a": ["x", "y"], "n": [1, None]})
    saved.to_parquet(str(tmp_path / "d.parquet"))
    expected = [Row(1, {"a": "x", "n": 1}), Row(2, {"a": "y", "n": None})]
    assert read_rows(str(tmp_path / "d.parquet")) == expected

    saved.save_to_disk(str(tmp_path / "one"))
    assert read_rows(str(tmp_path / "one")) == expected
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "many"))
    assert read_rows(str(tmp_path / "many"), split="train") == expected
    assert read_rows(f"{tmp_path / 'many'}:test") == [Row(1, {"a": "y", "n": None})]
    assert split_names(str(tmp_path / "many")) == ["train", "test"]
    assert split_names(str(tmp_path / "one")) == []
    with pytest.raises(DataError, match="has the splits train, test: name one"):
        read_rows(str(tmp_path / "many"))
    assert len(read_rows(str(tmp_path / "many"), split="test")) == 1
    with pytest.raises(DataError, match=r"no split 'tests' \(did you mean 'test'\?\): it has train, test"):
        read_rows(str(tmp_path / "many"), split="tests")
    with pytest.raises(DataError, match="not a folder saved by datasets"):
        read_rows(str(tmp_path))


def test_classes_of_a_saved_set_keep_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a", "b", "c", "d"], "label": [1, 0, None, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "d"))
    assert [row.fields["label"] for row in read_rows(str(tmp_path / "d"))] == ["yes", "no", None, None]


def test_a_colon_in_a_file_name_does_not_name_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, "a:train.jsonl", '{"a": 1}')
    assert read_rows(source) == [Row(1, {"a": 1})]
    assert split_names(source) == []
    with pytest.raises(DataError, match="does not exist"):
        read_rows(f"{source}:train")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "rows.jsonl", '{"a": 1}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_rows("data/rows.jsonl:train")


def test_a_split_of_a_hub_data_set_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def load(name: str, split: str) -> datasets.Dataset:
        requested.append((name, split))
        return datasets.Dataset.from_dict({"a": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("nobody/nothing:test", "nobody/nothing"):
        assert read_rows(source) == [Row(1, {"a": 1})]
    assert requested == [("nobody/nothing", "test"), ("nobody/nothing", "train")]


def test_dates_in_a_table_become_text(tmp_path: Path) -> None:
    table = pyarrow.table({"day": pyarrow.array([0], pyarrow.date32())})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert read_rows(str(tmp_path / "d.parquet")) == [Row(1, {"day": "1970-01-01"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("d.jsonl", '{"a": 1}\n\n[1]', "line 3 is a JSON list"),
        ("d.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}', "line 2 is not UTF-8"),
        ("d.jsonl", "\n \n", "holds no rows"),
        ("d.json", '{"a": 1}\n{"a": 2}', r"one object per line, name it \.jsonl"),
        ("d.json", '{"data": []}', "must be a list of objects"),
        ("d.json", '[{"a": 1}, "b"]', "item 2 is a JSON str"),
        ("d.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 fields and its header has 2"),
        ("d.csv", "a,b\n1\n", "line 2 has 1 fields"),
        ("d.csv", 'a,b\n1,"x\n2,y\n', "line 2 is not CSV"),
        ("d.csv", "a,a\n1,2\n", "the column 'a' twice"),
        ("d.csv", "a,b\n", "holds no rows"),
        ("d.parquet", "PAR1", "cannot be read as Parquet"),
        ("d.txt", "hello", r"unknown format.*\.jsonl"),
    ],
)
def test_errors_about_broken_files_name_the_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, name, content))


def test_a_missing_file_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"does not exist \(did you mean 'train.jsonl'\?\)"):
        read_rows(str(tmp_path / "tran.jsonl"))


def test_a_hub_that_cannot_be_reached_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"nobody/nothing is neither an existing file nor a hub data set.*no route"):
        read_rows("nobody/nothing")


def test_columns_of_all_rows_are_listed() -> None:
    assert column_names([Row(1, {"a": 1}), Row(2, {"b": 1, "a": 2})]) == ["a", "b"]
