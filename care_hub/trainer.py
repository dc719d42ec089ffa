"""The training loop."""

import dataclasses
import json
import platform
import shlex
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, send_to_device

from . import card, checkpoint, figures, hub, report
from .config import Plan, TrainConfig, lr_at, weight_at, write_yaml
from .data import sources
from .distributed import global_batch_norm, use_all_cores
from .encoder import Encoder
from .errors import CareHubError
from .evaluate.monitor import closing, knn
from .export import fill
from .log import Interrupt, Log
from .methods import MoCo, SimCLR
from .views import make_views, recipe_of, training_batches

# Of no meaning elsewhere; not part of a published record.
PRIVATE = {
    "data_root",
    "save_root",
    "run_name",
    "resume",
    "push_to_hub",
    "dry_run",
    "log_with",
    "num_workers",
}


def train(config: TrainConfig) -> dict:
    """Train, evaluate and export as `config` says; returns what is written to results.json.

    Raises CareHubError for whatever a person can put right; everything up to the last checkpoint is kept then.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else Accelerate does not see the processes of torchrun
        mixed_precision=precision(config.mixed_precision),
        log_with=None if config.log_with == "none" else config.log_with,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        project_dir=config.save_root,
    )
    processes, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    config.check_processes(processes)
    if config.push_to_hub and main and not config.dry_run:
        hub.check_push(config.push_to_hub)
    threads = use_all_cores(accelerator.device)

    with accelerator.local_main_process_first():  # one process fills the cache of `datasets`
        data = load_data(config, main)
    plan = Plan.of(config, len(data["train"]))
    recipe = recipe_of(config, data["train"])
    torch.manual_seed(config.seed)
    encoder = Encoder.new(
        config.model, recipe.size, recipe.mean, recipe.std, config.projection_hidden, config.projection_dim,
        config.projection_norm, crop_pct=recipe.size / data["train"].size,
    )  # fmt: skip
    if main:
        where = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else f"CPU, {threads} threads"
        print(report.plan(config, plan, encoder, data, processes, where, accelerator.mixed_precision), flush=True)
    if config.dry_run:
        return {}

    run = open_run(config, main)
    method = global_batch_norm(make_method(config, encoder, len(data["train"])), accelerator.device)
    if config.compile:
        encoder.backbone.compile()
    # Renamed in newer torch; the old name is the one that torch 2.6 knows.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    method, optimizer = accelerator.prepare(method, make_optimizer(config, method))
    care = accelerator.unwrap_model(method)
    start, seconds = 0, 0.0
    if config.resume:
        start, seconds = restore(run, method, optimizer, accelerator)
    data = {k: v.to(accelerator.device) if v else None for k, v in data.items()}
    if config.log_with != "none":
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.init_trackers("care_hub", config={k: str(v) for k, v in dataclasses.asdict(config).items()})

    log = Log(run, plan, start, config, accelerator)
    writer = checkpoint.Writer(run / "checkpoints")
    save = lambda step: save_checkpoint(writer, step, log.seconds + seconds, method, optimizer, accelerator)  # noqa: E731
    batches = training_batches(config, plan, data["train"], recipe, start, rank, processes)
    method.train()
    with Interrupt(enabled=processes == 1) as interrupt:
        for step in range(start, plan.stop):
            began = time.perf_counter()
            lr = lr_at(step, plan.steps, plan.warmup, config.lr, config.lr_schedule_type)
            for group in optimizer.param_groups:
                group["lr"] = lr
            care.weight = weight_at(step, plan.weight_warmup, config.weight)
            for micro in range(config.gradient_accumulation):
                images = send_to_device(next(batches), accelerator.device, non_blocking=True)
                views = make_views(images, config, recipe, step * config.gradient_accumulation + micro, rank, processes)
                last = micro == config.gradient_accumulation - 1
                with nullcontext() if last else accelerator.no_sync(method):
                    losses = method(*views)
                    accelerator.backward(losses["loss"] / config.gradient_accumulation)
                log.losses(losses)
            optimizer.step()
            optimizer.zero_grad()
            care.after_step()
            log.step(step, lr, care.weight, time.perf_counter() - began)

            done, epoch_done = step + 1, (step + 1) % plan.steps_per_epoch == 0
            if interrupt.asked:
                break
            if done % (config.checkpoint_every or plan.steps_per_epoch) == 0 and done < plan.stop:
                log.flush()
                save(done)
            if config.knn_every and epoch_done and (done // plan.steps_per_epoch) % config.knn_every == 0 and done < plan.stop:
                log.knn(done, *knn(config, encoder, data, accelerator))
    log.close()
    if interrupt.asked:
        save(done)
        writer.wait()
        raise CareHubError(f"stopped at step {done} of {plan.stop}; go on with --resume --run-name {run.name}.")

    save(plan.stop)
    results = closing(config, encoder, data, recipe, accelerator)
    seconds += log.seconds
    writer.wait()
    images = plan.stop * config.batch_size * config.gradient_accumulation
    results |= {"training_seconds": round(seconds, 1), "images_per_second": round(images / seconds, 1)}
    if main:
        export(run, config, encoder, data, results)
    for tracker in accelerator.trackers:
        tracker.finish()
    return results


def precision(wanted: str) -> str:
    """`auto` -> bf16 where the matrix units have it: GPUs from Ampere on, CPUs with avx512_bf16 or AMX."""
    if wanted != "auto":
        if wanted == "fp16" and not torch.cuda.is_available():
            raise CareHubError("--mixed-precision fp16 needs a GPU; use bf16 or no on a CPU.")
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "no"
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if any(probe() for probe in probes if probe) else "no"


def load_data(config: TrainConfig, progress: bool) -> dict[str, sources.Images | None]:
    train, test = sources.load_both(
        config.dataset_name, config.data_root, size=config.image_size, image_column=config.image_column,
        label_column=config.label_column, workers=config.num_workers, skip_broken=config.skip_broken_images, progress=progress,
    )  # fmt: skip
    return {"train": train, "test": test}


def make_method(config: TrainConfig, encoder: Encoder, images: int) -> SimCLR:
    stride = config.equivariance_stride if config.views == "shared" else 1
    arguments = (encoder, config.temperature, config.weight, config.equiv_splits, stride)
    if config.method == "moco":
        return MoCo(*arguments, config.queue_for(images), config.momentum_encoder)
    return SimCLR(*arguments, config.loss_subtype)


def make_optimizer(config: TrainConfig, method: torch.nn.Module) -> torch.optim.Optimizer:
    from timm.optim import Lars

    parameters = [p for p in method.parameters() if p.requires_grad]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer in ("sgd", "lars"):
        common["momentum"] = config.momentum
    if config.optimizer == "lars":
        return Lars(parameters, **common)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    return kinds[config.optimizer](parameters, fused=True, **common)


def open_run(config: TrainConfig, main: bool) -> Path:
    """Make the run folder (one name for all processes) and write config.yaml, or find the one to resume."""
    root, name, problem = Path(config.save_root), config.run_name, None
    if main and not config.resume:
        number = 1
        while name is None or (config.run_name is None and (root / name).exists()):
            name, number = f"{config.dataset_name.replace('/', '-')}-{config.method}-{number}", number + 1
        try:
            (root / name).mkdir(parents=True)
            write_yaml(root / name / "config.yaml", config)
        except FileExistsError:
            problem = f"the run folder '{root / name}' exists; choose another --run-name, or go on with it by --resume."
        except OSError as error:
            problem = f"the run folder '{root / name}' can't be made ({error.strerror})."
    name, problem = broadcast_object_list([name, problem])
    if problem:
        raise CareHubError(problem)
    return root / name


def save_checkpoint(writer: checkpoint.Writer, step: int, seconds: float, method, optimizer, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        extra = {"seconds": seconds, "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}
        writer.save(step, accelerator.unwrap_model(method).state_dict(), optimizer.state_dict(), extra)


def restore(run: Path, method, optimizer, accelerator: Accelerator) -> tuple[int, float]:
    """Weights, optimiser and position of the newest checkpoint -> (step, seconds trained). All else follows from the seed."""
    model, state, extra = checkpoint.load(run / "checkpoints")
    fill(accelerator.unwrap_model(method), model, checkpoint.complete(run / "checkpoints")[-1])
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():  # a fused optimiser pairs numbers by their place in memory: channels_last, too
        kept |= {k: torch.empty_like(parameter).copy_(v) for k, v in kept.items() if getattr(v, "shape", None) == parameter.shape}
    if accelerator.scaler and extra["scaler"]:
        accelerator.scaler.load_state_dict(extra["scaler"])
    return extra["step"], extra["seconds"]


def export(run: Path, config: TrainConfig, encoder: Encoder, data: dict, results: dict) -> None:
    """export/ with its card, results.json, the closing screen, and the push if one was asked for."""
    import accelerate
    import timm

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }
    training = {k: v for k, v in dataclasses.asdict(config).items() if k not in PRIVATE}
    encoder.care |= {"method": config.label, "weight": config.weight, "groups": config.equiv_splits, "dataset": config.dataset_name}
    encoder.care |= {"seed": config.seed, "training": training, "results": results, "versions": versions}
    encoder.save_pretrained(run / "export")
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    images = data["test"] or data["train"]
    figures.neighbours({"": encoder}, images.take(torch.arange(min(2000, len(images)))), run / "export" / "neighbours.png")
    card.write(run / "export")
    print(report.closing_screen(config, run, results, data["train"].skipped + (data["test"].skipped if data["test"] else [])))
    if config.push_to_hub:
        try:
            print(f"\nPushed     {hub.push(run / 'export', config.push_to_hub)}")
        except CareHubError as error:
            later = f"care-hub push {shlex.quote(str(run))} {config.push_to_hub}"
            raise CareHubError(f"the run is complete and kept, but it could not be pushed: {error} Push it later: {later}") from error
