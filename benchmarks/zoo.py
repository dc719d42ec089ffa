"""The table of the encoders in the package, read from their folders: docs/encoders.md and results/zoo.json.

    python benchmarks/zoo.py

Every figure is one that the encoder's card states and `care-hub verify NAME` measures again.
"""

import json
from pathlib import Path

import click
from result_tables import ROOT, write_section

from care_hub.files import write_text
from care_hub.hub.evaluation_record import read_record
from care_hub.hub.export import read_config
from care_hub.hub.linear_head import LinearHead, head_files
from care_hub.hub.registry import SHIPPED

FAMILIES = ("color", "hue", "crop")
HEADER = ("name", "data", "image size", "minutes", "kNN", "linear probe", *FAMILIES, "size")


def row_of(folder: Path) -> list[str]:
    config, _ = read_config(folder)
    (head,) = map(LinearHead.load, head_files(folder))
    families = read_record(folder)["equivariance"][config.dataset]["families"]
    size = sum(file.stat().st_size for file in folder.iterdir())

    def found(family: str) -> str:
        return f"{families[family]['same_image_hit_at_1'][0]:.1f} %"

    return [
        f"`{folder.name}`",
        f"`{config.dataset}`",
        f"{config.image_size} px",
        f"{config.results['training_seconds'] / 60:.1f}",
        f"{config.results['knn_top1']:.1f} %",
        f"{head.metrics['top1']:.1f} %",
        *map(found, FAMILIES),
        f"{size / 1e6:.1f} MB",
    ]


@click.command()
def main() -> None:
    rows = [row_of(config.parent) for config in sorted(SHIPPED.glob("*/config.json"))]
    about = [dict(zip(HEADER, row, strict=True)) for row in rows]
    write_text(ROOT / "results" / "zoo.json", json.dumps(about, indent=2) + "\n")
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows))
    write_section(ROOT / "docs" / "encoders.md", table)
    click.echo(table)


if __name__ == "__main__":
    main()
