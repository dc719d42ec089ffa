"""Fixtures, and what must be set before torch and huggingface_hub are imported."""

import atexit
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

# Before torch is imported, here and in processes started here: a thread that waits by spinning holds a
# core that other processes could use. On busy cores a step takes up to ten times as long.
os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np
import pytest
import torch
from helpers import GOOD, SHARED, TURN, fitted, train_here
from loopback_hub import WRITER, LoopbackHub
from PIL import Image

from care_hub.cores import cores
from care_hub.data import shapes

# Before huggingface_hub is imported: a cache of our own, and plain LFS, which a small Hub can speak.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="care_hub_tests_")
os.environ["HF_HUB_DISABLE_XET"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

torch.set_num_threads(cores())
# float32 on every machine, so that a figure that a test expects is the same everywhere.
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False


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
def shapes_rendered_once():
    """`shapes` takes seconds to render; within one process of the tests once is enough."""
    render, rendered = shapes.render, {}

    def once(factors):
        key = factors["x"].tobytes()
        if key not in rendered:
            rendered[key] = render(factors)
        return rendered[key].copy()

    shapes.render = once
    yield
    shapes.render = render


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Class folders of smooth random images: train/ and test/, two classes, 24 + 8 of 40 x 48 pixels."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for split, count in (("train", 24), ("test", 8)):
        for name in ("warm", "cold"):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                small = random.randint(0, 256, (5, 6, 3)).astype(np.uint8)
                small[..., 2 if name == "warm" else 0] //= 4
                image = Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{k:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The run folder of a few CARE steps on `shapes`."""
    from care_hub.evaluate import monitor

    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "FINAL_IMAGES", 400)  # what they tell is another test's matter
        train_here(root, "--max-steps", "6", "--run-name", "tiny", "--knn-every", "1")
    return root / "tiny"


@pytest.fixture
def one_family(monkeypatch):
    """`care-hub equivariance` measures a single family of augmentations."""
    from care_hub.evaluate import commands

    one = partial(commands.measure_equivariance, families=["crop"])
    monkeypatch.setattr(commands, "measure_equivariance", one)


@pytest.fixture
def one_thread(monkeypatch):
    """torch has one thread, and the environment names no other number."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def server(monkeypatch):
    """A Hub on loopback, to which the process is logged in as a user who may write."""
    from huggingface_hub import constants, file_download

    from care_hub.hub import client

    with LoopbackHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        for name in ("HUGGINGFACE_CO_URL_TEMPLATE", "ENDPOINT"):  # clients before 1.10 read it once
            value = getattr(constants, name).replace(constants.ENDPOINT, running.url)
            monkeypatch.setattr(constants, name, value)
            if hasattr(file_download, name):
                monkeypatch.setattr(file_download, name, value)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(client, "RETRY_SECONDS", (0, 0))
        yield running


@pytest.fixture
def export(tmp_path) -> Path:
    """An export of random weights with a head and a card, much as training leaves it."""
    from care_hub.encoder import Encoder
    from care_hub.hub.card import write_card
    from care_hub.hub.linear_head import LinearHead

    torch.manual_seed(0)
    encoder = Encoder.new("resnet10_w16_small", hidden=32, outputs=16)
    results = {"knn_top1": 50.0, "knn_color_top1": 40.0, "rotation_error": 0.1, "invariance_error": 0.2}
    encoder.config = replace(
        encoder.config,
        method="CARE-simclr",
        weight=0.3,
        dataset="shapes",
        results=results | {"rotation_invariance_ratio": 0.5, "gram_deviation": 0.01},
        training={"model": "resnet10_w16_small", "epochs": 2},
        versions={"torch": torch.__version__},
    )
    folder = encoder.save_pretrained(tmp_path / "export")
    names = [f"class {k}" for k in range(10)]
    metrics = {"top1": 61.5, "top5": 97.0, "n_train": 5000, "n_test": 2000}
    LinearHead("shapes", torch.randn(10, 128), torch.randn(10), names, metrics).save(folder)
    write_card(folder)
    return folder


@pytest.fixture
def rotations(export):
    """Those of `export`: brightness turns at a constant speed on its scale; nobody can tell a flip."""
    import care_hub
    from care_hub.hub.export import sha256
    from care_hub.hub.rotation_set import RotationSet
    from care_hub.rotation import Rotation

    fits = torch.stack([TURN.power(t).matrix for t in (-1, 0.5, 1)])
    found = {
        "brightness": fitted("brightness", [0.5, 2**0.5, 2.0]),
        "flip": fitted("flip", [1.0], 0.0, "switch", GOOD | {"same_image_hit_at_1": (50.0, 40.0, 60.0)}, 2),
    }
    matrices = {"brightness": fits, "flip": Rotation.random(16, 7).matrix[None]}
    encoder = care_hub.load_encoder(export)
    weights = {name: sha256(export / name) for name in ("model.safetensors", "projection.safetensors")}
    moved = {"brightness": torch.eye(16)[:, :3], "flip": torch.eye(16)[:, 2:4]}
    return RotationSet(found, matrices, encoder.fingerprint, "org/name", "projection", weights, moved)
