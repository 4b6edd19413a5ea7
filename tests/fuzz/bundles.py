"""Cases of what a bundle holds: manifest, graphs, tokenizer; and of prompts and chat templates."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any, Literal

import onnx

from edge_ft.files import file_sha256
from fuzz.child import Box, Case
from fuzz.mutations import dump_json, mutate_bytes, mutate_json, odd_text

__all__ = ["manifest_case", "onnx_case", "prompt_case", "renew_hashes", "tokenizer_case"]

BUNDLES = ("bundle", "bundle", "adapter-bundle", "classifier", "t5-bundle", "embedder")


def renew_hashes(bundle: Path) -> None:
    """Write the sizes and hashes of the files as they are now into the manifest, so that they pass the check."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    found = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    manifest["files"] = {
        name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for name, path in sorted(found.items())
        if name != "manifest.json"
    }
    file.write_text(json.dumps(manifest), encoding="utf-8")


def _command(random: Random, bundle: str) -> list[str]:
    """A command that opens the bundle."""
    what = random.random()
    if what < 0.5:
        return ["run", bundle, "hello the answer", *(["--max-new-tokens", "2"] if random.random() < 0.8 else [])]
    if what < 0.85 or bundle not in ("bundle", "adapter-bundle"):
        return ["verify", bundle]
    return ["eval", bundle, "--data", "sums.jsonl", "--limit", "3", *random.choice([[], ["--no-generate"]])]


def _begin(random: Random, box: Box, names: tuple[str, ...] = BUNDLES) -> tuple[str, Path]:
    name = random.choice(names)
    box.copy("sums.jsonl")
    return name, box.copy(name)


def manifest_case(random: Random, box: Box) -> Case:
    """manifest.json with other values; or a bundle that differs from its manifest."""
    name, bundle = _begin(random, box)
    file = bundle / "manifest.json"
    manifest: Any = json.loads(file.read_text(encoding="utf-8"))
    kind, expect, what = random.random(), "any", "values"
    if kind < 0.6:
        part = random.choice([None, None, "rendering", "verification", "tokenization", "cache", "graphs"])
        if part is None or part not in manifest:
            manifest = mutate_json(random, manifest)
        else:
            manifest[part] = mutate_json(random, manifest[part])
            what = f"values of {part}"
        file.write_bytes(dump_json(random, manifest))
    elif kind < 0.7:
        what = "bytes"
        file.write_bytes(mutate_bytes(random, file.read_bytes()))
    else:
        what, expect = _contradict(random, box, bundle, manifest), "refused"
    return Case("manifests", _command(random, name), f"{name}: {what}", expect=expect)


