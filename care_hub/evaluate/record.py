"""evaluation.json beside an encoder: what was measured of these very weights, by kind and data set. The card reads it."""

import json
from pathlib import Path

from ..export import sha256

NAME = "evaluation.json"


def read(folder: Path) -> dict[str, dict]:
    """kind -> data set -> results. Empty where nothing is recorded, or of other weights than those in `folder`, or what is no
    record of this program: it may be a stranger's file."""
    try:
        record = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return _checked(record["results"]) if record["encoder"] == sha256(folder / "model.safetensors") else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _checked(results: dict) -> dict:
    """`results`, if whoever shows them finds numbers where numbers belong; else one of the errors that `read` knows."""
    numbers = []
    for by_label in results.get("accuracy", {}).values():
        for metrics in by_label.values():
            numbers += [metrics["top1"], *(metrics.get(k, 0) for k in ("top5", "top1_std", "seeds", "n_train"))]
    for found in results.get("equivariance", {}).values():
        numbers += [found["images"], found["draws"], *(v for space in found["kept"].values() for v in space.values())]
        for triple in (t for family in found["families"].values() for t in family.values()):
            mean, low, high = triple
            numbers += [] if triple == [None, None, None] else [mean, low, high]
        if len({tuple(space) for space in found["kept"].values()}) != 1:
            raise ValueError("kept")
    if not all(isinstance(n, int | float) for n in numbers):
        raise TypeError("a number is missing")
    return results


def add(folder: Path, kind: str, dataset: str, results: dict) -> None:
    """Put `results` into the record of `folder`, beside others of this kind and data set, and rewrite its card."""
    from .. import card

    known = read(folder)
    known.setdefault(kind, {}).setdefault(dataset, {}).update(results)
    half = folder / f"{NAME}.writing"  # a crash leaves the old file or the new one
    half.write_text(json.dumps({"encoder": sha256(folder / "model.safetensors"), "results": known}, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / NAME)
    card.write(folder)
