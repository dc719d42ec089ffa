"""The export folder: config.json in timm's schema with a `care` object, and safetensors files.

Nothing in such a folder is trusted, since it may come from a stranger; nothing is unpickled.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import EncoderConfig, ProjectionConfig
from ..errors import CareHubError
from ..files import file_errors, replacement, write_tensors

CONFIG_BYTES = 1 << 20
PENDING = ".pending-"  # and its sha256: a file whose place another has as yet
# What reading a stranger's JSON may raise.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def export_folder(source: str | Path) -> Path:
    """An export folder, or a run folder that contains one -> the export folder.

    What a killed writer left undone there is finished. Raises CareHubError for anything else.
    """
    for folder in (Path(source) / "export", Path(source)):
        with file_errors(folder, "read"):
            if (folder / "config.json").is_file():
                with suppress(CareHubError):  # not this user's to write
                    if any(folder.glob(f"{PENDING}*")):  # of a writer that is at work, or was killed
                        with folder_lock(folder):
                            settle(folder, read_config(folder)[0].sha256)
                return folder
    raise CareHubError(f"'{source}' is not an export folder or a run folder with one (no config.json there).")


def read_config(folder: Path) -> tuple[EncoderConfig, dict[str, Any]]:
    """config.json: its `care` object, checked for what rebuilding an encoder takes, and all of it.

    Raises CareHubError for a file that is missing or is not a configuration of care_hub.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        whole = json.loads(path.read_text(encoding="utf-8"))
        _check(whole["care"])
        return EncoderConfig.from_json(whole["care"]), whole
    except (*READ_ERRORS, CareHubError) as error:
        raise CareHubError(f"'{path}' is not a care_hub configuration ({error!r:.200}).") from error


def _check(care: dict[str, Any]) -> None:
    """Raise READ_ERRORS unless `care` has what an EncoderConfig takes, and its results are numbers."""
    head = care.get("projection")
    check_numbers([care.get("weight", 0), *care.get("results", {}).values()])
    sound = {
        "model": isinstance(care["model"], str),
        "projection": head is None or set(head) == {"inputs", "hidden", "outputs", "norm"},
        **{name: isinstance(care.get(name, {}), dict) for name in ("training", "versions", "sha256")},
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise ValueError(f"{name} {care[name]!r}")


def check_numbers(values: Iterable[object]) -> None:
    """Raise TypeError unless all of `values`, out of a file, are numbers."""
    if not all(isinstance(value, int | float) for value in values):
        raise TypeError("a number is missing")


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


def check_sums(folder: Path, sums: dict[str, str]) -> None:
    """Raise CareHubError if a file in `folder` has another sha256 than in `sums`; some may be absent."""
    for name, expected in sums.items():
        path = folder / Path(name).name
        if path.is_file() and sha256(path) != expected:
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
    their places, or those of the new one at hand. The caller holds the lock of `folder`.
    """
    with file_errors(folder):
        for name, checksum in sums.items():
            pending = folder / Path(f"{PENDING}{checksum}").name
            if pending.is_file():
                os.replace(pending, folder / Path(name).name)
        for pending in folder.glob(f"{PENDING}*"):
            pending.unlink()


def copy_export(folder: Path, target: Path) -> None:
    """Copy the files of an export that `target` does not have; config.json last, which makes it an export."""
    with folder_lock(target):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            there = target / path.name
            if path.is_file() and not path.name.startswith(".") and not there.exists():
                with replacement(there) as new:
                    shutil.copyfile(path, new)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. CareHubError if it is missing, cut short or not finite."""
    try:
        path.open("rb").close()  # safetensors calls missing what it may not read
        state = load_file(path)
    except FileNotFoundError:
        raise CareHubError(f"'{path}' is missing; the export is incomplete.") from None
    except SafetensorError as error:
        raise CareHubError(f"'{path}' is not a complete safetensors file ({error}).") from error
    except (OSError, ValueError) as error:
        raise CareHubError(f"'{path}' can't be read ({getattr(error, 'strerror', error)}).") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.double().abs().sum())):
            raise CareHubError(f"'{path}' contains values that are not finite numbers (in {name}).")
    return state


def fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state`, read from `path`, into `module`.

    Raises CareHubError with the first name or shape that differs.
    """
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    for name in expected | shapes:
        wanted, found = expected.get(name), shapes.get(name)
        if wanted != found:
            raise CareHubError(
                f"'{path}' does not fit its architecture: {name} should be {wanted} and is {found}."
            )
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
