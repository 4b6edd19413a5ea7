"""Tuning over bitsandbytes' nf4 weights."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import PeftModel
from tiny_models import write_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.errors import ModelError
from edge_ft.evaluate.loading import open_run_model
from edge_ft.models.logging import silence_libraries
from edge_ft.quant.nf4 import NF4Linear
from edge_ft.quant.serialization import codes_sha256
from edge_ft.tune import tune


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths are multiples of 64: others are misread by bitsandbytes' own layer on a CPU."""
    return write_llama(tmp_path_factory.mktemp("wide") / "llama", intermediate_size=128)


@pytest.fixture(scope="module")
def nf4_run(whole_blocks: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("nf4") / "run"
    settings = {
        "base_format": "nf4",
        "max_steps": 5,
        "learning_rate": 1e-2,
        "split": (0.6, 0.2, 0.2),
        "compute": "fp32",
    }
    return tune(TuneConfig(model=str(whole_blocks), data=str(sums), out=out, **settings))  # type: ignore[arg-type]


def test_the_tuned_model_is_plain_pefts_over_bitsandbytes_own(whole_blocks: Path, nf4_run: RunFolder) -> None:
    with silence_libraries():
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
        theirs = AutoModelForCausalLM.from_pretrained(whole_blocks, quantization_config=settings, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(theirs, nf4_run.adapter)
    ours, _ = open_run_model(nf4_run)
    for name, layer in ours.named_modules():
        if isinstance(layer, NF4Linear):
            weight = theirs.get_submodule(name).weight
            assert torch.equal(weight.data, layer.qweight) and torch.equal(weight.quant_state.absmax, layer.absmax)
    theirs.train()  # for scoring alone it repacks the weights and computes in bfloat16 on some CPUs
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_adapter_loads_on_the_plain_base(whole_blocks: Path, nf4_run: RunFolder) -> None:
    plain = AutoModelForCausalLM.from_pretrained(whole_blocks)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = plain(ids).logits
        after = PeftModel.from_pretrained(plain, nf4_run.adapter).eval()(ids).logits
    assert not torch.allclose(before, after)


def test_a_run_checks_the_bytes_that_it_was_trained_over(nf4_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = open_run_model(nf4_run)
    assert nf4_run.base()["codes_sha256"] == codes_sha256(model)
    monkeypatch.setattr("edge_ft.quant.nf4.quantize_4bit", lambda weight, **how: quantize_4bit(weight * 1.01, **how))
    with pytest.raises(ModelError, match=r"the nf4 codes .* tune again"):
        open_run_model(nf4_run)
