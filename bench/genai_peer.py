"""onnxruntime-genai as a peer of decoders: it runs the graph that the bundle's own `genai_config.json` names."""

import json
from pathlib import Path
from time import perf_counter

import onnxruntime_genai

from edge_ft.bench.meters import DecodeTimings
from edge_ft.data import TextTokenizer
from edge_ft.errors import UsageError

__all__ = ["GenAIDecoder"]


class GenAIDecoder:
    """A decoder with the calls of `edge_ft.runtime.TextGenerator`, and one shared buffer for its keys and values.

    Raises:
        UsageError: onnxruntime-genai cannot open the bundle.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        self.tokenizer = TextTokenizer.of_bundle(bundle)
        try:
            config = onnxruntime_genai.Config(str(bundle))
            options = {"session_options": {"intra_op_num_threads": threads, "inter_op_num_threads": 1}}
            self.settings = {**options["session_options"], "past_present_share_buffer": True}
            config.overlay(json.dumps({"model": {"decoder": options}, "search": {"past_present_share_buffer": True}}))
            self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise UsageError(
                f"onnxruntime-genai {onnxruntime_genai.__version__} cannot open {bundle}: {error}"
            ) from error

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> DecodeTimings:
        """Decode exactly `new_tokens` greedily, past any stop token."""
        length = len(prompt_ids) + new_tokens
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        # The shared buffer has as many positions as the answer needs; a stop token is not chosen before its end.
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=1)
        generator = onnxruntime_genai.Generator(self._model, parameters)
        marks = [perf_counter()]
        generator.append_tokens(prompt_ids)
        for _ in range(new_tokens):
            generator.generate_next_token()
            marks.append(perf_counter())
        return DecodeTimings.between(marks)
