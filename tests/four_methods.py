"""Trains each method for a few steps: `four_methods.py SAVE_ROOT DATA_ROOT JOBS...`. JOBS are DTYPE:STEPS,... for the
process group that torchrun has made, or PROCESSES=DTYPE:STEPS,... for one that is made here."""

import os
import socket
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


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def train_all(save_root: str, data: dict, jobs: str) -> None:
    for job in jobs.split(","):
        dtype, steps = job.split(":")
        torch.set_default_dtype(getattr(torch, dtype))
        for name, settings in METHODS.items():
            config = TrainConfig(
                save_root=f"{save_root}/{job}", run_name=name, lr=0.02, weight_decay=0.0, weight_warmup_epochs=0, batch_size=16,
                equiv_splits=4, projection_hidden=32, projection_dim=16, epochs=8, max_steps=int(steps), checkpoint_every=100,
                mixed_precision="no", **data, **settings,
            )  # fmt: skip
            train(config)


def member(rank: int, processes: int, port: str, *arguments) -> None:
    """One process of the group, told of it as torchrun does."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    train_all(*arguments)


if __name__ == "__main__":
    save_root, data_root, *groups = sys.argv[1:]
    data = {"dataset_name": "imagefolder", "data_root": data_root, "image_size": 16}
    figures.neighbours = lambda *_: None  # no pictures of runs that nobody looks at
    pictures = trainer.load_data(TrainConfig(**data), False)  # read once, since that takes longer than training
    trainer.load_data = lambda *_: pictures
    for group in groups:
        processes, _, jobs = group.rpartition("=")
        arguments = (f"{save_root}/{processes}", data, jobs)
        if int(processes or 1) > 1:  # forked, since importing torch takes longer than training
            torch.multiprocessing.start_processes(member, (int(processes), free_port(), *arguments), int(processes), start_method="fork")
        else:
            train_all(*arguments)
