"""What differs between model families, a row each.

Everything that is not in a row is read from the model's own config or modules.
"""

from dataclasses import dataclass, replace
from typing import Literal

from edge_ft.config import Task, TuneConfig
from edge_ft.errors import ModelError

__all__ = ["CLASSIFIERS", "FAMILIES", "Family", "Kind", "family_of"]

Kind = Literal["decoder", "encoder", "encoder-decoder"]

CLASSIFIERS: tuple[Task, ...] = ("text-classification", "token-classification")
"""Tasks whose head has an output for each of the user's classes."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of a transformers config."""

    name: str
    """`model_type` in config.json."""
    heads: dict[Task, tuple[str, ...]]
    """What can be tuned and exported, the default first, and dotted names of the modules that make its output from
    the layers'. LoRA leaves them alone; the last of a classifier's has a row of weights for each class."""
    layers: str
    """Dotted name of the list of transformer layers inside a task model; of two stacks, the decoder's."""
    kind: Kind
    """decoder: causal, with a KV cache; encoder: bidirectional, one pass; encoder-decoder: one of each."""
    learning_rate: float
    """Peak rate for LoRA; as the next two, chosen by measurement (docs/decisions/010)."""
    epochs: float = 3.0
    """Passes over the training rows."""
    batch_size: int = 8
    """Rows of a step."""
    positions_after_pad: bool = False
    """Positions are numbered from `pad_token_id` + 1 on, so that many of the table are never used."""
    fan_in_fan_out: bool = False
    """The checkpoint's linear layers lie the other way round, [in, out] (transformers' Conv1D; PEFT's name for it)."""
    encoder_layers: str | None = None
    """Dotted name of the encoder's layers (encoder-decoder)."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """Dotted names of all lists of layers, in the order in which a text passes through them."""
        return (self.layers,) if self.encoder_layers is None else (self.encoder_layers, self.layers)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What can be tuned and exported; the first is the default."""
        return tuple(self.heads)

    def trained_head(self, task: Task) -> tuple[str, ...]:
        """Modules that stay float and are trained in full: a classifier's head is made for the user's own classes."""
        return self.heads[task] if task in CLASSIFIERS and not self.decoder else ()

    def class_weights(self, task: Task) -> tuple[str, str]:
        """Names that a classifier's weight [classes, hidden] may have: of a linear layer, of the last of several."""
        return f"{self.heads[task][-1]}.weight", f"{self.heads[task][-1]}.out_proj.weight"

    def resolve(self, config: TuneConfig) -> TuneConfig:
        """`config` with the family's recipe where it leaves that open."""
        return replace(
            config,
            learning_rate=config.learning_rate or self.learning_rate,
            epochs=config.epochs or self.epochs,
            batch_size=config.batch_size or self.batch_size,
        )

    @property
    def decoder(self) -> bool:
        """Whether it is one decoder and nothing else."""
        return self.kind == "decoder"


def _decoder(name: str, layers: str = "model.layers", fan_in_fan_out: bool = False) -> Family:
    heads: dict[Task, tuple[str, ...]] = {"text-generation": ("lm_head",)}
    return Family(name, heads, layers, "decoder", 2e-3, epochs=2.0, batch_size=4, fan_in_fan_out=fan_in_fan_out)


def _encoder(
    name: str,
    layers: str,
    classifier: tuple[str, ...] = ("classifier",),
    tagger: tuple[str, ...] = ("classifier",),
    filler: tuple[str, ...] = ("lm_head",),
    pooler: tuple[str, ...] = ("pooler",),
    positions_after_pad: bool = False,
) -> Family:
    heads: dict[Task, tuple[str, ...]] = {
        "text-classification": classifier,
        "token-classification": tagger,
        "fill-mask": filler,
        "feature-extraction": pooler,
    }
    return Family(name, heads, layers, "encoder", 1e-3, positions_after_pad=positions_after_pad)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(
            _decoder(name)
            for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
        ),
        _decoder("gpt_neox", "gpt_neox.layers"),
        _decoder("opt", "model.decoder.layers"),
        _decoder("gpt2", "transformer.h", fan_in_fan_out=True),
        *(
            Family(
                name,
                {"text2text-generation": ("lm_head",)},
                "decoder.block",
                "encoder-decoder",
                2e-3,
                encoder_layers="encoder.block",
            )
            for name in ("t5", "mt5")
        ),
        _encoder("bert", "bert.encoder.layer", ("bert.pooler", "classifier"), filler=("cls",)),
        _encoder("roberta", "roberta.encoder.layer", positions_after_pad=True),
        _encoder("xlm-roberta", "roberta.encoder.layer", positions_after_pad=True),
        _encoder("electra", "electra.encoder.layer", filler=("generator_predictions", "generator_lm_head"), pooler=()),
        _encoder(
            "distilbert",
            "distilbert.transformer.layer",
            ("pre_classifier", "classifier"),
            filler=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            pooler=(),
        ),
        _encoder(
            "albert", "albert.encoder.albert_layer_groups", ("albert.pooler", "classifier"), filler=("predictions",)
        ),
        _encoder("mpnet", "mpnet.encoder.layer", positions_after_pad=True),
        _encoder(
            "modernbert", "model.layers", ("head", "classifier"), ("head", "classifier"), ("head", "decoder"), pooler=()
        ),
    )
}


def family_of(model_type: str, task: Task | None = None) -> Family:
    """The row of a `model_type`.

    Raises:
        ModelError: no such row, or the family cannot do `task`; the message names what is supported.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(f"{name} ({', '.join(row.tasks)})" for name, row in FAMILIES.items())
        raise ModelError(f"models of type {model_type!r} are not supported; supported are: {known}")
    if task is not None and task not in family.tasks:
        raise ModelError(f"a {model_type} model does {', '.join(family.tasks)} here, not {task}")
    return family
