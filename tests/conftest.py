import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Before torch is imported, here and in processes started here: a thread that waits by spinning holds a core of which other
# processes make better use, perhaps the one for which it waits. On busy cores a step takes up to ten times as long.
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
from click.testing import CliRunner
from PIL import Image

from care_hub import cli
from care_hub.data import shapes

# Before huggingface_hub is imported, which reads them once: a cache of our own, and plain LFS, which a small Hub can speak.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="care_hub_tests_")
os.environ["HF_HUB_DISABLE_XET"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("CARE_HUB_TEST_DATA", ROOT.parent / "shared"))  # real data, where it is at hand

torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))


@pytest.fixture
def shared():
    """`shared("data/cifar10")`: a path to real data; skips the test where there is none."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} is not at hand")
        return path

    return find


@pytest.fixture(scope="session", autouse=True)
def shapes_drawn_once():
    """`shapes` takes seconds to draw; within one process of the tests once is enough."""
    render, drawn = shapes.render, {}

    def once(factors):
        key = factors["x"].tobytes()
        if key not in drawn:
            drawn[key] = render(factors)
        return drawn[key].copy()

    shapes.render = once
    yield
    shapes.render = render


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Class folders of smooth random pictures: train/ and test/, two classes, 24 + 8 of 40 x 48 pixels."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.RandomState(0)
    for split, count in (("train", 24), ("test", 8)):
        for name in ("warm", "cold"):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                small = draw.randint(0, 256, (5, 6, 3)).astype(np.uint8)
                small[..., 2 if name == "warm" else 0] //= 4
                Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(root / split / name / f"{k:02d}.png")
    return root


# float32 on every machine, so that a figure that a test expects is the same everywhere; Accelerate knows one precision per process.
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
TINY = ("--batch-size", "16", "--equiv-splits", "4", "--projection-hidden", "32", "--projection-dim", "16", "--knn-bank", "200")
TINY += ("--mixed-precision", "no")


def run(*words, ok: bool = True, cwd=None, env=None, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a command as a person would; fails the test with its output if the exit status is not as expected."""
    words = [sys.executable if w == "python" else str(w) for w in words]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | (env or {})
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout)
    assert (done.returncode == 0) == ok, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def train(root: Path, *flags, ok: bool = True, launcher=("python",), env=None) -> subprocess.CompletedProcess:
    return run(*launcher, ROOT / "train.py", "--save-root", root, *TINY, *flags, ok=ok, env=env)


def train_here(root: Path, *flags) -> str:
    """`train` in this process, which spares the start of another; returns what it printed."""
    done = CliRunner().invoke(cli.train, [str(w) for w in ("--save-root", root, *TINY, *flags)])
    assert done.exit_code == 0, done.output
    return done.output


def refusal(*flags) -> str:
    """The one sentence with which train.py ends."""
    done = CliRunner().invoke(cli.train, [str(w) for w in flags])
    assert done.exit_code != 0 and "Traceback" not in done.output
    return done.output


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The run folder of a few CARE steps on `shapes`."""
    root = tmp_path_factory.mktemp("runs")
    train_here(root, "--max-steps", "6", "--run-name", "tiny", "--knn-every", "1")
    return root / "tiny"
