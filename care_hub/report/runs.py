"""A run folder as the page of `care-hub report` needs it."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import TrainConfig, read_yaml
from ..errors import CareHubError
from ..hub.card import Row, accuracies
from ..hub.evaluation_record import read_record
from ..hub.export import READ_ERRORS, check_numbers, read_config
from ..hub.linear_head import read_heads


@dataclass
class Run:
    """What a run folder contains; parts that are not there yet are empty."""

    name: str
    path: Path
    config: TrainConfig
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl
    results: dict[str, float]  # results.json
    versions: dict[str, str] = field(default_factory=dict)  # package -> version it was trained with
    accuracy: dict[tuple[str, str], Row] = field(default_factory=dict)  # by data set and title
    geometry: dict[str, dict[str, Any]] = field(default_factory=dict)
    """data set -> what `care-hub equivariance` measured"""

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises CareHubError for what is no run folder, or has a damaged file."""
        if not os.path.isfile(path / "config.yaml"):
            raise CareHubError(f"'{path}' is not a run folder (no config.yaml there).")
        config = TrainConfig(**read_yaml(path / "config.yaml"))
        rows, results = _read_rows(path / "metrics.jsonl"), _read_results(path / "results.json")
        run = cls(path.resolve().name, path, config, rows, results)
        export = path / "export"
        if (export / "config.json").is_file():
            about, record = read_config(export)[0], read_record(export)
            heads = read_heads(export)
            run.versions, run.geometry = about.versions, record.get("equivariance", {})
            run.accuracy = {(row.dataset, row.title): row for row in accuracies(about, heads, record)}
        return run


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in the folders `paths`; those whose folders are named alike are called by their paths."""
    runs = [Run.read(Path(path)) for path in paths]
    if not runs:
        raise CareHubError("there is no run to report; name at least one run folder.")
    count = Counter(run.name for run in runs)
    for run in runs:
        run.name = str(run.path) if count[run.name] > 1 else run.name
    if len({run.name for run in runs}) < len(runs):
        raise CareHubError("the same run is given twice.")
    return runs


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = dict(json.loads(path.read_bytes())) if path.is_file() else {}
        known = {key: value for key, value in results.items() if value == value}  # version 0.1 wrote NaN
        check_numbers(known.values())
        return known
    except READ_ERRORS as error:
        raise CareHubError(f"'{path}' does not contain the results of a run ({error!r:.200}).") from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line that is being written, or was cut short, is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            check_numbers([row["step"], *row.values()])
            rows.append(row)
        except READ_ERRORS as error:
            if number < len(lines):
                raise CareHubError(f"line {number} of '{path}' is no row of metrics.") from error
    return rows
