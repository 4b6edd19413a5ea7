"""Cases of model files: safetensors (base, adapter, checkpoint, codes) and the JSON beside them, adapters, and GGUF."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from fuzz.child import Box, Case
from fuzz.mutations import EDGE_INTEGERS, dump_json, mutate_bytes, mutate_json, odd_text, safetensors_parts

__all__ = ["adapter_case", "gguf_case", "safetensors_case"]

DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "I16",
    "F16",
    "BF16",
    "I32",
    "F32",
    "F64",
    "I64",
    "F4",
    "X",
)
Expected = Literal["any", "refused"]


def safetensors_case(random: Random, box: Box) -> Case:
    """A file of weights or the config beside it: of a model, a run's adapter or a checkpoint to resume from."""
    box.copy("sums.jsonl")
    where = random.random()
    if where < 0.55:
        name, file = "llama", box.copy("llama") / "model.safetensors"
        form = random.choice(["fp32", "int4", "int8", "bf16"])
        argv = ["eval", "llama", "--data", "sums.jsonl", "--no-generate", "--limit", "2", "--base-format", form]
    elif where < 0.65:
        name, file = "bert", box.copy("bert") / "model.safetensors"
        box.copy("pairs.jsonl")
        argv = ["eval", "bert", "--data", "pairs.jsonl", "--task", "feature-extraction", "--limit", "2"]
        argv += ["--prompt", "{text}", "--completion", "{text_pair}"]
    elif where < 0.85:
        name, argv, file = _run(random, box)
    else:
        name, argv, file = _stopped(random, box)
    expect: Expected = "any"
    beside = sorted(path for path in file.parent.glob("*.json") if not path.name.startswith("tokenizer"))
    if beside and random.random() < 0.3:
        chosen = random.choice(beside)
        what = f"values of {chosen.name}"
        chosen.write_bytes(dump_json(random, mutate_json(random, json.loads(chosen.read_text(encoding="utf-8")))))
    elif random.random() < 0.15:
        what, expect = _oddly_stored(random, file)
    else:
        what, expect = change_safetensors(random, file)
    return Case("safetensors", argv, f"{name}/{file.name}: {what}", expect=expect, out=("out", *_written(name)))


def _written(name: str) -> tuple[str, ...]:
    return ("stopped",) if name == "stopped" else ()


def _run(random: Random, box: Box) -> tuple[str, list[str], Path]:
    """A finished run; the base that its base.json names is that of the seeds."""
    run = box.copy("run")
    files = sorted(run.rglob("*.safetensors"))
    argv = ["eval", "run", "--data", "sums.jsonl", "--no-generate", "--limit", "2"]
    return "run", argv, random.choice(files)


def _stopped(random: Random, box: Box) -> tuple[str, list[str], Path]:
    """A run that was killed, to be resumed."""
    run = box.copy("stopped")
    files = sorted((run / "checkpoint").glob("*.safetensors"))
    return "stopped", ["tune", "--config", "stopped/config.yaml", "--out", "stopped", "--resume"], random.choice(files)


