"""The published linear probe (100 epochs of augmented images through the frozen encoder) against ours.

    python experiments/linear_protocols.py --encoder RUN --dataset-name shapes --seeds 3
    python experiments/linear_protocols.py --encoder RUN --dataset-name cifar10 --images 10000

Ours computes features once, then fits by L-BFGS. Both see the same images, decoded and in memory, and the
same test split; the encoder is in eval mode in both (in the public code it is not). Prints one JSON object
per seed and one of means: seconds and top-1 of each.
"""

import json
import statistics
import time
from dataclasses import replace

import click
import torch
import torch.nn.functional as F

from care_hub import augment
from care_hub.augment import center_crop, seeded_generator
from care_hub.config import EvalConfig
from care_hub.distributed import inference_accelerator
from care_hub.encoder import Encoder
from care_hub.evaluate.commands import open_splits
from care_hub.evaluate.features import LabeledImages, labeled, random_subset, recorded_augmentation
from care_hub.evaluate.linear import linear_probe
from care_hub.metrics import topk_accuracy

BATCH = 512


def published_probe(
    encoder: Encoder, train: LabeledImages, test: LabeledImages, epochs: int, seed: int
) -> float:
    """Top-1 of Adam, lr 1e-3, wd 1e-6, every epoch on newly augmented images (CIFAR and STL-10 form)."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(encoder.backbone.num_features, len(train.class_names))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3, weight_decay=1e-6)
    augmentation = recorded_augmentation(encoder.config)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=seeded_generator(seed, "order", epoch)).split(BATCH)
        for step, (index, x) in enumerate(zip(order, train.images.batches(order), strict=True)):
            generator = seeded_generator(seed, "views", epoch, step)
            params = augment.sample(augmentation, len(x), *x.shape[2:], generator)
            features = encoder.embed(augment.apply(x, params, augmentation), "backbone")
            loss = F.cross_entropy(head(features), train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    size, logits = encoder.config.image_size, []
    with torch.no_grad():
        for x in test.images.batches(torch.arange(len(test)).split(BATCH)):
            logits.append(head(encoder.embed(center_crop(x, size), "backbone")))
    return topk_accuracy(torch.cat(logits), test.labels, 1)


@click.command()
@click.option("--encoder", "source", required=True)
@click.option("--dataset-name", required=True)
@click.option("--data-root")
@click.option("--images", type=int, help="so many training images (default: all)")
@click.option("--epochs", default=100, show_default=True, help="of the published protocol")
@click.option("--seeds", default=3, show_default=True)
def main(
    source: str, dataset_name: str, data_root: str | None, images: int | None, epochs: int, seeds: int
) -> None:
    accelerator = inference_accelerator()
    config = EvalConfig(encoder=source, dataset_name=dataset_name, data_root=data_root)
    encoder = Encoder.from_pretrained(source).to(accelerator.device)
    train, test = labeled(dataset_name, *open_splits(encoder, config, accelerator))
    train = train.take(random_subset(len(train), images or len(train)))
    test = test.take(torch.arange(len(test)))  # in memory too
    rows = []
    for seed in range(seeds):
        began = time.perf_counter()
        published = published_probe(encoder, train, test, epochs, seed)
        between = time.perf_counter()
        (head,) = linear_probe(encoder, train, test, accelerator, replace(config, seed=seed))
        ended = time.perf_counter()
        row = {"published": published, "ours": head.metrics["top1"]}
        row |= {"published_seconds": between - began, "our_seconds": ended - between}
        row |= {name: head.metrics[name] for name in ("features_seconds", "head_seconds")}
        rows.append(row)
        print(json.dumps(row), flush=True)
    means = {name: round(statistics.mean(row[name] for row in rows), 2) for name in rows[0]}
    times_faster = round(means["published_seconds"] / means["our_seconds"], 1)
    print(json.dumps(means | {"times_faster": times_faster, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
