"""`care-hub report`: runs side by side on one self-contained HTML page."""

import base64
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment

from ..errors import CareHubError
from ..hub.export import write_text
from ..metrics import FINAL_METRICS, METRICS
from .figures import GEOMETRY, logged_metrics, plot_curves, plot_geometry, run_colors
from .runs import Run, read_runs
from .svg import VARIABLES, inline_svg
from .tables import number, title_with_unit

FAMILY_METRICS = (
    "rotation_invariance_ratio",
    "gram_deviation",
    "gamma",
    "composition_invariance_ratio",
    "hit_at_1",
    "hit_at_1_unrotated",
    "hit_at_1_random",
)
SHEETS = ("neighbors.png", "neighbours.png")  # the latter in exports of earlier versions
OWN_OPTIONS = {"run_name", "save_root", "resume"}  # differ between runs of one configuration


@dataclass
class Cell:
    text: str
    note: str = ""  # small, below
    best: bool = False
    color: str = ""  # of the run that is named


@dataclass
class Table:
    """A row of one cell is a heading."""

    head: list[Cell]
    rows: list[list[Cell]]


def write_page(paths: Sequence[str], output: str) -> Path:
    """Write the page that compares the run folders `paths`.

    Raises CareHubError for what is no run and for a page that can't be written.
    """
    target = Path(output)
    if target.is_dir():
        raise CareHubError(f"'{output}' is a folder; name a file for the page.")
    if not target.absolute().parent.is_dir():
        raise CareHubError(f"the folder '{target.parent}' for the page does not exist.")
    source = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    page = template.render(**contents(read_runs(paths)))
    try:
        write_text(target, page)
    except OSError as error:
        raise CareHubError(f"'{output}' can't be written ({error.strerror}).") from error
    return target


def contents(runs: list[Run]) -> dict[str, Any]:
    """What the template shows."""
    colors = run_colors(run.name for run in runs)
    with TemporaryDirectory() as folder:
        curves = _curve_figures(runs, Path(folder))
        datasets = list(dict.fromkeys(dataset for run in runs for dataset in run.geometry))
        parts = [_geometry_part(dataset, runs, colors, Path(folder)) for dataset in datasets]
    return {
        "variables": VARIABLES,
        "title": "Runs compared" if len(runs) > 1 else runs[0].name,
        "lead": _lead(runs),
        "legend": [Cell(run.name, color=colors[run.name]) for run in runs] if len(runs) > 1 else [],
        "about": about_table(runs, colors),
        "results": result_table(runs, colors),
        "differing": option_table(runs, colors),
        "missing": missing(runs),
        "curves": curves,
        "geometry": parts,
        "sheets": [{"name": run.name, "png": png} for run in runs if (png := _sheet(run))],
    }


def _lead(runs: list[Run]) -> str:
    if len(runs) == 1:
        return f"A run of care_hub: {runs[0].config.method_name} on {runs[0].config.dataset_name}."
    names = ", ".join(f"{run.name} ({run.config.method_name})" for run in runs)
    return f"{len(runs)} runs of care_hub: {names}."


def _curve_figures(runs: list[Run], folder: Path) -> list[str]:
    """A panel of SVG for each metric that was logged."""
    rows = {run.name: (run.metrics, run.config) for run in runs}
    panels = []
    for metric in logged_metrics(rows):
        path = folder / f"{metric}.svg"
        plot_curves(rows, path, [metric], legend=False)
        panels.append(inline_svg(path, f"{title_with_unit(metric)}, over the images seen"))
    return panels


def _geometry_part(dataset: str, runs: list[Run], colors: dict[str, str], folder: Path) -> dict[str, Any]:
    """The section on one data set."""
    known = {run.name: run.geometry[dataset] for run in runs if dataset in run.geometry}
    panels = []
    for metric in GEOMETRY:
        path = folder / f"{metric}.svg"
        plot_geometry(known, path, colors, [metric], legend=False)
        label = f"{title_with_unit(metric)}, by augmentation of {dataset}"
        panels.append(inline_svg(path, label))
    return {
        "dataset": dataset,
        "panels": panels,
        "candidates": f"{next(iter(known.values()))['images'] // 2:,}",
        "alike": len({(found["images"], found["draws"], found.get("seed")) for found in known.values()}) == 1,
        "families": family_table(known, colors),
        "attributes": attribute_table(known, colors),
    }


def _sheet(run: Run) -> str:
    """The run's sheet of nearest neighbors as base64, empty if there is none."""
    found = [path for name in SHEETS if (path := run.path / "export" / name).is_file()]
    return base64.b64encode(found[0].read_bytes()).decode() if found else ""


def _across(title: str, colors: dict[str, str], rows: list[list[Cell]]) -> Table:
    """A column for each run; `colors`: name -> color."""
    return Table([Cell(title), *(Cell(name, color=color) for name, color in colors.items())], rows)


def about_table(runs: list[Run], colors: dict[str, str]) -> Table:
    """What each run is."""
    facts = [_facts(run) for run in runs]
    rows = [[Cell(title), *(Cell(fact[title]) for fact in facts)] for title in facts[0]]
    return _across("", colors, rows)