def change_safetensors(random: Random, file: Path) -> tuple[str, Expected]:
    """Change header or data of a safetensors file; returns what, and whether it must be refused."""
    data = file.read_bytes()
    header, values = safetensors_parts(data)
    names = [name for name in header if name != "__metadata__"]
    chosen = header[random.choice(names)]
    expect: Expected = "any"
    what = random.choice(
        ["bytes", "head", "json", "cut", "length", "offsets", "shape", "dtype", "name", "missing", "nan"]
    )
    if what == "bytes":
        data = mutate_bytes(random, data)
    elif what == "head":
        data = mutate_bytes(random, data, head=200)
    elif what == "json":
        data = _packed(mutate_json(random, header), values)
    elif what == "cut":
        data, expect = data[: random.choice([0, 4, 8, 100, len(data) // 2, len(data) - 1])], "refused"
    elif what == "length":
        size = random.choice([0, 1, 7, 2**32, 2**63 - 1, 2**64 - 1, len(data), len(data) + 1])
        data, expect = struct.pack("<Q", size) + data[8:], "refused"
    elif what == "offsets":
        start, stop = chosen["data_offsets"]
        chosen["data_offsets"] = random.choice(
            [[stop, start], [start, 2**62], [-1, stop], [start], [start + 4, stop + 4], [start, stop + 4], [0, 0], "x"]
        )
        data, expect = _packed(header, values), "refused"
    elif what == "shape":
        chosen["shape"] = random.choice(
            [[], [0], [-1, 2], [2**40, 2**40], chosen["shape"][::-1], [1, *chosen["shape"]]]
        )
        data = _packed(header, values)
    elif what == "dtype":
        chosen["dtype"] = random.choice(DTYPES)
        data = _packed(header, values)
    elif what == "name":
        old = random.choice(names)
        header[random.choice([odd_text(random), old.upper(), f"model.{old}", old.replace(".0.", ".7.")])] = header.pop(
            old
        )
        data = _packed(header, values)
    elif what == "missing":
        tensors = load_file(file)
        del tensors[random.choice(names)]
        save_file(tensors, file)
        return what, "refused"
    else:
        data = data[:-8] + random.choice([b"\xff" * 8, b"\0\0\x80\x7f" * 2, b"\0" * 8])
    file.write_bytes(data)
    return what, expect


def _packed(header: Any, values: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + values


def _oddly_stored(random: Random, file: Path) -> tuple[str, Expected]:
    """The same tensors in another dtype, shape or split, as other programs leave them."""
    tensors = load_file(file)
    name = random.choice(sorted(tensors))
    what = random.choice(["half", "double", "integers", "transposed", "flat", "empty", "extra", "nan", "huge"])
    changes: dict[str, Any] = {
        "half": lambda: tensors[name].astype(np.float16),
        "double": lambda: tensors[name].astype(np.float64),
        "integers": lambda: tensors[name].astype(np.int32),
        "transposed": lambda: np.ascontiguousarray(tensors[name].T),
        "flat": lambda: tensors[name].reshape(-1),
        "empty": lambda: tensors[name][:0],
        "extra": lambda: np.zeros((2, 3), np.float32),
        "nan": lambda: np.full_like(tensors[name], np.nan) if tensors[name].dtype.kind == "f" else tensors[name],
        "huge": lambda: np.full_like(tensors[name], 3e38) if tensors[name].dtype.kind == "f" else tensors[name],
    }
    changed = changes[what]()
    tensors["nowhere.weight" if what == "extra" else name] = changed
    save_file(tensors, file)
    return what, "any"


def adapter_case(random: Random, box: Box) -> Case:
    """adapter_config.json or the weights of an adapter, over its run or by --adapter."""
    box.copy("sums.jsonl")
    if random.random() < 0.85:
        folder = box.copy("run") / "adapter"
        argv = ["eval", "run", "--data", "sums.jsonl", "--no-generate", "--limit", "2"]
    else:
        folder = box.copy("run/adapter", "adapter")
        box.copy("llama")
        lane = random.choice(["merged", "adapter"])
        argv = ["export", "llama", "--adapter", "adapter", "--out", "out", "--lane", lane, "--weights", "fp32"]
    expect: Expected = "any"
    if random.random() < 0.65:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        what = "values of adapter_config.json"
        if random.random() < 0.5:
            config.update(_adapter_settings(random))
            file.write_text(json.dumps(config), encoding="utf-8")
        elif random.random() < 0.8:
            file.write_bytes(dump_json(random, mutate_json(random, config)))
        else:
            what = "bytes of adapter_config.json"
            file.write_bytes(mutate_bytes(random, file.read_bytes()))
    elif random.random() < 0.2:
        what, expect = _oddly_stored(random, folder / "adapter_model.safetensors")
    else:
        what, expect = change_safetensors(random, folder / "adapter_model.safetensors")
    return Case("adapters", argv, f"{argv[0]}: {what}", expect=expect, out=("out",))


def _adapter_settings(random: Random) -> dict[str, Any]:
    """A setting of PEFT with another value: of its kind, or odd."""
    choices: dict[str, list[Any]] = {
        "peft_type": ["LORA", "lora", "IA3", "PREFIX_TUNING", "NOWHERE", None, 7],
        "r": [0, -1, 1, 4, 10**6, 2.5, "8", None],
        "lora_alpha": [0, -16, 1e308, float("nan"), "16", None],
        "target_modules": [[], None, "all-linear", "(", ".*", ["q_proj"], ["nowhere"], "q_proj", 7, [7]],
        "modules_to_save": [[], ["lm_head"], ["embed_tokens"], ["nowhere"], "lm_head", 7],
        "use_dora": [True, "yes"],
        "use_rslora": [True, 7],
        "bias": ["all", "lora_only", "odd", None],
        "lora_bias": [True, "x"],
        "rank_pattern": [{"q_proj": 4}, {"(": 4}, {"q_proj": -1}, [], 7],
        "alpha_pattern": [{"q_proj": 4}, {"q_proj": "x"}, [], 7],
        "layers_to_transform": [0, [0], [99], -1, "x"],
        "layers_pattern": ["layers", "(", 7],
        "task_type": ["CAUSAL_LM", "SEQ_CLS", "NOWHERE", None, 7],
        "fan_in_fan_out": [True, "x"],
        "auto_mapping": [{"base_model_class": "X", "parent_library": "os"}, 7],
        "base_model_name_or_path": ["../../nowhere", "", None, 7, odd_text(random)],
        "init_lora_weights": [False, "pissa", "olora", "loftq", "nowhere", 7],
        "loftq_config": [{"loftq_bits": 4}, 7],
        "eva_config": [{}, 7],
        "lora_dropout": [2.0, -1, "x"],
        "revision": ["main", 7],
        "exclude_modules": ["(", ".*", ["q_proj"]],
        odd_text(random): [odd_text(random)],
    }
    return {name: random.choice(choices[name]) for name in random.sample(list(choices), random.choice([1, 1, 2]))}


GGUF_TYPES = (*range(36), 99, 2**31, 2**32 - 1)


def gguf_case(random: Random, box: Box) -> Case:
    """A GGUF file with another header, other keys, types, sizes or offsets."""
    file = box.copy(
        "llama.gguf", random.choice(["model.gguf"] * 6 + ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"])
    )
    box.copy("sums.jsonl")
    data = bytearray(file.read_bytes())
    keys, tensors = _gguf_places(bytes(data))
    header_end = tensors[-1][1] + 12
    expect: Expected = "any"
    what = random.choice(
        ["bytes", "bytes", "counts", "key", "key", "value", "value", "text", "shape", "type", "offset", "cut", "magic"]
    )
    if what == "bytes":
        data = bytearray(mutate_bytes(random, bytes(data), head=header_end))
    elif what == "counts":
        struct.pack_into("<Q", data, random.choice([8, 16]), random.choice(EDGE_INTEGERS))
    elif what == "key":
        at, length = random.choice(keys)[:2]
        data[at : at + length] = bytes(random.choice([65, 46, 0, 255]) for _ in range(length))
    elif what == "value":
        _, _, at = random.choice(keys)
        struct.pack_into("<I", data, at, random.choice([*range(14), 99, 2**31]))
        if random.random() < 0.3:
            data[at + 4 : at + 8] = random.randbytes(4)
    elif what == "text":
        _, _, at = random.choice(keys)
        struct.pack_into("<Q", data, at + 4, random.choice(EDGE_INTEGERS))
    elif what in ("shape", "type", "offset"):
        dims_at, type_at = random.choice(tensors)
        if what == "shape":
            struct.pack_into("<Q", data, dims_at + 4, random.choice(EDGE_INTEGERS))
        elif what == "type":
            struct.pack_into("<I", data, type_at, random.choice(GGUF_TYPES))
        else:
            struct.pack_into("<Q", data, type_at + 4, random.choice([7, 2**40, 2**63, len(data)]))
    elif what == "cut":
        del data[random.choice([0, 3, 4, 24, 100, header_end, len(data) // 2, len(data) - 1]) :]
        expect = "refused"
    else:
        data[:8] = random.choice(
            [b"GGUF\1\0\0\0", b"GGUF\3\0\0\1", b"FUGG\3\0\0\0", b"ggml\3\0\0\0", b"GGUF\xff\xff\xff\xff"]
        )
        expect = "any"
    file.write_bytes(data)
    model = f"./{file.name}"
    argv = [
        "eval",
        model,
        "--data",
        "sums.jsonl",
        "--no-generate",
        "--limit",
        "2",
        *random.choice([[], ["--base-format", "int4"]]),
    ]
    return Case("gguf", argv, f"{file.name}: {what}", expect=expect)


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each fixed type of GGUF."""


def _gguf_places(data: bytes) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Offsets in a valid GGUF file: of each key its text, length and type; of each tensor its dims and type."""

    def skip(kind: int, at: int) -> int:
        if kind == 8:
            return at + 8 + struct.unpack_from("<Q", data, at)[0]
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            if inner in _SIZES:
                return at + count * _SIZES[inner]
            for _ in range(count):
                at = skip(inner, at)
            return at
        return at + _SIZES[kind]

    tensor_count, key_count = struct.unpack_from("<QQ", data, 8)
    at, keys, tensors = 24, [], []
    for _ in range(key_count):
        length = struct.unpack_from("<Q", data, at)[0]
        keys.append((at + 8, length, at + 8 + length))
        kind = struct.unpack_from("<I", data, at + 8 + length)[0]
        at = skip(kind, at + 8 + length + 4)
    for _ in range(tensor_count):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
        dims = at
        at += 4 + 8 * struct.unpack_from("<I", data, at)[0]
        tensors.append((dims, at))
        at += 12
    return keys, tensors
