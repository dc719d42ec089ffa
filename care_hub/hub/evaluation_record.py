"""evaluation.json beside an encoder: what was measured of its very weights, by kind and data set."""

import json
import logging
from pathlib import Path
from typing import Any, TypedDict

from ..files import file_errors, own_file, read_header, write_text
from ..schema import check_type
from .export import READ_ERRORS, folder_lock, read_json, sha256

logger = logging.getLogger(__name__)
FILE_NAME, RECORD_BYTES = "evaluation.json", 16 << 20
FORMER_NAMES = {"greyscale": "grayscale", "spread": "variance"}  # of families and measures
Record = dict[str, dict[str, Any]]  # kind ("accuracy" or "equivariance") -> data set -> results

Interval = tuple[float, float, float] | tuple[None, None, None]  # mean and 95 % bounds, where there are some


class Metrics(TypedDict, total=False):
    """Of a classifier; accuracies in percent. There is more in it, as settings of its training."""

    top1: float
    top5: float
    top1_std: float
    top5_std: float
    protocol: str
    seed: int
    seeds: int
    k: int  # this and the next of kNN
    temperature: float
    n_train: int
    n_test: int
    data: dict[str, str | bool]  # see `data.sources.data_of`


class _Measured(TypedDict):
    images: int
    draws: int
    families: dict[str, dict[str, Interval]]
    attributes: dict[str, dict[str, float]]  # by space and attribute


class Equivariance(_Measured, total=False):
    """What `care-hub equivariance` measured of one data set."""

    seed: int
    effective_rank: float
    n_test: int  # of which `images` were taken
    data: dict[str, str | bool]  # see `data.sources.data_of`
    recipe: dict[str, Any]  # the augmentation "full recipe", where it is another encoder's


def read_record(folder: Path) -> Record:
    """kind -> data set -> results; what had another name in former versions comes under today's.

    Empty where nothing is recorded, where it was measured of other weights than those in `folder`,
    and where the file is no record of this program: it may be a stranger's. Raises CareHubError for a
    file that may not be read, which must not be taken for an empty record and written anew.
    """
    path, weights = folder / FILE_NAME, folder / "model.safetensors"
    if not (own_file(path) and own_file(weights)):
        return {}
    read_header(weights)
    with file_errors(path, "read"):
        path.open("rb").close()
    try:
        stored = read_json(path, RECORD_BYTES)
        if stored["encoder"] != sha256(weights):
            return {}
        return _checked(stored["results"])
    except READ_ERRORS as error:
        logger.warning("'%s' is no record of care_hub and is left out (%.200r).", path, error)
        return {}


def _checked(results: Any) -> Record:
    """`results` under today's names. Raises READ_ERRORS unless numbers are where they belong."""
    check_type(results, dict[str, dict[str, dict[str, Any]]], "results")
    for name, found in results.get("equivariance", {}).items():
        if "kept" in found:
            found["attributes"] = found.pop("kept")
        found["families"] = _renamed({name: _renamed(of) for name, of in found["families"].items()})
        check_type(found, Equivariance, name)
        if len({tuple(space) for space in found["attributes"].values()}) != 1:
            raise ValueError("other attributes in one space than in the other")
    for by_label in results.get("accuracy", {}).values():
        for label, metrics in by_label.items():
            check_type({"top1": None} | metrics, Metrics, label)  # it must be there
    return results


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


def add_result(folder: Path, kind: str, dataset: str, results: dict[str, Any]) -> None:
    """Put `results` into the record of `folder`, beside others of this kind and data set.

    Any number of processes may do so at the same time. It leaves the card alone: see
    `card.write_card`.
    """
    with folder_lock(folder):
        record = read_record(folder)
        record.setdefault(kind, {}).setdefault(dataset, {}).update(results)
        stored = {"encoder": sha256(folder / "model.safetensors"), "results": record}
        write_text(folder / FILE_NAME, json.dumps(stored) + "\n")
