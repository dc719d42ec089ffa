"""The export folder: config.json in timm's schema with a `care` object, and safetensors files.

Nothing in such a folder is trusted, since it may come from a stranger; nothing is unpickled.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor, nn

from ..config import EncoderConfig, ProjectionConfig
from ..errors import CareHubError
from ..files import (
    check_tensors,
    file_errors,
    own_file,
    read_header,
    read_tensors,
    replacement,
    write_bytes,
    write_tensors,
)
from . import sentence_transformer

JSON_BYTES = 1 << 20
PENDING = ".pending-"  # and its sha256: a file whose place another has as yet
# What reading a stranger's JSON may raise.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def export_folder(source: str | Path) -> Path:
    """An export folder, or a run folder that contains one -> the export folder.

    What a killed writer left undone there is finished. Raises CareHubError for anything else.
    """
    for folder in (Path(source) / "export", Path(source)):
        if own_file(folder / "config.json"):
            with suppress(CareHubError, ValueError):  # not this user's to write, or a stranger's
                if any(folder.glob(f"{PENDING}*")):  # of a writer that is at work, or was killed
                    with folder_lock(folder):
                        settle(folder, read_config(folder)[0].sha256)
            return folder
    raise CareHubError(f"'{source}' is not an export folder or a run folder with one (no config.json there).")


def read_config(folder: Path, plain: bool = False) -> tuple[EncoderConfig, dict[str, Any]]:
    """config.json: its `care` object, checked for what rebuilding an encoder takes, and all of it.

    `plain`: without one, what timm wrote there instead. Raises CareHubError for a file that is
    missing or is not a configuration of care_hub.
    """
    path = folder / "config.json"
    try:
        whole = read_json(path)
        if plain and "care" not in whole:
            return plain_config(whole), whole
        return EncoderConfig.from_json(whole["care"]), whole
    except (*READ_ERRORS, CareHubError) as error:
        raise CareHubError(f"'{path}' is not a care_hub configuration ({error!r:.200}).") from error


def plain_config(whole: dict[str, Any]) -> EncoderConfig:
    """That of an encoder without a head, from timm's own keys. Raises READ_ERRORS and CareHubError."""
    seen = whole["pretrained_cfg"]
    values = {"model": whole["architecture"], "image_size": seen["input_size"][-1]}
    return EncoderConfig.from_json(values | {key: seen[key] for key in ("crop_pct", "mean", "std")})


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """What a JSON file of at most `most` bytes contains, itself not yet checked.

    Raises READ_ERRORS, and CareHubError for what is no regular file of its folder.
    """
    if not own_file(path):
        raise FileNotFoundError(errno.ENOENT, "there is none")
    if path.stat().st_size > most:
        raise ValueError(f"{path.stat().st_size:,} bytes")
    return json.loads(path.read_bytes().decode())


def check_numbers(values: Iterable[object]) -> None:
    """Raise TypeError unless all of `values`, out of a file, are finite numbers."""
    if not all(isinstance(value, int | float) and abs(value) <= sys.float_info.max for value in values):
        raise TypeError("a finite number is missing")


def projection_of(head: dict[str, Tensor]) -> ProjectionConfig | None:
    """The shape of a projection head, from its weights; None if they are not those of one."""
    first, last = head.get("0.weight"), head.get("3.weight", head.get("2.weight"))
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        return None
    hidden, inputs = first.shape
    return ProjectionConfig(inputs, hidden, last.shape[0], norm="3.weight" in head)


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal. Raises CareHubError where it can't be read."""
    digest = hashlib.sha256()
    with file_errors(path, "read"), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_sum(tensors: Iterable[Tensor], about: dict[str, str]) -> str:
    """sha256 of what a file with such tensors and metadata says, in hexadecimal."""
    said = [(key, value) for key, value in sorted(about.items()) if key not in ("format", "sha256")]
    numbers = [tensor.float().cpu().contiguous().numpy().tobytes() for tensor in tensors]
    return hashlib.sha256(b"".join([json.dumps(said).encode(), *numbers])).hexdigest()


