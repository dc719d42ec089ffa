"""Trains each method for a few steps in one process group: `four_methods.py DTYPE:STEPS,... SAVE_ROOT DATA_ROOT`."""

import sys

import torch

from care_hub import figures, trainer
from care_hub.config import TrainConfig
from care_hub.trainer import train

METHODS = {
    "simclr": {"weight": 0.0},
    "care": {"weight": 0.3},
    "moco": {"weight": 0.0, "method": "moco", "queue_size": 32},
    "care-moco": {"weight": 0.3, "method": "moco", "queue_size": 32, "equivariant_batch_size": 8},
}

LOAD, LOADED = trainer.load_split, {}


def load_once(config, split, progress):
    """All runs see the same pictures; reading them anew takes longer than training on them."""
    if split not in LOADED:
        LOADED[split] = LOAD(config, split, progress)
    return LOADED[split]


if __name__ == "__main__":
    jobs, save_root, data_root = sys.argv[1:]
    figures.neighbours = lambda *_: None  # no pictures of runs that nobody looks at
    trainer.load_split = load_once
    for job in jobs.split(","):
        dtype, steps = job.split(":")
        torch.set_default_dtype(getattr(torch, dtype))
        for name, settings in METHODS.items():
            config = TrainConfig(
                dataset_name="imagefolder", data_root=data_root, image_size=32, save_root=f"{save_root}/{job}", run_name=name, lr=0.02,
                weight_decay=0.0, weight_warmup_epochs=0, batch_size=16, equiv_splits=4, projection_hidden=32, projection_dim=16,
                epochs=8, max_steps=int(steps), checkpoint_every=100, mixed_precision="no", **settings,
            )  # fmt: skip
            train(config)
