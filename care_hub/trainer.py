"""The training loop."""

import ctypes
import dataclasses
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from . import augment, checkpoint, report
from .config import TrainConfig, lr_at, write_yaml
from .data import sources
from .distributed import global_batch_norm
from .encoder import Encoder
from .errors import CareHubError
from .evaluate.equivariance import augmented, rotation_errors
from .evaluate.knn import knn_top1
from .methods import MoCo, SimCLR


@dataclass(frozen=True)
class Plan:
    """What follows from the options and the size of the data."""

    steps_per_epoch: int
    steps: int  # the whole schedule
    stop: int  # where this run ends
    warmup: int

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> "Plan":
        per_step = config.batch_size * config.gradient_accumulation
        if images < per_step:
            raise CareHubError(f"{images} training images are fewer than the {per_step} of one optimiser step; lower --batch-size.")
        per_epoch = images // per_step
        steps = config.epochs * per_epoch
        return cls(per_epoch, steps, min(steps, config.max_steps or steps), round(config.warmup_epochs * per_epoch))


def train(config: TrainConfig) -> dict:
    """Train, evaluate and export as `config` says; returns what is written to results.json.

    Raises CareHubError for whatever a person can put right; everything up to the last checkpoint is kept then.
    """
    accelerator = Accelerator(
        mixed_precision=precision(config.mixed_precision),
        log_with=None if config.log_with == "none" else config.log_with,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        project_dir=config.save_root,
    )
    processes, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    config.check_processes(processes)
    threads = use_all_cores(accelerator.device)

    with accelerator.local_main_process_first():  # one process fills the cache of `datasets`
        data = {s: load_split(config, s, main) for s in ("train", "test")}
    plan = Plan.of(config, len(data["train"]))
    recipe = recipe_of(config, data["train"])
    torch.manual_seed(config.seed)
    encoder = Encoder.new(
        config.model, recipe.size, recipe.mean, recipe.std, config.projection_hidden, config.projection_dim,
        config.projection_norm, crop_pct=recipe.size / data["train"].size,
    )  # fmt: skip
    if main:
        tell_plan(config, plan, encoder, data, accelerator, threads)
    if config.dry_run:
        return {}

    run = open_run(config, main)
    method = global_batch_norm(make_method(config, encoder, len(data["train"])), accelerator.device)
    if config.compile:
        encoder.backbone.compile()
    method, optimizer = accelerator.prepare(method, make_optimizer(config, method))
    start, seconds = 0, 0.0
    if config.resume:
        start, seconds = restore(run, method, optimizer, accelerator)
    data = {k: v and v.to(accelerator.device) for k, v in data.items()}
    if config.log_with != "none":
        accelerator.init_trackers("care_hub", config={k: str(v) for k, v in dataclasses.asdict(config).items()})

    log = Log(run, plan, start, config, accelerator)
    save = lambda step: save_checkpoint(run, step, log.seconds + seconds, method, optimizer, accelerator)  # noqa: E731
    batches = data["train"].batches(order(config, plan, len(data["train"]), start, rank, processes))
    method.train()
    with Interrupt(enabled=processes == 1) as interrupt:
        for step in range(start, plan.stop):
            began = time.perf_counter()
            lr = lr_at(step, plan.steps, plan.warmup, config.lr, config.lr_schedule_type)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for micro in range(config.gradient_accumulation):
                images = next(batches).to(accelerator.device, non_blocking=True)
                views = make_views(images, config, recipe, step * config.gradient_accumulation + micro, rank, processes)
                last = micro == config.gradient_accumulation - 1
                with nullcontext() if last else accelerator.no_sync(method):
                    losses = method(*views)
                    accelerator.backward(losses["loss"] / config.gradient_accumulation)
                log.losses(losses)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.unwrap_model(method).after_step()
            log.step(step, lr, time.perf_counter() - began)

            done, epoch_done = step + 1, (step + 1) % plan.steps_per_epoch == 0
            if interrupt.asked:
                break
            if done % (config.checkpoint_every or plan.steps_per_epoch) == 0 and done < plan.stop:
                log.flush()
                save(done)
            if config.knn_every and epoch_done and (done // plan.steps_per_epoch) % config.knn_every == 0 and done < plan.stop:
                log.knn(done, knn(config, encoder, data, accelerator))
    log.close()
    if interrupt.asked:
        save(done)
        raise CareHubError(f"stopped at step {done} of {plan.stop}; go on with --resume --run-name {run.name}.")

    save(plan.stop)
    results = closing(config, encoder, data, recipe, accelerator)
    seconds += log.seconds
    images = plan.stop * config.batch_size * config.gradient_accumulation
    results |= {"training_seconds": round(seconds, 1), "images_per_second": round(images / seconds, 1)}
    if main:
        export(run, config, encoder, data, results)
    accelerator.end_training()
    return results


def make_views(images: Tensor, config: TrainConfig, recipe: augment.Recipe, step: int, rank: int, processes: int) -> tuple:
    """The pair for InfoNCE (drawn per image) and, for CARE, the pair drawn per group. (One pair where they are shared.)"""
    arguments = (recipe, config.seed, step)
    groups = config.equiv_splits if config.augmentation_scope == "group" else 1
    if config.weight and config.views == "shared":
        return (augment.pair(images, *arguments, "shared", groups, rank, processes),)
    views = augment.pair(images, *arguments, "contrastive", len(images) * processes, rank, processes)
    if not config.weight:
        return (views,)
    part = images[:: config.batch_size // (config.equivariant_batch_size or config.batch_size)]
    return views, augment.pair(part, *arguments, "equivariance", groups, rank, processes)


def order(config: TrainConfig, plan: Plan, images: int, start: int, rank: int, processes: int) -> Iterator[Tensor]:
    """This process's indices of every micro-batch from step `start` on; epochs are shuffled by (seed, epoch)."""
    size, per_epoch = config.batch_size // processes, plan.steps_per_epoch * config.gradient_accumulation
    first, last = start * config.gradient_accumulation, plan.stop * config.gradient_accumulation
    for k in range(first, last):
        epoch, place = divmod(k, per_epoch)
        if place == 0 or k == first:
            shuffled = torch.randperm(images, generator=augment.generator(config.seed, "order", epoch))
        yield shuffled[place * config.batch_size + rank * size :][:size]


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


def use_all_cores(device: torch.device) -> int:
    """Share the cores among this machine's processes; `accelerate launch` and torchrun ask for one thread each."""
    if device.type == "cpu" and int(os.environ.get("OMP_NUM_THREADS", "1") or 1) <= 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: glibc would map and unmap every large tensor anew, page fault by page fault
    return torch.get_num_threads()


def load_split(config: TrainConfig, split: str, progress: bool) -> sources.Images | None:
    return sources.load(
        config.dataset_name, split, config.data_root, config.image_size, config.image_column, config.label_column,
        workers=config.num_workers, skip_broken=config.skip_broken_images, progress=progress,
    )  # fmt: skip


def recipe_of(config: TrainConfig, images: sources.Images) -> augment.Recipe:
    about = sources.spec(config.dataset_name)
    return augment.Recipe(
        size=config.image_size or about.size, scale=(config.crop_scale, 1.0), jitter=config.jitter, jitter_p=config.jitter_p,
        greyscale=config.greyscale, blur=config.blur, blur_taps=config.blur_taps, mean=about.statistics[0], std=about.statistics[1],
    )  # fmt: skip


def make_method(config: TrainConfig, encoder: Encoder, images: int) -> SimCLR:
    arguments = (encoder, config.temperature, config.weight, config.equiv_splits)
    if config.method == "moco":
        return MoCo(*arguments, config.queue_for(images), config.momentum_encoder)
    return SimCLR(*arguments, config.loss_subtype)


def make_optimizer(config: TrainConfig, method: torch.nn.Module) -> torch.optim.Optimizer:
    from timm.optim import Lars

    parameters = [p for p in method.parameters() if p.requires_grad]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer in ("sgd", "lars"):
        common["momentum"] = config.momentum
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "lars": Lars}
    return kinds[config.optimizer](parameters, **common)


def open_run(config: TrainConfig, main: bool) -> Path:
    """Make the run folder (one name for all processes) and write config.yaml, or find the one to resume."""
    root, name, problem = Path(config.save_root), config.run_name, None
    if main and not config.resume:
        number = 1
        while name is None or (config.run_name is None and (root / name).exists()):
            name, number = f"{config.dataset_name.replace('/', '-')}-{config.label.lower()}-{number}", number + 1
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


def save_checkpoint(run: Path, step: int, seconds: float, method, optimizer, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        extra = {"seconds": seconds, "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}
        checkpoint.save(run / "checkpoints", step, accelerator.unwrap_model(method).state_dict(), optimizer.state_dict(), extra)
    accelerator.wait_for_everyone()


def restore(run: Path, method, optimizer, accelerator: Accelerator) -> tuple[int, float]:
    """Weights, optimiser and position of the newest checkpoint -> (step, seconds trained). All else follows from the seed."""
    model, state, extra = checkpoint.load(run / "checkpoints")
    checkpoint.fill(accelerator.unwrap_model(method), model, run)
    optimizer.load_state_dict(state)
    if accelerator.scaler and extra["scaler"]:
        accelerator.scaler.load_state_dict(extra["scaler"])
    return extra["step"], extra["seconds"]


class Interrupt:
    """Ctrl-C or a termination signal ends the loop after the current step; a second one ends it at once."""

    def __init__(self, enabled: bool):
        self.asked, self.enabled = False, enabled

    def __enter__(self):
        if self.enabled:
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        if self.enabled:
            for number, handler in self.before.items():
                signal.signal(number, handler)


class Log:
    """Progress bar, metrics.jsonl and trackers. Losses stay on the device and are fetched in blocks."""

    def __init__(self, run: Path, plan: Plan, start: int, config: TrainConfig, accelerator: Accelerator):
        self.plan, self.config, self.accelerator, self.main = plan, config, accelerator, accelerator.is_main_process
        self.block = 1 if accelerator.device.type == "cpu" else 20
        self.seconds, self.steps, self.pending, self.micro = 0.0, 0, [], []
        if self.main:
            path = run / "metrics.jsonl"
            self._drop_after(path, start)
            self.file = open(path, "a", buffering=1)
        self.bar = tqdm(total=plan.stop, initial=start, unit="step", disable=not self.main, dynamic_ncols=True)

    @staticmethod
    def _drop_after(path: Path, start: int) -> None:
        """Forget lines beyond the checkpoint, and a line that a crash cut short."""
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))

    def losses(self, losses: dict[str, Tensor]) -> None:
        self.micro.append(torch.stack([losses[k].detach().float() for k in ("loss", "infonce", "equivariance")]))

    def step(self, step: int, lr: float, seconds: float) -> None:
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        self.pending.append((step, lr, seconds, torch.stack(self.micro).mean(dim=0)))
        self.micro = []
        if self.steps == 1:
            self.first = seconds  # slower than the rest
        if self.steps == 4 and self.main:
            left = (self.seconds - self.first) / 3 * (self.plan.stop - step - 1)
            self.bar.write(f"about {left / 60:.1f} minutes of training to go on this machine")
        if len(self.pending) >= self.block:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        values = torch.stack([p[3] for p in self.pending]).tolist()
        for (step, lr, seconds, _), (loss, infonce, equivariance) in zip(self.pending, values, strict=True):
            speed = self.config.batch_size * self.config.gradient_accumulation / seconds
            if loss != loss or abs(loss) == float("inf"):
                raise CareHubError(
                    f"the loss became {loss} at step {step + 1}; lower --lr or try --mixed-precision no "
                    "(earlier checkpoints are kept)."
                )
            row = {"step": step + 1, "epoch": step // self.plan.steps_per_epoch + 1, "loss": loss, "infonce": infonce}
            self.write(row | {"equivariance": equivariance, "lr": lr, "images_per_second": speed})
        self.bar.set_postfix_str(f"loss {loss:.3f} infonce {infonce:.3f} equi {equivariance:.3f} {speed:.0f} images/s", refresh=False)
        self.bar.update(len(self.pending))
        self.pending = []

    def knn(self, step: int, top1: float | None) -> None:
        if top1 is not None:
            self.flush()
            self.write({"step": step, "epoch": step // self.plan.steps_per_epoch, "knn_top1": top1})
            self.bar.write(f"epoch {step // self.plan.steps_per_epoch}: kNN top-1 {top1:.1f} %") if self.main else None

    def write(self, row: dict) -> None:
        if self.main:
            self.file.write(json.dumps(row) + "\n")
        if self.config.log_with != "none":
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self.flush()
        self.bar.close()
        if self.main:
            self.file.close()


def embed_all(encoder: Encoder, images: sources.Images, accelerator: Accelerator, space: str, batch: int = 500) -> Tensor:
    """(N, d) embeddings of all images, each process doing its share."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    share = -(-len(images) // processes)
    mine = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)
    parts = [encoder.embed(center(x, encoder.care["image_size"]), space) for x in images.batches(mine.split(batch))]
    return accelerator.gather(torch.cat(parts))[: len(images)]


def center(x: Tensor, size: int) -> Tensor:
    top = (x.shape[-1] - size) // 2
    return x[..., top : top + size, top : top + size]


def bank_of(config: TrainConfig, images: sources.Images) -> sources.Images:
    """`knn_bank` labelled pictures, fixed by the seed (the unlabeled ones of stl10 have no vote)."""
    labelled = (images.labels >= 0).nonzero().squeeze(1)
    if len(labelled) == len(images) <= config.knn_bank:
        return images
    return images.take(labelled[torch.randperm(len(labelled), generator=augment.generator(config.seed, "bank"))][: config.knn_bank])


def knn(config, encoder, data, accelerator, column: str | None = None) -> float | None:
    """kNN top-1 on backbone features, in per cent; None without labels or a test split."""
    if data["test"] is None or data["test"].labels is None or data["train"].labels is None:
        return None
    bank = bank_of(config, data["train"])
    labels, truth = ((i.columns[column] if column else i.labels).to(accelerator.device) for i in (bank, data["test"]))
    features, queries = (embed_all(encoder, images, accelerator, "backbone") for images in (bank, data["test"]))
    return knn_top1(features, labels, queries, truth) if len(labels) else None


def closing(config: TrainConfig, encoder: Encoder, data: dict, recipe: augment.Recipe, accelerator: Accelerator) -> dict:
    """The closing figures: kNN, and the rotation protocol on 2,000 held-out images (half fitted, half measured).

    A run cut short by --max-steps is measured only if --knn-every asks for it.
    """
    if config.max_steps and not config.knn_every:
        return {}
    results = {"knn_top1": knn(config, encoder, data, accelerator)}
    if config.dataset_name == "shapes":
        results["knn_color_top1"] = knn(config, encoder, data, accelerator, column="color")
    if accelerator.is_main_process:
        images = data["test"] or data["train"]
        some = images.take(torch.arange(min(2000, len(images))))
        pixels = some.held.to(accelerator.device)
        z = torch.cat([encoder.embed(center(b, recipe.size)) for b in pixels.split(500)])
        results |= rotation_errors(z, augmented(encoder.embed, pixels, recipe))
    accelerator.wait_for_everyone()
    return {k: round(v, 4) for k, v in results.items() if v is not None}


def export(run: Path, config: TrainConfig, encoder: Encoder, data: dict, results: dict) -> None:
    """export/, results.json and the closing screen."""
    import accelerate
    import timm

    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "accelerate": accelerate.__version__}
    training = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("data_root", "save_root", "run_name", "resume")}
    encoder.care |= {"method": config.label, "weight": config.weight, "groups": config.equiv_splits, "dataset": config.dataset_name}
    encoder.care |= {"seed": config.seed, "training": training, "results": results, "versions": versions}
    encoder.save_pretrained(run / "export")
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    images = data["test"] or data["train"]
    report.neighbours(encoder, images.take(torch.arange(min(2000, len(images)))), run / "export" / "neighbours.png")
    print(report.closing_screen(config, run, results, data["train"].skipped + (data["test"].skipped if data["test"] else [])))


def tell_plan(config: TrainConfig, plan: Plan, encoder: Encoder, data: dict, accelerator: Accelerator, threads: int) -> None:
    device = accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"
    million = sum(p.numel() for p in encoder.parameters()) / 1e6
    micro = f", each the average of {config.gradient_accumulation} independent micro-batches" if config.gradient_accumulation > 1 else ""
    groups = f", weight {config.weight:g}, {config.equiv_splits} groups" if config.weight else ""
    print(f"{config.label}{groups} · {config.model} ({million:.1f} M parameters) · {config.dataset_name}, "
          f"{len(data['train']):,} images at {encoder.care['image_size']} px")  # fmt: skip
    print(f"{plan.stop:,} steps of {config.batch_size} images{micro} ({plan.stop / plan.steps_per_epoch:.1f} epochs) on "
          f"{accelerator.num_processes} x {where}, precision {accelerator.mixed_precision}", flush=True)  # fmt: skip
    for split, images in data.items():
        if images is not None and images.skipped:
            print(f"skipped {len(images.skipped)} broken pictures in {split}: " + " ".join(images.skipped))
