"""Answers of a tuned decoder, alone and in batches."""

from edge_ft.artifacts import RunFolder
from edge_ft.data import TextTokenizer
from edge_ft.evaluate.loading import open_run_model
from edge_ft.models.scorer import TorchScorer


def test_torch_answers_the_same_in_batches_and_alone(llama_run: RunFolder) -> None:
    model, _ = open_run_model(llama_run)
    scorer = TorchScorer(model, "text-generation", frozenset({2}))
    tokenizer = TextTokenizer.load(llama_run.tokenizer)
    prompts = [tokenizer.encode(text) for text in ("hello 3 the answer", "hello", "the answer hello 12 hello 4 the")]
    alone = [scorer.answer(prompt, 12) for prompt in prompts]
    assert scorer.answer_batch(prompts, 12) == alone
    assert len({len(answer) for answer in alone}) > 1, "they end at different tokens"
