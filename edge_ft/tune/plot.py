"""The loss curve of a run as a picture."""

import importlib.util
import json

from edge_ft.artifacts import RunFolder
from edge_ft.progress import Progress

__all__ = ["plot_losses"]


def plot_losses(run: RunFolder, progress: Progress) -> None:
    """Draw loss.png: training and validation loss (nats per target token) over steps.

    Args:
        run: Its metrics.jsonl is read.
        progress: Gets a note if matplotlib is not installed; then nothing is drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        progress.say("no loss.png: it needs pip install 'edge-ft[metrics]'")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, style in (("loss", "-"), ("validation_nll", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=key)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per target token")
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(run.path / "loss.png"))
