"""Figures: their format follows the path, their size is bounded, names in them are text and nothing else."""

import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from care_hub.config import TrainConfig
from care_hub.data.images import InMemoryImages
from care_hub.errors import CareHubError
from care_hub.report import figures
from care_hub.report.svg import inline_svg

HOSTILE = "_<script>alert(1)$x\x01$"


def log(steps: int, speed: float = 100.0, weight: float = 1.0):
    """(rows, config) of a run as metrics.jsonl has them."""
    row = {
        "loss": 2.0,
        "infonce": 1.5,
        "equivariance": 0.1,
        "uniformity": 5.0,
        "weight": weight,
        "lr": 0.1,
        "images_per_second": speed,
    }
    rows = [row | {"step": k, "loss": 2 + np.sin(k)} for k in range(1, steps + 1)]
    return [*rows, {"step": steps, "knn_top1": 50.0}], TrainConfig(weight=weight)


def measured(families=("crop", "<flip>"), mean: float = 0.5) -> dict:
    triple = [mean, mean - 0.1, mean + 0.2]
    keys = (*figures.PANELS, "hit_at_1_unrotated")
    return {"families": {family: {key: triple for key in keys} for family in families}}


def texts(path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


@pytest.mark.parametrize("names", [("fast", "slow"), ("slow", "fast")])
def test_the_axis_of_the_speed_is_that_of_all_runs(tmp_path, names):
    speeds = {"fast": 1000.0, "slow": 100.0}
    runs = {name: log(20, speeds[name]) for name in names}
    figures.plot_curves(runs, tmp_path / "speed.svg", ["images_per_second"], legend=False)
    ticks = [float(text) for text in texts(tmp_path / "speed.svg") if text.isdigit()]
    assert max(ticks) >= 1000 and "speed, images/s" in texts(tmp_path / "speed.svg")


def test_a_long_run_makes_no_large_figure(tmp_path):
    figures.plot_curves({"long": log(20_000)}, tmp_path / "c.svg")
    assert len(inline_svg(tmp_path / "c.svg", "curves")) < 200_000
    figures.plot_curves({"short": log(1)}, tmp_path / "c.svg")


def test_only_what_was_logged_has_a_panel(tmp_path):
    plain = log(3, weight=0.0)
    assert "equivariance" not in figures.logged_metrics({"plain": plain})
    assert figures.logged_metrics({"plain": plain, "care": log(3)}) == list(figures.CURVES)
    figures.plot_curves({"plain": plain}, tmp_path / "c.svg")
    assert "equivariance loss" not in texts(tmp_path / "c.svg")


def test_runs_that_logged_nothing_have_no_figure(tmp_path):
    """It was a ZeroDivisionError."""
    figures.plot_curves({"new": ([], TrainConfig())}, tmp_path / "c.svg")
    figures.plot_curves({"new": ([], TrainConfig()), "care": log(3)}, tmp_path / "d.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["d.svg"]


def test_a_figure_that_can_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    def break_off(figure, file, **options):
        file.write_bytes(b"half of")
        raise OSError("no space left")

    figures.plot_curves({"care": log(3)}, tmp_path / "c.png")
    before = (tmp_path / "c.png").read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", break_off)
    with pytest.raises(CareHubError, match=r"c.png' can't be written \(no space left\)"):
        figures.plot_curves({"care": log(4)}, tmp_path / "c.png")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
    assert (tmp_path / "c.png").read_bytes() == before


def test_names_are_text_and_nothing_else(tmp_path):
    figures.plot_curves({HOSTILE: log(3), "b": log(3)}, tmp_path / "c.svg")
    results = {HOSTILE: measured(("crop", HOSTILE)), "b": measured()}
    figures.plot_geometry(results, tmp_path / "g.svg")
    for name in ("c.svg", "g.svg"):
        page = inline_svg(tmp_path / name, '"><script>')
        assert "<script" not in page and page.count('aria-label="&quot;&gt;&lt;script&gt;"') == 1
        assert "_&lt;script&gt;alert(1)$x$" in page


def test_an_inline_figure_follows_the_page_and_has_ids_of_its_own(tmp_path):
    figures.plot_geometry({"a": measured(), "b": measured(mean=0.7)}, tmp_path / "g.svg")
    one, two = (inline_svg(tmp_path / "g.svg", label) for label in ("of CIFAR-10", "of STL-10"))
    ids = [set(re.findall(r' id="([^"]+)"', page)) for page in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', one)) == ids[0]
    assert "var(--ink)" in one and "var(--paper)" in one and "var(--blue)" in one
    assert not re.search(r"<style|<\?xml|xmlns|#1c1f24|#ffffff", one)
    assert one.startswith("<svg viewBox=") and 'role="img"' in one


def test_format_and_colors_are_those_asked_for(tmp_path):
    results = {"a": measured(), "b": measured(families=("crop",))}  # b lacks a family
    results["a"]["families"]["crop"]["gram_deviation"] = [None, None, None]
    results["a"]["families"]["crop"]["hit_at_1"] = [0.5, 0.6, 0.7]  # a mean outside of its interval
    figures.plot_geometry(results, tmp_path / "g.png")
    assert Image.open(tmp_path / "g.png").format == "PNG"
    figures.plot_geometry(results, tmp_path / "g.svg", {"a": "#123456", "b": "#654321"})
    svg = (tmp_path / "g.svg").read_text()
    assert "#123456" in svg and "#654321" in svg and "#0072b2" not in svg
    assert {"rotation / invariance", "found by R f(x), %", "a", "b"} <= {
        t.strip("\u200b") for t in texts(tmp_path / "g.svg")
    }
    assert any("lower is better" in text for text in texts(tmp_path / "g.svg"))


def test_settings_of_matplotlib_stay_the_users(tmp_path):
    before = dict(matplotlib.rcParams)
    figures.plot_curves({"a": log(3)}, tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before


class ByColor:
    """Stands for an encoder: an image's embedding is its mean color."""

    config = SimpleNamespace(image_size=8)
    projection = None

    def embed(self, images, space):
        assert space == "backbone" and images.dtype == torch.uint8
        return images.float().mean(dim=(2, 3)) + 1e-3


def in_memory(count: int) -> InMemoryImages:
    """Red, green and blue images of 12 x 12 pixels in turn."""
    colors = 255 * torch.eye(3, dtype=torch.uint8)[torch.arange(count) % 3]
    pixels = colors[:, :, None, None].expand(-1, -1, 12, 12).contiguous()
    return InMemoryImages(size=12, labels=None, class_names=None, pixels=pixels)


def test_neighbors_are_the_most_similar_others(tmp_path):
    images = in_memory(9)
    nearest = figures._nearest(ByColor(), images.pixels, torch.tensor([0, 4]), 2)
    assert [sorted(row) for row in nearest.tolist()] == [[3, 6], [1, 7]]
    figures.plot_neighbors(
        {"a": ByColor(), HOSTILE: ByColor()}, images, tmp_path / "n.png", queries=3, found=2
    )
    sheet = np.asarray(Image.open(tmp_path / "n.png").convert("RGB"))
    for color in 255 * np.eye(3):  # query and two neighbors for each of two encoders, all of its color
        assert len(np.unique(np.nonzero((sheet == color).all(axis=2).any(axis=1))[0])) > 20
    figures.plot_neighbors({"": ByColor()}, in_memory(1), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_block_shows_its_images_row_by_row():
    pixels = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    block = figures._block(pixels, torch.tensor([[0, 1], [2, 3], [1, 0]]), gap=2)
    assert block.shape == (3 * 7, 2 * 7 + 6, 3)
    assert (block[7:12, 7:12] == pixels[3].permute(1, 2, 0).numpy()).all()
    assert (block[5:7] == 255).all() and (block[:, 12:] == 255).all()
