"""A chat template that prints the date: rows keep the one of their training, an answer at run time has today's."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from recorded_progress import RecordedProgress
from small_tokenizers import CHATML, write_bpe
from tiny_models import write_llama, write_sums

from edge_ft.config import RowsConfig, TuneConfig
from edge_ft.data import Columns, Rendering, Row, TextTokenizer, clock, encode_prompt, encode_rows, trained_rendering
from edge_ft.data.rendering import make_rendering
from edge_ft.errors import UsageError
from edge_ft.tune.prepare import prepare_job

DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y %H:%M') + '.<|im_end|>\n' }}" + CHATML
COLUMNS = Columns("prompt_completion", "{prompt}", "{completion}")
ROW = Row(1, {"prompt": "hello", "completion": "seven"})


class Clock(datetime):
    """A clock that a test sets."""

    today = datetime(2026, 2, 28, 23, 59)

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return cls.today


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The clock stands at the end of a February; `setattr(Clock, "today", …)` sets it."""
    monkeypatch.setattr(clock, "datetime", Clock)
    return monkeypatch


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return TextTokenizer.load(write_bpe(tmp_path, chat_template=DATED))


def test_rows_keep_their_date_and_answers_have_todays(tokenizer: TextTokenizer, tomorrow: pytest.MonkeyPatch) -> None:
    made = make_rendering(RowsConfig(), COLUMNS, "text-generation", tokenizer, 256, ())
    rendering = Rendering.from_dict(made.to_dict())
    (row,), prompt = encode_rows(rendering, tokenizer, [ROW]), encode_prompt(rendering, tokenizer, "hello")
    assert tokenizer.decode(row.input_ids[: row.prompt_length]) == tokenizer.decode(prompt)
    assert "28 Feb 2026 23:59" in tokenizer.decode(prompt)

    tomorrow.setattr(Clock, "today", Clock.today + timedelta(minutes=1))
    assert encode_rows(rendering, tokenizer, [ROW]) == [row]
    assert "01 Mar 2026 00:00" in tokenizer.decode(encode_prompt(rendering, tokenizer, "hello"))


def test_a_template_without_a_clock_has_no_date(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    assert make_rendering(RowsConfig(), COLUMNS, "text-generation", tokenizer, 256, ()).rendered_at is None


def test_the_same_template_given_again_has_the_date_of_the_training(
    tokenizer: TextTokenizer, tomorrow: pytest.MonkeyPatch
) -> None:
    own = make_rendering(RowsConfig(), COLUMNS, "text-generation", tokenizer, 256, ())
    tomorrow.setattr(Clock, "today", Clock.today + timedelta(days=1))
    assert trained_rendering(own, RowsConfig(chat_template="auto"), [ROW], tokenizer, 256) == own


def test_a_run_that_is_resumed_tomorrow_reads_the_same_rows(tmp_path: Path, tomorrow: pytest.MonkeyPatch) -> None:
    model = write_llama(tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    config = TuneConfig(model=str(model), data=str(write_sums(tmp_path / "rows.jsonl")), out=tmp_path / "run")
    begun = prepare_job(config, RecordedProgress())
    tomorrow.setattr(Clock, "today", Clock.today + timedelta(days=1))
    resumed = prepare_job(config, RecordedProgress(), begun.identity)
    assert resumed.prepared.examples_sha256 == begun.prepared.examples_sha256
    with pytest.raises(UsageError, match="reads differently"):
        prepare_job(config, RecordedProgress(), {**begun.identity, "rendered_at": None})
