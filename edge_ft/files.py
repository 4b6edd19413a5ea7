"""Files and folders that are written whole or not at all, by one process at a time, and that show damage."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edge_ft.errors import EdgeFTError, UsageError

try:
    import fcntl
except ImportError:  # on Windows nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_file",
    "atomic_folder",
    "cache_folder",
    "disk_full",
    "file_sha256",
    "is_as_sealed",
    "is_rewritten",
    "json_text",
    "locked",
    "out_of_memory",
    "refuse_existing",
    "replaced_folder",
    "seal",
    "write_json",
    "write_jsonl",
    "write_text",
]

_NO_MEMORY = (
    "out of memory",  # torch on a GPU
    *("can't allocate memory", "not enough memory", "cannot allocate memory", "os error 12"),  # torch, safetensors
    *("bad_alloc", "bad allocation", "failed to allocate memory"),  # onnxruntime, tokenizers
    "can't start new thread",
    "returned null without setting an exception",  # protobuf
)


def cache_folder() -> Path:
    """The folder for what later commands reuse: EDGE_FT_CACHE, or ~/.cache/edge-ft."""
    return Path(os.environ.get("EDGE_FT_CACHE", Path.home() / ".cache" / "edge-ft"))


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which is renamed to `path` if the block succeeds and removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield neighbour
        with neighbour.open("r+b") as file:
            os.fsync(file.fileno())
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON by `write_text`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know.
    """
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a JSON value as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the hash of its content as `seal`, by which `is_as_sealed` sees damage."""
    content = {key: value for key, value in document.items() if key != "seal"}
    plain = json.loads(json.dumps(content, allow_nan=False))  # as it reads after writing, whatever its layout
    return {**content, "seal": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def is_as_sealed(path: Path, document: dict[str, Any]) -> bool:
    """Whether a JSON object is what `seal` and `write_json` wrote; one of an earlier release has no seal, and passes.

    A file that is now on a single line passes too: somebody's script rewrote it on purpose.

    Args:
        path: The file.
        document: What was read from it.

    Returns:
        Whether it may be used.
    """
    if "seal" not in document or is_rewritten(path):
        return True
    try:
        return bool(document["seal"] == seal(document)["seal"])
    except ValueError:  # a number that `write_json` does not write: NaN or infinity
        return False


def is_rewritten(path: Path) -> bool:
    """Whether a JSON file is on a single line, as `write_json` never writes one and no damage makes one."""
    return path.suffix == ".json" and b"\n" not in path.read_bytes().strip()


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """`write_text` of one JSON value a line; what JSON has no form for is written as text."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values))


def disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; safetensors reports that in an error of its own."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os error {code})" in str(error) for code in full)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that there is no memory left; each library has its own words."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if not isinstance(error, EdgeFTError) and any(words in str(error).lower() for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def refuse_existing(out: Path) -> None:
    """Refuse to overwrite.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: give another --out or remove it")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which is renamed to `out` if the block succeeds and removed if it fails.

    Yields:
        The temporary folder.

    Raises:
        UsageError: `out` exists.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which replaces it if the block succeeds: `folder` is never half written."""
    neighbour = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(neighbour, ignore_errors=True)
    neighbour.mkdir()
    yield neighbour
    shutil.rmtree(folder, ignore_errors=True)
    neighbour.rename(folder)


@contextmanager
def locked(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Let no other process write `out` during this block; what a killed one left beside it is removed.

    The lock is on a file beside `out`, which the block's end removes. It ends with the process, however that ends.

    Args:
        out: A file or folder, existing or not.
        wait: For another process that writes it; else it is refused.

    Yields:
        Nothing.

    Raises:
        UsageError: another process writes `out`, or this user may not write there.
        OSError: the lock cannot be written for another reason, as a full disk.
    """
    place = out.resolve()
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file, descriptor = _lock(place, wait)
    except BlockingIOError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise UsageError(f"{out} cannot be written ({error.strerror}: {error.filename}): give another --out") from error
    try:
        for left in place.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(place.name)}\.\d+\.tmp", left.name):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def _lock(place: Path, wait: bool) -> tuple[Path, int]:
    """Return the locked file of a place, and its descriptor.

    Raises:
        BlockingIOError: another process has locked it; the message names that.
        OSError: it cannot be opened or locked.
    """
    file = place.with_name(f".{place.name}.lock")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return file, descriptor
        except BlockingIOError:
            process = os.read(descriptor, 20).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(
                f"{place} is being written by another edge-ft (process {process}): wait for it or give another --out"
            ) from None
        except FileNotFoundError:
            pass  # the process before this one has just ended, and removed it
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return file, descriptor  # a file system without locks
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
