"""Benchmarks: what is compared is what the table says, and a label that they make up follows its rule."""

import importlib
import json
import math
import re
from types import ModuleType

import pytest
import timm
import torch
import torch.nn.functional as F
from click import ClickException
from helpers import ROOT, TINY, care_hub_command, command, fitted
from safetensors.torch import load_file

import care_hub
from care_hub import cli
from care_hub.config import TrainConfig
from care_hub.data import shapes
from care_hub.evaluate.linear import fit_linear
from care_hub.hub.rotation_set import RotationSet
from care_hub.metrics import knn_scores
from care_hub.rotation import Rotation
from care_hub.schedule import Plan

IMAGES = {"shapes": 5000, "cifar10_small": 50000, "shapes_moco": 5000}


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def arms_and_configs(paper_table: ModuleType, recipe: str):
    arms = paper_table.ARMS.get(recipe, paper_table.OTHERS)
    options = {name: paper_table.options_of(arm, arms, recipe, IMAGES[recipe]) for name, arm in arms.items()}
    return arms, {name: cli.resolve(given, recipe) for name, given in options.items()}


@pytest.mark.parametrize("recipe", IMAGES)
def test_an_arm_as_long_as_another_costs_as_many_steps(recipe, benchmark_module):
    arms, configs = arms_and_configs(benchmark_module("paper_table"), recipe)
    plans = {name: Plan.of(config, IMAGES[recipe]) for name, config in configs.items()}
    price = {name: plan.price(configs[name]) for name, plan in plans.items()}
    as_long = [name for name, arm in arms.items() if arm.as_long_as]
    assert as_long
    for longer in as_long:
        assert configs[longer].weight == 0 and price[longer] == plans[longer].steps
        # A hundredth of an epoch is no reason for one more.
        surplus = (price[longer] - price[arms[longer].as_long_as]) / plans[longer].steps_per_epoch
        assert -0.01 < surplus < 1


def test_arms_of_a_table_have_names_and_options_of_their_own(benchmark_module):
    for recipe in IMAGES:
        _, configs = arms_and_configs(benchmark_module("paper_table"), recipe)
        assert len({str(config) for config in configs.values()}) == len(configs)


def test_a_table_marks_what_leads_by_more_than_its_deviation(benchmark_module):
    tables = benchmark_module("result_tables")
    arms = {
        "near": [{"label_knn": 50.0, "gram": 0.01}, {"label_knn": 52.0, "gram": 0.01}],
        "ahead": [{"label_knn": 52.0, "gram": 0.02}, {"label_knn": 53.0, "gram": 0.02}],
    }
    text = tables.table({"recipe": "r", "settings": "s", "arms": arms})
    assert "| kNN, label, % | 51.0 ± 1.4 | **52.5 ± 0.7** |" in text
    assert "| Gram deviation | **0.0100 ± 0.0000** | 0.0200 ± 0.0000 |" in text
    arms["ahead"].pop()  # of one seed nobody knows how certain it is
    text = tables.table({"recipe": "r", "settings": "s", "arms": arms})
    assert "**r** (s; 1 to 2 seeds)" in text and "| kNN, label, % | 51.0 ± 1.4 | 52.0 |" in text


