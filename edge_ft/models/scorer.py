"""Torch's side of scoring: logits only where there is a label."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.config import Task
from edge_ft.data import Batch, target_mask
from edge_ft.data.example import IGNORED
from edge_ft.models.chunked_loss import score_targets, softcap_of
from edge_ft.models.losses import class_losses, contrastive_losses, embed, mask_losses, tag_losses, task_model_of

__all__ = ["HIDDEN", "LOSSES", "TorchScorer", "head_input", "task_model_of"]


def target_hidden(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a decoder's head reads at the labelled positions, and their labels.

    The vocabulary is projected where there is a label and nowhere else: on instruction data that is a
    few percent of the positions.

    Args:
        model: The task model, with or without PEFT around it.
        batch: `input_ids` [batch, seq] and `labels` [batch, seq] with -100 where there is no loss.

    Returns:
        hidden [targets, hidden] float32 and labels [targets] int64.
    """
    input_ids = torch.from_numpy(batch["input_ids"]).to(device)
    labels = torch.from_numpy(batch["labels"]).to(device)
    task_model = task_model_of(model)
    body = getattr(task_model, task_model.base_model_prefix)
    # Padding is on the right of a causal model, where no labelled position can see it: no mask is needed,
    # and attention takes its fast path.
    hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state  # [batch, seq, hidden]
    targets = labels[:, 1:] != -100
    return hidden[:, :-1][targets].float(), labels[:, 1:][targets]


