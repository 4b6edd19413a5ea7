"""Answers of a tuned decoder, alone and in batches."""

from edge_ft.artifacts import RunFolder
from edge_ft.data import Rendering, TextTokenizer, encode_rows, read_rows
from edge_ft.evaluate.loading import open_run_model
from edge_ft.models.scorer import TorchScorer


def test_torch_answers_the_same_in_batches_and_alone(llama_run: RunFolder) -> None:
    model, _ = open_run_model(llama_run)
    rows = read_rows(str(llama_run.split("test")))[:8]
    tokenizer = TextTokenizer.load(llama_run.tokenizer)
    examples = encode_rows(Rendering.from_dict(llama_run.rendering()), tokenizer, rows)
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    free = [TorchScorer(model, "text-generation", frozenset()).answer(prompt, 12) for prompt in prompts]
    # Of the tokens in these answers, one that comes at different places ends them.
    places = {
        stop: {answer.index(stop) if stop in answer else 12 for answer in free} for answer in free for stop in answer
    }
    scorer = TorchScorer(model, "text-generation", frozenset({max(places, key=lambda stop: len(places[stop]))}))
    alone = [scorer.answer(prompt, 12) for prompt in prompts]
    assert scorer.answer_batch(prompts, 12) == alone
    assert len({len(answer) for answer in alone}) > 1, "they end at different tokens"
