"""What a file of settings may hold, and messages that a terminal can show whatever they quote."""

from pathlib import Path

import pytest

from edge_ft.cli.settings_file import settings_in
from edge_ft.errors import UsageError, one_line

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine short lines that stand for 387 million texts."""


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['true']",
        ALIASES,
        "seed: &a [*a]",
        "seed: 2001-99-99",
        "seed: 2001-01-01",
        "seed: {a: 1}",
        "prompt: [[a]]",
        "7: 1",
        "[" * 10_000,
    ],
)
def test_a_file_of_settings_holds_options_with_plain_values(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match="settings"):
        settings_in(file)


def test_a_message_is_one_printable_line() -> None:
    assert one_line("no 'a\x1b[31m\x07'\n  in\tfile \u202etxt \udcff") == r"no 'a\x1b[31m\x07' in file \u202etxt \udcff"
    assert len(one_line(f"{'x' * 10_000}: give another")) < 1500
    assert one_line(f"{'x' * 10_000}: give another").endswith("x: give another")
