"""Progress reports what is done, and the elapsed and the remaining time."""

import io
import threading
import time
from contextlib import redirect_stderr

import pytest

from edge_ft.progress import Lines, ProgressBars, Silent, eta, heartbeat, say_if_slow, track


def test_the_remaining_time_is_extrapolated() -> None:
    assert eta(0, 10, 5.0) == "5 s"
    assert eta(5, 10, 5.0) == "5 s, 5 s left"
    assert eta(10, 10, 9.0) == "9 s"


def test_the_last_step_is_always_printed() -> None:
    stream = io.StringIO()
    assert list(track(Lines(stream), "score", "abc", 3)) == ["a", "b", "c"]
    assert stream.getvalue().splitlines() == ["score 3/3  0 s"]


def test_a_stage_that_continues_after_another_one_is_timed_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("edge_ft.progress.running_seconds", lambda: now[0])
    stream = io.StringIO()
    lines = Lines(stream, interval=0.0)
    for step in range(1, 21):
        now[0] += 1
        lines.advance("train", step, 40)
        if step == 10:
            now[0] += 100
            lines.advance("validation", 1, 1)
    assert stream.getvalue().splitlines()[-1].startswith("train 20/40  9 s, 18 s left")


def test_a_step_that_cannot_be_counted_is_reported_until_it_ends() -> None:
    reports: list[tuple[str, int, int]] = []

    class Recorded(Silent):
        def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
            reports.append((stage, done, total))
            if len(reports) == 3:
                enough.set()

    enough = threading.Event()
    with heartbeat(Recorded(), "tracing", seconds=0.01):
        assert enough.wait(10)
    count = len(reports)
    assert set(reports) == {("tracing", 0, 0)}
    time.sleep(0.05)
    assert len(reports) == count  # nothing after its end


def test_a_counted_part_is_shown_instead_of_the_step_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("edge_ft.progress.running_seconds", lambda: now[0])
    stream = io.StringIO()
    lines = Lines(stream)
    for stage, done, total in [
        *[("loading", 0, 0)] * 2,
        *[("codes", 1, 3), ("loading", 0, 0), ("codes", 2, 3), ("loading", 0, 0), ("codes", 3, 3)],
        *[("loading", 0, 0)] * 2,
    ]:
        now[0] += 3
        lines.advance(stage, done, total)
    assert stream.getvalue().splitlines() == [
        "loading  3 s",  # and not the counted one 3 s later
        "codes 2/3  6 s, 3 s left",
        "codes 3/3  12 s",
        "loading  3 s",
    ]


def test_a_slow_part_of_a_counted_stage_keeps_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("edge_ft.progress.running_seconds", lambda: now[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.advance("answers", 0, 2)
    lines.advance("answers", 1, 2)
    now[0] += 5
    lines.advance("answers", 0, 0)
    assert stream.getvalue().splitlines() == ["answers 1/2  5 s"]


def test_bars_show_the_counted_part_of_a_step() -> None:
    bars = ProgressBars()
    bars.advance("loading", 0, 0)
    bars.advance("codes", 1, 3)
    bars.advance("loading", 0, 0)
    (task,) = bars._display.tasks
    assert (task.description, task.completed, task.total, task.fields["count"]) == ("codes", 1, 3, "1/3")
    bars.say("chosen")
    bars.advance("loading", 0, 0)
    (task,) = bars._display.tasks
    assert (task.description, task.total, task.fields["count"]) == ("loading", None, "")


def test_bars_are_shown_while_the_output_of_libraries_is_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars()
    with redirect_stderr(io.StringIO()) as silenced:
        bars.say("loading the model")
    assert silenced.getvalue() == ""
    assert capsys.readouterr().err == "loading the model\n"


def test_a_step_is_named_if_it_takes_long() -> None:
    said: list[str] = []
    named = threading.Event()

    class Recorded(Silent):
        def say(self, text: str) -> None:
            said.append(text)
            named.set()

    with say_if_slow(Recorded(), "quick", seconds=60):
        pass
    with say_if_slow(Recorded(), "opening", seconds=0.01):
        assert named.wait(10)
    assert said == ["opening"]
