"""A run is the same run on any number of processes, for SimCLR, CARE-SimCLR, MoCo and CARE-MoCo."""

import os
import subprocess
import sys

import pytest
import torch
from four_methods import METHODS, views, weight_difference
from helpers import ROOT, metrics, run_forked
from processes import free_port
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import nn

from care_hub.distributed import (
    GlobalBatchNorm,
    GlobalBatchNormAct,
    gather,
    global_batch_norm,
    inference_accelerator,
)

WORKER = ROOT / "tests" / "four_methods.py"


def losses(folder, name):
    return [(row["infonce"], row["equivariance"]) for row in metrics(folder / name)]


def pairs_of_losses(expected, found, name, steps):
    """(losses of the one run, of the other) for each of the first `steps` steps, which is all of `found`."""
    pairs = list(zip(losses(expected, name)[:steps], losses(found, name), strict=True))
    assert len(pairs) == steps
    return pairs


def agree_to_1e_8(expected, found, steps):
    for name in METHODS:
        for step, (a, b) in enumerate(pairs_of_losses(expected, found, name, steps)):
            assert b == pytest.approx(a, rel=1e-8), (name, step)


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """What 1 and 2 processes have trained: `runs / "2" / "float64:20" / "simclr"` and so on.

    1 has resumed, as "float64:20:resumed", what 2 had saved after 13 steps.
    """
    root, steps = tmp_path_factory.mktemp("runs"), "float64:20"
    run_forked(WORKER, root, photos, f"2={steps}", f"1={steps},{steps}:resumed")
    return root


@pytest.mark.launches
def test_in_float64_twenty_steps_of_two_processes_agree_to_1e_8(runs):
    agree_to_1e_8(runs / "1" / "float64:20", runs / "2" / "float64:20", 20)


def resumes_the_run_of_two_processes(runs, processes):
    for name in METHODS:
        expected = runs / "2" / "float64:20" / name
        found = runs / processes / "float64:20:resumed" / name
        assert weight_difference(expected, found, 20) <= 1e-8
        seen, again = views(expected, 2), views(found, int(processes))
        assert len(again) == 7 * (1 + ("care" in name)) and again == seen[-len(again) :]


@pytest.mark.launches
def test_one_process_resumes_the_run_of_two(runs):
    resumes_the_run_of_two_processes(runs, "1")


@pytest.mark.slow
def test_in_float64_four_processes_train_and_resume_the_same_run(runs, photos):
    run_forked(WORKER, runs, photos, "4=float64:20,float64:20:resumed")
    agree_to_1e_8(runs / "1" / "float64:20", runs / "4" / "float64:20", 20)
    resumes_the_run_of_two_processes(runs, "4")


@pytest.mark.slow
def test_in_float32_four_steps_and_the_first_gradients_agree(photos, tmp_path):
    run_forked(WORKER, tmp_path, photos, "2=float32:4,float32:1", "1=float32:4,float32:1")
    one, two = tmp_path / "1", tmp_path / "2"
    for name in METHODS:
        for a, b in pairs_of_losses(one / "float32:4", two / "float32:4", name, 4):
            assert b[0] == pytest.approx(a[0], rel=1e-3) and b[1] == pytest.approx(a[1], rel=1e-3, abs=1e-5)
        # With momentum and no weight decay the optimizer's buffer after one step is the gradient.
        path = f"float32:1/{name}/checkpoints/step-00000001/optimizer.safetensors"
        expected, found = load_file(one / path), load_file(two / path)
        assert expected.keys() == found.keys() and len(found) > (4 if name == "frozen" else 30)
        for key, gradient in expected.items():
            difference = torch.linalg.norm(gradient - found[key])
            assert difference <= 1e-5 * torch.linalg.norm(gradient), (name, key)


@pytest.mark.slow
def test_two_nodes_are_one_run(runs, photos, tmp_path):
    """Two agents with one process each, meeting on loopback."""
    port, nodes = free_port(), []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for rank in (0, 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port]
        words = [*launcher, str(WORKER), str(tmp_path), str(photos), "float64:3"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(words, env=environment, **pipes))
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()  # one that waits for the other at its end takes no SIGTERM
    assert [node.returncode for node in nodes] == [0, 0], outputs
    agree_to_1e_8(runs / "1" / "float64:20", tmp_path / "float64:3", 3)


@pytest.mark.launches
def test_a_batch_that_does_not_divide_is_refused(photos, tmp_path):
    data = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32")
    flags = ("--save-root", tmp_path, *data, "--batch-size", "15", "--weight", "0")
    error = run_forked(ROOT / "train.py", *flags, processes=2, ok=False).stderr
    assert "--batch-size 15 does not divide among 2 processes; the nearest that does is 16" in error


def small_network():
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
    return nn.ModuleDict({"backbone": convolution, "projection": head}).double()


def forward(network, x):
    return network["projection"](network["backbone"](x))


def compare_batch_norms():
    """In one of two processes: half a batch through global norms is the whole batch through local ones."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    whole, mine = small_network(), small_network()
    tensors = [*mine.parameters(), *mine.buffers()]
    mine = global_batch_norm(mine, torch.device("cpu"))
    kinds = [type(m) for m in mine.modules() if isinstance(m, GlobalBatchNorm)]
    assert kinds == [GlobalBatchNormAct, GlobalBatchNorm, GlobalBatchNorm]
    assert all(a is b for a, b in zip(tensors, [*mine.parameters(), *mine.buffers()], strict=True))
    assert list(mine.state_dict()) == list(whole.state_dict())
    alone = nn.BatchNorm1d(8)
    assert global_batch_norm(alone, torch.device("cpu")).weight is alone.weight

    x = torch.randn(10, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, found = forward(whole, x), gather(forward(mine, x.chunk(2)[rank]))
    torch.testing.assert_close(found, expected)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    for a, b in zip(whole.parameters(), mine.parameters(), strict=True):
        torch.distributed.all_reduce(b.grad)
        torch.testing.assert_close(b.grad / 2, a.grad)  # the mean over processes, as of DDP
    for a, b in zip(whole.buffers(), mine.buffers(), strict=True):
        torch.testing.assert_close(b, a)
    torch.testing.assert_close(forward(mine.eval(), x), forward(whole.eval(), x))
    torch.distributed.destroy_process_group()


@pytest.mark.launches
def test_global_batch_norms_of_two_processes_see_the_whole_batch():
    run_forked(__file__, processes=2)


def test_one_process_keeps_its_batch_norms():
    network = small_network()
    before = list(network.modules())
    assert list(global_batch_norm(network, torch.device("cpu")).modules()) == before


def test_an_evaluation_takes_no_threads(one_thread):
    """Only the command line shares out the cores."""
    inference_accelerator()
    assert torch.get_num_threads() == 1


if __name__ == "__main__":
    compare_batch_norms()
