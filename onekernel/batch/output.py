"""The output file of a batch job: one line an answer, on the disk before the next ones are written."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onekernel.errors import InvalidRequest, OnekernelError

START = b'{"id": "batch_req_'  # how each line begins
OWN = "onekernel"  # the field that says which line of which input this is


class OutputFailed(OnekernelError):
    """The output cannot be written; the message says what to do."""


class Output:
    """An output file, held by this process until it is closed.

    The file itself is the record of what is done: each line names the line of the input that it answers, by number and
    digest, and the model. It only grows, but for a last line that a kill left incomplete, which is dropped.

    Attributes:
        done: numbers of the lines of the input that are answered.
        failed: how many of them with an error.
    """

    def __init__(self, path: Path, model: str, digests: Mapping[int, str]) -> None:
        """Open the file, or make it.

        Args:
            model: that answers, as the user named it.
            digests: of the lines of the input, by their number.

        Raises:
            InvalidRequest: the file is a device, or holds something else than answers of this model to this input. It
                is left alone.
            OutputFailed: the file cannot be opened, or another process holds it.
        """
        self.done: set[int] = set()
        self.failed = 0
        self._path = path
        self._model = model
        self._digests = digests
        try:
            new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise OutputFailed(f"the output {path} cannot be opened: {error.strerror or error}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise InvalidRequest(f"the output {path} is no regular file, so a job could not go on from it")
            self._lock()
            self._read()
            if new:
                _sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def add(self, number: int, result: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
        """Append the answer to a line of the input. When this returns it is on the disk.

        Args:
            result: the fields of the line, "id" first.
            ignored: fields of the request that had no effect; the line names them.

        Raises:
            OutputFailed: the disk is full, for example. The next start drops what was written in part.
        """
        self.add_all([(number, result, ignored)])

    def add_all(self, results: Sequence[tuple[int, Mapping[str, Any], Sequence[str]]]) -> None:
        """The same for several lines, with one wait for the disk."""
        lines = []
        for number, result, ignored in results:
            own: dict[str, Any] = {"line": number, "sha256": self._digests[number], "model": self._model}
            if ignored:
                own["ignored"] = list(ignored)
            lines.append(_encode({**result, OWN: own}) + b"\n")
        left = memoryview(b"".join(lines))
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            raise OutputFailed(
                f"the output {self._path} cannot be written: {error.strerror or error}. "
                "Mend that, then start the same command again: it goes on where it stopped"
            ) from None
        for number, result, _ in results:
            self._count(number, result)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Two processes would both answer what is left. The lock ends with the process, however that ends."""
        try:
            import fcntl
        except ImportError:  # Windows has none that is as simple
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputFailed(f"another process is writing the output {self._path}: wait for it to end") from None
        except OSError:  # a file system without locks
            return

    def _read(self) -> None:
        """Find out what is done. Changes nothing before all lines are known to be of this job."""
        complete = 0  # bytes
        tail = b""
        with os.fdopen(os.dup(self._file), "rb") as file:
            for count, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    self._read_line(count, line)
                    complete += len(line)
                else:
                    tail = line
        if not tail:
            return
        if not (tail.startswith(START) or START.startswith(tail)):
            raise self._foreign("its last line is none that onekernel wrote")
        if _is_json(tail):  # usually it is cut somewhere
            self._identify(tail, "its last line")
        os.ftruncate(self._file, complete)
        os.fsync(self._file)

    def _read_line(self, count: int, line: bytes) -> None:
        number, result = self._identify(line, f"its line {count}")
        if number in self.done:
            raise self._foreign(f"it answers line {number} twice")
        self._count(number, result)

    def _identify(self, line: bytes, where: str) -> tuple[int, dict[str, Any]]:
        """(the number of the line of the input that `line` answers, its fields)."""
        try:
            result = json.loads(line)
            own = result[OWN]
            number, digest, model = own["line"], own["sha256"], own["model"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._foreign(f"{where} is none that onekernel wrote") from None
        if model != self._model:
            raise self._foreign(f"{where} was made by the model {model!r}, not by {self._model!r}")
        if self._digests.get(number) != digest:
            raise self._foreign(
                f"{where} answers line {number} of another input, or of this one before it was changed, or with other "
                "options"
            )
        return number, result

    def _count(self, number: int, result: Mapping[str, Any]) -> None:
        self.done.add(number)
        self.failed += is_failure(result)

    def _foreign(self, why: str) -> InvalidRequest:
        return InvalidRequest(f"the output {self._path} belongs to something else: {why}. Choose another file")


def is_failure(result: Mapping[str, Any]) -> bool:
    """Whether a line of the output tells of an error."""
    response = result.get("response")
    return not isinstance(response, Mapping) or response.get("status_code") != 200


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _encode(result: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(result, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape
        return json.dumps(result).encode("ascii")


def _sync_folder(folder: Path) -> None:
    """A new file outlives a power cut only if its folder does."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
