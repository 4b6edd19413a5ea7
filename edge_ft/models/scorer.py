"""Score and generate with a torch model: a loss for each task, for training and scoring alike.

Logits are computed only where there is a label.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.config import Task
from edge_ft.data import IGNORED, Batch, pad, target_mask
from edge_ft.data.contrastive import SCALE, duplicate_texts
from edge_ft.models.chunked_loss import logit_softcap, score_targets

__all__ = ["HEAD_INPUTS", "LOSSES", "TorchScorer", "class_losses", "embed", "head_input", "task_model_of"]


def task_model_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_head_inputs(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the inputs of a decoder's head at the labelled positions: on instruction data a few percent of all.

    Args:
        model: The task model, with or without PEFT around it.
        batch: `input_ids` [batch, seq] and `labels` [batch, seq] with -100 where there is no loss; of packed rows
            `position_ids`, too.
        device: Where the model is.

    Returns:
        Inputs [targets, hidden] float32 and labels [targets] int64.
    """
    input_ids = torch.from_numpy(batch["input_ids"]).to(device)
    labels = torch.from_numpy(batch["labels"]).to(device)
    task_model = task_model_of(model)
    body = getattr(task_model, task_model.base_model_prefix)
    # Padding is on the right of a causal model, where no labelled position attends: no mask is needed,
    # and attention takes its fast path.
    packed = {"position_ids": torch.from_numpy(batch["position_ids"]).to(device)} if "position_ids" in batch else {}
    hidden = body(input_ids=input_ids, use_cache=False, **packed).last_hidden_state  # [batch, seq, hidden]
    targets = labels[:, 1:] != IGNORED
    return hidden[:, :-1][targets].float(), labels[:, 1:][targets]


