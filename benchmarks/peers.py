"""How fast care_hub is beside packages used in its place: lightly, timm, FAISS, scikit-learn.

    pip install lightly faiss-cpu scikit-learn
    python benchmarks/peers.py          # four minutes on two quiet cores

Each row of the table: the same work by both, in turn, round after round, so that a busy machine is busy
for both. Medians of the rates, and the median of the ratios within a round. A package that is not
installed is left out. Writes results/peers.json and the table in docs/performance.md.

- A step of SimCLR: images, augmentation, network, loss, optimizer. ResNet-18 with a 3x3 stem, batches of
  64 of the same images of 32 px. lightly's as in its example for CIFAR-10: PIL images, two loader
  processes, `SimCLRTransform`, `SimCLRProjectionHead`, `NTXentLoss`, SGD; in bf16, forward pass and loss
  are under autocast. Ours samples the same operations with the same probabilities.
- `encode` against timm's transform, data set and model in a loader: see benchmarks/embedding.py.
- kNN, k = 200, exact in both; scikit-learn's logistic regression (L-BFGS) on the objective of
  `fit_linear`. What both find must agree.
"""

import importlib.util
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from embedding import bare_loop, bare_tensors, speeds_in_turn
from photos import make_photos
from PIL import Image
from result_tables import ROOT, hardware, write_section
from throughput import Machine, OurStep
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from care_hub.augment import AugmentationConfig
from care_hub.config import TrainConfig
from care_hub.encoder import Encoder
from care_hub.evaluate.linear import fit_linear
from care_hub.factory import create_model
from care_hub.files import write_text
from care_hub.metrics import knn_scores, topk_accuracy
from care_hub.training.trainer import precision

MODEL, SIZE, BATCH = "resnet18_cifar", 32, 64
CLASSES, NEIGHBORS, PENALTY = 10, 200, 1e-3
Way = Callable[[], int]  # does some work and returns how many things it did
Pairs = dict[str, tuple[str, str]]  # a row's title -> the names of our way and of the other package's


class PilImages(Dataset):
    """Pixels as PIL images with labels, as torchvision's CIFAR-10 has them."""

    def __init__(self, pixels: Tensor, transform: Callable[[Image.Image], Any]):
        self.pixels, self.transform = pixels.cpu().permute(0, 2, 3, 1).numpy(), transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[index])), 0


def lightly_batches(pixels: Tensor) -> Iterator[list[Tensor]]:
    """Pairs of views without end. The loader processes make one during each step, ahead by some."""
    from lightly.transforms import SimCLRTransform

    data = PilImages(pixels, SimCLRTransform(input_size=SIZE))
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    while True:
        yield from (views for views, _ in loader)


class LightlyStep:
    """A step of lightly's example, on a network that is ours."""

    def __init__(self, batches: Iterator[list[Tensor]], machine: Machine):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        torch.manual_seed(0)
        head = SimCLRProjectionHead(512, 512, 128)
        self.model = nn.Sequential(create_model(MODEL, num_classes=0), head).to(machine.device).train()
        self.batches, self.machine, self.criterion = batches, machine, NTXentLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.06)
        self.total = 0.0

    def __call__(self) -> int:
        x0, x1 = (x.to(self.machine.device) for x in next(self.batches))
        with self.machine.autocast():
            loss = self.criterion(self.model(x0), self.model(x1))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total += loss.item()
        return BATCH


class CareHubStep(OurStep):
    """A step of SimCLR as `care-hub train` does it."""

    def __init__(self, machine: Machine):
        super().__init__(TrainConfig(model=MODEL, batch_size=BATCH, weight=0.0), SIZE, machine)
        self.augmentation = AugmentationConfig(SIZE, jitter=(0.8, 0.8, 0.8, 0.2))  # lightly's, as all else
        self.done = 0

    def __call__(self) -> int:
        self.step(self.done)
        self.done += 1
        return BATCH


def step_ways(device: torch.device) -> tuple[dict[str, Way], Pairs]:
    """Steps of SimCLR in float32 ("no") and in bf16."""
    machines = [Machine(device, name, compiled=False) for name in ("no", "bf16")]
    ours = {f"ours, {machine.precision}": CareHubStep(machine) for machine in machines}
    batches = lightly_batches(ours["ours, no"].images)
    theirs = {f"lightly, {machine.precision}": LightlyStep(batches, machine) for machine in machines}
    auto = precision("auto", torch.device("cpu"))
    chosen = "float32" if auto == "no" else auto
    return ours | theirs, {
        f"a step of SimCLR as each comes: {chosen}, lightly in float32": (f"ours, {auto}", "lightly, no"),
        "the same, both in float32": ("ours, no", "lightly, no"),
        "the same, both in bf16": ("ours, bf16", "lightly, bf16"),
    }


def encode_ways(device: torch.device, folder: Path, count: int) -> tuple[dict[str, Way], Pairs]:
    """Images a second of a ResNet-18 at 224 px: JPEG files of 375 x 500 pixels, and tensors in memory."""
    make_photos(folder, count, 375)
    encoder = Encoder.new("resnet18", 224).eval().to(device)
    images = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    ways = {
        "ours, files": lambda: len(encoder.encode(folder.parent, BATCH, "backbone")),
        "timm, files": lambda: bare_loop(encoder.backbone, folder.parent, 224, BATCH),
        "ours, tensors": lambda: len(encoder.encode(images, BATCH, "backbone")),
        "timm, tensors": lambda: bare_tensors(encoder.backbone, images, BATCH),
    }
    titles = {kind: f"`encode`, ResNet-18, 224 px, float32, from {kind}" for kind in ("files", "tensors")}
    return ways, {title: (f"ours, {kind}", f"timm, {kind}") for kind, title in titles.items()}


