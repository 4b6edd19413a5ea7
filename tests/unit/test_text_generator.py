"""Answers, streams, conversations and scores of a text-generation bundle."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import write_decoder

from edge_ft.config import RunConfig
from edge_ft.errors import UsageError
from edge_ft.runtime import Generation, TextGenerator, decode, load, token_scores
from edge_ft.runtime.decode import TooLong
from edge_ft.runtime.window import Window

SCRIPT = "Cafés €日😀!"
"""The scripted model's answer; no byte of it occurs twice, so each token decides the next."""
SAMPLED = RunConfig(temperature=1.0, max_new_tokens=24)

Open = Callable[..., TextGenerator]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Open the tiny bundle of these options, which is made once."""
    folder: Path = tmp_path_factory.mktemp("bundles")

    @cache
    def open_tiny(**options: Any) -> TextGenerator:
        generator = load(write_decoder(folder / repr(sorted(options.items())), **options), threads=1)
        assert isinstance(generator, TextGenerator)
        return generator

    return open_tiny


def pieces(
    generator: TextGenerator, prompt: str, config: RunConfig, between: Callable[[], None] = lambda: None
) -> tuple[list[str], Generation]:
    """All pieces of a stream, and its return value; `between` is called after each piece."""
    stream = generator.stream(prompt, config)
    shown = []
    while True:
        try:
            shown.append(next(stream))
            between()
        except StopIteration as end:
            return shown, end.value


# Where an answer ends


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(opened: Open) -> None:
    answer = opened(script=SCRIPT).generate("Say:")
    assert answer.text == SCRIPT
    assert answer.finish_reason == "stop"
    assert answer.prompt_tokens == 4
    assert answer.new_tokens == len(SCRIPT.encode()) + 1


def test_max_new_tokens_ends_the_answer(opened: Open) -> None:
    answer = opened(script=SCRIPT).generate("Say:", RunConfig(max_new_tokens=3))
    assert (answer.text, answer.new_tokens, answer.finish_reason) == ("Caf", 3, "length")


def test_an_answer_that_is_cut_inside_a_character_ends_before_it(opened: Open) -> None:
    inside = len("Cafés €".encode()) - 1
    answer = opened(script=SCRIPT).generate("Say:", RunConfig(max_new_tokens=inside))
    assert (answer.text, answer.new_tokens) == ("Cafés ", inside)


def test_a_stop_string_over_several_tokens_ends_the_answer_before_it(opened: Open) -> None:
    shown, answer = pieces(opened(script=SCRIPT), "Say:", RunConfig(stop=("€日", "never")))
    assert shown == ["C", "a", "f", "é", "s", " "]
    assert (answer.text, answer.finish_reason) == ("Cafés ", "stop")
    assert answer.new_tokens == len("Cafés €日".encode())  # nothing is decoded past it


def test_a_stop_string_that_does_not_occur_changes_nothing(opened: Open) -> None:
    answer = opened(script=SCRIPT).generate("Say:", RunConfig(stop=("€X", "!!")))
    assert answer.text == SCRIPT


def test_prompt_and_answer_must_fit_the_model(opened: Open) -> None:
    generator = opened(script=SCRIPT, max_length=64)
    assert generator.generate("a" * 43 + ":", RunConfig(max_new_tokens=20)).text == SCRIPT
    assert generator.generate("a" * 60 + ":", RunConfig()).new_tokens == 3
    with pytest.raises(TooLong, match="at most 19 new tokens"):
        generator.generate("a" * 44 + ":", RunConfig(max_new_tokens=20))
    with pytest.raises(UsageError, match="shorten the prompt"):
        generator.generate("a" * 64, RunConfig(max_new_tokens=1))
    with pytest.raises(UsageError, match="65 tokens are more than the 64"):
        generator.logits(np.zeros((1, 65), np.int64), np.ones((1, 65), np.int64))


def test_the_beginning_of_a_long_prompt_is_dropped_on_request(opened: Open) -> None:
    generator = opened(max_length=64)  # of random weights: every token of the prompt counts
    prompt = "".join(chr(97 + index % 26) for index in range(100))
    cut = RunConfig(max_new_tokens=20, overflow="truncate-left")
    answer, whole = generator.generate(prompt, cut), generator.generate(prompt[-44:], RunConfig(max_new_tokens=20))
    assert (answer.text, answer.prompt_tokens, answer.dropped_tokens) == (whole.text, 44, 100 - 44)
    assert generator.generate(prompt[-44:], cut) != generator.generate(prompt[-43:], cut)
    assert generator.generate("short", cut).dropped_tokens == whole.dropped_tokens == 0
    assert generator.generate(prompt, RunConfig(overflow="truncate-left")).new_tokens <= 32  # half of the limit
    with pytest.raises(TooLong, match=r"64 new tokens leave no room .* at most 63, or give --overflow shift"):
        generator.generate("a", RunConfig(max_new_tokens=64, overflow="truncate-left"))


@pytest.mark.parametrize("prompt", ["short", "much longer than the limit of this model"])
def test_a_shifting_answer_goes_on_past_the_limit(opened: Open, prompt: str) -> None:
    """Whenever the text is full, its last half is read again."""
    generator, limit, new = opened(max_length=32), 32, 90
    ids = generator.tokenizer.encode(prompt)
    read, expected = ids if len(ids) < limit else ids[-limit // 2 :], []
    for _ in range(new):
        read = read if len(read) <= limit else read[-limit // 2 :]
        logits = generator.logits(np.array([read]), np.ones((1, len(read)), np.int64), keep=1)
        expected.append(int(logits[0, -1].argmax()))
        read = [*read, expected[-1]]
    answer = generator.generate(prompt, RunConfig(max_new_tokens=new, overflow="shift"))
    assert answer.text == generator.tokenizer.decode(expected)
    assert (answer.new_tokens, answer.dropped_tokens > new - limit) == (new, True)


def test_the_first_token_is_kept_where_it_begins_every_text() -> None:
    window = Window(limit=8, kept=1)
    assert window.end_of([1, 2, 3, 4, 5], room=3) == [1, 4, 5]
    assert (window.end_of([1, 2, 3], room=3), window.dropped) == ([1, 2, 3], 2)


def test_an_empty_prompt_is_refused(opened: Open) -> None:
    with pytest.raises(UsageError, match="empty"):
        opened(script=SCRIPT).generate("")


# Streaming


def test_a_stream_yields_whole_characters_that_add_up_to_the_text(opened: Open) -> None:
    shown, answer = pieces(opened(script=SCRIPT), "Say:", RunConfig())
    assert shown == list(SCRIPT)
    assert answer.text == SCRIPT


def test_streaming_and_generating_give_the_same(opened: Open) -> None:
    generator = opened()
    shown, streamed = pieces(generator, "Say:", SAMPLED)
    assert "".join(shown) == streamed.text == generator.generate("Say:", SAMPLED).text


def test_concurrent_streams_do_not_affect_each_other(opened: Open) -> None:
    generator = opened()
    prompts = ["one", "another prompt"]
    streams = [generator.stream(prompt, SAMPLED) for prompt in prompts]
    texts = ["", ""]
    for _ in range(25):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    assert texts == [generator.generate(prompt, SAMPLED).text for prompt in prompts]


def test_timings_leave_out_the_time_of_a_streams_consumer(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(decode, "perf_counter", lambda: now[-1])
    _, answer = pieces(opened(script=SCRIPT), "Say:", RunConfig(), lambda: now.append(now[-1] + 100))
    assert now[-1] == 100 * len(SCRIPT)
    assert answer.timings.ttft_s == 0
    assert sum(answer.timings.decode_s) == 0


# Choosing


def test_greedy_answers_are_always_the_same(opened: Open) -> None:
    generator = opened()
    config = RunConfig(max_new_tokens=24)
    assert generator.generate("Say:", config).text == generator.generate("Say:", config).text


def test_the_seed_decides_a_sampled_answer(opened: Open) -> None:
    generator = opened()
    one, same, other = (
        generator.generate("Say:", RunConfig(temperature=1, max_new_tokens=24, seed=seed)).text for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}, {"repetition_penalty": 3.0}],
)
def test_each_option_changes_the_answer(opened: Open, options: dict[str, float]) -> None:
    generator = opened()
    plain: dict[str, float] = {"temperature": 1.0, "max_new_tokens": 24}
    changed = RunConfig(**{**plain, **options})  # type: ignore[arg-type]
    assert generator.generate("Say:", changed).text != generator.generate("Say:", SAMPLED).text


# Chats


def test_a_text_prompt_is_the_users_message_of_a_chat(opened: Open) -> None:
    generator = opened(chat=True)
    chat = [{"role": "user", "content": "Hello"}]
    assert generator.generate("Hello", SAMPLED).text == generator.generate(chat, SAMPLED).text
    assert generator.generate("Hello").prompt_tokens == 1 + 5 + 1 + 1


def test_a_system_message_comes_first(opened: Open) -> None:
    generator = opened(chat=True)
    config = RunConfig(temperature=1, max_new_tokens=24, system="Be brief.")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answer = generator.generate("Hello", config)
    assert answer.text == generator.generate(chat, SAMPLED).text
    assert answer.text != generator.generate("Hello", SAMPLED).text


def test_the_chat_template_can_be_switched_off_or_replaced(opened: Open, tmp_path: Path) -> None:
    generator = opened(chat=True)
    assert generator.generate("Hello", RunConfig(chat_template="none")).prompt_tokens == 5
    assert generator.generate("Hello", RunConfig(chat_template="auto")).prompt_tokens == 8
    other = tmp_path / "other.jinja"
    other.write_text("{% for message in messages %}{{ message.content }}<|end|>{% endfor %}")
    assert generator.generate("Hello", RunConfig(chat_template=str(other))).prompt_tokens == 6


def test_a_conversation_uses_the_cache_and_answers_as_without_it(opened: Open) -> None:
    generator = opened(chat=True)
    conversation = generator.chat(SAMPLED)
    for turn, question in enumerate(["Hello", "And then? " * 30, "Why?"]):
        over = [*conversation.messages, {"role": "user", "content": question}]
        afresh = generator.generate(over, SAMPLED)
        answer = conversation.send(question)
        assert answer.text == afresh.text
        assert (answer.prompt_tokens, afresh.cached_tokens) == (afresh.prompt_tokens, 0)
        assert (answer.cached_tokens > 0) == (turn > 0)
    assert answer.cached_tokens > 300  # all but the last answer and question


def test_a_conversation_reads_only_new_tokens(opened: Open) -> None:
    conversation = opened(script=SCRIPT, chat=True).chat()
    first = conversation.send("Hello")
    second = conversation.send("Again")
    answered = len(SCRIPT.encode())
    assert second.text == SCRIPT
    assert second.cached_tokens == first.prompt_tokens + answered
    tags = 4  # the end of the answer, and user, end and assistant of the question
    assert second.prompt_tokens - second.cached_tokens == len("Again") + tags


def test_a_conversation_continues_after_a_stop_string(opened: Open) -> None:
    generator = opened(script=SCRIPT, chat=True)
    conversation = generator.chat(RunConfig(stop=("日",)))
    assert conversation.send("Hello").text == "Cafés €"
    assert [message["content"] for message in conversation.messages] == ["Hello", "Cafés €"]
    assert conversation.send("Again").text == "Cafés €"


def test_an_interrupted_turn_is_not_part_of_the_conversation(opened: Open) -> None:
    generator = opened(chat=True)
    conversation = generator.chat(SAMPLED)
    broken = conversation.stream("Forget this")
    next(broken)
    broken.close()
    assert conversation.messages == []
    assert conversation.send("Hello").text == generator.generate("Hello", SAMPLED).text


def test_a_chat_needs_a_chat_template(opened: Open) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        opened(script=SCRIPT).chat()
    with pytest.raises(UsageError, match="chat template"):
        opened(script=SCRIPT).generate([{"role": "user", "content": "Hello"}])


# Tokens in, tokens out


def test_answer_returns_tokens_without_the_stop_token(opened: Open) -> None:
    generator = opened(script=SCRIPT)
    prompt = generator.tokenizer.encode("Say:")
    assert generator.answer(prompt, 64) == generator.tokenizer.encode(SCRIPT)
    assert generator.answer(prompt, 2) == generator.tokenizer.encode("Ca")


def test_answer_ends_at_the_models_limit(opened: Open) -> None:
    generator = opened(script=SCRIPT, max_length=64)
    prompt = generator.tokenizer.encode("a" * 59 + ":")
    assert generator.tokenizer.decode(generator.answer(prompt, 64)) == "Caf" + "\ufffd"
    assert generator.answer([1] * 64, 64) == generator.answer([], 64) == []


def test_timings_have_an_entry_for_every_token(opened: Open) -> None:
    answer = opened(script=SCRIPT).generate("Say:")
    assert len(answer.timings.decode_s) == answer.new_tokens - 1
    assert 0 < answer.timings.prefill_s <= answer.timings.ttft_s
    assert min(answer.timings.decode_s) > 0


def test_time_decode_ignores_stop_tokens(opened: Open) -> None:
    generator = opened(script=SCRIPT)
    prompt = generator.tokenizer.encode("Say:")
    assert len(generator.time_decode(prompt, 40).decode_s) == 39
    with pytest.raises(UsageError, match="tokens"):
        generator.time_decode(prompt, 10_000)


# Scores


def test_token_nll_is_the_loss_of_the_labelled_tokens(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = opened()
    random = np.random.default_rng(0)
    input_ids = random.integers(0, 256, (3, 12))
    attention_mask = np.ones_like(input_ids)
    labels = np.where(random.random(input_ids.shape) < 0.5, input_ids, -100)
    attention_mask[1, 8:], labels[1, 8:] = 0, -100
    labels[:, :2], labels[2, 0] = -100, input_ids[2, 0]  # a label on the first token counts for nothing
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "rows": [1, 2, 3]}

    nll, predicted = generator.token_nll(batch)  # type: ignore[arg-type]

    logits = generator.logits(input_ids, attention_mask).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(3):
        for at in range(12):
            if at == 0 or labels[row, at] == -100:
                assert (nll[row, at], predicted[row, at]) == (0, -100)
            else:
                expected = -log_probabilities[row, at - 1, labels[row, at]]
                assert nll[row, at] == pytest.approx(expected, abs=1e-4)
                assert predicted[row, at] == logits[row, at - 1].argmax()

    monkeypatch.setattr(token_scores, "MAX_LOGITS", 1)  # row by row
    np.testing.assert_allclose(generator.token_nll(batch)[0], nll, atol=1e-5)  # type: ignore[arg-type]


def test_padding_changes_no_score(opened: Open) -> None:
    generator = opened()
    ids = np.random.default_rng(1).integers(0, 256, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    together = generator.logits(ids, mask)
    np.testing.assert_allclose(generator.logits(ids[1:, :5], mask[1:, :5])[0], together[1, :5], atol=1e-5)


def test_a_batch_without_labels_has_no_loss(opened: Open) -> None:
    ids = np.ones((2, 4), np.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": np.full((2, 4), -100), "rows": [1, 2]}
    nll, predicted = opened().token_nll(batch)  # type: ignore[arg-type]
    assert not nll.any()
    assert (predicted == -100).all()


def test_weights_are_moved_to_huge_pages_once_after_the_first_long_answer(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    monkeypatch.setattr("edge_ft.runtime.text_generator.use_huge_pages", moved.append)
    generator = opened(script=SCRIPT)
    monkeypatch.setattr(generator, "_settled", False)
    generator.time_decode([5, 6, 7], 9)  # as long as those by which engines are compared
    assert moved == []
    for _ in range(2):
        generator.time_decode([5, 6, 7], 20)
        generator.generate("Say:", RunConfig(max_new_tokens=20))
    assert moved == [4 * generator.bundle.size_bytes]