def seq2seq_head_inputs(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the inputs of an encoder-decoder's head at the labelled positions.

    Args:
        model: The task model, with or without PEFT around it.
        batch: `input_ids` and `attention_mask` [batch, source], `labels` [batch, target] with -100 behind each end.
        device: Where the model is.

    Returns:
        Inputs [targets, hidden] float32 and labels [targets] int64.
    """
    input_ids, mask, labels = (
        torch.from_numpy(batch[name]).to(device) for name in ("input_ids", "attention_mask", "labels")
    )
    task_model = task_model_of(model)
    source = task_model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
    # Padding is behind the target, where no labelled position attends: the decoder needs no mask of its own.
    hidden = task_model.get_decoder()(
        input_ids=task_model.prepare_decoder_input_ids_from_labels(labels),
        encoder_hidden_states=source,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state  # [batch, target, hidden]
    targets = labels != IGNORED
    return head_input(task_model, hidden)[targets].float(), labels[targets]


def head_input(model: Any, hidden: Tensor) -> Tensor:
    """Return the input of an encoder-decoder's head for the decoder's output: T5 1.0, whose head is tied, scales it."""
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    return hidden * model.config.d_model**-0.5 if scaled else hidden


def encoder_inputs(model: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return what the task model takes of a batch [batch, seq]: RoBERTa, DistilBERT and MPNet have no token types."""
    task_model = task_model_of(model)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    takes = "token_type_ids" in signature(task_model.forward).parameters
    if "token_type_ids" in batch and takes and getattr(task_model.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = batch["token_type_ids"]
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


def class_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Score a text classifier by the `problem_type` of its config.

    Returns:
        nll and prediction. single_label_classification: cross-entropy [batch], likeliest class.
        multi_label_classification: binary cross-entropy of each class, whether it is likelier than not
        [batch x classes]. regression: half the squared error [batch], which is the nll of a normal distribution of
        variance 1 up to a constant, and the number.
    """
    logits = model(**encoder_inputs(model, batch, device)).logits.float()
    labels = torch.from_numpy(batch["labels"]).to(device)
    problem = model.config.problem_type
    if problem == "regression":
        return (logits - labels).square().flatten() / 2, logits.flatten()
    if problem == "multi_label_classification":
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return losses.flatten(), (logits > 0).float().flatten()
    return nn.functional.cross_entropy(logits, labels[:, 0], reduction="none"), logits.argmax(dim=-1)


def tag_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nll and likeliest tag of each word, at its first token [words]."""
    logits = model(**encoder_inputs(model, batch, device)).logits
    labels = torch.from_numpy(batch["labels"]).to(device)
    at = labels != IGNORED
    logits = logits[at].float()
    return nn.functional.cross_entropy(logits, labels[at], reduction="none"), logits.argmax(dim=-1)


def mask_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nll and likeliest token of each masked token [targets]; logits are computed only there."""
    labels = torch.from_numpy(batch["labels"]).to(device)
    at = labels != IGNORED
    task_model = task_model_of(model)
    # What comes between the layers and the output layer differs by family; the input of that layer does not.
    handle = task_model.get_output_embeddings().register_forward_pre_hook(lambda _, arguments: arguments[0][at])
    try:
        logits = model(**encoder_inputs(model, batch, device)).logits.float()  # [targets, vocab]
    finally:
        handle.remove()
    return nn.functional.cross_entropy(logits, labels[at], reduction="none"), logits.argmax(dim=-1)


def embed(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return vectors of length 1 of a batch's first and second texts [batch, hidden], pooled as the config says."""
    task_model = task_model_of(model)
    vectors = []
    for ids, mask in (("input_ids", "attention_mask"), ("pair_input_ids", "pair_attention_mask")):
        input_ids, attention_mask = (torch.from_numpy(batch[name]).to(device) for name in (ids, mask))  # type: ignore[literal-required]
        hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        if task_model.config.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = attention_mask[:, :, None].float()
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        vectors.append(nn.functional.normalize(pooled, dim=-1))
    return vectors[0], vectors[1]


def contrastive_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nll and rank of each row's own second text among those of its batch [batch].

    See `edge_ft.data.contrastive`; texts that occur twice are no negatives of each other.
    """
    first, second = embed(model, batch, device)
    same = torch.from_numpy(duplicate_texts(batch)).to(device)
    scores = (SCALE * first @ second.T).masked_fill(same, float("-inf"))
    own = torch.arange(len(scores), device=device)
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return nn.functional.cross_entropy(scores, own, reduction="none"), rank


ScoreTargets = Callable[[Any, Batch, torch.device], tuple[Tensor, Tensor]]
"""model, batch, device -> two tensors with an entry for each target, in the order of `target_mask`."""

Step = Callable[[Tensor | None, Any], Any]
"""tokens [rows, 1] or None at the first step, cache -> transformers' output."""

HEAD_INPUTS: dict[Task, ScoreTargets] = {
    "text-generation": decoder_head_inputs,
    "text2text-generation": seq2seq_head_inputs,
}
"""Tasks whose targets are tokens: inputs of the head over the vocabulary, float32, and labels."""

LOSSES: dict[Task, ScoreTargets] = {
    "text-classification": class_losses,
    "token-classification": tag_losses,
    "fill-mask": mask_losses,
    "feature-extraction": contrastive_losses,
}
"""All other tasks: nll (nats, float32, differentiable) and prediction."""


class TorchScorer:
    """A torch model as `edge_ft.evaluate` scores it."""

    def __init__(self, model: nn.Module, task: Task, stop_ids: frozenset[int] = frozenset()) -> None:
        """`stop_ids` are the tokens that end an answer."""
        self.model = model
        self.task = task
        self.stop_ids = stop_ids
        self.device = next(parameter.device for parameter in model.parameters())
        self.dtype = torch.float32
        """Of the head's products."""

    def head_arguments(self, batch: Batch) -> tuple[Tensor, Any, Tensor, torch.dtype, float | None]:
        """Return the arguments of `score_targets` and `target_loss` for a batch of a task in `HEAD_INPUTS`."""
        hidden, labels = HEAD_INPUTS[self.task](self.model, batch, self.device)
        task_model = task_model_of(self.model)
        return hidden, task_model.get_output_embeddings(), labels, self.dtype, logit_softcap(task_model)

    @torch.inference_mode()
    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Score the labels of a batch.

        Returns:
            Negative log-likelihood (nats) and likeliest token or class, shaped as the labels; 0 and -100 where there
            is no target.
        """
        self.model.eval()
        if self.task in HEAD_INPUTS:
            scores = score_targets(*self.head_arguments(batch))
            nll, predicted = scores.nll, scores.predicted
        else:
            nll, predicted = LOSSES[self.task](self.model, batch, self.device)
        at = target_mask(batch["labels"], self.task)
        nll_at = np.zeros(at.shape, np.float32)
        predicted_at = np.full(at.shape, IGNORED, batch["labels"].dtype)
        nll_at[at], predicted_at[at] = nll.float().cpu().numpy(), predicted.cpu().numpy()
        return nll_at, predicted_at

    @torch.inference_mode()
    def vectors(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return vectors of length 1 of a batch's first and second texts [batch, hidden] (feature-extraction)."""
        self.model.eval()
        first, second = embed(self.model, batch, self.device)
        return first.cpu().numpy(), second.cpu().numpy()

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Return the greedy answer to one prompt, without the stop token that ends it; an empty one to no prompt."""
        return self.answer_batch([prompt_ids], max_new_tokens)[0] if prompt_ids else []

    @torch.inference_mode()
    def answer_batch(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return `answer` to each of the prompts, none of them empty; they are computed together."""
        self.model.eval()
        step = (self._seq2seq_step if self.task == "text2text-generation" else self._decoder_step)(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished, tokens, past = set(range(len(prompts))), None, None
        for _ in range(max_new_tokens):
            output = step(tokens, past)
            past, tokens = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if token in self.stop_ids:
                    unfinished.discard(row)
                elif row in unfinished:
                    answers[row].append(token)
            if not unfinished:
                break
        return answers

    def _decoder_step(self, prompts: Sequence[list[int]]) -> Step:
        """Return the step of a decoder; prompts are padded on the left."""
        ids, mask = (np.fliplr(array).copy() for array in pad([prompt[::-1] for prompt in prompts], 0))
        input_ids, attention_mask = (torch.from_numpy(array).to(self.device) for array in (ids, mask))

        def step(tokens: Tensor | None, past: Any) -> Any:
            nonlocal attention_mask
            if tokens is None:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            else:
                position_ids = attention_mask.sum(-1, keepdim=True)
                attention_mask = torch.cat((attention_mask, torch.ones_like(tokens)), dim=1)
            return self.model(  # type: ignore[operator]
                input_ids=input_ids if tokens is None else tokens,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )

        return step

    def _seq2seq_step(self, sources: Sequence[list[int]]) -> Step:
        """Return the step of an encoder-decoder; sources are padded on the right."""
        model = task_model_of(self.model)
        input_ids, attention_mask = (torch.from_numpy(array).to(self.device) for array in pad(sources, 0))
        encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        start = torch.full((len(sources), 1), model.config.decoder_start_token_id, device=self.device)
        return lambda tokens, past: model(
            encoder_outputs=encoded,
            attention_mask=attention_mask,
            decoder_input_ids=start if tokens is None else tokens,
            past_key_values=past,
            use_cache=True,
        )

    @torch.inference_mode()
    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """Return the negative log-likelihood (nats) of each answer to one prompt; the prompt is computed once."""
        self.model.eval()
        targets = torch.from_numpy(pad(answers, IGNORED)[0]).to(self.device)
        prompt = torch.tensor([prompt_ids], device=self.device)
        output = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
        logits = output.logits.float().expand(len(answers), -1, -1)
        if targets.shape[1] > 1:
            past = output.past_key_values
            past.batch_repeat_interleave(len(answers))
            # Padding is on the right, where no answer attends.
            later = self.model(input_ids=targets[:, :-1].clamp(min=0), past_key_values=past, use_cache=True)  # type: ignore[operator]
            logits = torch.cat((logits, later.logits.float()), dim=1)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return losses.sum(1).double().cpu().numpy()
