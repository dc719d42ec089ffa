"""Benchmarks: what is compared is what the table says, and a label that they make up follows its rule."""

import importlib
from types import ModuleType

import pytest
import timm
import torch
from click import ClickException
from helpers import ROOT

from care_hub import cli
from care_hub.config import TrainConfig
from care_hub.evaluate.linear import fit_linear
from care_hub.metrics import knn_scores
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
    (longer,) = [name for name, arm in arms.items() if arm.as_long_as]
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
    sent = benchmark_module("augmentation").bytes_sent(config, 40)  # waiting would be an error
    pairs = 1 if options.get("views") == "shared" or options.get("weight") == 0 else 2
    assert 4 * pairs <= len(sent) <= 12
    assert sum(sent) <= 32 * 8 + pairs * 64 * 128  # bytes: of indices, and for each view