def test_arms_whose_runs_are_gone_stay_if_all_else_is_equal(benchmark_module, tmp_path, monkeypatch):
    tables = benchmark_module("result_tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "results.md").write_text(f"Before\n{tables.BEGIN}\n{tables.END}\nafter\n")
    assert tables.recorded("r", "a CPU") == {}
    arms = {"gone": [{"label_knn": 50.0}]}
    tables.write_results("r", "R", "a CPU", arms)
    assert tables.recorded("r", "a CPU") == arms and tables.recorded("r", "another") == {}
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.startswith("Before\n") and page.endswith("after\n") and "| kNN, label, % | 50.0 |" in page


def test_the_color_of_an_image_is_that_of_its_middle(benchmark_module):
    transfer = benchmark_module("transfer")
    middles = {
        "black": (40, 0, 60),
        "gray": (120, 125, 130),
        "white": (250, 245, 240),
        "red": (200, 20, 10),
        "orange": (220, 160, 20),
        "green": (20, 180, 60),
        "blue": (20, 60, 200),
        "pink": (230, 60, 180),
    }
    images = torch.full((len(middles), 3, 32, 32), 255, dtype=torch.uint8)
    images[:, :, 8:24, 8:24] = torch.tensor([*middles.values()], dtype=torch.uint8)[:, :, None, None]
    assert [transfer.COLORS[k] for k in transfer.central_colors(images)] == [*middles]


def test_only_ways_that_find_the_same_are_compared(benchmark_module):
    peers = benchmark_module("peers")
    same, other = torch.eye(3), torch.eye(3).flip(0)
    peers.agree("kNN", 1.0, same, same * 2)
    with pytest.raises(ClickException, match=r"only 33\.3% of the answers are the same"):
        peers.agree("kNN", 0.5, same, other)
    row = peers.compare({"a": lambda: 1, "b": lambda: 1}, {"a row": ("a", "b")}, "timm", rounds=3)[0]
    assert row["lowest"] <= row["ratio"] <= row["highest"]
    text = peers.table({"settings": "a CPU", "rows": [row]})
    assert f"**{row['ratio']:.2f}**" in text and f"timm {timm.__version__}" in text


def test_peers_do_the_same_work(benchmark_module):
    peers = benchmark_module("peers")
    pytest.importorskip("faiss")
    pytest.importorskip("sklearn")
    x, labels = peers.clusters(2000, 32, seed=1)
    test, _ = peers.clusters(200, 32, seed=2)
    peers.agree("kNN", 0.999, knn_scores(x, labels, test, 10), peers.faiss_scores(x, labels, test))
    fits = fit_linear(x, labels, 10, peers.PENALTY), peers.sklearn_fit(x, labels)
    peers.agree("probe", 0.99, *(test @ weight.T + bias for weight, bias in fits))


def test_steps_are_timed_beside_the_network_alone(benchmark_module):
    words = ["--model", "resnet10_w16_small", "--batch", "8", "--groups", "2", "--steps", "1"]
    words += [word for name in ("SimCLR", "CARE", "floor, 2 views") for word in ("--only", name)]
    *_, a, b, c = command(benchmark_module("throughput").main, *words).splitlines()
    assert [line.split("  ")[0] for line in (a, b, c)] == ["SimCLR", "CARE", "floor, 2 views"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": 0.0},
        {"views": "shared", "equivariant_batch_size": 16},
        {"equivariance_crop": "shared", "equivariant_batch_size": 16},
        {"equivariance_crop": False},
    ],
    ids=str,
)
def test_a_step_sends_a_dozen_small_tensors_and_waits_for_no_device(options, benchmark_module):
    config = TrainConfig(**{"batch_size": 32, "equiv_splits": 4, "weight_start_epochs": 0} | options)
    sent = benchmark_module("augmentation").sent_by_a_step(config, 40).bytes  # waiting would be an error
    pairs = 1 if options.get("views") == "shared" or options.get("weight") == 0 else 2
    assert len(sent) == 4 + pairs  # each pair is cropped by itself; colors are changed together
    assert sum(sent) <= 32 * 8 + pairs * 64 * 128  # bytes: of indices, and for each view


