"""All options, each described once, and the record of an encoder.

Command line, YAML, checkpoints and model cards read them. The defaults are those of the recipe
`shapes`.
"""

import copy
import dataclasses
import math
import numbers
import os
import re
import shlex
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .errors import CareHubError, printable, suggest
from .schema import check_type

LARGEST_IMAGE = 2048  # pixels a side
WIDEST_LAYER = 65536  # of a projection head
LABEL_LENGTH = 64  # it becomes part of the names of files
DEFAULT_MODEL = "resnet10_w16_small"
RECIPES = Path(__file__).with_name("recipes")  # YAML files


def option(
    group: str,
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    changeable: bool = False,
    published: bool = True,
    formerly: str = "",
) -> Any:
    """A dataclass field that is an option, with all that anyone needs to know about it.

    `group`: its heading in `--help`. `default`: an empty string means that it must be given.
    `changeable`: may differ when a run is resumed. `published`: part of a run's public record.
    `formerly`: another name under which files and command lines may give it.
    """
    about = {"group": group, "help": help, "choices": choices, "changeable": changeable}
    return field(default=default, metadata=about | {"published": published, "formerly": formerly})


_data, _model, _method, _augment, _optim, _probe = (
    partial(option, group)
    for group in ("Data", "Model", "Method", "Augmentation", "Optimization", "Evaluation")
)
_reading, _run = (partial(option, group, changeable=True, published=False) for group in ("Data", "Run"))
AUGMENTATION = ("crop_scale", "jitter", "jitter_p", "grayscale", "blur", "flip")  # of each kind of views
PREEMPT_SIGNALS = ("sigusr1", "sigusr2", "sigxcpu", "sigquit", "sigurg")


@dataclass
class DataConfig:
    """Which data set, and how it is read."""

    dataset_name: str = _data(
        "", "shapes (embedded), cifar10, cifar100, stl10, imagenet100, imagefolder, or org/name on the Hub"
    )
    data_root: str | None = _reading(
        None,
        "a local copy: a folder in the Hub's parquet layout, or class folders; nothing is downloaded then",
    )
    dataset_label: str | None = _reading(
        None, "the name under which results are kept (default: --dataset-name; of imagefolder the folder's)"
    )
    image_column: str | None = _data(None, "the column with the images, where it has an unusual name")
    label_column: str | None = _data(None, "the column with the labels, where it has an unusual name")
    num_workers: int = _reading(2, "loader processes, for data sets too large for memory")
    skip_broken_images: bool = _data(False, "count and name images that can't be decoded instead of stopping")

    def __post_init__(self) -> None:
        vars(self).update(typed_options(type(self), vars(self)))
        if not self.dataset_name:
            raise CareHubError("`dataset_name` is missing.")
        check_numbers(self, at_least_0="num_workers")
        if self.dataset_label is not None and not 0 < len(printable(self.dataset_label)) <= LABEL_LENGTH:
            raise CareHubError(f"`dataset_label` must have 1 to {LABEL_LENGTH} letters.")

    @property
    def data_label(self) -> str:
        """The name of the data set in heads, records and cards; a folder's own name tells it from others."""
        if self.dataset_label is None and self.dataset_name == "imagefolder" and self.data_root:
            return printable(Path(self.data_root).resolve().name)[:LABEL_LENGTH] or self.dataset_name
        return printable(self.dataset_label or self.dataset_name)