def clusters(count: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random features (count, width) around the mean of their class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return 0.2 * means[labels] + torch.randn(count, width, generator=generator), labels


def faiss_scores(bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """What `knn_scores` gives, by FAISS's exact search."""
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(F.normalize(bank, dim=1).numpy())
    found = index.search(F.normalize(queries, dim=1).numpy(), NEIGHBORS)
    similarity, neighbors = map(torch.from_numpy, found)
    votes = torch.zeros(len(queries), CLASSES)
    return votes.scatter_add_(1, labels[neighbors], (similarity / 0.5).exp())


def knn_ways() -> tuple[dict[str, Way], Pairs]:
    """Queries a second in a bank as large as CIFAR-10's."""
    bank, labels = clusters(50_000, 512, seed=1)
    queries, _ = clusters(5_000, 512, seed=2)
    votes = {"ours": partial(knn_scores, bank, labels, queries, CLASSES)}
    votes["faiss"] = partial(faiss_scores, bank, labels, queries)
    agree("kNN", 0.999, *(vote() for vote in votes.values()))
    ways = {name: lambda vote=vote: len(vote()) for name, vote in votes.items()}
    return ways, {"kNN of 5,000 queries in 50,000 x 512": ("ours", "faiss")}


def sklearn_fit(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `fit_linear` minimizes, by scikit-learn: standardized features, at most 100 steps."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = LogisticRegression(C=1 / (len(x) * PENALTY))
    scaler, fitted = make_pipeline(StandardScaler(), model).fit(x.numpy(), labels.numpy())
    weight = torch.from_numpy(fitted.coef_ / scaler.scale_).float()
    return weight, torch.from_numpy(fitted.intercept_).float() - weight @ torch.from_numpy(
        scaler.mean_
    ).float()


def probe_ways() -> tuple[dict[str, Way], Pairs]:
    """Images a second of a linear probe on as many features as CIFAR-10's."""
    x, labels = clusters(50_000, 512, seed=1)
    test, _ = clusters(5_000, 512, seed=2)
    fits = {"ours": partial(fit_linear, x, labels, CLASSES, PENALTY)}
    fits["sklearn"] = partial(sklearn_fit, x, labels)
    agree("probe", 0.99, *(test @ weight.T + bias for weight, bias in (fit() for fit in fits.values())))
    ways = {name: lambda fit=fit: len(fit()) and len(x) for name, fit in fits.items()}
    return ways, {"linear probe of 50,000 x 512, 10 classes": ("ours", "sklearn")}


def agree(what: str, share: float, ours: Tensor, theirs: Tensor) -> None:
    """Raise an error unless `share` of the scores (N, classes) say the same class."""
    found = topk_accuracy(ours, theirs.argmax(dim=1), 1) / 100
    if found < share:
        raise click.ClickException(
            f"{what}: only {found:.1%} of the answers are the same; nothing is compared."
        )


def compare(ways: dict[str, Way], pairs: Pairs, peer: str, rounds: int) -> list[dict[str, Any]]:
    """A row of the table for each pair."""
    speeds, rows = speeds_in_turn(ways, rounds), []
    for title, names in pairs.items():
        ours, theirs = (speeds[name] for name in names)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        row = {"what": title, "beside": f"{peer} {version(peer)}", "rounds": rounds}
        row |= {"ours": statistics.median(ours), "theirs": statistics.median(theirs)}
        row |= {"ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
        rows.append({k: v if isinstance(v, str) else float(f"{v:.4g}") for k, v in row.items()})
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown; rates are in images or queries per second."""
    lines = ["| | beside | its rate | ours | ratio (lowest to highest) |", "|---" * 5 + "|"]
    for row in report["rows"]:
        rates = f"{row['theirs']:,.4g} | {row['ours']:,.4g}"
        ratio = f"**{row['ratio']:.2f}** ({row['lowest']:.2f} to {row['highest']:.2f})"
        lines.append(f"| {row['what']} | {row['beside']} | {rates} | {ratio} |")
    return f"{report['settings']}.\n\n" + "\n".join(lines)


@click.command()
@click.option("--rounds", default=12, show_default=True, help="of steps; a quarter as many of all else")
@click.option("--count", default=128, show_default=True, help="images that are encoded")
@click.option("--write/--no-write", default=True, help="results/peers.json and docs/performance.md")
def main(rounds: int, count: int, write: bool) -> None:
    device, load = torch.device("cuda" if torch.cuda.is_available() else "cpu"), os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a class"
        folder.mkdir()
        for peer, module, make, times in (
            ("lightly", "lightly", partial(step_ways, device), rounds),
            ("timm", "timm", partial(encode_ways, device, folder, count), max(1, rounds // 4)),
            ("faiss-cpu", "faiss", knn_ways, max(1, rounds // 4)),
            ("scikit-learn", "sklearn", probe_ways, max(1, rounds // 4)),
        ):
            if importlib.util.find_spec(module):
                rows += compare(*make(), peer, times)
            else:
                click.echo(f"{peer} is not installed and left out", err=True)
    settings = f"{hardware()}, {torch.get_num_threads()} threads, load average before {load:.1f}"
    report = {"settings": settings, "rows": rows}
    click.echo(table(report))
    if write:
        write_text(ROOT / "results" / "peers.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_section(ROOT / "docs" / "performance.md", table(report))


if __name__ == "__main__":
    main()