def test_the_page_of_encoders_says_what_their_folders_say(benchmark_module):
    zoo, page = benchmark_module("zoo"), (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.+`.* MB \|$", page, flags=re.MULTILINE)
    folders = sorted(config.parent for config in zoo.SHIPPED.glob("*/config.json"))
    assert rows == [f"| {' | '.join(zoo.row_of(folder))} |" for folder in folders]
    for row in rows:
        assert re.search(rf"^- {row.split(' | ')[0][2:]}", page, flags=re.MULTILINE), "no word on it"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for about in json.loads((ROOT / "results" / "zoo.json").read_text()):
        (row,) = re.findall(rf"^\| {about['name']} \|.+$", readme, flags=re.MULTILINE)
        *_, probe, neighbors, color = row.removesuffix(" |").split(" | ")
        assert (probe, neighbors) == (about["linear probe"], about["kNN"])
        assert color == f"{float(about['color'].split()[0]):.0f} %"


def test_rotations_of_the_package_belong_to_their_encoders(benchmark_module):
    page = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    for path in benchmark_module("zoo").SHIPPED.glob("*/rotations.safetensors"):
        rotations = care_hub.load_rotations(path.parent.name)
        encoder = care_hub.load_encoder(path.parent.name)
        (about,) = re.findall(rf"^- `{path.parent.name}`((?:.+\n)+?)(?=-|\n)", page, flags=re.MULTILINE)
        for name, found in rotations.fitted.items():
            rotations[name, found.strengths[0]].check(encoder)
            assert name in rotations.steerable and name.replace("_", " ") in " ".join(about.split())


@pytest.mark.slow
@pytest.mark.launches
def test_a_run_becomes_an_encoder_that_verifies(benchmark_module, tmp_path, monkeypatch):
    ship, root = benchmark_module("ship"), str(tmp_path / "runs")
    command(cli.train, "--save-root", root, "--run-name", "r", *TINY, "--max-steps", "4")
    monkeypatch.setattr(ship, "SHIPPED", tmp_path)
    words = (f"{root}/r", "tiny", "--dataset-name", "shapes", "--transform", "brightness=0.5")
    text = command(ship.main, *words)
    folder = tmp_path / "tiny"
    assert "tiny: 0." in text and {*load_file(folder / "rotations.safetensors")} >= {"log.brightness"}
    weights = [v for v in load_file(folder / "model.safetensors").values() if v.ndim > 1]
    assert {v.dtype for v in weights} == {torch.float16}
    said = care_hub_command("verify", folder)
    assert "none differ" in said and "rotations by brightness" in said


@pytest.fixture
def results(benchmark_module, tmp_path, monkeypatch):
    """A repository of its own, for the tables."""
    tables = benchmark_module("result_tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(shapes, "SIZES", {"train": 10, "test": 60})
    for folder in ("docs", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "docs" / "results.md").write_text(f"{tables.BEGIN}\n{tables.END}\n")
    return tmp_path


def clusters(count: int, d: int, classes: int = 4):
    """Labels, and unit vectors around a direction of each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    z = torch.randn(classes, d, generator=generator)[labels]
    return labels, F.normalize(z + 0.7 * torch.randn(count, d, generator=generator), dim=1)


def test_what_is_a_rotation_is_worth_as_much_as_embedding_anew(benchmark_module, monkeypatch):
    uses = benchmark_module("uses")
    labels, z = clusters(300, 8)
    turns = [Rotation.random(8, seed).power(0.4) for seed in range(3)]
    views = torch.stack([r(z[:200]) for r in turns])
    found = uses.Embedded(labels, z, views, turns[1](z), turns[0](z), 0.002)
    for name, value in {"UPGRADE_PAIRS": 100, "DRAWS": 1, "STEPS": 20}.items():
        monkeypatch.setattr(uses, name, value)
    runs = uses.measure(found, {"upgrade": z}, turns[1](z), seeds=1)
    for turned, anew, stored in zip(*(runs[m] for m in ("rotation", uses.ANEW, uses.STORED)), strict=True):
        for row in uses.SHARED:
            assert turned[row] == pytest.approx(anew[row], abs=1.5), row
        assert turned["light_search"] == 100 > stored["light_search"] + 20
        assert turned["upgrade"] == 100 > stored["upgrade"] + 20
        assert turned["light_search_share"] == pytest.approx(100, abs=5)
        assert stored["light_search_share"] is None
        assert anew["views_seconds"] == 1000 * uses.VIEWS * 0.002 and stored["views_seconds"] == 0


def test_a_share_is_that_of_what_embedding_anew_wins(benchmark_module):
    uses = benchmark_module("uses")
    values = {uses.STORED: (40, 50), "rotation": (46, 53), "linear map": (40, 47), uses.ANEW: (52, 58)}
    runs = {name: [dict.fromkeys(uses.SHARED, v) for v in found] for name, found in values.items()}
    for rows in runs.values():
        for row in rows:
            row["tta"] = 50
    uses.add_shares(runs)
    assert [row["shots_5_share"] for row in runs["rotation"]] == [60, 30]
    assert [row["shots_5_share"] for row in runs["linear map"]] == [0, -30]
    assert {row["tta_share"] for rows in runs.values() for row in rows} == {None}
    assert {row["shots_5_share"] for row in runs[uses.ANEW]} == {None}


def test_a_turned_query_finds_the_version_that_was_asked_for(benchmark_module):
    search = benchmark_module("search")
    _, z = clusters(60, 8)
    turns = {0.5: Rotation.random(8, 1).power(0.3), 2.0: Rotation.random(8, 2).power(0.3)}
    matrices = torch.stack([r.matrix for r in turns.values()])
    found = RotationSet({"brightness": fitted("brightness", [0.5, 2.0])}, {"brightness": matrices})
    changed = {strength: r(z[:20]) for strength, r in turns.items()}
    row = search.steered(found, "brightness", z, changed)
    assert row["search_exact"] == row["search_version"] == 100
    assert row["search_exact_unsteered"] == 0 and row["search_version_unsteered"] == 100
    wrong = search.steered(found, "brightness", z, {0.5: changed[2.0], 2.0: changed[0.5]})
    assert wrong["search_exact"] == 0


class Angle:
    """An encoder of dark images: embeddings on a circle, by the logarithm of the mean value."""

    projection, device = None, "cpu"

    def embed(self, x: torch.Tensor, space: str) -> torch.Tensor:
        angle = x.mean(dim=(1, 2, 3)).log()
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_nothing_is_lost_in_between_where_all_changes_are_one_turn(benchmark_module):
    between = benchmark_module("between")
    pixels = torch.randint(20, 60, (40, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    split = between.Split(between.Images(Angle(), pixels), *torch.arange(40).tensor_split(2))
    rows = between.between(split, "brightness=0.5,2") | between.one_after_the_other(
        split, "brightness=1.4+brightness=0.5"
    )
    assert [*rows] == [
        "brightness 0.707, between 0.5 and 1",
        "brightness 1.41, between 1 and 2",
        "brightness 1.4, then brightness 0.5",
    ]
    for row, factor in zip(rows.values(), (0.5**0.5, 2**0.5, 0.7), strict=True):
        assert row["of_itself"] == pytest.approx(math.cos(math.log(factor)), abs=1e-4)
        assert row["of_fitted"] == pytest.approx(1) and row["of_lost"] == pytest.approx(0, abs=1e-5)
    assert between.with_verdict("a", [{"of_lost": 0.01}, {"of_lost": 0.05}]) == "a: beyond 0.02"


@pytest.mark.launches
def test_strengths_in_between_are_measured_and_shown(benchmark_module, results):
    options = ("--dataset-name", "shapes", "--images", "20", "--seeds", "2")
    transforms = ("--transform", "brightness=0.5", "--transform", "hue=0.3+saturation=0.5")
    between = benchmark_module("between")
    text = command(between.main, "resnet10_w16_small.care_shapes", *options, *transforms)
    assert (
        "| | cosine with f(ax) of f(x) | of R f(x), fitted there | of the geodesic or product | lost |"
        in text
    )
    assert re.search(
        r"\| brightness 0.707, between 0.5 and 1: (with|bey)\w+ 0.02 \|( -?0\.\d+ ± 0\.\d+ \|){4}", text
    )
    assert "fitted to 20 images, on 20 others" in text and "| hue 0.3, then saturation 0.5: " in text
    assert (results / "docs" / "results.md").read_text().count(text.strip()) == 1


@pytest.mark.launches
def test_heads_are_trained_on_frozen_backbones(benchmark_module, results, monkeypatch):
    monkeypatch.setattr(shapes, "SIZES", {"train": 64, "test": 60})
    frozen, run = benchmark_module("frozen"), results / "runs" / "r-0"
    command(cli.train, "--save-root", run.parent, "--run-name", run.name, *TINY, "--max-steps", "2")
    monkeypatch.setattr(frozen, "IMAGES", 60)
    assert "| a steering head on it, 1 epochs |" in command(frozen.main, run, "--epochs", "1")


@pytest.mark.launches
def test_uses_and_search_are_measured_and_shown(benchmark_module, results, monkeypatch):
    name, data = "resnet10_w16_small.care_shapes", ("--dataset-name", "shapes")
    uses = benchmark_module("uses")
    for attribute, value in {"VIEWS": 2, "DRAWS": 1, "STEPS": 2}.items():
        monkeypatch.setattr(uses, attribute, value)
    command(uses.main, "--encoder", name, "--twin", name, "--images", "40", "--seeds", "1", *data)
    command(benchmark_module("search").main, name, "--transform", "brightness", *data)
    page = (results / "docs" / "results.md").read_text()
    assert (
        "| | CARE, as stored | CARE, linear map | CARE, rotation | CARE, embedded anew | λ = 0, as stored |"
        in page
    )
    assert re.search(r"\| another light, the same image found, % \| [\d.]+ \|", page)
    assert re.search(r"\| \| brightness, (not )?steerable \|", page) and "right version on top" in page


@pytest.mark.slow
@pytest.mark.launches
def test_the_page_says_how_many_pairs_a_rotation_needs(benchmark_module):
    words = ("resnet10_w16_small.care_shapes", "--dataset-name", "shapes")
    head, rule, *rows = command(benchmark_module("pairs").main, *words).strip().splitlines()
    page = (ROOT / "docs" / "rotations.md").read_text(encoding="utf-8")
    stated = page[page.index(f"{head}\n{rule}") :].splitlines()[2 : 2 + len(rows)]

    def cells(row: str) -> list[str]:
        return [cell.strip() for cell in row.strip("|").split("|")]

    for row, other in zip(map(cells, rows), map(cells, stated), strict=True):
        assert row[0] == other[0]
        assert [*map(float, row[1:])] == pytest.approx([*map(float, other[1:])], abs=2e-3)
