"""The export folder: config.json in timm's schema with a `care` object, and safetensors files.

Nothing in such a folder is trusted, since it may come from a stranger; nothing is unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import BaseFileLock, FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import EncoderConfig, ProjectionConfig
from ..errors import CareHubError

CONFIG_BYTES = 1 << 20
HASHED_AT_ONCE = 1 << 20  # bytes


def export_folder(source: str | Path) -> Path:
    """An export folder, or a run folder that contains one -> the export folder.

    Raises CareHubError for anything else.
    """
    folder = Path(source)
    if (folder / "export" / "config.json").is_file():
        return folder / "export"
    if not (folder / "config.json").is_file():
        raise CareHubError(
            f"'{source}' is not an export folder or a run folder with one (no config.json there)."
        )
    return folder


def read_config(folder: Path) -> tuple[EncoderConfig, dict[str, Any]]:
    """config.json: its `care` object, checked for what rebuilding the encoder takes, and the whole JSON.

    Raises CareHubError for a file that is missing or is not a configuration of care_hub.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        whole = json.loads(path.read_text(encoding="utf-8"))
        _check_normalization(whole["care"])
        _check_types(whole["care"])
        return EncoderConfig.from_json(whole["care"]), whole
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CareHubError(f"'{path}' is not a care_hub configuration ({error!r:.200}).") from error


def _check_normalization(care: dict[str, Any]) -> None:
    mean, std, crop_pct = care["mean"], care["std"], care["crop_pct"]
    if len(mean) != 3 or len(std) != 3 or not all_numbers([*mean, *std, crop_pct]):
        raise ValueError(f"mean {mean}, std {std}, crop_pct {crop_pct}")
    if not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0 or not 0.1 <= crop_pct <= 1:
        raise ValueError(f"mean {mean}, std {std}, crop_pct {crop_pct}")


def _check_types(care: dict[str, Any]) -> None:
    size, head = care["image_size"], care.get("projection")
    if not isinstance(care["model"], str) or type(size) is not int or not 1 <= size <= 2048:
        raise ValueError(f"model {care['model']!r} at image_size {size!r}")
    if head is not None and set(head) != {"inputs", "hidden", "outputs", "norm"}:
        raise ValueError(f"projection {head}")
    for name in ("training", "results", "versions", "sha256"):
        if not isinstance(care.get(name, {}), dict):
            raise ValueError(f"{name} {care[name]!r}")
    if not all_numbers([care.get("weight", 0), *care.get("results", {}).values()]):
        raise ValueError("a number is missing")


def all_numbers(values: Iterable[object]) -> bool:
    """Whether all of `values`, out of a file, are numbers."""
    return all(isinstance(value, int | float) for value in values)


def projection_of(head: dict[str, Tensor]) -> ProjectionConfig | None:
    """The shape of a projection head, from its weights; None if they are not those of one."""
    first, last = head.get("0.weight"), head.get("3.weight", head.get("2.weight"))
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        return None
    hidden, inputs = first.shape
    return ProjectionConfig(inputs, hidden, outputs=last.shape[0], norm="3.weight" in head)


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def check_sums(folder: Path, sums: dict[str, str]) -> None:
    """Raise CareHubError if a file in `folder` has another sha256 than `sums` says; files may be absent."""
    for name, expected in sums.items():
        path = folder / Path(name).name
        if path.is_file() and sha256(path) != expected:
            raise CareHubError(
                f"'{path}' is damaged: its sha256 is not the one in config.json; fetch or export it again."
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CareHubError if it is missing, cut short or not finite."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise CareHubError(f"'{path}' is missing; the export is incomplete.") from None
    except (SafetensorError, OSError) as error:
        raise CareHubError(f"'{path}' is not a complete safetensors file ({error}).") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.double().abs().sum())):
            raise CareHubError(f"'{path}' contains values that are not finite numbers (in {name}).")
    return state


def fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state`, read from `path`, into `module`.

    Raises CareHubError with the first name or shape that differs.
    """
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if wanted != found:
        wrong = next(k for k in [*wanted, *found] if wanted.get(k) != found.get(k))
        raise CareHubError(
            f"'{path}' does not fit its architecture: {wrong} should be {wanted.get(wrong)} "
            f"and is {found.get(wrong)}."
        )
    module.load_state_dict(state)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file at once: whatever happens, `path` has its old content or all of the new one."""
    with _replacement(path) as new:
        new.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file at once, as `write_text` does."""
    with _replacement(path) as new:
        save_file(tensors, new, metadata={"format": "pt"} | (metadata or {}))


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which then takes its place. No two processes use the same one."""
    new = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def folder_lock(folder: Path) -> BaseFileLock:
    """A lock for `with`, under which a file in `folder` is read, changed and written.

    Without it, of two processes that do so at the same time one would undo what the other has done.
    """
    return FileLock(folder / ".care_hub.lock")