def target_hidden_seq2seq(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """What an encoder-decoder's head reads at the labelled positions, and their labels.

    Args:
        model: The task model, with or without PEFT around it.
        batch: `input_ids` and `attention_mask` [batch, source], `labels` [batch, target] with -100 behind each end.

    Returns:
        hidden [targets, hidden] float32 and labels [targets] int64.
    """
    input_ids, mask, labels = (
        torch.from_numpy(batch[name]).to(device) for name in ("input_ids", "attention_mask", "labels")
    )
    task_model = task_model_of(model)
    source = task_model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
    # Padding is behind the target, where no labelled position can see it: the decoder needs no mask of its own.
    hidden = task_model.get_decoder()(
        input_ids=task_model.prepare_decoder_input_ids_from_labels(labels),
        encoder_hidden_states=source,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state  # [batch, target, hidden]
    targets = labels != IGNORED
    return head_input(task_model, hidden)[targets].float(), labels[targets]


def head_input(model: Any, hidden: Tensor) -> Tensor:
    """What an encoder-decoder's head reads of the decoder's output: T5's first shape, its head tied, scales it."""
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    return hidden * model.config.d_model**-0.5 if scaled else hidden


Targets = Callable[[Any, Batch, torch.device], tuple[Tensor, Tensor]]
"""model, batch, device -> two tensors with an entry for each target, in the order of `target_mask`."""

HIDDEN: dict[Task, Targets] = {
    "text-generation": target_hidden,
    "text2text-generation": target_hidden_seq2seq,
}
"""Tasks whose targets are tokens: what the head over the vocabulary reads at each, float32, and the label."""

LOSSES: dict[Task, Targets] = {
    "text-classification": class_losses,
    "token-classification": tag_losses,
    "fill-mask": mask_losses,
    "feature-extraction": contrastive_losses,
}
"""All others: nll (nats, float32, differentiable) of each target, and what was predicted there."""


class TorchScorer:
    """A torch model that `edge_ft.evaluate` can score and ask."""

    def __init__(self, model: nn.Module, task: Task, stop_ids: frozenset[int] = frozenset()) -> None:
        self.model = model
        self.task = task
        self.stop_ids = stop_ids
        self.device = next(parameter.device for parameter in model.parameters())
        self.dtype = torch.float32
        """Of the head's products."""

    @torch.inference_mode()
    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Negative log-likelihood (nats) and likeliest token or class, where there is a label.

        Returns:
            nll float32 and predicted, shaped as the labels, 0 and -100 where there is no target.
        """
        self.model.eval()
        if self.task in HIDDEN:
            hidden, targets = HIDDEN[self.task](self.model, batch, self.device)
            task_model = task_model_of(self.model)
            head = task_model.get_output_embeddings()
            scores = score_targets(hidden, head, targets, self.dtype, softcap_of(task_model))
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
        """Vectors of length 1 of a batch's first and second texts [batch, hidden] (feature-extraction)."""
        self.model.eval()
        first, second = embed(self.model, batch, self.device)
        return first.cpu().numpy(), second.cpu().numpy()

    @torch.inference_mode()
    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of one prompt, up to and without the first stop token; none of an empty prompt."""
        if not prompt_ids:
            return []
        if self.task == "text2text-generation":
            return self._write([prompt_ids], max_new_tokens)[0]
        self.model.eval()
        input_ids = torch.tensor([prompt_ids], device=self.device)
        answer: list[int] = []
        past = None
        while len(answer) < max_new_tokens:
            output = self.model(input_ids=input_ids, past_key_values=past, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
            token = int(output.logits[0, -1].argmax())
            if token in self.stop_ids:
                break
            answer.append(token)
            past, input_ids = output.past_key_values, torch.tensor([[token]], device=self.device)
        return answer

    @torch.inference_mode()
    def answer_batch(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """`answer` to each of the prompts, none of them empty; a decoder reads them together, padded on the left."""
        if self.task == "text2text-generation":
            return self._write(prompts, max_new_tokens)
        self.model.eval()
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        input_ids, attention_mask = (torch.from_numpy(array).to(self.device) for array in (ids, mask))
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        answers: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        past = None
        for _ in range(max_new_tokens):
            output = self.model(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
            input_ids = output.logits[:, -1].argmax(-1, keepdim=True)
            if not self._append(input_ids[:, 0].tolist(), answers, going):
                break
            past, position_ids = output.past_key_values, position_ids[:, -1:] + 1
            attention_mask = torch.cat((attention_mask, torch.ones_like(input_ids)), dim=1)
        return answers

    def _append(self, tokens: list[int], answers: list[list[int]], going: set[int]) -> set[int]:
        """Put each row's next token behind its answer, and give the rows that go on: a stop token ends one."""
        for row, token in enumerate(tokens):
            if token in self.stop_ids:
                going.discard(row)
            elif row in going:
                answers[row].append(token)
        return going

    def _write(self, sources: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """An encoder-decoder's greedy answers; the sources are read together, padded on the right."""
        self.model.eval()
        model = task_model_of(self.model)
        ids = np.zeros((len(sources), max(map(len, sources))), np.int64)
        mask = np.zeros_like(ids)
        for row, source in enumerate(sources):
            ids[row, : len(source)], mask[row, : len(source)] = source, 1
        input_ids, attention_mask = (torch.from_numpy(array).to(self.device) for array in (ids, mask))
        encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        tokens = torch.full((len(sources), 1), model.config.decoder_start_token_id, device=self.device)
        answers: list[list[int]] = [[] for _ in sources]
        going = set(range(len(sources)))
        past = None
        for _ in range(max_new_tokens):
            output = model(
                encoder_outputs=encoded,
                attention_mask=attention_mask,
                decoder_input_ids=tokens,
                past_key_values=past,
                use_cache=True,
            )
            past, tokens = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            if not self._append(tokens[:, 0].tolist(), answers, going):
                break
        return answers

    @torch.inference_mode()
    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """Negative log-likelihood (nats) of each whole answer to one prompt; the prompt is read once."""
        self.model.eval()
        shape = (len(answers), max(map(len, answers)))
        targets = torch.full(shape, IGNORED)
        for row, ids in enumerate(answers):
            targets[row, : len(ids)] = torch.tensor(ids)
        targets = targets.to(self.device)
        prompt = torch.tensor([prompt_ids], device=self.device)
        output = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
        logits = output.logits.float().expand(len(answers), -1, -1)
        if shape[1] > 1:
            past = output.past_key_values
            past.batch_repeat_interleave(len(answers))
            # Padding is on the right, where no answer looks.
            later = self.model(input_ids=targets[:, :-1].clamp(min=0), past_key_values=past, use_cache=True)  # type: ignore[operator]
            logits = torch.cat((logits, later.logits.float()), dim=1)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        found: NDArray[np.float64] = losses.sum(1).double().cpu().numpy()
        return found
