"""Bundles small enough to be made in a test: a two-layer decoder and a pooled classifier.

The graphs follow the graph contract (names, shapes, overridable initializers) but are written with
`onnx.helper`, so that run time is tested without torch. With `script` the decoder's weights are chosen so
that greedy decoding says exactly that text after a ":" or an assistant tag, one byte a token.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from edge_ft.artifacts import Bundle
from edge_ft.config import Task
from edge_ft.data import Columns, Rendering

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, RANK = 64, 4, 2, 16, 2, 4
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[CLS]", "[SEP]"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_decoder(
    folder: Path,
    *,
    script: str = "",
    chat: bool = False,
    lane: str = "base",
    zero_adapter: bool = False,
    max_length: int = 2048,
    seed: int = 0,
) -> Path:
    """A text-generation bundle, of random weights unless a `script` is given.

    No byte may occur twice in `script`: each token decides the next one.
    """
    tokenizer = _write_tokenizer(folder, chat=chat)
    scale = None if lane != "adapter" else 0.0 if zero_adapter else 1.0
    _save(folder, _decoder(tokenizer, script, scale, max_length, np.random.default_rng(seed)))
    end = tokenizer.token_to_id("<|end|>")
    _seal(
        folder,
        "text-generation",
        family="llama",
        chat_template=CHAT_TEMPLATE if chat else None,
        appended_eos=end,
        max_length=max_length,
        lane=lane,
        cache={"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
    )
    return folder


def write_classifier(folder: Path, *, labels: tuple[str, ...] = ("no", "maybe", "yes"), max_length: int = 16) -> Path:
    """A text-classification bundle: the mean of the embeddings of all tokens, then a linear layer."""
    tokenizer = _write_tokenizer(folder, chat=False, classifier=True)
    _save(folder, _classifier(tokenizer.get_vocab_size(), len(labels), np.random.default_rng(0)))
    _seal(folder, "text-classification", family="bert", labels=labels, max_length=max_length, lane="base")
    return folder


def _write_tokenizer(folder: Path, *, chat: bool, classifier: bool = False) -> Tokenizer:
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    if classifier:
        ends = [(text, tokenizer.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    if classifier:
        settings |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer


def _seal(
    folder: Path,
    task: Task,
    *,
    max_length: int,
    chat_template: str | None = None,
    labels: tuple[str, ...] = (),
    appended_eos: int | None = None,
    **keys: object,
) -> None:
    rendering = Rendering(
        task=task,
        chat_template=chat_template,
        columns=Columns(
            kind="messages" if chat_template else "text_label" if labels else "prompt_completion",
            prompt=None,
            completion=None,
            label=None,
        ),
        labels=labels,
        max_length=max_length,
        bos=None,
        appended_eos=appended_eos,
    )
    manifest = {
        "task": task,
        "model": "onnx/model.onnx",
        "graphs": {"1": "onnx/model.onnx"},
        "max_length": max_length,
        "tokenization": {"bos": None, "appended_eos": appended_eos},
        "rendering": rendering.to_dict(),
        **keys,
    }
    Bundle.seal(folder, manifest)


def _save(folder: Path, graph: onnx.GraphProto) -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / "onnx").mkdir()
    onnx.save(model, folder / "onnx" / "model.onnx")


def _decoder(
    tokenizer: Tokenizer,
    script: str,
    adapter_scale: float | None,
    max_length: int,
    random: np.random.Generator,
) -> onnx.GraphProto:
    vocab = tokenizer.get_vocab_size()
    weights = {"embed": random.normal(size=(vocab, HIDDEN)), "head": random.normal(size=(vocab, HIDDEN))}
    weights["head"] /= np.sqrt(HIDDEN)
    mixing = 1 / np.sqrt(HIDDEN)  # what attention adds is as large as what it is added to
    if script:
        mixing = 0.002
        weights["embed"] /= np.linalg.norm(weights["embed"], axis=1, keepdims=True)
        weights["head"] = _successors(tokenizer, script, weights["embed"])
    weights["head"] = weights["head"].T
    angles = np.arange(max_length)[:, None] / 10000 ** (np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    weights |= {"cos": np.cos(angles), "sin": np.sin(angles)}

    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "axis_1"], ["lengths"], keepdims=0),
        helper.make_node("Sub", ["lengths", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_length"], start=1, end=2),
        helper.make_node("Squeeze", ["mask_length"], ["mask_scalar"]),
        helper.make_node("Cast", ["mask_scalar"], ["total"], to=TensorProto.INT32),
        helper.make_node("Gather", ["embed", "input_ids"], ["x0"]),
    ]
    lora: dict[str, NDArray[np.float32]] = {}
    past, present = [], []
    for layer in range(LAYERS):
        x, q, k, v = f"x{layer}", f"q{layer}", f"k{layer}", f"v{layer}"
        for name, width in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"w{name}{layer}"] = random.normal(size=(HIDDEN, width * HEAD_DIM)) / np.sqrt(HIDDEN)
            nodes.append(helper.make_node("MatMul", [x, f"w{name}{layer}"], [f"{name}{layer}"]))
        kv_names = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        present_names = [f"present.{layer}.key", f"present.{layer}.value"]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *kv_names, "seqlens_k", "total", "cos", "sin"],
                [f"a{layer}", *present_names],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            )
        )
        weights[f"wo{layer}"] = random.normal(size=(HEADS * HEAD_DIM, HIDDEN)) * mixing
        nodes.append(helper.make_node("MatMul", [f"a{layer}", f"wo{layer}"], [f"o{layer}"]))
        update = f"o{layer}"
        if adapter_scale is not None:
            a, b = f"lora_A.layers.{layer}.o", f"lora_B.layers.{layer}.o"
            lora[a] = random.normal(size=(RANK, HEADS * HEAD_DIM)).astype(np.float32)
            lora[b] = random.normal(0, adapter_scale / HIDDEN, (HIDDEN, RANK)).astype(np.float32)
            nodes += [
                helper.make_node("Transpose", [a], [f"at{layer}"], perm=[1, 0]),
                helper.make_node("Transpose", [b], [f"bt{layer}"], perm=[1, 0]),
                helper.make_node("MatMul", [f"a{layer}", f"at{layer}"], [f"low{layer}"]),
                helper.make_node("MatMul", [f"low{layer}", f"bt{layer}"], [f"delta{layer}"]),
                helper.make_node("Add", [f"o{layer}", f"delta{layer}"], [f"tuned{layer}"]),
            ]
            update = f"tuned{layer}"
        nodes.append(helper.make_node("Add", [x, update], [f"x{layer + 1}"]))
        past += [_value(name, "past_sequence_length") for name in kv_names]
        present += [_value(name, "total_sequence_length") for name in present_names]
    nodes += [
        helper.make_node("Neg", ["num_logits_to_keep"], ["negative"]),
        helper.make_node("Reshape", ["negative", "one"], ["start"]),
        helper.make_node("Slice", [f"x{LAYERS}", "start", "end", "axis_1"], ["kept"]),
        helper.make_node("MatMul", ["kept", "head"], ["logits"]),
    ]
    integers = {"one": [1], "axis_1": [1], "end": [2**62], "num_logits_to_keep": 1}
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        *past,
        helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []),
        *(
            helper.make_tensor_value_info(
                name,
                TensorProto.FLOAT,
                ["rank", array.shape[1]] if name.startswith("lora_A") else [array.shape[0], "rank"],
            )
            for name, array in lora.items()
        ),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "num_logits", vocab])
    initializers = [
        *(numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()),
        *(numpy_helper.from_array(array, name) for name, array in lora.items()),
        *(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in integers.items()),
    ]
    return helper.make_graph(nodes, "tiny_decoder", inputs, [logits, *present], initializers)


def _successors(tokenizer: Tokenizer, script: str, embed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Output rows [vocab, hidden] under which each token of `script` is followed by the next."""
    said = tokenizer.encode(script).ids
    assert len(set(said)) == len(said), f"{script!r} repeats a byte"
    head = np.zeros_like(embed)
    chain = [*said, tokenizer.token_to_id("<|end|>")]
    for before, after in pairwise(chain):
        head[after] += 10 * embed[before]
    for start in (":", "<|assistant|>"):
        head[chain[0]] += 10 * embed[tokenizer.token_to_id(start)]
    return head


def _value(name: str, length: str) -> onnx.ValueInfoProto:
    shape: list[str | int | None] = ["batch_size", KV_HEADS, length, HEAD_DIM]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _classifier(vocab: int, classes: int, random: np.random.Generator) -> onnx.GraphProto:
    weights = {"embed": random.normal(size=(vocab, HIDDEN)), "head": random.normal(size=(HIDDEN, classes))}
    ids = ["input_ids", "attention_mask", "token_type_ids"]
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["real", "types"], ["share"]),
        helper.make_node("Unsqueeze", ["share", "axis_2"], ["column"]),
        helper.make_node("Mul", ["tokens", "column"], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "axis_1"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["column", "axis_1"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    shape = ["batch_size", "sequence_length"]
    return helper.make_graph(
        nodes,
        "tiny_classifier",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ids],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", classes])],
        [
            *(numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()),
            numpy_helper.from_array(np.array([1], np.int64), "axis_1"),
            numpy_helper.from_array(np.array([2], np.int64), "axis_2"),
        ],
    )


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Write the hashes of a bundle again after its files have changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    Bundle.seal(folder, {name: manifest[name] for name in manifest.keys() - {"files", "format_version"}})