def check_sums(folder: Path, sums: dict[str, str]) -> None:
    """Raise CareHubError if a file in `folder` has another sha256 than in `sums`; some may be absent."""
    for path in filter(lambda path: path.name in sums, folder.iterdir()):
        if own_file(path) and path.suffix == ".safetensors":
            read_header(path)  # the file is as long as it says
        if sha256(path) != sums[path.name]:
            raise CareHubError(f"'{path}' is damaged: its sha256 is wrong; fetch or export it again.")


def write_pending(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file into `folder` that `settle` will put in its place; gives its sha256."""
    new = folder / PENDING
    write_tensors(new, tensors)
    checksum = sha256(new)
    os.replace(new, folder / f"{PENDING}{checksum}")
    return checksum


def settle(folder: Path, sums: dict[str, str]) -> None:
    """Let pending files that config.json names by their `sums` take their places; the others go.

    So the one rename that decides is that of config.json: with it the files of the old encoder are in
    their places, or those of the new one at hand. What SentenceTransformer reads is made of them.
    The caller holds the lock of `folder`.
    """
    with file_errors(folder):
        for name, checksum in sums.items():
            pending = folder / Path(f"{PENDING}{checksum}").name
            if pending.is_file():
                os.replace(pending, folder / Path(name).name)
        write_modules(folder)
        for pending in folder.glob(f"{PENDING}*"):
            pending.unlink()


def module_files(folder: Path) -> dict[str, bytes]:
    """Path in `folder` -> content of what SentenceTransformer reads beside the export there.

    Raises CareHubError where the projection head is not what config.json says.
    """
    path = folder / "projection.safetensors"
    named = read_config(folder)[0].projection
    if not (named and own_file(path)):  # an encoder has features then, but no embeddings
        return sentence_transformer.module_files(None)
    head = read_tensors(path)
    try:
        if named == projection_of(head):
            return sentence_transformer.module_files(head)
    except (KeyError, RuntimeError):  # another form, or shapes that do not fit each other
        pass
    raise CareHubError(f"'{folder / 'config.json'}' and '{path.name}' disagree on the head.")


def retract_modules(folder: Path) -> None:
    """Make `folder` none for SentenceTransformer, until `settle`, which others call after a kill."""
    with file_errors(folder):
        (folder / f"{PENDING}modules").touch()
        (folder / sentence_transformer.MODULES).unlink(missing_ok=True)


def write_modules(folder: Path) -> None:
    """Write `module_files` of `folder` there, modules.json last; what is none of them goes.

    The caller holds the lock of `folder`. Raises CareHubError also for a link in the place of a
    folder, which might lead anywhere.
    """
    files = module_files(folder)
    for name in sentence_transformer.NAMES:
        path = folder / name
        if path.parent.is_symlink() and path.parent != folder:
            raise CareHubError(f"'{path.parent}' is a link; put a folder there.")
        with file_errors(path):
            if name in files:
                path.parent.mkdir(exist_ok=True)
                write_bytes(path, files[name])
            else:
                path.unlink(missing_ok=True)


def copy_export(folder: Path, target: Path) -> None:
    """Copy the files of an export that `target` does not have; config.json last, which makes it an export.

    What SentenceTransformer reads is made anew.
    """
    with folder_lock(target):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            there = target / path.name
            if path.name.startswith(".") or path.is_dir() or there.exists():
                continue
            if path.name not in sentence_transformer.NAMES and own_file(path):
                with replacement(there) as new:
                    shutil.copyfile(path, new)
        write_modules(target)


def fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state`, read from `path`, into `module`.

    Raises CareHubError with the first name, shape, dtype or value that does not fit: see `check_tensors`.
    """
    check_tensors(state, module.state_dict(), path)
    module.load_state_dict(state)


@contextmanager
def folder_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """For `with`: a lock under which a file in `folder` is read, changed and written.

    Without it, of two processes that do so at the same time one would undo what the other has done.
    It ends with its process. Raises CareHubError where nothing can be written, and unless `wait` where
    another has the lock.
    """
    lock = FileLock(folder / ".care_hub.lock")
    with file_errors(folder):
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise CareHubError(f"another process is writing '{folder}'; wait for it, or end it.") from None
    try:
        yield
    finally:
        lock.release()
