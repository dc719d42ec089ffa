"""Fine-tuning: backbone and linear head trained end to end, with labels."""

import copy
import logging
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .. import augment
from ..config import ACCELERATE, EvalConfig
from ..data.sources import recorded_options
from ..distributed import global_batch_norm
from ..encoder import Encoder
from ..errors import CareHubError
from ..hub.linear_head import LinearHead
from ..launched import launched_options
from ..schedule import lr_at
from .features import LabeledImages, embed_all, label_subset
from .linear import fit_best, top_accuracies

logger = logging.getLogger(__name__)
BATCH_SIZE, LR = 128, 0.02


def finetune(
    encoder: Encoder,
    train: LabeledImages,
    test: LabeledImages,
    accelerator: Accelerator,
    config: EvalConfig,
) -> tuple[list[LinearHead], Encoder]:
    """A head for each seed, and the encoder of the first; `encoder` itself stays as it was.

    SGD with a cosine schedule on random crops (area 0.25 to 1) and flips. The head starts from the
    linear probe, which keeps the features from being distorted early on (Kumar et al. 2022,
    "LP-FT"). Order and augmentation depend on the seed and the place in the global batch, never on
    the number of processes. An optimizer step averages as many batches as Accelerate's
    gradient_accumulation_steps says; its mixed_precision and dynamo_backend hold too.
    """
    for option, value in launched_options().items() if accelerator.is_main_process else ():
        logger.info("fine-tuning with %s %s, as Accelerate was launched", ACCELERATE[option], value)
    x = embed_all(encoder, train.images, accelerator, "backbone", title="training images")
    y, names = train.labels.to(x.device), train.class_names
    heads, encoders = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        began = time.perf_counter()
        subset = label_subset(train.labels, config.label_fraction, seed)
        index = subset.to(x.device)
        head = nn.utils.skip_init(nn.Linear, x.shape[1], len(names))
        head.weight.data, head.bias.data, _ = fit_best(x[index], y[index], len(names), seed)
        tuned = copy.deepcopy(encoder)
        tuned.set_contrastive_head(False)
        tuned.projection = None  # it belonged to the features as they were
        _train(tuned, head, train, subset, accelerator, config, seed)
        logits = head(embed_all(tuned, test.images, accelerator, "backbone"))
        metrics = config.settings | {"seed": seed} | top_accuracies(logits, test.labels)
        metrics |= {"n_train": len(subset), "n_test": len(test)} | recorded_options(config)
        metrics["head_seconds"] = round(time.perf_counter() - began, 1)
        weight, bias = head.weight.data.cpu(), head.bias.data.cpu()
        heads.append(LinearHead(config.data_label, weight, bias, names, metrics))
        encoders.append(tuned.eval())
    return heads, encoders[0]


def _train(
    encoder: Encoder,
    head: nn.Linear,
    split: LabeledImages,
    subset: Tensor,
    accelerator: Accelerator,
    config: EvalConfig,
    seed: int,
) -> None:
    """Train backbone and head in place on the images `subset`."""
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    accumulation = accelerator.gradient_accumulation_steps  # by which `accelerator.backward` divides
    batch_size = min(BATCH_SIZE, len(subset) // accumulation) // processes * processes
    if batch_size < 2:  # which a BatchNorm needs
        few = f"{len(subset)} training images do not make {accumulation} batches of at least 2"
        raise CareHubError(f"{few} for each of {processes} processes.")
    per_epoch = len(subset) // (batch_size * accumulation)  # optimizer steps
    lr, epochs, side = config.lr or LR, config.epochs or 1, split.images.size
    total = epochs * per_epoch
    about = encoder.config
    crops = augment.AugmentationConfig(
        about.image_size, scale=(0.25, 1), jitter_p=0, grayscale=0, blur=0, mean=about.mean, std=about.std
    )
    model = global_batch_norm(nn.Sequential(encoder.backbone, head), device)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    indices = []
    for epoch in range(epochs):
        order = augment.permutation(len(subset), seed, "finetune", epoch)
        batches = subset[order[: per_epoch * accumulation * batch_size]].split(batch_size)
        indices += [batch.chunk(processes)[rank] for batch in batches]
    steps = zip(indices, split.images.batches(indices), strict=True)
    hidden = rank > 0 or None  # None: only on a terminal
    bar = tqdm(steps, f"fine-tuning, seed {seed}", len(indices), leave=False, unit="batch", disable=hidden)
    for number, (index, images) in enumerate(bar):
        step, micro = divmod(number, accumulation)
        generator = augment.seeded_generator(seed, "finetune views", number)
        params = augment.sample(crops, batch_size, side, side, generator)
        own = slice(rank * len(index), (rank + 1) * len(index))
        views = augment.apply(images.to(device), params.rows(own), crops)
        last = micro == accumulation - 1  # gradients are averaged over processes during its backward pass
        with nullcontext() if last else accelerator.no_sync(model):
            logits = model(views.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, split.labels[index].to(device))
            accelerator.backward(loss)
        if last:
            optimizer.param_groups[0]["lr"] = lr_at(step, total, per_epoch, lr, "cosine")
            optimizer.step()
            optimizer.zero_grad()
        if number % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
