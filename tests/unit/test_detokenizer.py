"""Streamed text has whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ft.errors import UsageError
from edge_ft.runtime.decode import StreamingDetokenizer


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer with a token for every byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def spell(words: list[str]) -> tuple[StreamingDetokenizer, list[str]]:
    """A detokenizer with a token for every word, and the result of each push."""
    pieces = StreamingDetokenizer(lambda ids: "".join(words[token] for token in ids), ("STOP", "end."))
    return pieces, [pieces.push(token) for token in range(len(words)) if not pieces.stopped]


def test_a_character_of_several_tokens_is_returned_whole() -> None:
    pieces = StreamingDetokenizer(decode_bytes)
    assert [pieces.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert pieces.finish() == ""


def test_half_a_character_at_the_end_is_dropped() -> None:
    pieces = StreamingDetokenizer(decode_bytes)
    assert "".join(pieces.push(byte) for byte in "ab€".encode()[:-1]) + pieces.finish() == "ab"


def test_invalid_bytes_become_a_replacement_character_once_text_follows() -> None:
    pieces = StreamingDetokenizer(decode_bytes)
    assert [pieces.push(byte) for byte in b"\xffok"] == ["", "\ufffdo", "k"]


def test_a_stop_string_ends_the_text_before_it() -> None:
    pieces, shown = spell(["Well ", "now", "STOP", "more"])
    assert shown == ["Well ", "now", ""]
    assert pieces.stopped
    assert pieces.finish() == ""


def test_a_stop_string_across_tokens_is_held_back_until_it_is_certain() -> None:
    pieces, shown = spell(["a ST", "O", "P b"])
    assert shown == ["a ", "", ""]
    assert pieces.stopped


def test_text_that_only_began_like_a_stop_string_is_returned() -> None:
    pieces, shown = spell(["a ST", "O", "NE", " en", "d"])
    assert shown == ["a ", "", "STONE", " ", ""]
    assert pieces.finish() == "end"
    assert not pieces.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StreamingDetokenizer(decode_bytes, ("ok", ""))


@given(text=st.text("ab€😀", max_size=12), stop=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
def test_the_text_does_not_depend_on_where_tokens_end(text: str, stop: list[str]) -> None:
    def read(words: list[bytes]) -> tuple[str, bool]:
        pieces = StreamingDetokenizer(lambda ids: decode_bytes(list(b"".join(words[at] for at in ids))), tuple(stop))
        shown = []
        for token in range(len(words)):
            shown.append(pieces.push(token))
            if pieces.stopped:
                break
        return "".join([*shown, pieces.finish()]), pieces.stopped

    whole, stopped = read([text.encode()])
    assert read([bytes([byte]) for byte in text.encode()]) == (whole, stopped)
    assert text.startswith(whole)
    assert stopped == any(string in text for string in stop)
    assert stopped or whole == text
