"""The study of what ships, with a tiny decoder: one scorer for every file, and what is kept is not done again."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_llama

from edge_ft.bench.studies import kept_jobs, race_worker, shipping
from edge_ft.bench.studies.kept_jobs import KeptJobs
from edge_ft.bench.studies.usual_formats import FORMATS, round_weights
from edge_ft.bench.studies.whole_command import Ran
from edge_ft.config import TuneConfig
from edge_ft.errors import EdgeFTError, UsageError
from edge_ft.tune import tune


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Jobs are done in this process, on rows and a model that are tiny; the names of those that were done."""
    done: list[str] = []

    def run(self: KeptJobs, name: str, job: dict[str, Any]) -> dict[str, Any]:
        done.append(name)
        return race_worker.work(job | {"started": 0.0})

    def tune_here(settings: dict[str, Any], out: Path, threads: int) -> Ran:
        done.append(out.name)
        if "second" in out.name:
            raise EdgeFTError("ours is trained again")
        given = settings | {"split": tuple(settings["split"]), "epochs": 1.0}
        tune(TuneConfig(**given, out=out, threads=threads))
        return Ran(1.0, 1.0, None, [])

    model = write_llama(tmp_path / "model")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the usual way takes it away
    monkeypatch.setattr(KeptJobs, "run", run)
    monkeypatch.setattr(kept_jobs, "machine", lambda: {"cpu": "any"})
    monkeypatch.setattr(shipping, "tune_command", tune_here)
    monkeypatch.setattr(shipping, "decoder_weights", lambda: model)
    for name, count in {"TRAIN": 24, "VALIDATION": 8, "TEST": 6, "EPOCHS": 1.0}.items():
        monkeypatch.setattr(shipping, name, count)
    sums = [{"passage": f"{a} and {b}", "question": "sum?", "answer": str(a + b)} for a in range(8) for b in range(8)]
    monkeypatch.setitem(
        shipping.SETS, "asdiv", shipping.Case(lambda: sums, "{passage}: {question}", shipping.SETS["asdiv"].completion)
    )
    few = ("Q4_0, 8-bit head", "RTN, 8-bit head")
    for name in FORMATS.keys() - set(few):
        monkeypatch.delitem(FORMATS, name)
    return done


def test_files_of_both_ways_are_scored_and_kept(here: list[str], tmp_path: Path) -> None:
    def study(ours: str) -> None:
        trainings = shipping.Trainings(cases="asdiv-on-grid", seeds=1, rates="1e-3")
        shipping.main(trainings=trainings, out=tmp_path / "out", ours=ours, threads=1, quiet=True)

    study("first")
    trainings = [name for name in here if name in ("usual-s0-lr0.001", "ours-first-s0")]
    assert len(trainings) == 2
    records = tmp_path / "out" / "records" / "shipping"
    (record,) = json.loads((records / "asdiv-on-grid.json").read_text())
    usual, ours = record["usual"], record["ours"]
    assert usual.keys() == {"float", *FORMATS}
    assert ours.keys() == {"merged", "adapter"}
    assert usual["float"]["shipped"] != usual["Q4_0, 8-bit head"]["shipped"]
    assert abs(ours["merged"]["shipped"] - ours["merged"]["graph"]) < 1e-3, "the scorer and the exact graph"
    assert abs(ours["adapter"]["shipped"] - ours["adapter"]["graph"]) < 1e-3, "by its own weights, not the training's"
    assert usual["float"]["size_bytes"] > 3 * ours["merged"]["size_bytes"] / 2
    assert (tmp_path / "out" / "shipping.md").read_text().count("| **ours**, first |") == 2
    for theme in ("", "-dark"):
        assert re.search(r"<svg [^>]*xmlns", text := (tmp_path / "out" / f"shipping{theme}.svg").read_text())
        assert "var(" not in text
    text = (records / "asdiv-on-grid.json").read_text()
    (records / "fiqa-off-grid.json").write_text(text.replace("first", "elsewhere"))
    here.clear()
    study("first")
    assert (records / "asdiv-on-grid.json").read_text() == text, "the seed took the place of the same one"
    more = (tmp_path / "out" / "shipping.md").read_text()
    assert more.count("| **ours**, first |") == more.count("| **ours**, elsewhere |") == 2, "kept from another machine"
    (tmp_path / "out" / "shipping.md").unlink()
    shipping.main(trainings=shipping.Trainings(seeds=0), out=tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "shipping.md").read_text() == more, "written from the records alone"
    assert here == []
    with pytest.raises(EdgeFTError, match="trained again"):
        study("second")
    assert here == ["ours-second-s0"], "the usual way is kept, ours is of another revision"


def test_a_case_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--cases asdiv: there is no such case"):
        shipping.main(trainings=shipping.Trainings(cases="asdiv"), out=tmp_path, quiet=True)


@pytest.mark.parametrize("part", ["matrices", "head"])
def test_what_is_scored_is_what_onnx_runtime_multiplies(part: str) -> None:
    import onnxruntime as ort
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    weight = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    made: list[Any] = []
    original = tool.MatMulNBitsQuantizer.process

    def process(self: Any) -> None:
        original(self)
        made.append(self.model.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.MatMulNBitsQuantizer, "process", process)
        rounded = getattr(FORMATS["RTN, 8-bit head"], part)(weight)
    session = ort.InferenceSession(made[0].SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_allclose(found.T, rounded.weight, atol=1e-5)


def test_norms_count_in_float32_and_are_not_rounded() -> None:
    weights = {
        "model.embed_tokens.weight": np.ones((4, 64), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.ones((2, 64), np.float32),
        "model.norm.weight": np.ones(64, np.float32),
    }
    found, size = round_weights(weights, FORMATS["Q4_0, 8-bit head"])
    assert found.keys() == weights.keys() - {"model.norm.weight"}
    assert size == 4 * 2 * 34 + 2 * 2 * 18 + 64 * 4
