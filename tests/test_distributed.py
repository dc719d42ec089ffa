"""A run is the same run on any number of processes, for SimCLR, CARE-SimCLR, MoCo and CARE-MoCo."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics, run
from four_methods import METHODS, free_port
from safetensors.torch import load_file

WORKER = ROOT / "tests" / "four_methods.py"


def losses(folder, name):
    return [(row["infonce"], row["equivariance"]) for row in metrics(folder / name)]


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """What 1, 2 and 4 processes have trained: `runs / "2" / "float64:20" / "simclr"` and so on."""
    root = tmp_path_factory.mktemp("runs")
    both = "float64:20,float32:4,float32:1"
    run("python", WORKER, root, photos, "4=float64:20", f"1={both}")
    run("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, root / "2", photos, both)
    return root


def agree_to_1e_8(expected, found):
    for name in METHODS:
        pairs = list(zip(losses(expected / "float64:20", name), losses(found / "float64:20", name), strict=True))
        assert len(pairs) == 20
        for step, (a, b) in enumerate(pairs):
            assert b == pytest.approx(a, rel=1e-8), (name, step)


def test_in_float64_twenty_steps_of_two_processes_agree_to_1e_8(runs):
    agree_to_1e_8(runs / "1", runs / "2")


def test_in_float64_twenty_steps_of_four_processes_agree_to_1e_8(runs):
    agree_to_1e_8(runs / "1", runs / "4")


def test_in_float32_four_steps_and_the_first_gradients_agree(runs):
    one_process, two_processes = runs / "1", runs / "2"
    for name in METHODS:
        pairs = list(zip(losses(one_process / "float32:4", name), losses(two_processes / "float32:4", name), strict=True))
        assert len(pairs) == 4
        for a, b in pairs:
            assert b[0] == pytest.approx(a[0], rel=1e-3) and b[1] == pytest.approx(a[1], rel=1e-3, abs=1e-5)
        # With momentum and no weight decay the optimiser's buffer after one step is the gradient.
        path = f"float32:1/{name}/checkpoints/step-00000001/optimizer.safetensors"
        expected, found = load_file(one_process / path), load_file(two_processes / path)
        assert expected.keys() == found.keys() and len(found) > 30
        for key, gradient in expected.items():
            assert torch.linalg.norm(gradient - found[key]) <= 1e-5 * torch.linalg.norm(gradient), (name, key)


def test_two_nodes_are_one_run(runs, photos, tmp_path):
    """Two agents with one process each, meeting on loopback."""
    port = free_port()
    nodes = []
    for rank in (0, 1):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        words += ["--master_addr", "127.0.0.1", "--master_port", port, str(WORKER), str(tmp_path), str(photos), "float64:3"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        nodes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    for name in METHODS:
        for a, b in zip(losses(runs / "1" / "float64:20", name)[:3], losses(tmp_path / "float64:3", name), strict=True):
            assert b == pytest.approx(a, rel=1e-8)


def test_a_batch_that_does_not_divide_is_refused(photos, tmp_path):
    launcher = ("python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", "--batch-size", "15", "--weight", "0")
    error = run(*launcher, ROOT / "train.py", "--save-root", tmp_path, *flags, ok=False).stderr
    assert "--batch-size 15 does not divide among 2 processes; the nearest that does is 16" in error
