"""Torch's side of scoring and of the loss: logits only where there is a label."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.data import Batch
from edge_ft.families import Family

__all__ = ["TorchScorer", "target_logits"]


def target_logits(model: Any, family: Family, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits of the labelled positions alone, and their labels.

    The vocabulary is projected where there is a label and nowhere else: on instruction data that is a
    few percent of the positions.

    Args:
        model: The task model, with or without PEFT around it.
        batch: `input_ids`, `attention_mask` [batch, seq]; `labels` [batch, seq] with -100 where there is
            no loss, or [batch] class indices.

    Returns:
        logits [targets, vocab or classes] float32 and labels [targets] int64.
    """
    input_ids = torch.from_numpy(batch["input_ids"]).to(device)
    labels = torch.from_numpy(batch["labels"]).to(device)
    if not family.decoder:
        mask = torch.from_numpy(batch["attention_mask"]).to(device)
        return model(input_ids=input_ids, attention_mask=mask).logits.float(), labels
    task_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(task_model, task_model.base_model_prefix)
    # Padding is on the right of a causal model, where no labelled position can see it: no mask is needed,
    # and attention takes its fast path.
    hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state  # [batch, seq, hidden]
    targets = labels[:, 1:] != -100
    return task_model.get_output_embeddings()(hidden[:, :-1][targets]).float(), labels[:, 1:][targets]


class TorchScorer:
    """A torch model that `edge_ft.evaluate` can score and ask."""

    def __init__(self, model: nn.Module, family: Family, stop_ids: frozenset[int] = frozenset()) -> None:
        self.model = model
        self.family = family
        self.stop_ids = stop_ids
        self.device = next(parameter.device for parameter in model.parameters())

    @torch.inference_mode()
    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Negative log-likelihood (nats) and likeliest token or class, where there is a label.

        Returns:
            nll float32 and predicted int64, both [batch, seq] for a decoder (0 and -100 without a label),
            [batch, 1] for a classifier.
        """
        self.model.eval()
        logits, targets = target_logits(self.model, self.family, batch, self.device)
        nll = nn.functional.cross_entropy(logits, targets, reduction="none").cpu().numpy()
        likeliest = logits.argmax(dim=-1).cpu().numpy()
        if not self.family.decoder:
            return nll[:, None], likeliest[:, None]
        at = batch["labels"] != -100
        at[:, 0] = False  # the first token is given, not predicted
        nll_at = np.zeros(at.shape, np.float32)
        predicted = np.full(at.shape, -100, np.int64)
        nll_at[at], predicted[at] = nll, likeliest
        return nll_at, predicted

    @torch.inference_mode()
    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of one prompt, up to and without the first stop token; none of an empty prompt."""
        if not prompt_ids:
            return []
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