@dataclass
class TrainConfig(DataConfig):
    """Options of train.py and of `care_hub.train`. Raises CareHubError for values that can't work."""

    dataset_name: str = _data("shapes", DataConfig.__dataclass_fields__["dataset_name"].metadata["help"])
    image_size: int | None = _data(
        None, "side of the views in pixels (default: the data set's own; with --init that of its images)"
    )

    model: str = _model(
        None,
        "any timm backbone; with a stem for small images: resnet18_cifar, ... (default: that of --init, "
        f"else {DEFAULT_MODEL})",
    )
    init: str | None = _model(
        None,
        "start from these weights: a run or export folder, a registry name, a Hub id, or architecture.tag "
        "for timm's",
    )
    freeze_backbone: bool = _model(False, "train the projection head alone, on the backbone of --init")
    projection_hidden: int = _model(512, "hidden width of the projection head")
    projection_dim: int = _model(128, "dimension of the sphere on which rotations act")
    projection_norm: bool = _model(True, "BatchNorm in the projection head")

    method: str = _method("simclr", "simclr or moco", ("simclr", "moco"))
    weight: float = _method(4.0, "lambda, the weight of the equivariance loss; 0 = the plain method")
    weight_start_epochs: float | None = _method(
        None,
        "epochs before which lambda is 0 and a step costs what the plain method's does (default: four fifths "
        "of --epochs; 0 with --freeze-backbone)",
    )
    weight_warmup_epochs: float | None = _method(
        None,
        "epochs over which lambda grows from 0 to --weight, from --weight-start-epochs on (default: a "
        "quarter of what is left)",
    )
    train_simclr: bool = _method(False, "the plain method, as --weight 0")
    equiv_splits: int = _method(8, "groups in the global batch; the images of a group share one augmentation")
    equivariant_batch_size: int | None = _method(
        None, "images that the equivariance loss sees (default: all)"
    )
    loss_subtype: str = _method(
        "infonce", "the contrastive part", ("infonce", "alignment", "uniformity", "none")
    )
    augmentation_scope: str = _method(
        "group",
        "group: one augmentation per group; batch: one pair a step, as the public code does in effect",
        ("group", "batch"),
    )
    views: str = _method(
        "separate",
        "separate: a second pair of views for equivariance; shared: one pair for both losses, sampled "
        "per group in the part of the batch that --equivariant-batch-size gives, per image in the rest",
        ("separate", "shared"),
    )
    steering_head: bool = _method(
        False, "InfoNCE on a head of its own, which may ignore the augmentation; the exported one rotates"
    )
    steering_uniformity: float = _method(
        0.1,
        "of a steering head: how much its embeddings spread, views of one image too, relative to --weight",
    )
    steering_temperature: float = _method(0.2, "temperature of --steering-uniformity")
    queue_size: int | None = _method(
        None, "MoCo: keys in the queue (default: 65,536, at most half the data set, a multiple of the batch)"
    )
    momentum_encoder: float = _method(0.99, "MoCo: momentum of the key encoder")
    temperature: float = _method(0.2, "temperature of InfoNCE")

    crop_scale: float = _augment(0.4, "smallest crop, as a fraction of the image's area")
    jitter: tuple[float, float, float, float] = _augment(
        (0.3, 0.3, 0.3, 0.5), "color jitter: brightness, contrast, saturation, hue"
    )
    jitter_p: float = _augment(0.8, "probability of color jitter")
    grayscale: float = _augment(0.1, "probability of grayscale", formerly="greyscale")
    blur: float = _augment(0.2, "probability of Gaussian blur")
    blur_kernel_size: int = _augment(3, "width of the blur kernel in pixels, odd", formerly="blur_taps")
    flip: float = _augment(0.5, "probability of a horizontal flip")
    equivariance_crop: bool | str = _augment(
        True,
        "crop the equivariance views too (default); shared: each image alike in both of its views; "
        "false: show the central crop",
        choices=("shared",),
    )
    equivariance_crop_scale: float | None = _augment(None, "of the equivariance views, if not --crop-scale")
    equivariance_jitter: tuple[float, float, float, float] | None = _augment(
        None, "of the equivariance views, if not --jitter: what embeddings shall turn by, not ignore"
    )
    equivariance_jitter_p: float | None = _augment(None, "of the equivariance views, if not --jitter-p")
    equivariance_grayscale: float | None = _augment(None, "of the equivariance views, if not --grayscale")
    equivariance_blur: float | None = _augment(None, "of the equivariance views, if not --blur")
    equivariance_flip: float | None = _augment(None, "of the equivariance views, if not --flip")

    epochs: int = _optim(20, "passes over the training images")
    batch_size: int = _optim(64, "images per micro-batch over all processes together")
    gradient_accumulation: int = _optim(
        None,
        "micro-batches averaged per optimizer step (default: Accelerate's, else 1); negatives and groups are "
        "those of one micro-batch",
    )
    optimizer: str = _optim("sgd", "adam, adamw, sgd or lars", ("adam", "adamw", "sgd", "lars"))
    lr: float = _optim(0.2, "peak learning rate")
    weight_decay: float = _optim(5e-4, "weight decay")
    momentum: float = _optim(0.9, "momentum of sgd and lars")
    lr_schedule_type: str = _optim("cosine", "constant or cosine, per step", ("constant", "cosine"))
    warmup_epochs: float = _optim(1, "epochs of linear warm-up")
    seed: int = _optim(0, "seed of weights, data order and every augmentation")
    mixed_precision: str = _optim("auto", "auto: bf16 where hardware has it", ("auto", "no", "bf16", "fp16"))
    compile: bool = _optim(False, "torch.compile the network", changeable=True)

    max_steps: int | None = _run(None, "stop and export after so many optimizer steps", published=True)
    knn_every: int | None = _run(
        None, "epochs between kNN checks, 0 = never (default: 5; with --max-steps 0)", published=True
    )
    knn_bank: int = _run(5000, "images in the bank of the kNN check", changeable=False, published=True)
    checkpoint_every: int | None = _run(None, "steps between checkpoints (default: an epoch)", published=True)
    checkpoint_minutes: float = _run(
        15, "minutes between checkpoints, beside --checkpoint-every; the first comes after one at most"
    )
    preempt_signal: str = _run(
        "sigusr1", "saves and stops a run, as SIGTERM, SIGINT and SIGHUP do", choices=PREEMPT_SIGNALS
    )
    save_root: str = _run("runs", "where run folders are made")
    run_name: str | None = _run(None, "name of the run folder (default: <dataset>-<method>-<free number>)")
    resume: bool | str = _run(
        False,
        "resume from the newest complete checkpoint of --run-name; auto: start the run if there is none, "
        "and leave it alone if it is finished",
        choices=("auto",),
    )
    log_with: str = _run("none", "none, tensorboard or wandb", ("none", "tensorboard", "wandb"))
    log_freq: int = _run(1, "steps between values sent to the tracker")
    project: str | None = _run(None, "the tracker's project (default: WANDB_PROJECT, else care_hub)")
    user: str | None = _run(None, "wandb's entity, a user or a team (default: WANDB_ENTITY)")
    push_to_hub: str | None = _run(
        None, "ORG/NAME: push the export there when training ends; token and name are checked before"
    )
    dry_run: bool = _run(False, "print the plan and stop; images are counted, not read")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init = self.init or None
        if self.model is None and not self.init:  # which else fixes the architecture
            self.model = DEFAULT_MODEL
        undecided = {"gradient_accumulation": None, "mixed_precision": "auto", "compile": False}
        self.undecided = {name for name, value in undecided.items() if getattr(self, name) == value}
        self.taken_over: set[str] = set()  # from Accelerate
        if self.gradient_accumulation is None:
            self.gradient_accumulation = 1
        if self.knn_every is None:
            self.knn_every = 0 if self.max_steps else 5
        if self.train_simclr:
            self.weight = 0.0
        self._check()

    def _check(self) -> None:
        check_numbers(
            self,
            "batch_size gradient_accumulation epochs equiv_splits temperature projection_dim "
            "projection_hidden knn_bank max_steps checkpoint_every image_size log_freq "
            "equivariant_batch_size blur_kernel_size checkpoint_minutes steering_temperature",
            at_least_0="seed weight lr weight_decay warmup_epochs weight_start_epochs weight_warmup_epochs "
            "knn_every steering_uniformity",
        )
        if self.blur_kernel_size % 2 == 0:
            raise CareHubError(f"`blur_kernel_size` must be odd, got {self.blur_kernel_size}.")
        if self.resume and not self.run_name:
            raise CareHubError("`resume` needs `run_name`, the name of the run to resume.")
        if self.freeze_backbone and not self.init:
            raise CareHubError("`freeze_backbone` needs `init`, the encoder whose backbone it is.")
        if self.weight == 0 and self.loss_subtype == "none":
            raise CareHubError("`loss_subtype='none'` with `weight=0` leaves no loss at all; change one.")
        name = self.run_name or "run"
        if self.run_name == "" or os.path.normpath(name) != name or name.startswith(("/", "..")):
            raise CareHubError(f"`run_name` must be the name of a folder, got '{self.run_name}'.")
        for name in ("momentum", "momentum_encoder"):
            if not 0 <= getattr(self, name) <= 1:
                raise CareHubError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        self._check_augmentation("", {name: getattr(self, name) for name in AUGMENTATION})
        self._check_augmentation("equivariance_", self.equivariance_augmentation)
        if self.method == "moco" and self.loss_subtype != "infonce":
            raise CareHubError("`loss_subtype` belongs to SimCLR's loss; with `method='moco'` use infonce.")
        if self.queue_size is not None and (self.queue_size <= 0 or self.queue_size % self.batch_size):
            near = max(1, round(self.queue_size / self.batch_size)) * self.batch_size
            raise CareHubError(
                f"`queue_size={self.queue_size}` is no multiple of `batch_size`; the nearest is {near}."
            )
        if self.weight:
            self._check_groups()
            self._check_equivariance()

    def _check_augmentation(self, kind: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name == "jitter":
                if min(value) < 0:
                    raise CareHubError(f"`{kind}{name}` can't be negative, got {value}.")
            elif not 0 <= value <= 1 or (name == "crop_scale" and value == 0):
                interval = "(0, 1]" if name == "crop_scale" else "[0, 1]"
                raise CareHubError(f"`{kind}{name}` must lie in {interval}, got {value}.")

    def _check_equivariance(self) -> None:
        begin, _ = self.weight_epochs
        start = f"`weight_start_epochs={begin:g}`"
        if begin >= self.epochs:
            raise CareHubError(f"{start} leaves none of `epochs={self.epochs}` to the equivariance loss.")
        if begin and self.loss_subtype == "none":
            raise CareHubError(f"`loss_subtype='none'` with {start} leaves no loss before that; change one.")
        own = [f"equivariance_{name}" for name in self.equivariance_augmentation]
        own += ["equivariance_crop='shared'"] * (self.equivariance_crop == "shared")
        if self.views == "shared" and own:
            raise CareHubError(f"`{own[0]}` needs a second pair of views; drop it or `views='shared'`.")

    def _check_groups(self) -> None:
        part = self.equivariant_batch_size or self.batch_size
        if self.batch_size % part:
            near = nearest_divisor(self.batch_size, part)
            raise CareHubError(
                f"`equivariant_batch_size={part}` does not divide the batch; the nearest that does is {near}."
            )
        if part % self.equiv_splits or part // self.equiv_splits < 2:
            near = nearest_divisor(part, self.equiv_splits, most=part // 2)
            raise CareHubError(
                f"{part} images do not make `equiv_splits={self.equiv_splits}` equal groups of at least 2; "
                f"the nearest that works is {near}."
            )
        if self.steering_head and self.views == "shared":
            raise CareHubError("`steering_head` takes views of its own; use `views='separate'`.")
        if self.steers_alone and self.weight_start_epochs:
            nothing = "over a frozen backbone `steering_head` has nothing to train before that"
            raise CareHubError(f"`weight_start_epochs` must be 0: {nothing}.")
        if self.steering_head and self.loss_subtype == "none":
            none = "`loss_subtype='none'` trains nothing but the head that rotates"
            raise CareHubError(f"{none}; leave `steering_head` out.")

    def take_over(self, launched: dict[str, Any]) -> "TrainConfig":
        """These options with those that Accelerate was `launched` with, where none was given.

        Raises CareHubError if both are given and differ.
        """
        for name, value in launched.items():
            if name not in self.undecided and (own := getattr(self, name)) != value:
                setting = ACCELERATE[name]
                theirs = f"Accelerate's {setting} {value} (ACCELERATE_{setting.upper()})"
                raise CareHubError(f"`{name}={own!r}` and {theirs} differ; give one of them.")
        config = copy.copy(self)
        config.taken_over = launched.keys() & self.undecided
        for name in config.taken_over:
            setattr(config, name, launched[name])
        return config

    def start_from(self, initial: "EncoderConfig") -> "TrainConfig":
        """These options with the architecture of `initial`, the encoder that `init` names, and its image
        size where none is given.

        Raises CareHubError if another architecture is given.
        """
        if self.model not in (None, initial.model):
            other = f"`model='{self.model}'` is not the architecture of '{self.init}'"
            raise CareHubError(f"{other}, which is {initial.model}; leave `model` out.")
        config = copy.copy(self)
        config.model, config.image_size = initial.model, self.image_size or initial.image_size
        return config

    def check_processes(self, count: int) -> None:
        """Raise CareHubError if the batch or its groups can't be spread over `count` processes."""
        for name in ("batch_size", "equiv_splits") if self.weight else ("batch_size",):
            value = getattr(self, name)
            if value % count:
                near = max(count, round(value / count) * count)
                few = f"`{name}={value}` does not divide among {count} processes"
                raise CareHubError(f"{few}; the nearest that does is {near}.")

    def queue_for(self, images: int) -> int:
        """Size of MoCo's queue for so many training images: a longer one would hold an image's own
        keys.
        """
        return self.queue_size or max(1, min(65536, images // 2) // self.batch_size) * self.batch_size

    @property
    def equivariance_stride(self) -> int:
        """Every so many images of the batch are seen by the equivariance loss, alike on every process."""
        return self.batch_size // (self.equivariant_batch_size or self.batch_size)

    @property
    def equivariance_augmentation(self) -> dict[str, Any]:
        """What the equivariance views have of their own, by the names that the contrastive ones have."""
        given = {name: getattr(self, f"equivariance_{name}") for name in AUGMENTATION}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def weight_epochs(self) -> tuple[float, float]:
        """Epochs before lambda, and those over which it grows: by default it comes in the last fifth."""
        late = not self.freeze_backbone and self.loss_subtype != "none"
        start, warmup = self.weight_start_epochs, self.weight_warmup_epochs
        start = (self.epochs * 4 / 5 if late else 0) if start is None else start
        return start, (self.epochs - start) / 4 if warmup is None else warmup

    @property
    def steers_alone(self) -> bool:
        """Whether there is no InfoNCE: its own head would serve nothing where the backbone is frozen."""
        return self.steering_head and self.freeze_backbone and self.weight > 0

    @property
    def method_name(self) -> str:
        """The method as it is called in text."""
        return f"CARE-{self.method}" if self.weight else self.method

    def published(self) -> dict[str, Any]:
        """The options that mean something elsewhere, for a run's public record."""
        public = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["published"]}
        start, warmup = self.weight_epochs
        given = {"weight_start_epochs": start, "weight_warmup_epochs": warmup}
        return public | given | {"init": self.init and source_name(self.init)}


@dataclass
class EvalConfig(DataConfig):
    """Options of eval_linear.py. Raises CareHubError for values that can't work."""

    encoder: str = _probe("", "a run folder, an export folder, a registry name or a Hub id")
    protocol: str = _probe(
        "lbfgs",
        "lbfgs: the optimum, its penalty chosen on training images; sgd: the published schedule, on features "
        "computed once; finetune: backbone and head together",
        ("lbfgs", "sgd", "finetune"),
    )
    optimizer: str = _probe(
        "adam",
        "of --protocol sgd: adam as published for CIFAR and STL-10, sgd as for ImageNet-100",
        ("adam", "sgd"),
    )
    lr: float | None = _probe(None, "learning rate (default: the published one; 0.02 for finetune)")
    epochs: int | None = _probe(None, "epochs (default: 100 of sgd, 10 of finetune)")
    augmented_copies: int = _probe(0, "of --protocol sgd: augmented copies of the features, used in turn")
    label_fraction: float = _probe(1.0, "train on this part of the labels of each class: 0.01, 0.1")
    seed: int = _probe(0, "seed of whatever is sampled: validation split, subset of labels, order")
    seeds: int = _probe(1, "repeat with so many seeds from --seed on; mean and standard deviation are shown")
    output_dir: str | None = _probe(
        None, "where to save encoder and head (default: the head, with the encoder)"
    )
    push_to_hub: str | None = _probe(None, "ORG/NAME: push encoder, head and card there")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder:
            raise CareHubError("`encoder` is missing.")
        if self.epochs is None:
            self.epochs = {"sgd": 100, "finetune": 10}.get(self.protocol, 1)
        check_numbers(self, positive="epochs seeds lr", at_least_0="augmented_copies seed")
        if not 0 < self.label_fraction <= 1:
            raise CareHubError(f"`label_fraction` must lie in (0, 1], got {self.label_fraction}.")
        if self.augmented_copies and self.protocol != "sgd":
            raise CareHubError("`augmented_copies` belongs to `protocol='sgd'`.")
        if self.protocol == "finetune" and not self.output_dir:
            raise CareHubError("fine-tuning makes another encoder; say by `output_dir` where to save it.")

    @property
    def settings(self) -> dict[str, Any]:
        """What repeats the evaluation on the same images: the protocol, and what is not its default."""
        names = {"sgd": ("optimizer", "epochs", "lr", "augmented_copies"), "finetune": ("epochs", "lr")}
        given = {name: getattr(self, name) for name in (*names.get(self.protocol, ()), "label_fraction")}
        defaults = EvalConfig.__dataclass_fields__
        changed = {name: value for name, value in given.items() if value != defaults[name].default}
        return {"protocol": self.protocol} | changed

    @property
    def protocol_name(self) -> str:
        """The protocol as it is called in text."""
        names = {"lbfgs": "linear probe", "sgd": f"linear probe ({self.optimizer})", "finetune": "fine-tuned"}
        fraction = "" if self.label_fraction == 1 else f", {100 * self.label_fraction:g} % of the labels"
        return names[self.protocol] + fraction


HEADS = ("projection", "contrastive_head")  # of an encoder, in files of these names


@dataclass(frozen=True)
class ProjectionConfig:
    """Shape of a projection head: Linear - (BatchNorm) - ReLU - Linear."""

    inputs: int
    hidden: int
    outputs: int
    norm: bool


@dataclass
class EncoderConfig:
    """What rebuilds an encoder and where it comes from: the `care` object of an export's config.json."""

    model: str
    image_size: int  # side in pixels
    crop_pct: float  # size of the central crop relative to the resized short side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    projection: ProjectionConfig | None = None  # None: there is no head, hence no sphere
    contrastive_head: ProjectionConfig | None = None  # beside one that InfoNCE did not train
    method: str | None = None
    weight: float | None = None
    groups: int | None = None
    dataset: str | None = None
    seed: int | None = None
    training: dict[str, Any] = field(default_factory=dict)  # options of train.py
    results: dict[str, float] = field(default_factory=dict)  # results.json
    versions: dict[str, str] = field(default_factory=dict)
    finetuned: str | None = None  # the data set whose labels were used
    init: dict[str, str] = field(default_factory=dict)  # name and license of the weights that it began with
    sha256: dict[str, str] = field(default_factory=dict)  # of the files beside config.json
    extra: dict[str, Any] = field(default_factory=dict)  # what other versions or programs wrote

    def __post_init__(self) -> None:
        """Raise CareHubError for sizes and statistics with which no encoder works."""
        size = self.image_size
        sound = {
            "image_size": type(size) is int and 1 <= size <= LARGEST_IMAGE,
            "crop_pct": 0.1 <= self.crop_pct <= 1,
            "mean": len(self.mean) == 3 and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == 3 and all(map(math.isfinite, self.std)) and min(self.std) > 0,
        }
        for name in HEADS:
            head = getattr(self, name)
            widths = (head.inputs, head.hidden, head.outputs) if head else ()
            sound[name] = all(1 <= width <= WIDEST_LAYER for width in widths)
        for name, is_sound in sound.items():
            if not is_sound:
                raise CareHubError(f"an encoder can't have `{name}={getattr(self, name)}`.")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "EncoderConfig":
        """From the `care` object; former names of options are understood.

        Raises ValueError where it is none; `hub.export.read_config` says that in a sentence.
        """
        check_type(values, cls, "care")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        given = {k: v for k, v in values.items() if k in known and v is not None}
        given |= {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        given["training"] = renamed_options(given.get("training", {}))
        given |= {name: ProjectionConfig(**given[name]) for name in HEADS if name in given}
        return cls(**given, extra={k: v for k, v in values.items() if k not in known})

    def to_json(self) -> dict[str, Any]:
        """The `care` object: what is not known is left out, but for the projection."""
        values = dataclasses.asdict(self)
        values |= {"mean": list(self.mean), "std": list(self.std), **values.pop("extra")}
        return {k: v for k, v in values.items() if k == "projection" or v not in (None, {})}


def check_numbers(config: DataConfig, positive: str = "", at_least_0: str = "") -> None:
    """Raise CareHubError for numbers out of range, by names with spaces between; None is left alone."""
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise CareHubError(f"`{name}` must be positive, got {value}.")
    for name in at_least_0.split():
        value = getattr(config, name)
        if value is not None and value < 0:
            raise CareHubError(f"`{name}` can't be negative, got {value}.")


def typed_options(config_class: type[DataConfig], values: dict[str, Any]) -> dict[str, Any]:
    """`values` of options with the types that `config_class` declares, however they are spelled.

    Raises CareHubError for those that have none.

    >>> typed_options(TrainConfig, {"lr": "1e-3", "mixed_precision": False, "optimizer": "SGD"})
    {'lr': 0.001, 'mixed_precision': 'no', 'optimizer': 'sgd'}
    """
    hints, known = typing.get_type_hints(config_class), config_class.__dataclass_fields__
    return {k: _typed(known[k], hints[k], v) if k in known else v for k, v in values.items()}


def _typed(option: dataclasses.Field, hint: Any, value: Any) -> Any:
    kinds = kinds_of(hint)
    name, read = KINDS[kinds[0]]
    if choices := option.metadata["choices"]:
        word = "no" if value is False else str(value).lower()  # YAML reads `no` as False, `null` as None
        if word in choices:
            return word
        if kinds[0] is str:
            near = suggest(word, choices)
            raise CareHubError(f"`{option.name}` can't be '{value}'{near}; choose from {', '.join(choices)}.")
        name, kinds = f"{name}, or {', '.join(choices)}", kinds[:1]
    if value is None and (option.default is None or type(None) in typing.get_args(hint)):
        return None
    try:
        if len(kinds) == 1:
            return read(value)
        name = f"{len(kinds)} numbers"
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise ValueError
        return tuple(read(part) for part in value)
    except (TypeError, ValueError, OverflowError):
        raise CareHubError(f"`{option.name}` must be {name}, got {value!r}.") from None


def kinds_of(hint: Any) -> list[Any]:
    """What an option may be but None, or, of several numbers, what each of them is.

    >>> kinds_of(tuple[float, float] | None), kinds_of(bool | str), kinds_of(int)
    ([<class 'float'>, <class 'float'>], [<class 'bool'>, <class 'str'>], [<class 'int'>])
    """
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    return list(typing.get_args(kinds[0])) or kinds


def _read_flag(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    word = str(value).lower() if isinstance(value, bool | str) else ""
    if word not in words:
        raise ValueError
    return words[word]


def _read_whole_number(value: Any) -> int:
    number: float = math.nan
    if isinstance(value, str | numbers.Integral) and not isinstance(value, bool):
        with suppress(ValueError):
            number = int(value)
    number = _read_number(value) if math.isnan(number) else number
    if number != int(number) or abs(number) >= 2**63:
        raise ValueError
    return int(number)


def _read_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _read_text(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    return text


KINDS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bool: ("true or false", _read_flag),
    int: ("a whole number", _read_whole_number),
    float: ("a finite number", _read_number),
    str: ("text (in YAML: in quotes)", _read_text),
}


def source_name(source: str) -> str:
    """An encoder's name for others: a registry name, timm's or a Hub id as it is, else the folder's own.

    >>> source_name("/home/ann/runs/birds/export"), source_name("resnet18.a1_in1k"), source_name("ann/birds")
    ('birds', 'resnet18.a1_in1k', 'ann/birds')
    """
    if source.count("/") < 2 and not source.startswith(("/", ".", "~")) and not os.path.isdir(source):
        return source
    path = Path(source).resolve()
    return path.parent.name if path.name == "export" else path.name


def nearest_divisor(number: int, wanted: int, most: int | None = None) -> int:
    """The divisor of `number`, at most `most`, that is nearest to `wanted`."""
    divisors = [k for k in range(1, (most or number) + 1) if number % k == 0]
    return min(divisors, key=lambda k: (abs(k - wanted), k))


def renamed_options(values: dict[str, Any]) -> dict[str, Any]:
    """Options by their names of today; what has no newer name stays.

    >>> renamed_options({"greyscale": 0.1, "lr": 0.2})
    {'grayscale': 0.1, 'lr': 0.2}
    """
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


FORMER_NAMES = {
    f.metadata["formerly"]: f.name for f in dataclasses.fields(TrainConfig) if f.metadata["formerly"]
}


# Options that Accelerate has too, and its names for them; in the environment ACCELERATE_ and capitals.
ACCELERATE = {
    "gradient_accumulation": "gradient_accumulation_steps",
    "mixed_precision": "mixed_precision",
    "compile": "dynamo_backend",
}

# Options of the public code that have another name here, and what to give instead.
PUBLIC_CODE = {
    "a": "`model`",
    "arch": "`model`",
    "b": "`batch_size`",
    "cos": "`lr_schedule_type='cosine'`",
    "data": "`data_root`",
    "dist_backend": "nothing: the launcher says it",
    "dist_url": "nothing: the launcher says it",
    "equiv_splits_per_gpu": "`equiv_splits`, which counts the groups of all processes together",
    "feature_dim": "`projection_dim`",
    "j": "`num_workers`",
    "kernel_size": "`blur_kernel_size`",
    "learning_rate": "`lr`",
    "local_rank": "nothing: the launcher says it",
    "log_root": "`save_root`",
    "moco_dim": "`projection_dim`",
    "moco_k": "`queue_size`",
    "moco_m": "`momentum_encoder`",
    "moco_t": "`temperature`",
    "multiprocessing_distributed": "nothing: the launcher says it",
    "no_knn": "`knn_every=0`",
    "p": "`log_freq`",
    "print_freq": "`log_freq`",
    "rank": "nothing: the launcher says it",
    "save_only_last_checkpoint": "`checkpoint_every`; the newest two are kept",
    "schedule": "`lr_schedule_type`",
    "split_batch": "`batch_size`, which counts the images of all processes together",
    "sync_batchnorm": "nothing: batch statistics are those of all processes",
    "test_freq": "`knn_every`",
    "wd": "`weight_decay`",
    "workers": "`num_workers`",
    "world_size": "nothing: the launcher says it",
}


def recipes() -> dict[str, str]:
    """What each of the package's recipes is, by its name: how the comment on top of the file begins."""
    files = {file.stem: file.read_text(encoding="utf-8") for file in sorted(RECIPES.glob("*.yaml"))}
    return {name: re.split(r"[;.]\s", text.removeprefix("# "))[0] for name, text in files.items()}


def find_config(name: str | Path) -> Path:
    """A file as it is, else the package's recipe: NAME or recipes/NAME.yaml.

    >>> find_config("shapes") == find_config("recipes/shapes.yaml") == RECIPES / "shapes.yaml"
    True
    """
    path = Path(name)
    recipe = RECIPES / f"{path.stem}.yaml"
    is_recipe = str(path) in (path.stem, recipe.name, f"recipes/{recipe.name}") and recipe.is_file()
    return recipe if is_recipe and not path.is_file() else path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options in a YAML file, or in the recipe of that name, by their names; former names are understood.

    `jitter` in a mapping `equivariance_augmentation` is `equivariance_jitter`, and so on.
    Raises CareHubError for a missing or malformed file or an unknown option.
    """
    try:
        data = yaml.safe_load(find_config(path).read_text(encoding="utf-8"))
    except OSError as error:
        near = suggest(str(path), recipes()) or "."
        raise CareHubError(f"the configuration '{path}' can't be read ({error.strerror}){near}") from error
    except UnicodeDecodeError as error:
        raise CareHubError(f"the configuration '{path}' is not UTF-8 text.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CareHubError(
            f"the configuration '{path}' is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise CareHubError(f"the configuration '{path}' must be a mapping of option names to values.")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    data = _by_names(data)
    nested = data.pop("equivariance_augmentation", None)
    if not isinstance(nested, dict | None):
        raise CareHubError(f"the configuration '{path}' must have a mapping as 'equivariance_augmentation'.")
    for name, value in _by_names(nested or {}).items():
        if data.setdefault(f"equivariance_{name}", value) != value:
            raise CareHubError(f"the configuration '{path}' has two values for 'equivariance_{name}'.")
    for name, value in data.items():
        if any(isinstance(part, list | dict) for part in (value if isinstance(value, list) else [value])):
            raise CareHubError(f"the configuration '{path}' has nested values for '{name}'.")
        if name not in known:
            near = f"; give {PUBLIC_CODE[name]}" if name in PUBLIC_CODE else suggest(name, known)
            raise CareHubError(f"the configuration '{path}' has an unknown option '{name}'{near}.")
    if "dry_run" in data:  # as in the file of a run; in those of version 0.1.0 lambda did not start late
        data.setdefault("weight_start_epochs", 0)
    return data


def _by_names(values: dict[Any, Any]) -> dict[str, Any]:
    return renamed_options({str(name).replace("-", "_"): value for name, value in values.items()})


def to_yaml(config: TrainConfig) -> str:
    """All options of a run, as `read_yaml` reads them; whether it was resumed is none of them."""
    return yaml.safe_dump(plain_values(dataclasses.asdict(config) | {"resume": False}), sort_keys=False)


def plain_values(options: dict[str, Any]) -> dict[str, Any]:
    """Options as YAML and JSON write them: tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def data_options(data: DataConfig) -> str:
    """The options of a data set as they are typed, but for those with their defaults.

    >>> data_options(TrainConfig("imagefolder", data_root="my images", skip_broken_images=True))
    "--dataset-name imagefolder --data-root 'my images' --skip-broken-images"
    """
    words: list[str] = []
    for option in dataclasses.fields(DataConfig):
        value = getattr(data, option.name)
        if value != option.default:
            words += ["--" + option.name.replace("_", "-"), *([] if value is True else [str(value)])]
    return shlex.join(words)
