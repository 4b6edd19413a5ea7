"""Every decoder family goes the whole way: tune, export in both lanes, and the tokens are those of torch."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_table import record
from numpy.typing import NDArray
from peft import PeftModel
from tiny_models import DECODERS, write_decoder
from torch import nn
from transformers import AutoModelForCausalLM

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.base.adapter import add_lora
from edge_ft.base.load import find_base, load_model
from edge_ft.base.scorer import TorchScorer
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.data import Batch
from edge_ft.export import export
from edge_ft.export.source import open_export_source
from edge_ft.runtime import cache, load
from edge_ft.tune import tune
from edge_ft.tune.torch_backend import TorchBackend

WINDOW = 8
LOOSE: dict[str, Any] = {"max_tax": 5.0, "min_retained": 0.0, "max_metric_drop": 1.0}


class Family:
    """One family's model and what the pipeline makes of it, each made once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.model = write_decoder(folder / "model", name)

    @cached_property
    def rows(self) -> Path:
        file = self.folder / "rows.jsonl"
        lines = [
            {"prompt": f"hello world, the answer {n} is", "completion": " seven hello" if n % 2 else " world"}
            for n in range(24)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return file

    @cached_property
    def run(self) -> RunFolder:
        settings = TuneConfig(
            model=str(self.model),
            data=str(self.rows),
            out=self.folder / "run",
            max_steps=8,
            eval_steps=8,
            learning_rate=1e-2,
            split=(0.7, 0.3, 0.0),
        )
        return tune(settings)

    def bundle(self, lane: Any) -> Bundle:
        out = self.folder / lane
        if out.is_dir():
            return Bundle.open(out)
        return export(str(self.run.path), ExportConfig(out=out, lane=lane, **LOOSE))

    def torch(self, lane: Any) -> TorchScorer:
        """The torch model that the bundle of a lane was made from."""
        source = open_export_source(str(self.run.path), ExportConfig(out=self.folder / "unused", lane=lane))
        return TorchScorer(source.load_shipped(lane).eval(), "text-generation")


@pytest.fixture(scope="module", params=DECODERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def padded_batch(lengths: tuple[int, ...] = (30, 11, 3)) -> Batch:
    """Rows of random tokens, right-padded, every token but the first one a target."""
    random = np.random.default_rng(0)
    mask: NDArray[np.int64] = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(3, 290, mask.shape) * mask
    return Batch(
        input_ids=ids, attention_mask=mask, labels=np.where(mask == 1, ids, -100), rows=list(range(len(lengths)))
    )


def test_a_step_is_that_of_plain_peft_on_the_plain_model(family: Family, tmp_path: Path) -> None:
    """The adapter is saved here and read there, so that the file fits the plain model too."""
    settings = TuneConfig(model="", data="", out=tmp_path, compute="fp32")
    base = find_base(str(family.model))
    model = add_lora(load_model(base, "text-generation", "fp32"), base.family, "text-generation", settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    backend = TorchBackend(model, base.family, "text-generation", settings)
    backend.save(tmp_path / "adapter")
    batch = padded_batch()
    loss = backend.gradient(batch, 1)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(family.model, dtype=torch.float32), tmp_path / "adapter", is_trainable=True
    )
    ids, mask, labels = (torch.from_numpy(batch[key]) for key in ("input_ids", "attention_mask", "labels"))  # type: ignore[literal-required]
    logits = plain(input_ids=ids, attention_mask=mask).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_it_learns(family: Family) -> None:
    nll = family.run.report()["nll"]
    assert nll["best"] < nll["base"]
    record(family.name, tune=f"{nll['base']:.2f} → {nll['best']:.2f}")


@pytest.mark.parametrize("lane", ["merged", "adapter"])
def test_the_bundle_answers_with_the_tokens_of_torch(
    family: Family, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a prompt longer than the window is read in parts."""
    bundle = family.bundle(lane)
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    scorer, generator = family.torch(lane), load(bundle, accuracy_level=1)
    generator.stop_ids = frozenset()
    right = 0
    for number, part in ((1, 512), (17, 512), (400, 5)):
        monkeypatch.setattr(cache, "_PREFILL", part)
        prompt = generator.tokenizer.encode(f"hello world, the answer {number} is seven hello world")
        assert len(prompt) > WINDOW
        answer = generator.answer(prompt, 12)
        assert answer == scorer.answer(prompt, 12)
        right += len(answer)
    record(family.name, **{lane: f"{right} of {right}"})


def test_a_padded_batch_scores_as_its_rows_do(family: Family) -> None:
    batch = padded_batch()
    generator = load(family.bundle("merged"), accuracy_level=1)
    together, _ = generator.token_nll(batch)
    expected, _ = family.torch("merged").token_nll(batch)
    np.testing.assert_allclose(together, expected, atol=2e-4)
    worst = 0.0
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        keys = ("input_ids", "attention_mask", "labels")
        alone, _ = generator.token_nll(Batch(rows=[row], **{key: batch[key][row : row + 1, :length] for key in keys}))  # type: ignore[literal-required, typeddict-item]
        worst = max(worst, float(np.abs(together[row, :length] - alone[0]).max()))
    assert worst < 1e-4
    record(family.name, padded=f"{worst:.0e}")