def _facts(run: Run) -> dict[str, str]:
    versions = [f"{name} {run.versions[name]}" for name in ("torch", "timm") if name in run.versions]
    return {
        "method": run.config.method_name,
        title_with_unit("weight"): number(run.config.weight),
        "data": run.config.dataset_name,
        "model": run.config.model,
        "epochs × batch": f"{run.config.epochs} × {run.config.batch_size}",
        "seed": str(run.config.seed),
        f"{METRICS['training_seconds'].title}, minutes": number(
            run.results.get("training_seconds", math.nan) / 60, digits=3
        ),
        title_with_unit("images_per_second"): number(run.results.get("images_per_second")),
        "versions": ", ".join(versions) or "–",
    }


def result_table(runs: list[Run], colors: dict[str, str]) -> Table:
    """Accuracies, then the geometry at the end of training."""
    rows = []
    for dataset, title in dict.fromkeys(key for run in runs for key in run.accuracy):
        found = [run.accuracy.get((dataset, title), (None, "")) for run in runs]
        cells = _compared([value for value, _ in found], "higher")
        for cell, (_, note) in zip(cells, found, strict=True):
            cell.note = note
        rows.append([Cell(f"{title}, %", dataset), *cells])
    for key in FINAL_METRICS:
        if METRICS[key].unit != "%" and any(key in run.results for run in runs):  # accuracies are above
            cells = _compared([run.results.get(key) for run in runs], METRICS[key].better)
            rows.append([Cell(title_with_unit(key), METRICS[key].meaning), *cells])
    return _across("measure", colors, rows)


def _compared(values: Sequence[float | None], better: str, digits: int = 4) -> list[Cell]:
    """Cells of one measure, the best marked if there is one. `better`: "higher", "lower" or "" (neither)."""
    cells = [Cell(number(value, digits)) for value in values]
    known = [value for value in values if value is not None and not math.isnan(value)]
    if better and known and min(known) != max(known):
        best = max(known) if better == "higher" else min(known)
        for cell, value in zip(cells, values, strict=True):
            cell.best = value == best
    return cells


def option_table(runs: list[Run], colors: dict[str, str]) -> Table:
    """Options in which the runs differ."""
    rows = []
    for name in vars(runs[0].config):
        values = [str(getattr(run.config, name)) for run in runs]
        if name not in OWN_OPTIONS and len(set(values)) > 1:
            rows.append([Cell(name), *map(Cell, values)])
    return _across("option", colors, rows)


def missing(runs: list[Run]) -> list[str]:
    """What can be had, and by which command."""
    unfinished = [run.name for run in runs if not run.results]
    sentences = [f"{name} is not finished: there is no results.json yet." for name in unfinished]
    if bare := [run for run in runs if run.results and not run.geometry]:
        names = ", ".join(run.name for run in bare)
        words = [*(str(run.path) for run in bare), "--dataset-name", bare[0].config.dataset_name]
        command = f"care-hub equivariance {shlex.join(words)}"
        sentences.append(f"Geometry by augmentation was not measured for {names}: {command}")
    return sentences


def family_table(known: dict[str, dict[str, Any]], colors: dict[str, str]) -> Table:
    """A row for each augmentation family and run; several runs stand below the family's name."""
    rows = []
    for family in next(iter(known.values()))["families"]:
        columns = []
        for key in FAMILY_METRICS:
            triples = [result["families"].get(family, {}).get(key) for result in known.values()]
            columns.append(_with_intervals(triples, METRICS[key].better))
        names = [Cell(family)]
        if len(known) > 1:
            rows.append(names)
            names = [Cell(name, color=colors[name]) for name in known]
        rows += [list(row) for row in zip(names, *columns, strict=True)]
    return Table([Cell("augmentation"), *(Cell(title_with_unit(key)) for key in FAMILY_METRICS)], rows)


def _with_intervals(triples: Sequence[list[float] | None], better: str) -> list[Cell]:
    """Cells of (mean, lower, upper end); the best is marked if its interval overlaps no other."""
    known = [None if triple is None or triple[0] is None else triple for triple in triples]
    cells = _compared([None if triple is None else triple[0] for triple in known], better, digits=3)
    for k, (cell, triple) in enumerate(zip(cells, known, strict=True)):
        if triple is not None:
            _, low, high = triple
            others = [other for other in known[:k] + known[k + 1 :] if other is not None]
            cell.note = f"{number(low, 3)}\u00a0to\u00a0{number(high, 3)}"
            cell.best = cell.best and all(other[1] > high or other[2] < low for other in others)
    return cells


def attribute_table(known: dict[str, dict[str, Any]], colors: dict[str, str]) -> Table:
    """A row for each attribute that a linear map predicts, a column for each space and run."""
    probes = {name: result["attributes"] for name, result in known.items()}
    spaces = list(dict.fromkeys(space for probe in probes.values() for space in probe))
    found = (attribute for probe in probes.values() for space in probe.values() for attribute in space)
    rows = []
    for attribute in dict.fromkeys(found):
        row = [Cell(title_with_unit(attribute))]
        for space in spaces:
            values = [probe.get(space, {}).get(attribute) for probe in probes.values()]
            row += _compared(values, "higher", digits=3)
        rows.append(row)
    head = [Cell(name, space, color=colors[name]) for space in spaces for name in known]
    return Table([Cell("attribute"), *head], rows)
