"""Fine-tuning: backbone and linear head trained end to end, with labels."""

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .. import augment
from ..augment import AugmentationConfig, seeded_generator
from ..config import EncoderConfig, EvalConfig
from ..distributed import global_batch_norm
from ..encoder import Encoder
from ..hub.linear_head import LinearHead
from ..schedule import lr_at
from .features import embed_all
from .labels import ClassificationSplit, label_subset
from .linear import fit_best, top_accuracies

BATCH_SIZE, LR, MOMENTUM, WEIGHT_DECAY = 128, 0.02, 0.9, 1e-4


class ClassifierNetwork(nn.Module):
    """(B, 3, S, S) normalized images -> (B, C) logits."""

    def __init__(self, encoder: Encoder, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.features(x))


def finetune(
    encoder: Encoder,
    train: ClassificationSplit,
    test: ClassificationSplit,
    accelerator: Accelerator,
    config: EvalConfig,
) -> tuple[list[LinearHead], Encoder]:
    """A head for each seed, and the encoder of the first; `encoder` itself stays as it was.

    SGD with a cosine schedule on random crops (area 0.25 to 1) and flips. The head starts from the linear
    probe, which keeps the features from being distorted early on (Kumar et al. 2022, "LP-FT"). Order and
    augmentation depend on the seed and the place in the global batch, never on the number of processes.
    """
    x = embed_all(encoder, train.images, accelerator, "backbone").float()
    heads, encoders = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        began = time.perf_counter()
        subset = label_subset(train.labels, config.label_fraction, seed)
        index = subset.to(x.device)
        y = train.labels.to(x.device)[index]
        head = _linear(*fit_best(x[index], y, len(train.class_names), seed)[:2])
        tuned = copy.deepcopy(encoder)
        tuned.projection = None  # it belonged to the features as they were
        _train(ClassifierNetwork(tuned, head), train, subset, accelerator, config, seed)
        with torch.no_grad():
            logits = head(embed_all(tuned, test.images, accelerator, "backbone"))
        metrics: dict[str, Any] = {"protocol": "finetune", "seed": seed}
        metrics |= top_accuracies(logits, test.labels) | {"n_train": len(subset), "n_test": len(test)}
        metrics["head_seconds"] = round(time.perf_counter() - began, 1)
        weight, bias = head.weight.detach().cpu(), head.bias.detach().cpu()
        heads.append(LinearHead(config.dataset_name, weight, bias, train.class_names, metrics))
        encoders.append(tuned.eval())
    return heads, encoders[0]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    classes, inputs = weight.shape
    head = nn.utils.skip_init(nn.Linear, inputs, classes)
    head.weight.data, head.bias.data = weight, bias
    return head


def _augmentation(config: EncoderConfig) -> AugmentationConfig:
    return AugmentationConfig(
        config.image_size,
        scale=(0.25, 1.0),
        jitter=(0.0, 0.0, 0.0, 0.0),
        jitter_p=0.0,
        grayscale=0.0,
        blur=0.0,
        mean=config.mean,
        std=config.std,
    )


def _train(
    network: ClassifierNetwork,
    split: ClassificationSplit,
    subset: Tensor,
    accelerator: Accelerator,
    config: EvalConfig,
    seed: int,
) -> None:
    """Train `network` in place on the images `subset`."""
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    size = min(BATCH_SIZE, len(subset)) // processes * processes
    per_epoch = len(subset) // size
    lr, epochs = config.lr or LR, config.epochs or 1
    total = epochs * per_epoch
    augmentation = _augmentation(network.encoder.config)
    module = global_batch_norm(network.to(device), device)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    model, optimizer = accelerator.prepare(module, optimizer)
    model.train()

    indices = []
    for epoch in range(epochs):
        order = torch.randperm(len(subset), generator=seeded_generator(seed, "finetune", epoch))
        batches = subset[order[: per_epoch * size]].split(size)
        indices += [batch.chunk(processes)[rank] for batch in batches]
    hidden = not accelerator.is_main_process
    with tqdm(total=total, unit="step", desc=f"fine-tuning, seed {seed}", disable=hidden, leave=False) as bar:
        for step, (index, images) in enumerate(zip(indices, split.images.batches(indices), strict=True)):
            height, width = images.shape[2:]
            generator = seeded_generator(seed, "finetune views", step)
            params = augment.sample(augmentation, size, height, width, generator)
            own = slice(rank * len(index), (rank + 1) * len(index))
            views = augment.apply(images.to(device), params.rows(own), augmentation)
            loss = F.cross_entropy(model(views), split.labels[index].to(device))
            optimizer.param_groups[0]["lr"] = lr_at(step, total, per_epoch, lr, "cosine")
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}")
            bar.update()
