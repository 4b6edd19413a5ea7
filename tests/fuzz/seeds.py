"""What is mutated: tiny models, runs, bundles and rows of every kind, made in the session."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from tiny_models import write_bert, write_llama, write_pairs, write_reviews, write_sums, write_t5, write_tagged

from edge_ft.artifacts import RunFolder
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.export import export
from edge_ft.tune import checkpoint, tune

__all__ = ["write_seeds"]

QUICK: dict[str, Any] = {
    "compute": "fp32",
    "threads": 1,
    "learning_rate": 1e-2,
    "split": (0.6, 0.2, 0.2),
    "calibration_rows": 0,
}
LOOSE: dict[str, Any] = {"max_tax": 100.0, "min_retained": -100.0, "max_metric_drop": 1.0, "threads": 1}
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": f"hello {n} the answer"},
            {"role": "assistant", "content": "seven" if n % 2 else "hello"},
        ]
    }
    for n in range(12)
]


def write_seeds(folder: Path) -> None:
    """Write models, rows, runs and bundles into `folder`; takes about ten seconds."""
    folder.mkdir(parents=True)
    write_llama(folder / "llama")
    write_bert(folder / "bert")
    write_t5(folder / "t5")
    write_sums(folder / "sums.jsonl")
    write_reviews(folder / "reviews.jsonl")
    write_tagged(folder / "tagged.jsonl", rows=20)
    write_pairs(folder / "pairs.jsonl", rows=20)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
    _write_gguf(folder / "llama", folder / "llama.gguf")
    _tune(folder, "run", "llama", "sums.jsonl", epochs=8)
    _tune(folder, "bert-run", "bert", "reviews.jsonl", epochs=8)
    _interrupted(folder)
    _export("run", folder, "bundle")
    _export("run", folder, "adapter-bundle", lane="adapter")
    _export("bert-run", folder, "classifier")
    _export("t5", folder, "t5-bundle", weights="fp32")
    _export("bert", folder, "embedder", weights="fp32", task="feature-extraction")


def _tune(folder: Path, name: str, model: str, rows: str, **settings: Any) -> None:
    tune(TuneConfig(model=str(folder / model), data=str(folder / rows), out=folder / name, **QUICK, **settings))


def _export(source: str, folder: Path, name: str, **settings: Any) -> None:
    export(str(folder / source), ExportConfig(out=folder / name, **LOOSE, **settings))


class _Stop(Exception):
    """Ends a tune right after its first checkpoint."""


def _interrupted(folder: Path) -> None:
    """A run that was killed after a checkpoint."""
    from edge_ft.tune import loop, train

    write, places = checkpoint.write_checkpoint, (checkpoint, train, loop)

    def stopping(*arguments: Any) -> None:
        write(*arguments)
        raise _Stop

    changed = [place for place in places if hasattr(place, "write_checkpoint")]
    for place in changed:
        place.write_checkpoint = stopping
    try:
        _tune(folder, "stopped", "llama", "sums.jsonl", max_steps=4, checkpoint_steps=1)
    except _Stop:
        pass
    finally:
        for place in changed:
            place.write_checkpoint = write
    assert (folder / "stopped" / "checkpoint").is_dir(), "the run of the seeds left no checkpoint"
    assert not RunFolder(folder / "stopped").report_path.is_file()
    shutil.rmtree(folder / "stopped" / ".lock", ignore_errors=True)


def _write_gguf(model: Path, file: Path) -> None:
    """The tiny Llama as llama.cpp's converter writes it, in float32."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = {**tokenizer["model"]["vocab"], **{each["content"]: each["id"] for each in tokenizer["added_tokens"]}}
    special = {each["content"] for each in tokenizer["added_tokens"]}
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template((model / "chat_template.jinja").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, array in load_file(model / "model.safetensors").items():
        for part, count in (("q_proj", heads), ("k_proj", key_heads)):
            if part in name:  # llama.cpp pairs neighbours where transformers pairs halves
                array = array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        writer.add_tensor(known, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
