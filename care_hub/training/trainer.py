"""The training loop: set-up, fit, finish."""

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import GradientAccumulationPlugin, send_to_device
from timm.optim import Lars
from torch import nn

from ..augment import AugmentationConfig, seeded_generator
from ..config import EncoderConfig, ProjectionConfig, TrainConfig
from ..data.images import Images, InMemoryImages
from ..data.sources import load_splits
from ..distributed import Votes, from_main, global_batch_norm, peer_errors
from ..encoder import Encoder, projection_head
from ..errors import CareHubError
from ..evaluate.monitor import final_results, knn_monitor
from ..hub.client import check_name, check_push
from ..launched import compile_arguments, launched_options, on_cpu
from ..models import feature_width
from ..schedule import Plan, lr_at, weight_at
from . import run, summary
from .batches import make_views, training_augmentation, training_batches
from .checkpoint import CheckpointWriter, resume_options
from .divergence import check_weights, largest_size
from .methods import MoCo, SimCLR, Steering
from .preemption import Preempted, Preemption
from .progress import NO_CALLBACKS, Callbacks, Progress, start_trackers

logger = logging.getLogger(__name__)


@dataclass
class Setup:
    """What is known before the first file is written."""

    config: TrainConfig
    accelerator: Accelerator
    train: Images
    test: Images | None
    plan: Plan
    augmentation: AugmentationConfig
    encoder: Encoder
    callbacks: Callbacks


@dataclass
class Session:
    """What a run changes."""

    folder: Path
    method: nn.Module  # wrapped for many processes
    optimizer: torch.optim.Optimizer
    progress: Progress
    writer: CheckpointWriter
    start: int  # the first step
    largest: float  # root mean square of the weights
    stopped: bool = False  # before the end, as it was asked to

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.release()
        self.writer.pool.shutdown()  # waits for a checkpoint that is being written


