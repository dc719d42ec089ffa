"""What a user sees before training and after it."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from ..config import ACCELERATE, TrainConfig, data_options
from ..data.images import Images
from ..encoder import Encoder
from ..metrics import FINAL_METRICS, METRICS
from ..schedule import Plan, lr_at


def plan_text(
    config: TrainConfig, plan: Plan, encoder: Encoder, train: Images, accelerator: Accelerator
) -> str:
    """The resolved plan in three lines, and one of what it begins with if that is `init`."""
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    device = f"CPU, {torch.get_num_threads()} threads"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    method = config.method_name
    if config.weight:
        method += f", weight {config.weight:g}"
        start, growth = config.weight_epochs
        if start:
            method += f" after {start:.3g} epochs"
        if growth and not config.steers_alone:
            method += f" growing over {growth:.3g} epochs"
        method += f", {config.equiv_splits} groups" + ", steering head" * config.steering_head
    if config.method == "moco":
        method += f", queue {config.queue_for(len(train)):,}"
    batch = f"{config.batch_size} images"
    if config.gradient_accumulation > 1:
        batch += f", each the average of {config.gradient_accumulation} independent micro-batches"
        batch += f", by {_source(config, 'gradient_accumulation')}"
    optimizer = config.optimizer if config.optimizer == "lars" else f"fused {config.optimizer}"
    if config.compile:
        optimizer += f", compiled by {_source(config, 'compile')}"
    model = f"{config.model} ({millions:.1f} M parameters)"
    data = f"{config.dataset_name}, {len(train):,} images at {encoder.config.image_size} px"
    mixed = accelerator.mixed_precision
    chosen = "auto" if config.mixed_precision == "auto" else f"by {_source(config, 'mixed_precision')}"
    precision = f"{'float32' if mixed == 'no' else mixed} ({chosen})"
    epochs = f"{plan.stop / plan.steps_per_epoch:.1f} epochs"
    if config.weight and not encoder.frozen:
        plain = {"simclr": "SimCLR", "moco": "MoCo"}[config.method]
        epochs += f"; price: {plan.price(config):,.0f} {plain} steps"
    began = ""
    if init := encoder.config.init:
        frozen = ", backbone frozen" * encoder.frozen + ", no contrastive views" * config.steers_alone
        license, head, sizes = init.get("license", "see there"), init["head"], encoder.config.projection
        if head == "new" and sizes:
            head += f", {sizes.inputs} -> {sizes.outputs}"
        began = f"initialized from {init['name']} (license: {license}), head {head}{frozen}\n"
    return (
        f"{method} · {model} · {data}\n{began}"
        f"{plan.stop:,} steps of {batch} ({epochs}) on {accelerator.num_processes} x {device}\n"
        f"precision {precision}, channels_last, {optimizer}, images {train.description}"
    )


def _source(config: TrainConfig, option: str) -> str:
    """Who has set an option: its own name, or Accelerate's."""
    return f"Accelerate's {ACCELERATE[option]}" if option in config.taken_over else option


def dry_run_text(config: TrainConfig, plan: Plan, processes: int, memory: float) -> str:
    """Learning rates along the schedule, and `memory`, bytes per process."""
    steps = {0, plan.warmup, plan.steps // 4, plan.steps // 2, 3 * plan.steps // 4, plan.steps - 1}
    rates = [
        f"{lr_at(k, plan.steps, plan.warmup, config.lr, config.lr_schedule_type):.3g} at step {k + 1:,}"
        for k in sorted(steps)
    ]
    share = f"{config.batch_size // processes} images per process"
    if config.weight:
        share += f", {config.equiv_splits // processes} groups"
    memory_text = f"about {memory / 2**30:.1f} GiB per process for the step (a guess)"
    return f"{share}\nlearning rate {', '.join(rates)}\n{memory_text}"


def final_screen(
    config: TrainConfig, run: Path, results: Mapping[str, float], train: Images, test: Images | None
) -> str:
    """What was measured, where it lies, and what to type next."""
    minutes, speed = results["training_seconds"] / 60, results["images_per_second"]
    trained = f"Trained {config.method_name} on {config.dataset_name}"
    lines = ["", f"{trained} in {minutes:.1f} minutes ({speed:.0f} images/s).", ""]
    measured = [key for key in FINAL_METRICS if key in results]
    if not measured:
        reason = "--max-steps ended the run, without --knn-every" if config.max_steps else "too few images"
        lines.append(f"  Nothing was measured: {reason}.")
    for key in measured:
        metric, value = METRICS[key], results[key]
        shown = f"{value:6.1f} %" if metric.unit == "%" else f"{value:8.4f}"
        lines.append(f"  {metric.title:<22}{shown:<10} {metric.meaning}")
    if skipped := len(train.skipped) + (len(test.skipped) if test else 0):
        lines += ["", f"  {skipped} broken images were skipped."]
    lines += ["", f"Results    {run / 'results.json'}, {run / 'metrics.jsonl'}"]
    lines += [f"Encoder    {run / 'export'}   (neighbors.png there shows what it finds alike)"]
    return "\n".join([*lines, "", "Next", *next_commands(config, run, train, test)])


def next_commands(config: TrainConfig, run: Path, train: Images, test: Images | None) -> list[str]:
    """Commands that use the encoder, and train and compare its baseline, as far as the data allows."""
    train_command, care_hub, probe = started_by(sys.argv[0], os.environ)
    name, data = shlex.quote(str(run)), data_options(config)
    encode = f'care_hub.load_encoder({json.dumps(str(run), ensure_ascii=False)}).encode("YOUR_IMAGES")'
    commands = [
        f"  {care_hub} embed YOUR_IMAGES --encoder {name} -o embeddings.parquet",
        f"  python -c {shlex.quote(f'import care_hub; print({encode}.shape)')}",
    ]
    if test and test.labels is not None and train.labels is not None:
        commands += [f"  {probe} --encoder {name} {data}   # a linear head"]
    if config.weight and config.loss_subtype != "none":  # which without lambda leaves no loss
        plain = f"{os.path.relpath(run, config.save_root)}-plain"
        words = ["--config", str(run / "config.yaml"), "--weight", "0", "--run-name", plain]
        words += ["--push-to-hub", ""] * bool(config.push_to_hub)
        commands += [f"  {train_command} {shlex.join(words)}   # the baseline"]
        if test and len(test) >= 4:
            twin = shlex.quote(f"{run}-plain")
            commands += [f"  {care_hub} equivariance {name} {twin} {data} -o compared"]
    return commands


def started_by(script: str, environment: Mapping[str, str]) -> tuple[str, str, str]:
    """How train.py, `care-hub` and eval_linear.py are called by whoever started this program.

    `script` is its sys.argv[0]: train.py of a checkout, or `care-hub`, or what calls `care_hub.train`.

    >>> started_by("__main__.py", {"ACCELERATE_MIXED_PRECISION": "no"})[0]
    'accelerate launch -m care_hub train'
    """
    launcher = ""
    if "ACCELERATE_MIXED_PRECISION" in environment:
        launcher = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in environment:
        launcher = f"torchrun --nproc_per_node {environment['LOCAL_WORLD_SIZE']}"
    care_hub = "care-hub" if shutil.which("care-hub") else "python -m care_hub"
    probe = Path(script).with_name("eval_linear.py")
    if Path(script).name == "train.py" and probe.is_file():
        return f"{launcher or 'python'} {shlex.quote(script)}", care_hub, f"python {shlex.quote(str(probe))}"
    return f"{launcher} -m care_hub train" if launcher else f"{care_hub} train", care_hub, f"{care_hub} probe"
