"""Results as plain text, and how numbers and their titles are written."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import printable
from ..hub.rotation_set import RotationSet
from ..metrics import METRICS

HITS = ("hit_at_1", "hit_at_1_unrotated", "hit_at_1_random")
STEERING = (
    "motion",
    "same_image_hit_at_1",
    "same_image_hit_at_1_linear",
    "same_image_hit_at_1_mlp",
    "same_image_mrr",
    "cosine",
    "cosine_unrotated",
    "parameters_from_pair",
    "parameters_from_view",
)
GEOMETRY = (
    "invariance_error",
    "rotation_error",
    "rotation_invariance_ratio",
    "special_rotation_invariance_ratio",
    "gamma",
    "gram_deviation",
    "variance",
    "composition_invariance_ratio",
    *HITS,
)
ROTATIONS = (
    "motion",
    "same_image_hit_at_1",
    "same_image_hit_at_1_unrotated",
    "same_image_hit_at_1_linear",
    "same_image_mrr",
    "cosine",
    "cosine_unrotated",
    "cosine_linear",
    "cosine_between",
)

Results = dict[str, dict[str, Any]]  # name of an encoder -> what `evaluate_equivariance` measured


def title_with_unit(key: str) -> str:
    """How the metric `key` is called; a key without a title is its own.

    >>> title_with_unit("hit_at_1"), title_with_unit("gram_deviation")
    ('found by R f(x), %', 'Gram deviation')
    """
    if key not in METRICS:
        return key
    metric = METRICS[key]
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def number(value: float | None, digits: int = 4) -> str:
    """`value` with so many significant digits, a dash where it is unknown (None or NaN).

    >>> number(0.123456), number(7), number(None)
    ('0.1235', '7', '–')
    """
    return "–" if value is None or value != value else f"{value:.{digits}g}"


def interval(result: dict[str, Any], family: str, metric: str) -> list[Any]:
    """(mean, lower, upper end) of what `evaluate_equivariance` measured; None where it did not."""
    return result["families"].get(family, {}).get(metric) or [None] * 3


def text_table(rows: list[list[str]]) -> str:
    """Columns under the heads in the first row, which are wrapped. The first column is flush left.

    >>> print(text_table([["family", "rotation error"], ["crop", "0.017"]]))
            rotation
    family     error
    crop       0.017
    """
    rows = [list(map(printable, row)) for row in rows]
    heads = [textwrap.wrap(head, 11, break_long_words=False, break_on_hyphens=False) for head in rows[0]]
    depth = max(map(len, heads))
    padded = [[""] * (depth - len(lines)) + lines for lines in heads]
    cells = [*zip(*padded, strict=True), *rows[1:]]
    first_width, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[first.ljust(first_width), *map(str.rjust, others, widths)] for first, *others in cells]
    return "\n".join(map("  ".join, lines))


def geometry_text(results: Results) -> str:
    """What `care-hub equivariance` prints: families by encoder, meanings of columns, attribute probes.

    First whether embeddings can be steered, then how nearly augmentations are rotations.

    `results`: name of the encoder -> what `evaluate.commands.evaluate_equivariance` measured.
    """
    note = "R is fitted to an augmentation a on one half of the images; the other half is measured."
    parts = ["", note, ""]
    for question, keys in (
        ("Does R know which augmentation was made? That is what steering takes.", STEERING),
        ("Is an augmentation a rotation of all embeddings, and does it keep images apart?", GEOMETRY),
    ):
        meanings = [f"  {METRICS[key].title}: {METRICS[key].meaning}" for key in keys]
        parts += [question, "", text_table(_family_rows(results, keys)), "", *meanings, ""]
    return "\n".join([*parts, text_table(_attribute_rows(results))])


def _family_rows(results: Results, keys: Sequence[str]) -> list[list[str]]:
    rows = [["family", "encoder", *map(title_with_unit, keys)]]
    for family in next(iter(results.values()))["families"]:
        for name, result in results.items():
            means = [number(interval(result, family, key)[0]) for key in keys]
            rows.append([family, Path(name).name, *means])
    return rows if len(results) > 1 else [[family, *numbers] for family, _, *numbers in rows]


def _attribute_rows(results: Results) -> list[list[str]]:
    spaces = [
        (f"{Path(name).name}, {space}", values)
        for name, result in results.items()
        for space, values in result["attributes"].items()
    ]
    rows = [["linear probe for", *(head for head, _ in spaces)]]
    for attribute in spaces[0][1]:
        rows.append([title_with_unit(attribute), *(number(values.get(attribute)) for _, values in spaces)])
    return rows


def rotations_text(rotations: RotationSet) -> str:
    """What `care-hub rotations` prints: each transformation and its strengths, and what can be steered."""
    rows = [["transformation", "steerable", *map(title_with_unit, ROTATIONS)]]
    for name, found in rotations.fitted.items():
        verdict = "yes" if found.steerable else "no"
        rows.append([name, verdict, *_means(found.overall)])
        if len(found.strengths) > 1:
            each = zip(found.strengths, found.measured, strict=True)
            rows += [[f"  {strength:g}", "", *_means(measured)] for strength, measured in each]
    meanings = [f"  {METRICS[key].title}: {METRICS[key].meaning}" for key in ROTATIONS]
    two = [name for name, found in rotations.fitted.items() if found.candidates == 2]
    if two:
        meanings.append(f"  of {', '.join(map(printable, two))} there are 2 views; chance is 50 %")
    able = ", ".join(map(printable, rotations.steerable)) or "none of these"
    unable = [printable(name) for name in rotations if name not in rotations.steerable]
    verdicts = [f"Embeddings can be steered by: {able}."]
    if unable:
        verdicts.append(f"Not steerable: {', '.join(unable)}.")
    return "\n".join(["", text_table(rows), "", *meanings, "", *verdicts])


def _means(measured: Mapping[str, Any]) -> list[str]:
    return [number((measured.get(key) or [None])[0], 3) for key in ROTATIONS]
