"""onnxruntime-genai opens a bundle of real weights and generates the same tokens."""

import pytest
from models_table import record_client, release

from edge_ft.artifacts import Bundle
from edge_ft.runtime import load


@pytest.mark.long
def test_onnxruntime_genai_generates_the_same_tokens_with_smollm2(smollm2_bundle: Bundle) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(smollm2_bundle.path))
    generator = load(smollm2_bundle, accuracy_level=1)
    text = "Transcript: we will meet again on monday\nWritten:"
    assert list(genai.Tokenizer(model).encode(text)) == generator.tokenizer.encode(text)
    prompt = generator.tokenizer.encode(text)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 24)
    theirs = genai.Generator(model, params)
    theirs.append_tokens(prompt)
    tokens = []
    while not theirs.is_done():
        theirs.generate_next_token()
        tokens.append(int(theirs.get_next_tokens()[0]))
    ours = generator.answer(prompt, 24)
    assert ours
    assert tokens[: len(ours)] == ours
    client = f"onnxruntime-genai {release('onnxruntime-genai')}"
    record_client("SmolLM2-135M", "text-generation", "int4 merged", client, "the same prompt and greedy tokens")
