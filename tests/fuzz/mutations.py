"""Mutations of bytes, texts and JSON values; each takes the case's own generator: a seed gives the same case."""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["ODD_TEXTS", "dump_json", "mutate_bytes", "mutate_json", "odd_text", "odd_value", "safetensors_parts"]

ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\t\r\n",
    "\0",
    "a\0b",
    "\x1b[31mred\x1b[0m",
    "\x7f\x80\x9f",
    "\ufeffstart",
    "\u202eright to left",
    "\u2028\u2029",
    "\ufdd0\ufdd1\ufffe\uffff",
    "e\u0301" * 30,
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "한국어 中文 العربية ไทย",
    "İıſßﬃ",
    "null",
    "NaN",
    "../../etc/passwd",
    "/dev/zero",
    "C:\\Windows\\win.ini",
    "{prompt}",
    "{{ messages }}",
    "{% for x in range(9) %}",
    "{0} {} {a.b} {a[0]!r:>9}",
    "%s %n %d",
    "'\"`$(touch escaped)",
    "--help",
    "-1",
    "1e999",
    "0x10",
    "𝟙²Ⅳ",
    "a" * 5000,
    "word " * 3000,
)
ODD_NUMBERS = (
    *(0, -1, 1, 2, 7, 255, 256, 65536, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63)),
    *(2**64, 10**30, 0.5, -0.0, 1e-320, 1.5, 1e38, 1e308, float("nan"), float("inf"), float("-inf")),
)
EDGE_INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1)


def odd_text(random: Random) -> str:
    """A text that programs often read wrongly, or random characters of every plane."""
    if random.random() < 0.7:
        return random.choice(ODD_TEXTS)
    bounds = random.choice([(0, 0x7F), (0, 0x2FF), (0x300, 0x36F), (0, 0xD7FF), (0xE000, 0xFFFF), (0x1F300, 0x10FFFF)])
    return "".join(chr(random.randint(*bounds)) for _ in range(random.choice([1, 3, 20, 200])))


def odd_value(random: Random) -> Any:
    """A JSON value of any type."""
    return random.choice(
        [
            lambda: None,
            lambda: random.random() < 0.5,
            lambda: random.choice(ODD_NUMBERS),
            lambda: random.choice(ODD_NUMBERS),
            lambda: odd_text(random),
            lambda: odd_text(random),
            list,
            dict,
            lambda: [None],
            lambda: [odd_text(random), random.choice(ODD_NUMBERS)],
            lambda: {odd_text(random): random.choice(ODD_NUMBERS)},
            lambda: [[[[["deep"]]]]],
        ]
    )()


def mutate_json(random: Random, value: Any, times: int | None = None) -> Any:
    """A copy of `value` with one or more of its nodes replaced, removed, renamed, wrapped or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(times or random.choice([1, 1, 1, 2, 3, 8])):
        places = list(_places(value))
        if not places:
            return odd_value(random)
        holder, key = random.choice(places)
        _change(random, holder, key, places)
    return odd_value(random) if random.random() < 0.01 else value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Holder and key of every node below `value`; nodes of large lists are thinned."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        for key in keys if len(keys) < 40 else [*keys[:6], *keys[-6:]]:
            found.append((node, key))
            todo.append(node[key])
    return found


def _change(random: Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    if (isinstance(holder, dict) and key not in holder) or (isinstance(holder, list) and key >= len(holder)):
        return  # an earlier change removed it
    what, old = random.random(), holder[key]
    if what < 0.35:
        holder[key] = odd_value(random)
    elif what < 0.55:
        del holder[key]
    elif what < 0.62:
        other = random.choice(places)
        if not (isinstance(other[0], list) and other[1] >= len(other[0])) and other[1] in (
            other[0] if isinstance(other[0], dict) else range(len(other[0]))
        ):
            holder[key] = json.loads(json.dumps(other[0][other[1]]))
    elif what < 0.70:
        holder[key] = [old]
    elif what < 0.76:
        holder[key] = {"value": old}
    elif what < 0.82 and isinstance(holder, dict):
        holder[random.choice([str(key).upper(), f"{key} ", odd_text(random)])] = holder.pop(key)
    elif what < 0.88 and isinstance(old, str):
        at = random.randrange(len(old) + 1)
        holder[key] = old[:at] + odd_text(random) + old[at + random.randrange(3) :]
    elif what < 0.94 and isinstance(old, int | float):
        holder[key] = random.choice([-old, old + 1, old - 1, old * 1000, str(old), float(old) + 0.5])
    elif isinstance(old, list):
        holder[key] = random.choice([old * 2, old[::-1], old[:-1], old[1:], [*old, odd_value(random)]])
    else:
        holder[key] = str(old)


def dump_json(random: Random, value: Any) -> bytes:
    """JSON of `value`, now and then written as other programs do: NaN, byte order mark, UTF-16, doubled keys."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5, indent=random.choice([None, None, 2]))
    what = random.random()
    if what < 0.02 and text.startswith("{"):
        text = '{"": 0, ' + text[1:] if len(text) > 2 else text
    if what > 0.98:
        return random.choice(
            [
                lambda: b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass"),
                lambda: text.encode("utf-16", "surrogatepass"),
                lambda: b"[" * 20000 + text.encode("utf-8", "surrogatepass"),
            ]
        )()
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(random: Random, data: bytes, times: int | None = None, *, head: int | None = None) -> bytes:
    """A copy with a few bytes changed, inserted, removed, doubled or cut off; `head` limits where."""
    found = bytearray(data)
    for _ in range(times or random.choice([1, 1, 2, 4, 16])):
        limit = min(len(found), head or len(found))
        at = random.randrange(limit + 1)
        size = random.choice([1, 1, 2, 4, 8, 64])
        random.choice(_BYTE_CHANGES)(random, found, at, size)
    return bytes(found)


def _flip(random: Random, found: bytearray, at: int, size: int) -> None:
    if at < len(found):
        found[at] ^= 1 << random.randrange(8)


def _overwrite(random: Random, found: bytearray, at: int, size: int) -> None:
    found[at : at + size] = random.randbytes(size)


def _insert(random: Random, found: bytearray, at: int, size: int) -> None:
    found[at:at] = random.choice(
        [random.randbytes(size), b"\0" * size, b"\xff" * size, b"\xc3\x28", b"\xed\xa0\x80", b"\n", b'"', b",", b"{"]
    )


def _delete(random: Random, found: bytearray, at: int, size: int) -> None:
    del found[at : at + size]


def _double(random: Random, found: bytearray, at: int, size: int) -> None:
    found[at:at] = found[at : at + size * 4]


def _cut(random: Random, found: bytearray, at: int, size: int) -> None:
    if random.random() < 0.3:
        del found[at:]


def _integer(random: Random, found: bytearray, at: int, size: int) -> None:
    form = random.choice(["<Q", "<I", "<H"])
    number = random.choice(EDGE_INTEGERS) % 2 ** (8 * struct.calcsize(form))
    found[at : at + struct.calcsize(form)] = struct.pack(form, number)


_BYTE_CHANGES: tuple[Callable[[Random, bytearray, int, int], None], ...] = (
    *(_flip, _flip, _overwrite, _insert, _delete, _double, _cut, _integer, _integer),
)


def safetensors_parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    size = struct.unpack_from("<Q", data)[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]
