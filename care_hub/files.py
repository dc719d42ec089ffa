"""Files that are written whole or not at all, and that others may read as far as the umask says."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import CareHubError


@contextmanager
def file_errors(path: str | Path, verb: str = "written") -> Iterator[None]:
    """For `with`: what the system refuses becomes a CareHubError that names `path`.

    >>> with file_errors("absent.txt", "read"):
    ...     open("absent.txt")
    Traceback (most recent call last):
    care_hub.errors.CareHubError: 'absent.txt' can't be read (No such file or directory).
    """
    if "\0" in str(path):  # for which Python has a ValueError
        raise CareHubError(f"'{path}' can't be {verb} (there is a NUL byte in its name).")
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CareHubError(f"'{path}' can't be {verb} ({reason}).") from error


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """For `with`: a file to write beside `path`, of this process, which then takes its place.

    Its mode is that of any new file, whatever wrote it: safetensors' own writer gives 0600. Raises
    CareHubError where it can't be written.
    """
    new = path.parent / f".writing-{uuid4().hex}"
    with file_errors(path):
        try:
            new.touch()
            mode = new.stat().st_mode
            yield new
            if new.stat().st_mode != mode:
                new.chmod(mode & 0o777)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file at once: whatever happens, `path` has its old content or all the new.

    What UTF-8 can't hold, as in a file name of other encoding, is written as an escape sequence.
    """
    with replacement(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file at once, as `write_text` does.

    Tensors that share memory, as tied weights do, are written once for each name.
    """
    memory = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    shared = {k: v.clone() for k, v in tensors.items() if memory[v.untyped_storage().data_ptr()] > 1}
    with replacement(path) as new:
        save_file(tensors | shared, new, metadata={"format": "pt"} | (metadata or {}))


def make_folder(path: str | Path) -> Path:
    """Make a folder, if need be with those above it, in which files can be written.

    Raises CareHubError, so that this is known before the work whose results go there.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise CareHubError(f"'{path}' can't be written: it is not a folder.")
    with file_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return path
