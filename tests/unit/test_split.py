"""No row is in two splits, a seed gives the same splits, and the fingerprint depends on the content alone."""

from hypothesis import given
from hypothesis import strategies as st

from edge_ft.data import Row, fingerprint, overlap, split_rows

rows_of_few_values = st.lists(st.integers(0, 30), min_size=1, max_size=80).map(
    lambda values: [Row(number, {"a": value}) for number, value in enumerate(values, start=1)]
)
shares = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (0.98, 0.01, 0.01)])


@given(rows_of_few_values, shares, st.integers(0, 9))
def test_splits_are_a_partition_without_common_rows(
    rows: list[Row], shares: tuple[float, float, float], seed: int
) -> None:
    splits = split_rows(rows, shares, seed)
    assert sorted(row.number for part in splits.values() for row in part) == [row.number for row in rows]
    assert not overlap(splits["train"], splits["validation"])
    assert not overlap(splits["train"], splits["test"])
    assert not overlap(splits["validation"], splits["test"])
    different = len({row.fields["a"] for row in rows})
    for part, share in zip(splits.values(), shares, strict=True):
        assert part == sorted(part, key=lambda row: row.number)
        assert share > 0 or not part
    if different >= sum(share > 0 for share in shares):
        assert all(part for part, share in zip(splits.values(), shares, strict=True) if share > 0)
    assert split_rows(rows, shares, seed) == splits


def test_shares_are_kept_and_the_seed_matters() -> None:
    rows = [Row(number, {"a": number}) for number in range(1, 1001)]
    splits = split_rows(rows, (0.8, 0.15, 0.05), 0)
    assert [len(part) for part in splits.values()] == [800, 150, 50]
    assert split_rows(rows, (0.8, 0.15, 0.05), 1)["test"] != splits["test"]


def test_overlap_names_rows_of_both_sides_and_ignores_the_order_of_fields() -> None:
    first = [Row(1, {"a": 1, "b": "x"}), Row(2, {"a": 2})]
    second = [Row(5, {"b": "x", "a": 1}), Row(6, {"a": 3}), Row(7, {"a": 1, "b": "x"})]
    assert overlap(first, second) == [(1, 5), (1, 7)]


def test_a_key_decides_which_rows_are_equal() -> None:
    rows = [Row(number, {"id": number, "a": number % 5}) for number in range(1, 51)]
    splits = split_rows(rows, (0.6, 0.2, 0.2), 0, key=lambda row: str(row.fields["a"]))
    held = [{row.fields["a"] for row in part} for part in splits.values()]
    assert sum(map(len, held)) == len(set.union(*held)) == 5
    first, second = rows[:1], [Row(7, {"id": 99, "a": 1})]
    assert overlap(first, second) == []
    assert overlap(first, second, key=lambda row: str(row.fields["a"])) == [(1, 7)]


def test_the_fingerprint_depends_on_content_and_order() -> None:
    rows = [Row(1, {"a": "é", "b": 2}), Row(2, {"a": None})]
    assert fingerprint(rows) == fingerprint([Row(8, {"b": 2, "a": "é"}), Row(9, {"a": None})])
    assert fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint([Row(1, {"a": "e", "b": 2}), Row(2, {"a": None})])
    assert len(fingerprint([])) == 64
