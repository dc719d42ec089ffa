"""evaluation.json beside an encoder: what was measured of its very weights, by kind and data set."""

import json
import os
from pathlib import Path
from typing import Any

from ..files import file_errors, write_text
from .export import READ_ERRORS, check_numbers, folder_lock, sha256

FILE_NAME = "evaluation.json"
FORMER_NAMES = {"greyscale": "grayscale", "spread": "variance"}  # of families and measures
Record = dict[str, dict[str, Any]]  # kind ("accuracy" or "equivariance") -> data set -> results


def read_record(folder: Path) -> Record:
    """kind -> data set -> results; what had another name in former versions comes under today's.

    Empty where nothing is recorded, where it was measured of other weights than those in `folder`,
    and where the file is no record of this program: it may be a stranger's. Raises CareHubError for a
    file that may not be read, which must not be taken for an empty record and written anew.
    """
    path, weights = folder / FILE_NAME, folder / "model.safetensors"
    if not (os.path.isfile(path) and os.path.isfile(weights)):
        return {}
    with file_errors(path, "read"):
        content = path.read_bytes()
    try:
        stored = json.loads(content.decode())
        if stored["encoder"] != sha256(weights):
            return {}
        return _checked(stored["results"])
    except READ_ERRORS:
        return {}


def _checked(results: Record) -> Record:
    """`results` under today's names. Raises READ_ERRORS unless numbers are where they belong."""
    for found in results.get("equivariance", {}).values():
        if "kept" in found:
            found["attributes"] = found.pop("kept")
        found["families"] = _renamed({name: _renamed(of) for name, of in found["families"].items()})
        _check_equivariance(found)
    for by_label in results.get("accuracy", {}).values():
        for metrics in by_label.values():
            check_accuracy({"top1": None} | metrics)  # it must be there
    return results


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


def _check_equivariance(found: dict[str, Any]) -> None:
    spaces = found["attributes"].values()
    if len({tuple(space) for space in spaces}) != 1:
        raise ValueError("other attributes in one space than in the other")
    numbers = [found["images"], found["draws"], *(number for space in spaces for number in space.values())]
    for measures in found["families"].values():
        for mean, low, high in measures.values():
            if (mean, low, high) != (None, None, None):
                numbers += [mean, low, high]
    check_numbers(numbers)


def check_accuracy(metrics: dict[str, Any]) -> None:
    """Raise TypeError or AttributeError unless `metrics` has numbers where numbers belong."""
    check_numbers(metrics.get(name, 0) for name in ("top1", "top5", "top1_std", "seeds", "n_train"))


def add_result(folder: Path, kind: str, dataset: str, results: dict[str, Any]) -> None:
    """Put `results` into the record of `folder`, beside others of this kind and data set.

    Any number of processes may do so at the same time. It leaves the card alone: see
    `card.write_card`.
    """
    with folder_lock(folder):
        record = read_record(folder)
        record.setdefault(kind, {}).setdefault(dataset, {}).update(results)
        stored = {"encoder": sha256(folder / "model.safetensors"), "results": record}
        write_text(folder / FILE_NAME, json.dumps(stored, indent=2) + "\n")