def _contradict(random: Random, box: Box, bundle: Path, manifest: dict[str, Any]) -> str:
    """Change files or manifest so that no command may accept the bundle; returns what was done."""
    names = sorted(manifest["files"])
    chosen = random.choice(names)
    what = random.choice(["flip", "flip", "cut", "remove", "add", "outside", "outside", "key"])
    if what == "flip":
        data = bytearray((bundle / chosen).read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        (bundle / chosen).write_bytes(data)
    elif what == "cut":
        (bundle / chosen).write_bytes((bundle / chosen).read_bytes()[:-1])
    elif what == "remove":
        (bundle / chosen).unlink()
    elif what == "add":
        (bundle / random.choice(["extra.bin", "onnx/model2.onnx", ".hidden"])).write_bytes(b"x")
    elif what == "outside":
        return _point_outside(random, box, bundle, manifest)
    else:
        del manifest[random.choice(["task", "model", "graphs", "lane", "rendering", "files", "format_version"])]
        (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return f"{what} {chosen if what in ('flip', 'cut', 'remove') else ''}".strip()


def _point_outside(random: Random, box: Box, bundle: Path, manifest: dict[str, Any]) -> str:
    """Let the manifest name a graph that lies beside the bundle, whole and with the right hash."""
    shutil.copytree(bundle / "onnx", box.work / "elsewhere")
    model = str(manifest["model"])
    path = random.choice(["../elsewhere/", f"{box.work}/elsewhere/", "onnx/../../elsewhere/"]) + Path(model).name
    if random.random() < 0.5:
        manifest["files"][path] = manifest["files"][model]
    manifest["model"] = path
    manifest["graphs"] = dict.fromkeys(manifest["graphs"], path)
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return f"the graph {path}"


def onnx_case(random: Random, box: Box) -> Case:
    """A graph of a bundle with changed bytes or structure, under the right hash."""
    name, bundle = _begin(random, box, (*BUNDLES[:1], *BUNDLES[2:]))
    files = sorted((bundle / "onnx").iterdir())
    graphs = [file for file in files if file.suffix == ".onnx"]
    chosen = random.choice(graphs if random.random() < 0.9 else files)
    expect: Literal["any", "refused"] = "any"
    if chosen.suffix != ".onnx" or random.random() < 0.5:
        what = f"bytes of {chosen.name}"
        chosen.write_bytes(mutate_bytes(random, chosen.read_bytes()))
    else:
        model = onnx.load(chosen, load_external_data=False)
        what = "structure: " + ", ".join(_change_graph(random, model) for _ in range(random.choice([1, 1, 2])))
        chosen.write_bytes(model.SerializeToString())
    renew_hashes(bundle)
    return Case("onnx", _command(random, name), f"{name}: {what}", expect=expect)


def _change_graph(random: Random, model: Any) -> str:
    """Change one thing of an ONNX graph; returns what."""
    graph = model.graph
    node, weight = random.choice(graph.node), random.choice(graph.initializer) if graph.initializer else None
    value = random.choice([*graph.input, *graph.output])
    what = random.choice(
        ["op", "input", "output", "attribute", "drop", "rename", "dims", "type", "external", "opset", "shape", "cycle"]
    )
    if what == "op":
        node.op_type = random.choice(["Identity", "Add", "MatMul", "Loop", "Gather", "Nowhere", odd_text(random)[:50]])
    elif what == "input" and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(["", "nowhere", node.output[0]])
    elif what == "output" and node.output:
        node.output[0] = random.choice(["", "other", graph.input[0].name])
    elif what == "attribute" and node.attribute:
        attribute = random.choice(node.attribute)
        attribute.i = random.choice([0, -1, 1, 3, 2**31, 2**62, -(2**63)])
        del attribute.ints[:]
    elif what == "drop":
        graph.node.remove(node)
    elif what == "rename":
        value.name = random.choice(["", "input_ids", "logits", "x", odd_text(random)[:50]])
    elif what == "dims" and weight is not None and weight.dims:
        weight.dims[random.randrange(len(weight.dims))] = random.choice([0, -1, 1, 7, 2**31, 2**62])
    elif what == "type" and weight is not None:
        weight.data_type = random.choice([0, 1, 2, 3, 7, 8, 10, 16, 21, 22, 99])
    elif what == "external" and weight is not None:
        weight.data_location = onnx.TensorProto.EXTERNAL
        del weight.external_data[:]
        place = random.choice(["../sums.jsonl", "/etc/passwd", "", "model.onnx", "../../../x", "model.onnx.data"])
        for key, text in (
            ("location", place),
            ("offset", random.choice(["0", "-1", "1e9", str(2**62)])),
            ("length", "64"),
        ):
            entry = weight.external_data.add()
            entry.key, entry.value = key, text
    elif what == "opset":
        model.opset_import[0].version = random.choice([0, -1, 1, 7, 999, 2**40])
    elif what == "shape" and value.type.tensor_type.shape.dim:
        random.choice(value.type.tensor_type.shape.dim).dim_value = random.choice([0, -1, 1, 2, 3, 2**40])
    elif what == "cycle" and node.input:
        node.input[0] = graph.node[-1].output[0]
    return what


def tokenizer_case(random: Random, box: Box) -> Case:
    """tokenizer.json or a file beside it, with other values or bytes; a bundle's hashes are renewed."""
    of_model = random.random() < 0.15
    names = ("llama", "bert", "t5") if of_model else BUNDLES
    name, folder = _begin(random, box, names)
    beside = [
        file
        for file in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "chat_template.jinja",
        )
        if (folder / file).is_file()
    ]
    chosen = folder / random.choice(["tokenizer.json"] * 3 + beside)
    if chosen.suffix == ".json" and random.random() < 0.8:
        content = json.loads(chosen.read_text(encoding="utf-8"))
        part = random.choice([*content, None, None, "model", "model"]) if isinstance(content, dict) else None
        if part is not None and isinstance(content.get(part), dict | list) and content[part]:
            content[part] = mutate_json(random, content[part])
        else:
            content = mutate_json(random, content)
        if random.random() < 0.25:
            _unusual_part(random, content)
        what = f"values of {chosen.name}"
        chosen.write_bytes(dump_json(random, content))
    else:
        what = f"bytes of {chosen.name}"
        chosen.write_bytes(mutate_bytes(random, chosen.read_bytes()))
    if of_model:
        rows = "sums.jsonl" if name != "bert" else "pairs.jsonl"
        box.copy("pairs.jsonl")
        task = (
            ["--task", "feature-extraction", "--prompt", "{text}", "--completion", "{text_pair}"]
            if name == "bert"
            else []
        )
        return Case(
            "tokenizers", ["eval", name, "--data", rows, "--no-generate", "--limit", "3", *task], f"{name}: {what}"
        )
    renew_hashes(folder)
    return Case("tokenizers", _command(random, name), f"{name}: {what}")


def _unusual_part(random: Random, content: Any) -> None:
    """Put a component into a tokenizer.json that the seeds do not have."""
    parts: list[tuple[str, Any]] = [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": random.choice(["", "AAAA", "/////w==", "x"])}),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"Regex": random.choice(["(a+)+$", "(", "", "\\"])}, "content": "b"},
        ),
        ("normalizer", {"type": "Prepend", "prepend": odd_text(random)}),
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(x*)*y"}, "behavior": "Isolated", "invert": False}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True}),
        ("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
        ("post_processor", {"type": "BertProcessing", "sep": ["x", 10**6], "cls": ["y", 7]}),
        ("truncation", {"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"}),
        (
            "padding",
            {"strategy": {"Fixed": 2**20}, "pad_id": 0, "pad_token": "x", "direction": "Left", "pad_type_id": 0},
        ),
        ("decoder", {"type": "Sequence", "decoders": []}),
        ("decoder", {"type": "Strip", "content": "a", "start": 10**6, "stop": 2}),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        (
            "model",
            {"type": "Unigram", "unk_id": random.choice([None, 0, 99]), "vocab": [["a", -1.0]], "byte_fallback": True},
        ),
        ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "none"}),
        ("model", {"type": "BPE", "vocab": {"a": 0, "b": 2**31}, "merges": [["a", "c"]]}),
    ]
    name, value = random.choice(parts)
    if isinstance(content, dict):
        content[name] = value


