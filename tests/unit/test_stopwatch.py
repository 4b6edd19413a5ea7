"""The seconds of the stages of a command."""

from edge_ft.tune.stopwatch import Timings


def test_a_stage_excludes_the_stages_inside_it() -> None:
    now = [0.0]
    timings = Timings(lambda: now[0])
    with timings.stage("train"):
        now[0] += 3
        for _ in range(2):
            with timings.stage("validation"):
                now[0] += 1
                with timings.stage("checkpoints"):
                    now[0] += 0.25
    with timings.stage("write"):
        now[0] += 5
    assert timings.seconds == {"train": 3.0, "validation": 2.0, "checkpoints": 0.5, "write": 5.0}
    assert timings.text == "train 3.0, validation 2.0, checkpoints 0.5, write 5.0; 10.5 in all"


def test_seconds_move_to_a_stage_that_was_a_part_of_another() -> None:
    timings = Timings(seconds={"load": 9.0})
    timings.move(4.0, "load", "calibrate")
    assert timings.seconds == {"load": 5.0, "calibrate": 4.0}
