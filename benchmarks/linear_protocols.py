"""The published linear probe (100 epochs of augmented pictures through the frozen encoder) against ours (one feature pass, L-BFGS).

python benchmarks/linear_protocols.py --encoder RUN --dataset-name shapes --seeds 3
python benchmarks/linear_protocols.py --encoder RUN --dataset-name cifar10 --data-root CIFAR10 --images 10000 --seeds 3

Both see the same pictures, decoded and in memory, and the same test split; the encoder is in eval mode in both (in the public
code it is not). Prints one JSON object: seconds and top-1 of each, by seed and as means.
"""

import json
import statistics
import time

import click
import torch
import torch.nn.functional as F

from care_hub import augment
from care_hub.config import EvalConfig
from care_hub.data.sources import center
from care_hub.evaluate.commands import Subject, labelled, load, start
from care_hub.evaluate.equivariance import recipe_of
from care_hub.evaluate.linear import probe
from care_hub.evaluate.monitor import some_of
from care_hub.measures import topk


def published(encoder, train, test, epochs: int, seed: int) -> float:
    """Top-1 of Adam, lr 1e-3, wd 1e-6, batch 512, every epoch on newly augmented pictures (CIFAR and STL-10 form)."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(encoder.backbone.num_features, len(train.class_names))
    optimizer, recipe = torch.optim.Adam(head.parameters(), lr=1e-3, weight_decay=1e-6), recipe_of(encoder)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=augment.generator(seed, "order", epoch))
        for step, index in enumerate(order.split(512)):
            x = train.held[index]
            drawn = augment.draw(recipe, len(x), *x.shape[2:], augment.generator(seed, "views", epoch, step))
            loss = F.cross_entropy(head(encoder.embed(augment.apply(x, drawn, recipe), "backbone")), train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    size = encoder.care["image_size"]
    with torch.no_grad():
        logits = torch.cat([head(encoder.embed(center(x, size), "backbone")) for x in test.held.split(512)])
    return topk(logits, test.labels, 1)


@click.command()
@click.option("--encoder", required=True)
@click.option("--dataset-name", required=True)
@click.option("--data-root")
@click.option("--images", type=int, help="so many training pictures (default: all)")
@click.option("--epochs", default=100, show_default=True, help="of the published protocol")
@click.option("--seeds", default=3, show_default=True)
def main(encoder: str, dataset_name: str, data_root: str | None, images: int | None, epochs: int, seeds: int) -> None:
    accelerator = start()
    model = Subject.open(encoder, accelerator.device).encoder
    train, test = labelled(dataset_name, *load(model, dataset_name, data_root, accelerator))
    train = train.take(some_of(len(train), images or len(train)))
    rows = []
    for seed in range(seeds):
        began = time.perf_counter()
        theirs = published(model, train, test, epochs, seed)
        between = time.perf_counter()
        (head,) = probe(model, train, test, accelerator, EvalConfig(encoder, dataset_name, seed=seed))
        ended = time.perf_counter()
        rows.append(
            {
                "published": theirs, "ours": head.metrics["top1"], "published_seconds": between - began, "our_seconds": ended - between,
                "features_seconds": head.metrics["features_seconds"], "head_seconds": head.metrics["head_seconds"],
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    means = {name: round(statistics.mean(row[name] for row in rows), 2) for name in rows[0]}
    print(
        json.dumps(
            means | {"times_faster": round(means["published_seconds"] / means["our_seconds"], 1), "threads": torch.get_num_threads()}
        )
    )


if __name__ == "__main__":
    main()
