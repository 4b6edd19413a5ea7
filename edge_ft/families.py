"""The differences between model families, one row for each family.

Everything else is read from the config or the modules of a model.
"""

from dataclasses import dataclass, replace
from typing import Literal

from edge_ft.config import Task, TuneConfig
from edge_ft.errors import ModelError

__all__ = ["CLASSIFIERS", "FAMILIES", "Family", "Kind", "family_of"]

RATE_WIDTH = 576
"""Hidden size of the model on which the decoders' learning rate was chosen."""

Kind = Literal["decoder", "encoder", "encoder-decoder"]

CLASSIFIERS: tuple[Task, ...] = ("text-classification", "token-classification")
"""Tasks whose head has one output for each class of the user's rows."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of a transformers config."""

    name: str
    """`model_type` in config.json."""
    heads: dict[Task, tuple[str, ...]]
    """Supported tasks, the default first, each with the dotted names of the modules after the layers. LoRA does not
    adapt these; the last module of a classifier has a row of weights for each class."""
    layers: str
    """Dotted name of the list of transformer layers inside a task model; of two stacks, the decoder's."""
    kind: Kind
    """decoder: causal, with a KV cache; encoder: bidirectional, one pass; encoder-decoder: one of each."""
    learning_rate: float
    """Default peak learning rate, of a decoder at a hidden size of at most `RATE_WIDTH`; chosen by measurement, like
    the next two (docs/decisions/010, 029 and 049)."""
    epochs: float = 3.0
    """Default passes over the training rows."""
    batch_size: int = 8
    """Default rows of an optimizer step."""
    positions_after_pad: bool = False
    """Positions begin at `pad_token_id` + 1, so that the first entries of the position table are never used."""
    fan_in_fan_out: bool = False
    """Linear layers of the checkpoint are [in, out] instead of [out, in] (transformers' Conv1D; PEFT's name for it)."""
    packs: bool = False
    """Several rows may share a sequence: attention keeps to a row where positions begin again at 0 (decoders)."""
    encoder_layers: str | None = None
    """Dotted name of the list of encoder layers (encoder-decoder)."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """Dotted names of all lists of layers, in the order in which a text passes through them."""
        return (self.layers,) if self.encoder_layers is None else (self.encoder_layers, self.layers)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Supported tasks; the first is the default."""
        return tuple(self.heads)

    def trained_head(self, task: Task) -> tuple[str, ...]:
        """Modules of a new classifier head, which are trained in full and stay in float."""
        return self.heads[task] if task in CLASSIFIERS and not self.decoder else ()

    def class_weights(self, task: Task) -> tuple[str, str]:
        """Possible names of a classifier's weight [classes, hidden]: of one linear layer, or of the last of several."""
        return f"{self.heads[task][-1]}.weight", f"{self.heads[task][-1]}.out_proj.weight"

    def resolve(self, config: TuneConfig, hidden: int) -> TuneConfig:
        """The settings, with the family's epochs, batch size and learning rate where the user gave none.

        Args:
            config: The settings.
            hidden: Width of the model.

        Returns:
            The settings.
        """
        return replace(
            config,
            epochs=config.epochs or self.epochs,
            batch_size=config.batch_size or self.batch_size,
            learning_rate=config.learning_rate or self.rate(hidden),
        )

    def rate(self, hidden: int) -> float:
        """Return the default peak learning rate of AdamW at a hidden size.

        The best rate of LoRA falls with the width to the power of 0.78 (Schulman et al., "LoRA Without Regret", 2025).
        """
        if not self.decoder:
            return self.learning_rate
        return float(f"{self.learning_rate / max(1.0, hidden / RATE_WIDTH) ** 0.78:.2g}")

    @property
    def decoder(self) -> bool:
        """Whether it is a decoder without an encoder."""
        return self.kind == "decoder"


def _decoder(name: str, layers: str = "model.layers", fan_in_fan_out: bool = False, packs: bool = True) -> Family:
    heads: dict[Task, tuple[str, ...]] = {"text-generation": ("lm_head",)}
    return Family(name, heads, layers, "decoder", 2e-3, epochs=2.0, fan_in_fan_out=fan_in_fan_out, packs=packs)


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
        _decoder("opt", "model.decoder.layers", packs=False),  # its mask is not made from positions
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
    """Find the family of a `model_type`.

    Returns:
        Its row.

    Raises:
        ModelError: the family, or `task` for this family, is not supported; the message lists what is.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(f"{name} ({', '.join(row.tasks)})" for name, row in FAMILIES.items())
        raise ModelError(f"models of type {model_type!r} are not supported; supported are: {known}")
    if task is not None and task not in family.tasks:
        able = sorted({row.kind for row in FAMILIES.values() if task in row.tasks})
        raise ModelError(
            f"a {model_type} model does {', '.join(family.tasks)} here, not {task}: leave out --task, or take a model "
            f"that does ({', '.join(f'an {kind}' if kind[0] == 'e' else f'a {kind}' for kind in able)})"
        )
    return family
