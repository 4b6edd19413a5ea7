"""Tiny models of every family, created from config objects, and rows that they can learn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from small_tokenizers import write_bpe, write_t5_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "was", "very", "not", "a", "[", "]", "sep"),
    "[MASK]",
]


def write_llama(folder: Path, *, tie: bool = True, seed: int = 0, **config: Any) -> Path:
    """A two-layer Llama with grouped queries, head_dim 16 and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bpe(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,  # the tokenizer pads with it too; named here, it would get an embedding of zeros
        "initializer_range": 0.1,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder)
    return folder


DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"hidden_size": 128, "sliding_window": 8, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt_neox": {"hidden_size": 128, "rotary_pct": 0.5},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt-350m": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt2": {"n_inner": 96},
}
"""Settings that exercise what is specific to a family; a key is `model_type` or `model_type-SHAPE`."""


def write_decoder(folder: Path, name: str, *, seed: int = 0, **config: Any) -> Path:
    """A two-layer model of one of `DECODERS` with random norms and biases, and without a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bpe(folder, chat_template=None)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    torch.manual_seed(seed)
    family = name.partition("-")[0]
    if not hasattr(CONFIG_MAPPING[family], "num_key_value_heads"):
        del sizes["num_key_value_heads"]
    made = AutoConfig.for_model(family, **{**sizes, **ids, "initializer_range": 0.1, **DECODERS[name], **config})
    for dropout in ("dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(made, dropout):
            setattr(made, dropout, 0.0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def write_bert(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A two-layer BERT without a head, with a WordPiece tokenizer."""
    settings: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return write_encoder(folder, BertConfig(**{**settings, **config}), seed=seed)


def padded_ids(pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and attention mask, both int64 [3, 20]; the second text has 7 tokens and is padded."""
    ids = np.random.default_rng(0).integers(4, 15, (3, 20))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = pad_id
    return ids, mask


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "electra": {"embedding_size": 32},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
    "albert": {"embedding_size": 32, "inner_group_num": 1, "num_hidden_groups": 1, "num_hidden_layers": 3},
    "mpnet": {"pad_token_id": 1},
    "modernbert": {
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "classifier_pooling": "mean",
    },
}
"""Settings of a tiny model of each family besides its size."""


def tiny_encoder_config(name: str) -> Any:
    """A family's config with two or three narrow layers and no dropout."""
    settings: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if name == "distilbert":  # has names of its own for the same
        settings = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "initializer_range": 0.1}
    return AutoConfig.for_model(name, **{**settings, **ENCODERS[name]})


def write_encoder(folder: Path, config: Any, *, seed: int = 0) -> Path:
    """An encoder without a head, with a WordPiece tokenizer that pads with the config's own token."""
    folder.mkdir(parents=True, exist_ok=True)
    words = list(WORDS)
    words.insert(config.pad_token_id, words.pop(0))
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([*WORDS[:4], "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


T5_SHAPES: dict[str, dict[str, Any]] = {
    "t5, relu, tied": {},
    "mt5, gated, untied": {"model_type": "mt5", "untied": True, "num_decoder_layers": 1},
}
"""The two forms of T5: settings of `write_t5`."""


def write_t5(folder: Path, *, model_type: str = "t5", untied: bool = False, seed: int = 0, **config: Any) -> Path:
    """Two layers in each stack: T5's first form (relu, tied head), or with `untied` that of FLAN and mT5."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_t5_tokenizer(folder)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu" if untied else "relu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        **({"tie_word_embeddings": False} if untied else {}),
    }
    settings |= config
    model = (
        MT5ForConditionalGeneration(MT5Config(**settings))
        if model_type == "mt5"
        else T5ForConditionalGeneration(T5Config(**settings))
    )
    if untied:  # whatever the config says, the file decides
        model.lm_head.weight = nn.Parameter(torch.randn(model.config.vocab_size, model.config.d_model) * 0.3)
    # Biases that differ between heads and distances, so that a wrong one shows.
    for stack in (model.encoder, model.decoder):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias.data = torch.randn_like(bias)
    model.save_pretrained(folder)
    return folder


def write_sums(path: Path, rows: int = 40) -> Path:
    """Distinct prompt/completion rows with short answers that are easy to learn."""
    lines = [{"prompt": f"hello {n} the answer", "completion": " seven" if n % 2 else " hello"} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_tagged(path: Path, rows: int = 60) -> Path:
    """tokens/tags rows: `film` is a work, `good` is praise and `bad` is blame."""
    lines = []
    for n in range(rows):
        word, tag = [("good", "B-praise"), ("bad", "B-blame")][n % 2]
        tokens = [
            "the",
            "film",
            "was",
            *(["very"] * (n // 8 % 4)),
            *(["not", "a"] * (n // 2 % 4)),
            word,
            *["a"] * (n // 32),
        ]
        tags = ["B-work" if token == "film" else tag if token == word else "O" for token in tokens]
        lines.append({"tokens": tokens, "tags": tags})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_pairs(path: Path, rows: int = 60) -> Path:
    """text/text_pair/label rows; one word of the second text decides the label."""
    lines = []
    for n in range(rows):
        word, label = [("good", "praise"), ("bad", "blame")][n % 2]
        first = " ".join(["the film was", *["very"] * (n // 8 % 4), *["a"] * (n // 32)])
        lines.append({"text": first, "text_pair": " ".join([*["not a"] * (n // 2 % 4), word]), "label": label})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_reviews(path: Path, rows: int = 60) -> Path:
    """text/label rows of two classes; one word decides the label."""
    kinds = [("good", "praise"), ("bad", "blame")]
    lines = []
    for n in range(rows):
        word, label = kinds[n % 2]
        text = " ".join(
            ["the film was", *(["very"] * (n // 8 % 4)), *(["not a"] * (n // 2 % 4)), word, "a " * (n // 32)]
        )
        lines.append({"text": text.strip(), "label": label})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