def train(config: TrainConfig, callbacks: Callbacks = NO_CALLBACKS) -> dict[str, float]:
    """Train, evaluate and export as `config` says; returns what is written to results.json.

    Progress goes to the `care_hub` logger. The global random state is left as it was. Raises
    CareHubError for user errors; everything up to the last checkpoint is kept then. Raises
    Preempted, which is one, if the run was asked to stop. `callbacks`: functions to be called
    meanwhile.
    """
    config = config.take_over(launched_options())
    accelerator = make_accelerator(config)
    if config.resume == "auto" and (results := from_main(lambda: run.finished_results(config))):
        if accelerator.is_main_process:
            folder = Path(config.save_root) / str(config.run_name)
            logger.info("the run '%s' is finished.", folder)
            if config.push_to_hub:
                run.push_run(folder, config.push_to_hub)
        return results
    on_gpu = accelerator.device.type == "cuda"
    with torch.random.fork_rng([accelerator.device] if on_gpu else []), peer_errors():
        torch.manual_seed(config.seed)  # the same initial weights on every process
        setup = set_up(config, accelerator, callbacks)
        if config.dry_run:
            return {}
        with (
            run.open_run(setup.config) as folder,
            start(setup, folder) as session,
            Preemption(config.preempt_signal) as preemption,
        ):
            return finish(setup, session, fit(setup, session, preemption), preemption)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The process group, device and precision of this process."""
    AcceleratorState._reset_state()  # which an evaluation in this process left, maybe in another precision
    cpu = on_cpu()
    device = PartialState(cpu=cpu).device
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision(config.mixed_precision, device),
        dynamo_backend="no",  # the backbone alone is compiled, in `start`
        log_with=None if config.log_with == "none" else config.log_with,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        project_dir=config.save_root,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation),
    )
    if accelerator.log_with == [] and config.log_with != "none":
        missing = f"`log_with='{config.log_with}'` needs a package that is not installed"
        raise CareHubError(f"{missing}; type: pip install {config.log_with}.")
    config.check_processes(accelerator.num_processes)
    if config.push_to_hub and accelerator.is_main_process:
        (check_name if config.dry_run else check_push)(config.push_to_hub)
    return accelerator


def precision(wanted: str, device: torch.device) -> str:
    """`auto` -> bf16 where the matrix units have it: GPUs from Ampere on, CPUs with avx512_bf16 or AMX.

    Raises CareHubError for fp16 without a GPU, and for a TPU.
    """
    if device.type == "xla":
        raise CareHubError("a TPU is not supported: training runs on CPUs and GPUs.")
    if wanted != "auto":
        if wanted == "fp16" and device.type != "cuda":
            raise CareHubError("`mixed_precision='fp16'` needs a GPU; use bf16 or no on a CPU.")
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "no"
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    probes = [getattr(torch.cpu, name, None) for name in names]
    return "bf16" if any(probe() for probe in probes if probe) else "no"


def set_up(config: TrainConfig, accelerator: Accelerator, callbacks: Callbacks) -> Setup:
    """Read the initial weights and the data, build the encoder and say the plan."""
    main = accelerator.is_main_process
    # One process of each machine fills the caches of `datasets` and of the Hub; the others wait for it.
    with accelerator.local_main_process_first():
        if initial := run.initial_encoder(config):
            config = config.start_from(initial.config)
        train_images, test_images = load_splits(config, config.image_size, main, not config.dry_run)
    plan, augmentation = Plan.of(config, len(train_images)), training_augmentation(config)
    if initial:  # its weights expect images normalized so, whatever their statistics are
        augmentation = replace(augmentation, mean=initial.config.mean, std=initial.config.std)
    encoder = make_encoder(config, initial, augmentation, augmentation.size / train_images.size)
    encoder.set_contrastive_head(config.steering_head and config.weight > 0 and not config.steers_alone)
    if initial:  # the same from here on, however the weights were read
        torch.manual_seed(config.seed)
    smallest = config.batch_size * (1 if config.method == "moco" else 2)  # batch that the encoder sees
    from_main(lambda: run.rehearse(encoder, min(2, smallest)))
    setup = Setup(config, accelerator, train_images, test_images, plan, augmentation, encoder, callbacks)
    if main:
        log_plan(setup)
    return setup


def make_encoder(
    config: TrainConfig, initial: Encoder | None, augmentation: AugmentationConfig, crop_pct: float
) -> Encoder:
    """A new encoder, or `initial` itself, with a new head unless its own has the sizes asked for."""
    size, mean, std = augmentation.size, augmentation.mean, augmentation.std
    sizes = (config.projection_hidden, config.projection_dim, config.projection_norm)
    if initial is None:
        return Encoder.new(config.model, size, mean, std, *sizes, crop_pct)
    before, backbone = initial.config, initial.backbone
    if size != before.image_size and hasattr(backbone, "set_input_size"):
        backbone.set_input_size(img_size=size)  # which interpolates position embeddings
    head = ProjectionConfig(feature_width(backbone, size), *sizes)
    init = {"head": "taken over" if head == before.projection else "new"} | before.init
    second = before.contrastive_head
    initial.config = EncoderConfig(config.model, size, crop_pct, mean, std, head, second, init=init)
    torch.manual_seed(config.seed)
    new_head = projection_head(head)
    if head != before.projection:
        initial.projection = new_head
    if config.freeze_backbone:
        initial.freeze_backbone()
    return initial


def log_plan(setup: Setup) -> None:
    """The plan, the images that were skipped and, for a dry run, what can be known in advance."""
    config, accelerator = setup.config, setup.accelerator
    logger.info(summary.plan_text(config, setup.plan, setup.encoder, setup.train, accelerator))
    for split, images in (("train", setup.train), ("test", setup.test)):
        if images is not None and images.skipped:
            names = " ".join(images.skipped)
            logger.info("skipped %d broken images in %s: %s", len(images.skipped), split, names)
    if config.dry_run:
        processes = accelerator.num_processes
        share = config.batch_size // processes
        memory = step_memory(config, setup.encoder, share, accelerator.mixed_precision)
        logger.info(summary.dry_run_text(config, setup.plan, processes, memory))


def start(setup: Setup, folder: Path) -> Session:
    """Make what is trained; restore the newest checkpoint of a run that is resumed."""
    config, accelerator = setup.config, setup.accelerator
    method = global_batch_norm(make_method(config, setup.encoder, len(setup.train)), accelerator.device)
    if config.compile:
        setup.encoder.backbone.compile(**compile_arguments())
    with warnings.catch_warnings():
        # Renamed in newer torch; the old name is the one that torch 2.6 knows.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        method, optimizer = accelerator.prepare(method, make_optimizer(config, method))
    step, seconds, largest = 0, 0.0, largest_size(method)
    if config.resume and run.has_checkpoint(config, folder):
        step, seconds = run.restore(folder, method, optimizer, accelerator)
    elif config.init:  # so that the run can be resumed where `init` has gone, or has changed
        from_main(lambda: setup.encoder.save_pretrained(folder / "init") and None)
    for images in (setup.train, setup.test):
        if isinstance(images, InMemoryImages):
            images.to(accelerator.device)
    start_trackers(folder, config, accelerator)
    progress = Progress(folder, setup.plan, step, seconds, config, accelerator, setup.callbacks)
    writer = CheckpointWriter(folder / "checkpoints", step)
    return Session(folder, method, optimizer, progress, writer, step, largest)


def fit(setup: Setup, session: Session, preemption: Preemption) -> int:
    """Optimizer steps until the plan's end or until any process is asked to stop, then all of them after
    the same step; returns how many are done in all.
    """
    config, accelerator, plan = setup.config, setup.accelerator, setup.plan
    rank, processes = accelerator.process_index, accelerator.num_processes
    method, optimizer, progress = session.method, session.optimizer, session.progress
    care: SimCLR = accelerator.unwrap_model(method)
    shares = (setup.augmentation, session.start, rank, processes)
    weighted = plan.weight_start * config.gradient_accumulation  # the first micro-batch with that loss
    votes, minutes = Votes(), config.checkpoint_minutes
    save_at = time.monotonic() + 60 * (minutes if session.start else min(1, minutes))
    method.train()
    with closing(training_batches(config, plan, setup.train, *shares)) as batches:  # and its loader processes
        for step in range(session.start, plan.stop):
            began = time.perf_counter()
            # Pure functions of the step: the same on every process, and after a resume.
            lr = lr_at(step, plan.steps, plan.warmup, config.lr, config.lr_schedule_type)
            for group in optimizer.param_groups:
                group["lr"] = lr
            care.weight = weight_at(step, plan.weight_start, plan.weight_warmup, config.weight)

            for micro in range(config.gradient_accumulation):
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
                # Augmentations are sampled for the global batch; each process applies those of its images.
                number = step * config.gradient_accumulation + micro
                views = make_views(batch, config, setup.augmentation, number, rank, processes, weighted)
                # Gradients are averaged over processes once a step, during the last backward pass.
                last = micro == config.gradient_accumulation - 1
                torch.manual_seed(seeded_generator(config.seed, "dropout", number, rank).initial_seed())
                with nullcontext() if last else accelerator.no_sync(method):
                    losses = method(*views)  # embeddings are gathered: all processes take part
                    accelerator.backward(losses["loss"])  # which divides by the number of micro-batches
                progress.add_losses(losses)
            votes.cast(preemption.asked(), time.monotonic() > save_at, session.writer.failed)
            optimizer.step()
            optimizer.zero_grad()
            care.after_step()
            # Fetches losses now and then, which waits for the device; one that is not finite ends the run.
            progress.add_step(step, lr, care.weight, time.perf_counter() - began)

            done = step + 1
            session.stopped, in_time, unwritten = votes.count()
            if unwritten:
                from_main(session.writer.wait)  # which raises, on all, why the last checkpoint failed
            if session.stopped or done == plan.stop:
                return done  # the last checkpoint and the final evaluation follow
            knn = knn_is_due(config, plan, done)  # which may take longer than the grace after a signal
            if in_time or knn or done % (config.checkpoint_every or plan.steps_per_epoch) == 0:
                progress.flush()
                save_checkpoint(setup, session, done)
                save_at = time.monotonic() + 60 * minutes
            if knn:
                # Every process embeds its share of the images: all take part.
                (top1,) = knn_monitor(config, setup.encoder, setup.train, setup.test, accelerator)
                progress.add_knn(done, top1)
            progress.end_epoch(done, setup.encoder)
    return session.start


def knn_is_due(config: TrainConfig, plan: Plan, done: int) -> bool:
    """Whether a kNN check follows step number `done`."""
    every, (epochs, rest) = config.knn_every or 0, divmod(done, plan.steps_per_epoch)
    return every > 0 and rest == 0 and epochs % every == 0


def save_checkpoint(setup: Setup, session: Session, done: int) -> None:
    """Begin to write a checkpoint, on the main process alone: all have the same state.

    Raises CareHubError, on all, if training has diverged.
    """
    accelerator = setup.accelerator
    method = accelerator.unwrap_model(session.method)
    check_weights(method, session.optimizer, done, setup.config, session.largest)
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        extra = {"seconds": session.progress.seconds, "scaler": scaler} | run.conditions(accelerator)
        session.writer.save(done, method.state_dict(), session.optimizer.state_dict(), extra)


def finish(setup: Setup, session: Session, done: int, preemption: Preemption) -> dict[str, float]:
    """Save, evaluate (all processes), then export, say what was measured, and push (the main process).

    Raises Preempted, after saving, for a run that was asked to stop.
    """
    config, accelerator, folder = setup.config, setup.accelerator, session.folder
    progress = session.progress
    progress.close()
    save_checkpoint(setup, session, done)
    progress.end_epoch(done, setup.encoder)
    stopped = f"stopped at step {done} of {setup.plan.stop}"
    preempted = Preempted(f"{stopped}; resume it with {resume_options(folder)}.")
    if session.stopped:
        from_main(session.writer.wait)  # no process ends before: a launcher would end the others
        raise preempted
    preemption.raise_from_now_on(preempted)
    splits = (setup.train, setup.test)
    results, families = final_results(config, setup.encoder, *splits, setup.augmentation, accelerator)
    progress.add_knn(done, results.get("knn_top1"))
    session.writer.wait()
    seconds, images = progress.seconds, done * config.batch_size * config.gradient_accumulation
    results |= {"training_seconds": round(seconds, 1), "images_per_second": round(images / seconds, 1)}
    if accelerator.is_main_process:
        run.export_run(folder, config, setup.encoder, setup.test or setup.train, results, families)
        progress.add_results(done, results)
        setup.callbacks.end(results, folder)
        logger.info(summary.final_screen(config, folder, results, *splits))
        if config.push_to_hub:
            run.push_run(folder, config.push_to_hub)
    for tracker in accelerator.trackers:
        tracker.finish()
    return results


def make_method(config: TrainConfig, encoder: Encoder, images: int) -> SimCLR:
    """The module that turns views into losses, for so many training images."""
    stride = config.equivariance_stride if config.views == "shared" else 1
    common = (encoder, config.temperature, config.weight, config.equiv_splits, stride)
    spread = (config.steering_uniformity, config.steering_temperature)
    if config.steers_alone:
        return Steering(*common, spread=spread)
    if config.method == "simclr":
        return SimCLR(*common, config.loss_subtype, spread)
    queue = (config.queue_for(images), config.momentum_encoder, config.projection_dim)
    return MoCo(*common, *queue, spread)


def make_optimizer(config: TrainConfig, method: nn.Module) -> torch.optim.Optimizer:
    """adam, adamw, sgd (fused) or lars over the parameters that are trained."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": partial(torch.optim.Adam, fused=True),
        "adamw": partial(torch.optim.AdamW, fused=True),
        "sgd": partial(torch.optim.SGD, fused=True, momentum=config.momentum),
        "lars": partial(Lars, momentum=config.momentum),
    }
    return kinds[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay)


def step_memory(config: TrainConfig, encoder: Encoder, images: int, precision: str) -> float:
    """A guess of the bytes that a step on `images` images takes.

    Weights, gradients, optimizer, and what the layers save for the backward pass: the outputs of
    all layers, measured on one image.
    """
    outputs, size = 0, encoder.config.image_size
    learned = nn.ModuleList(m for m in encoder.children() if m is not encoder.backbone or not encoder.frozen)

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, torch.Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in learned.modules() if not list(m.children())]
    encoder.embed(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    separate = config.weight and config.views == "separate"
    views = images * (2 + (2 / config.equivariance_stride if separate else 0))  # alive at the backward pass
    every, trained = (sum(p.numel() for p in module.parameters()) for module in (encoder, learned))
    copies = 3 if config.optimizer in ("adam", "adamw") else 2  # gradients, and what the optimizer has
    weights = every * (1 + (config.method == "moco")) + trained * copies
    return weights * 4 + outputs * views * (4 if precision == "no" else 2)
