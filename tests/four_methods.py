"""Trains each method for a few steps: `four_methods.py SAVE_ROOT DATA_ROOT JOBS...`.

JOBS are DTYPE:STEPS,... for the process group that torchrun has made, or PROCESSES=DTYPE:STEPS,... for one
that is made here. DTYPE:STEPS:resumed goes on with what two processes had saved before their last step.
"""

import hashlib
import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
from processes import fork
from safetensors.torch import load_file

from care_hub import augment
from care_hub.config import TrainConfig
from care_hub.data.sources import load_splits
from care_hub.training import run, trainer

METHODS = {
    "simclr": {"weight": 0.0},
    "care": {"weight": 0.3},
    "moco": {"weight": 0.0, "method": "moco", "queue_size": 80},
    "care-moco": {"weight": 0.3, "method": "moco", "queue_size": 80, "equivariant_batch_size": 8}
    | {"equivariance_jitter": (0.4, 0.4, 0.4, 0.1), "equivariance_crop": "shared"}
    | {"weight_start_epochs": 1 / 3},  # a step
    "care-steering": {"weight": 0.3, "steering_head": True, "weight_start_epochs": 2 / 3},
    "frozen": {"weight": 0.3, "init": "resnet10_w16_small.care_shapes", "freeze_backbone": True}
    | {"steering_head": True},
}
COMMON = {
    "batch_size": 16,
    "equiv_splits": 4,
    "projection_hidden": 32,
    "projection_dim": 16,
    "epochs": 8,
    "lr": 0.02,
    "weight_decay": 0.0,
    "weight_start_epochs": 0,
    "weight_warmup_epochs": 0,
    "checkpoint_every": 13,  # within an epoch, which has 3 steps
    "mixed_precision": "no",
}


def views(run_folder: Path, processes: int) -> list[list[str]]:
    """What `note_views` has left there: for each pair of views of a global batch, a digest per image."""
    files = [run_folder / f"views-{rank}-of-{processes}.json" for rank in range(processes)]
    parts = zip(*(json.loads(file.read_text()) for file in files), strict=True)
    return [list(itertools.chain(*shares)) for shares in parts]


def weight_difference(one: Path, other: Path, step: int) -> float:
    """The largest between the checkpoints of two run folders, in weights, statistics and queue."""
    path = f"checkpoints/step-{step:08d}/model.safetensors"
    a, b = load_file(one / path), load_file(other / path)
    assert a.keys() == b.keys() and any(v.dtype == torch.float64 for v in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def note_views() -> None:
    """Have every process leave in the run folder what it trained on: images and parameters, in order."""
    apply_each, finish, seen = augment.apply_each, trainer.finish, []

    def noting(parts):
        for images, params, _ in parts:
            rows = zip(*(t.numpy() for t in (images, *vars(params).values())), strict=True)
            digests = [hashlib.sha256(b"".join(v.tobytes() for v in row)).hexdigest() for row in rows]
            first, second = digests[: len(digests) // 2], digests[len(digests) // 2 :]
            seen.append([a + b for a, b in zip(first, second, strict=True)])
        return apply_each(parts)

    def writing(setup, session, *arguments):
        rank, processes = setup.accelerator.process_index, setup.accelerator.num_processes
        (session.folder / f"views-{rank}-of-{processes}.json").write_text(json.dumps(seen))
        result = finish(setup, session, *arguments)
        seen.clear()
        return result

    augment.apply_each, trainer.finish = noting, writing


def train_all(save_root: str, data: dict, jobs: str) -> None:
    for job in jobs.split(","):
        dtype, steps, *_ = job.split(":")
        torch.set_default_dtype(getattr(torch, dtype))
        for name, settings in METHODS.items():
            here = {"save_root": f"{save_root}/{job}", "run_name": name, "max_steps": int(steps)}
            here["resume"] = job.endswith("resumed")
            trainer.train(TrainConfig(**COMMON | data | settings | here))


def main(save_root: str, data_root: str, *groups: str) -> None:
    data = {"dataset_name": "imagefolder", "data_root": data_root, "image_size": 16}
    splits = load_splits(TrainConfig(**data), size=16, progress=False)
    trainer.load_splits = lambda *_, **__: splits  # read once, since that takes longer than training
    run.plot_neighbors = run.rehearse = lambda *_: None  # neither figures nor rehearsals are looked at
    note_views()
    for group in groups:
        processes, _, jobs = group.rpartition("=")
        for job in jobs.split(","):
            if job.endswith(":resumed"):
                saved = f"{save_root}/2/{job.removesuffix(':resumed')}"
                last = shutil.ignore_patterns(f"step-{int(job.split(':')[1]):08d}")
                if not (target := Path(save_root, processes, job)).is_dir():  # a campaign has its own
                    shutil.copytree(saved, target, ignore=last)
        arguments = (f"{save_root}/{processes}", data, jobs)
        if processes in ("", "1"):
            train_all(*arguments)
        else:
            fork(int(processes), train_all, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
