"""The one dataclass of options. Command line, YAML, checkpoints and model cards all read it.

The defaults are those of recipes/shapes.yaml.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CareHubError, suggest


def option(default, help: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class TrainConfig:
    # data
    dataset_name: str = option("shapes", "shapes (embedded), cifar10, cifar100, stl10, imagenet100, imagefolder, or org/name on the Hub")
    data_root: str | None = option(None, "a local copy: a folder in the Hub's parquet layout, or class folders; nothing is downloaded then")
    image_column: str | None = option(None, "the column with the pictures, where it has an unusual name")
    label_column: str | None = option(None, "the column with the labels, where it has an unusual name")
    image_size: int | None = option(None, "side of the views in pixels (default: the data set's own)")
    skip_broken_images: bool = option(False, "count and name pictures that can't be decoded instead of stopping")
    num_workers: int = option(2, "loader processes, for data sets too large to be held in memory")
    # model
    model: str = option("resnet10_w16_small", "any timm backbone; small-image stems as resnet18_cifar, resnet50_cifar, ...")
    projection_hidden: int = option(512, "hidden width of the projection head")
    projection_dim: int = option(128, "dimension of the sphere on which rotations act")
    projection_norm: bool = option(True, "BatchNorm in the projection head")
    # method
    method: str = option("simclr", "simclr or moco", ("simclr", "moco"))
    weight: float = option(1.5, "lambda, the weight of the equivariance loss; 0 = the plain method")
    weight_warmup_epochs: float = option(12, "epochs over which lambda grows from 0 to --weight; early on it would slow the learning")
    train_simclr: bool = option(False, "the plain method, as --weight 0")
    equiv_splits: int = option(8, "groups in the global batch; the images of a group share one augmentation")
    equivariant_batch_size: int | None = option(None, "how much of the global batch the equivariance loss sees (default: all of it)")
    loss_subtype: str = option(
        "infonce", "contrastive part: infonce, alignment, uniformity, none", ("infonce", "alignment", "uniformity", "none")
    )
    augmentation_scope: str = option(
        "group", "group: one draw per group; batch: one pair a step, as the public code does in effect", ("group", "batch")
    )
    views: str = option(
        "separate",
        "separate: a second pair of views for equivariance; shared: one pair for both losses, drawn per group in that part "
        "of the batch which --equivariant-batch-size gives, per image in the rest",
        ("separate", "shared"),
    )
    queue_size: int | None = option(None, "MoCo: keys in the queue (default: 65,536, at most half the data set, a multiple of the batch)")
    momentum_encoder: float = option(0.99, "MoCo: momentum of the key encoder")
    temperature: float = option(0.2, "temperature of InfoNCE")
    # augmentation
    crop_scale: float = option(0.4, "smallest crop, as a fraction of the picture's area")
    jitter: tuple[float, float, float, float] = option((0.3, 0.3, 0.3, 0.5), "colour jitter: brightness, contrast, saturation, hue")
    jitter_p: float = option(0.8, "probability of colour jitter")
    greyscale: float = option(0.1, "probability of greyscale")
    blur: float = option(0.2, "probability of Gaussian blur")
    equivariance_crop: bool = option(True, "crop the views drawn per group too; without, they show the central crop")
    blur_taps: int = option(3, "width of the blur kernel in pixels, odd")
    # optimisation
    epochs: int = option(12, "passes over the training images")
    batch_size: int = option(64, "images per micro-batch over all processes together")
    gradient_accumulation: int = option(1, "micro-batches averaged per optimiser step; negatives and groups are those of one micro-batch")
    optimizer: str = option("sgd", "adam, adamw, sgd or lars", ("adam", "adamw", "sgd", "lars"))
    lr: float = option(0.2, "peak learning rate")
    weight_decay: float = option(5e-4, "weight decay")
    momentum: float = option(0.9, "momentum of sgd and lars")
    lr_schedule_type: str = option("cosine", "constant or cosine, per step", ("constant", "cosine"))
    warmup_epochs: float = option(1, "epochs of linear warm-up")
    seed: int = option(0, "seed of weights, data order and every augmentation")
    mixed_precision: str = option("auto", "auto: bf16 where the matrix units have it; no, bf16, fp16", ("auto", "no", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the network")
    # run
    max_steps: int | None = option(None, "stop and export after so many optimiser steps")
    knn_every: int | None = option(None, "epochs between kNN checks, 0 = never (default: 5; with --max-steps 0)")
    knn_bank: int = option(5000, "images in the bank of the kNN check")
    checkpoint_every: int | None = option(None, "steps between checkpoints (default: an epoch)")
    save_root: str = option("runs", "where run folders are made")
    run_name: str | None = option(None, "name of the run folder (default: <dataset>-<method>-<first free number>)")
    resume: bool = option(False, "go on from the newest complete checkpoint of --run-name")
    log_with: str = option("none", "none, tensorboard or wandb", ("none", "tensorboard", "wandb"))
    push_to_hub: str | None = option(None, "ORG/NAME: push the export there when training ends; token and name are checked before")
    dry_run: bool = option(False, "print the plan and stop")

    def __post_init__(self) -> None:
        check_choices(self)
        self.jitter = tuple(self.jitter)
        if self.knn_every is None:
            self.knn_every = 0 if self.max_steps else 5
        if self.train_simclr:
            self.weight = 0.0
        self._check()

    def _check(self) -> None:
        positive = (
            "batch_size",
            "gradient_accumulation",
            "epochs",
            "equiv_splits",
            "temperature",
            "projection_dim",
            "projection_hidden",
            "knn_bank",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise CareHubError(f"{flag(name)} must be positive, got {getattr(self, name)}.")
        for name in ("weight", "lr", "weight_decay", "warmup_epochs", "weight_warmup_epochs", "knn_every", "num_workers"):
            if getattr(self, name) < 0:
                raise CareHubError(f"{flag(name)} can't be negative, got {getattr(self, name)}.")
        for name in ("max_steps", "checkpoint_every", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise CareHubError(f"{flag(name)} must be positive, got {getattr(self, name)}.")
        if self.blur_taps % 2 == 0:
            raise CareHubError(f"--blur-taps must be odd, got {self.blur_taps}.")
        if self.resume and not self.run_name:
            raise CareHubError("--resume needs --run-name, the folder to go on with.")
        if self.weight == 0 and self.loss_subtype == "none":
            raise CareHubError("--loss-subtype none with --weight 0 leaves no loss at all; give one of them a value.")
        if not 0 <= self.momentum_encoder <= 1:
            raise CareHubError(f"--momentum-encoder must lie in [0, 1], got {self.momentum_encoder}.")
        if self.method == "moco" and self.loss_subtype != "infonce":
            raise CareHubError(f"--loss-subtype {self.loss_subtype} is a part of SimCLR's loss; with --method moco use infonce.")
        if self.queue_size is not None and (self.queue_size <= 0 or self.queue_size % self.batch_size):
            near = max(1, round(self.queue_size / self.batch_size)) * self.batch_size
            raise CareHubError(f"--queue-size {self.queue_size} is not a multiple of --batch-size; the nearest that is: {near}.")
        if self.weight:
            self._check_groups()

    def _check_groups(self) -> None:
        part = self.equivariant_batch_size or self.batch_size
        if self.batch_size % part:
            near = nearest_divisor(self.batch_size, part)
            raise CareHubError(
                f"--equivariant-batch-size {part} does not divide --batch-size {self.batch_size}; the nearest that does is {near}."
            )
        if part % self.equiv_splits or part // self.equiv_splits < 2:
            near = nearest_divisor(part, self.equiv_splits, most=part // 2)
            raise CareHubError(
                f"{part} images can't be cut into --equiv-splits {self.equiv_splits} equal groups of at least 2; "
                f"the nearest that works is {near}."
            )

    def check_processes(self, count: int) -> None:
        """Raise CareHubError if the batch or its groups can't be spread over `count` processes."""
        for name in ("batch_size", *(("equiv_splits",) if self.weight else ())):
            value = getattr(self, name)
            if value % count:
                near = max(count, round(value / count) * count)
                raise CareHubError(f"{flag(name)} {value} does not divide among {count} processes; the nearest that does is {near}.")

    def queue_for(self, images: int) -> int:
        """Size of MoCo's queue for so many training images: a longer one would hold the image's own older keys."""
        return self.queue_size or max(1, min(65536, images // 2) // self.batch_size) * self.batch_size

    @property
    def equivariance_stride(self) -> int:
        """Every so many images of the batch are seen by the equivariance loss, alike on every process."""
        return self.batch_size // (self.equivariant_batch_size or self.batch_size)

    @property
    def label(self) -> str:
        """The method's name for people."""
        return f"CARE-{self.method}" if self.weight else self.method


@dataclass
class EvalConfig:
    """Options of eval_linear.py."""

    encoder: str = option("", "a run folder, an export folder, a registry name or a Hub id")
    dataset_name: str = option("", "as in train.py")
    data_root: str | None = option(None, "a local copy of it")
    image_column: str | None = option(None, "the column with the pictures, where it has an unusual name")
    label_column: str | None = option(None, "the column with the labels, where it has an unusual name")
    num_workers: int = option(2, "loader processes, for large data sets")
    skip_broken_images: bool = option(False, "count and name pictures that can't be decoded instead of stopping")
    protocol: str = option(
        "lbfgs", "lbfgs: the optimum, its penalty chosen on training images; sgd: the published schedule, on features computed once; "
        "finetune: backbone and head together", ("lbfgs", "sgd", "finetune"),
    )  # fmt: skip
    optimizer: str = option("adam", "of --protocol sgd: adam as published for CIFAR and STL-10, sgd as for ImageNet-100", ("adam", "sgd"))
    lr: float | None = option(None, "learning rate (default: the published one; 0.02 for finetune)")
    epochs: int | None = option(None, "epochs (default: 100 of sgd, 10 of finetune)")
    augmented_copies: int = option(0, "of --protocol sgd: train on so many augmented copies of the features, in turn")
    label_fraction: float = option(1.0, "train on this part of the labels of each class: 0.01, 0.1")
    seed: int = option(0, "seed of whatever is drawn: validation split, subset of labels, order")
    seeds: int = option(1, "repeat with so many seeds from --seed on; mean and standard deviation are shown")
    output_dir: str | None = option(None, "where encoder and head go (default: the head goes beside the encoder)")
    push_to_hub: str | None = option(None, "ORG/NAME: push encoder, head and card there")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("encoder", "dataset_name"):
            if not getattr(self, name):
                raise CareHubError(f"{flag(name)} is missing.")
        self.epochs = {"sgd": 100, "finetune": 10}.get(self.protocol, 1) if self.epochs is None else self.epochs
        for name in ("epochs", "seeds"):
            if getattr(self, name) <= 0:
                raise CareHubError(f"{flag(name)} must be positive, got {getattr(self, name)}.")
        if not 0 < self.label_fraction <= 1:
            raise CareHubError(f"--label-fraction must lie in (0, 1], got {self.label_fraction}.")
        if self.augmented_copies and self.protocol != "sgd":
            raise CareHubError("--augmented-copies belongs to --protocol sgd.")
        if self.augmented_copies < 0:
            raise CareHubError(f"--augmented-copies can't be negative, got {self.augmented_copies}.")
        if self.protocol == "finetune" and not self.output_dir:
            raise CareHubError("fine-tuning makes another encoder; say by --output-dir where it shall be saved.")

    @property
    def label(self) -> str:
        """The protocol's name for people."""
        name = {"lbfgs": "linear probe", "sgd": f"linear probe ({self.optimizer})", "finetune": "fine-tuned"}[self.protocol]
        return name if self.label_fraction == 1 else f"{name}, {100 * self.label_fraction:g} % of the labels"


@dataclass(frozen=True)
class Plan:
    """What follows from the options and the size of the data."""

    steps_per_epoch: int
    steps: int  # the whole schedule
    stop: int  # where this run ends
    warmup: int  # of the learning rate
    weight_warmup: int

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> "Plan":
        per_step = config.batch_size * config.gradient_accumulation
        if images < per_step:
            raise CareHubError(f"{images} training images are fewer than the {per_step} of one optimiser step; lower --batch-size.")
        per_epoch = images // per_step
        steps = config.epochs * per_epoch
        return cls(
            per_epoch,
            steps,
            min(steps, config.max_steps or steps),
            round(config.warmup_epochs * per_epoch),
            round(config.weight_warmup_epochs * per_epoch),
        )


def check_choices(config) -> None:
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise CareHubError(f"{flag(f.name)} can't be '{value}'{suggest(str(value), choices)}; choose from {', '.join(choices)}.")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def nearest_divisor(number: int, wanted: int, most: int | None = None) -> int:
    divisors = [k for k in range(1, (most or number) + 1) if number % k == 0]
    return min(divisors, key=lambda k: (abs(k - wanted), k))


def lr_at(step: int, total: int, warmup: int, peak: float, schedule: str) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant or half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def weight_at(step: int, warmup: int, weight: float) -> float:
    """Lambda at optimiser step `step` (from 0): grows linearly over `warmup` steps, then stays."""
    return weight * min(1.0, (step + 1) / warmup) if warmup else weight


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options in a YAML file, by their names. Raises CareHubError for a missing or malformed file or an unknown option."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise CareHubError(f"the configuration '{path}' can't be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise CareHubError(f"the configuration '{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise CareHubError(f"the configuration '{path}' must be a mapping of option names to values.")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    data = {str(k).replace("-", "_"): v for k, v in data.items()}
    for name in data:
        if name not in known:
            raise CareHubError(f"the configuration '{path}' has an unknown option '{name}'{suggest(name, known)}.")
    return data


def write_yaml(path: str | Path, config: TrainConfig) -> None:
    import yaml

    data = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    Path(path).write_text(yaml.safe_dump(data, sort_keys=False))
