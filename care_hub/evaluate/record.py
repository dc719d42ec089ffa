"""evaluation.json beside an encoder: what was measured of these very weights, by kind and data set. The card reads it."""

import json
from pathlib import Path

from ..export import sha256

NAME = "evaluation.json"


def read(folder: Path) -> dict[str, dict]:
    """kind -> data set -> results; empty where nothing is recorded, or of other weights than those in `folder`."""
    try:
        record = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return record["results"] if record["encoder"] == sha256(folder / "model.safetensors") else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def add(folder: Path, kind: str, dataset: str, results: dict) -> None:
    """Put `results` into the record of `folder`, beside others of this kind and data set, and rewrite its card."""
    from .. import card

    known = read(folder)
    known.setdefault(kind, {}).setdefault(dataset, {}).update(results)
    half = folder / f"{NAME}.writing"  # a crash leaves the old file or the new one
    half.write_text(json.dumps({"encoder": sha256(folder / "model.safetensors"), "results": known}, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / NAME)
    card.write(folder)
