"""Files that are written whole or not at all, and that others may read as far as the umask says."""

import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CareHubError

WEIGHTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' name of each
DTYPES = WEIGHTS | {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


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
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file at once, as `write_text` does."""
    with replacement(path) as new:
        new.write_bytes(content)


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


def own_file(path: Path) -> bool:
    """Whether there is a file `path`. Raises CareHubError for what is no regular file of its folder.

    A stranger's folder may contain a pipe, a device, or a link to a file that is not the
    stranger's. Links in a cache of the Hub (models--org--name/snapshots/revision) lead to its
    folders `blobs`.
    """
    with file_errors(path, "read"):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        homes, real = [path.parent], Path(os.path.realpath(path))
        if Path(os.path.realpath(path.parent)).parent.name == "snapshots":
            homes += [path.parent / up / "blobs" for up in ("../..", "../../..")]
        if not any(real.is_relative_to(os.path.realpath(home)) for home in homes):
            raise CareHubError(f"'{path}' is a link that leads out of its folder; put the file itself there.")
        if not stat.S_ISREG(real.stat().st_mode):
            raise CareHubError(f"'{path}' is not a regular file.")
    return True


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """For `with`: a safetensors file. Raises CareHubError for what is none, then or while it is open."""
    if not own_file(path):
        raise CareHubError(f"'{path}' is missing; the export is incomplete.")
    try:
        with path.open("rb") as opened:  # safetensors calls missing what it may not read
            named = f"/dev/fd/{opened.fileno()}" if _not_utf8(path) else path  # which it can't name
            with safe_open(named, "pt") as file:
                yield file
    except SafetensorError as error:
        raise CareHubError(
            f"'{path}' is not a complete safetensors file ({error}); fetch or write it again."
        ) from error
    except OSError as error:
        raise CareHubError(f"'{path}' can't be read ({error.strerror or error}).") from error


def _not_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a surrogate stands for each byte that is not UTF-8
        return True
    return False


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file without their values, on `meta`, and its metadata.

    Nothing else of the file is read. Raises CareHubError if it is missing, cut short, or of other
    dtypes.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        for name, part in slices.items():
            if part.get_dtype() not in DTYPES:
                raise CareHubError(f"'{path}' contains {name} in {part.get_dtype()}, which is never written.")
        return {
            name: torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
            for name, part in slices.items()
        }, file.metadata() or {}


def read_tensors(path: Path, own: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, once its header has shown that they are like `own`, if given.

    Raises CareHubError if it is missing, cut short, not finite, or does not fit: see
    `check_tensors`.
    """
    header, _ = read_header(path)
    own = header if own is None else own
    check_tensors(header, own, path)
    with _opened(path) as file:
        state = _values(file)
    check_tensors(state, own, path)
    return state


def _values(file: safe_open) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def check_tensors(found: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    """Raise CareHubError with the first of `found`, out of `path`, that can't take the place of `own`.

    Names and shapes are equal. So are dtypes, but that weights may be in float32, float16 or
    bfloat16. Values are finite, but for those that are equal. Tensors on `meta` have no values.
    """
    for name in own | found:
        mine, given = own.get(name), found.get(name)
        wanted, shape = (None if x is None else tuple(x.shape) for x in (mine, given))
        if mine is None or given is None or wanted != shape:
            raise CareHubError(
                f"'{path}' does not fit its architecture: {name} should be {wanted} and is {shape}."
            )
        if given.dtype != mine.dtype and not (mine.is_floating_point() and given.dtype in WEIGHTS.values()):
            raise CareHubError(
                f"'{path}' does not fit its architecture: {name} should be {mine.dtype}, is {given.dtype}."
            )
        if not _is_finite(given, mine):
            raise CareHubError(f"'{path}' contains values that are not finite numbers (in {name}).")


def _is_finite(given: Tensor, mine: Tensor) -> bool:
    """Whether all values are finite, or else those of `mine`, as the tables of some networks' buffers."""
    if given.is_meta or not given.is_floating_point() or not given.numel():
        return True
    if all(bound.isfinite() for bound in given.aminmax()):  # takes no memory
        return True
    if mine.is_meta:
        return False
    odd, same = (torch.where(x.isfinite(), 0, x) for x in (given.to(mine), mine))
    return torch.allclose(odd, same, equal_nan=True)