SPECIAL_TEXTS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "</s>", "<pad>")


def prompt_case(random: Random, box: Box) -> Case:
    """A prompt, by argument, standard input, chat or rows, with options for generation."""
    name = random.choice(("bundle", "bundle", "bundle", "classifier", "t5-bundle", "embedder"))
    bundle = box.copy(name).name
    text = "".join(
        random.choice([odd_text(random), random.choice(SPECIAL_TEXTS), "hello "])
        for _ in range(random.choice([1, 2, 6]))
    )
    options = ["--max-new-tokens", "3"] if random.random() < 0.9 else []
    for flag in ("--stop", "--system", "--labels", "--text-pair"):
        if random.random() < 0.12:
            options += [flag, _as_argument(odd_text(random) + random.choice(["", ",b"]))]
    if random.random() < 0.15:
        options += ["--temperature", "0.7", "--seed", "3"]
    console = random.choice(
        ["utf-8:strict"] * 6 + ["utf-8:surrogateescape", "ascii:strict", "ascii:surrogateescape", "cp1252:strict"]
    )
    how = random.random()
    if how < 0.4:
        argv, stdin = ["run", bundle, _as_argument(text), *options], b""
    elif how < 0.75:
        argv, stdin = ["run", bundle, *options], _as_bytes(random, text)
    elif how < 0.85:
        argv, stdin = ["run", bundle, "-i", *options], b"\n".join(_as_bytes(random, text) for _ in range(2))
    else:
        rows = [random.choice([{"prompt": text}, {"text": text}, {"messages": [{"role": "user", "content": text}]}])]
        (box.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        argv, stdin = ["run", bundle, "--jsonl", "rows.jsonl", "--out", "out.jsonl", *options], b""
    return Case("prompts", argv, f"{name}: {text[:60]!a}", stdin, console)


def _as_argument(text: str) -> str:
    """The text as Python hands a process's argument to it: no NUL, and bytes that are not UTF-8 as lone surrogates."""
    return text.encode("utf-8", "surrogatepass").replace(b"\0", b"\xff").decode("utf-8", "surrogateescape")


def _as_bytes(random: Random, text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return (
        mutate_bytes(random, data)
        if random.random() < 0.4
        else data.replace(b"hello", b"h\xe9llo")
        if random.random() < 0.2
        else data
    )
