"""Fine-tuning: backbone and linear head trained end to end, with labels."""

import copy
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .. import augment
from ..classifier import LinearHead
from ..config import EvalConfig, lr_at
from ..data.sources import Images
from ..distributed import global_batch_norm
from ..encoder import Encoder
from ..measures import topk
from .linear import fit_best, subset
from .monitor import embed_all

BATCH, LR, MOMENTUM, WEIGHT_DECAY = 128, 0.02, 0.9, 1e-4


class Network(nn.Module):
    """(B, 3, S, S) normalised pictures -> (B, C) logits."""

    def __init__(self, encoder: Encoder, head: nn.Linear):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.features(x))


def finetune(
    encoder: Encoder, train: Images, test: Images, accelerator: Accelerator, config: EvalConfig
) -> tuple[list[LinearHead], Encoder]:  # fmt: skip
    """A head for each seed, and the encoder of the first; `encoder` itself stays as it was.

    SGD with a cosine schedule on random crops (area 0.25 to 1) and flips. The head starts from the linear probe, which
    keeps the features from being torn up at the start (Kumar et al. 2022, "LP-FT"). Order and augmentation depend on the
    seed and the place in the global batch, never on the number of processes.
    """
    x = embed_all(encoder, train, accelerator, "backbone").float()
    y, classes, heads, first = train.labels, len(train.class_names), [], None
    size, mean, std = (encoder.care[k] for k in ("image_size", "mean", "std"))
    recipe = augment.Recipe(size, (0.25, 1.0), jitter=(0.0,) * 4, jitter_p=0, greyscale=0, blur=0, mean=tuple(mean), std=tuple(std))
    for seed in range(config.seed, config.seed + config.seeds):
        began = time.perf_counter()
        some = subset(y, config.label_fraction, seed)
        head = nn.Linear(x.shape[1], classes)
        head.weight.data, head.bias.data, _ = fit_best(x[some.to(x.device)], y[some].to(x.device), classes, seed)
        tuned = copy.deepcopy(encoder)
        tuned.projection = None  # it belonged to the features as they were
        _train(Network(tuned, head), train, some, accelerator, config, recipe, seed)
        with torch.no_grad():
            logits = head(embed_all(tuned, test, accelerator, "backbone"))
        metrics = {"protocol": "finetune", "seed": seed} | {
            f"top{k}": round(topk(logits, test.labels.to(logits.device), k), 2) for k in (1, 5)
        }
        metrics |= {"n_train": len(some), "n_test": len(test), "head_seconds": round(time.perf_counter() - began, 1)}
        heads.append(LinearHead(config.dataset_name, head.weight.detach().cpu(), head.bias.detach().cpu(), train.class_names, metrics))
        first = first or tuned.eval()
    return heads, first


def _train(network: Network, images: Images, some: Tensor, accelerator: Accelerator, config: EvalConfig, recipe, seed: int) -> None:
    processes, rank = accelerator.num_processes, accelerator.process_index
    size = min(BATCH, len(some)) // processes * processes
    per_epoch = len(some) // size
    total = config.epochs * per_epoch
    lr = config.lr or LR
    network = global_batch_norm(network.to(accelerator.device), accelerator.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    model, optimizer = accelerator.prepare(network, optimizer)
    model.train()
    indices = []
    for epoch in range(config.epochs):
        order = some[torch.randperm(len(some), generator=augment.generator(seed, "finetune", epoch))]
        indices += [batch.chunk(processes)[rank] for batch in order[: per_epoch * size].split(size)]
    bar = tqdm(total=total, unit="step", desc=f"fine-tuning, seed {seed}", disable=not accelerator.is_main_process, leave=False)
    for step, (index, pictures) in enumerate(zip(indices, images.batches(indices), strict=True)):
        drawn = augment.draw(recipe, size, *pictures.shape[2:], augment.generator(seed, "finetune views", step))
        mine = slice(rank * len(index), (rank + 1) * len(index))
        views = augment.apply(pictures.to(accelerator.device), drawn.rows(mine), recipe)
        loss = F.cross_entropy(model(views), images.labels[index].to(accelerator.device))
        optimizer.param_groups[0]["lr"] = lr_at(step, total, per_epoch, lr, "cosine")
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        bar.update()
    bar.close()
