"""What a user sees before training and after it."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from ..config import TrainConfig
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
        own = config.accumulation_given
        source = "gradient_accumulation" if own else "Accelerate's gradient_accumulation_steps"
        batch += f", each the average of {config.gradient_accumulation} independent micro-batches"
        batch += f", by {source}"
    optimizer = config.optimizer if config.optimizer == "lars" else f"fused {config.optimizer}"
    if config.compile:
        optimizer += ", compiled"
    model = f"{config.model} ({millions:.1f} M parameters)"
    data = f"{config.dataset_name}, {len(train):,} images at {encoder.config.image_size} px"
    mixed = accelerator.mixed_precision
    precision = "float32" if mixed == "no" else mixed
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
    for key in [key for key in FINAL_METRICS if key in results]:
        metric, value = METRICS[key], results[key]
        shown = f"{value:6.1f} %" if metric.unit == "%" else f"{value:8.4f}"
        lines.append(f"  {metric.title:<22}{shown:<10} {metric.meaning}")
    if skipped := len(train.skipped) + (len(test.skipped) if test else 0):
        lines += ["", f"  {skipped} broken images were skipped."]
    lines += ["", f"Results    {run / 'results.json'}, {run / 'metrics.jsonl'}"]
    lines += [f"Encoder    {run / 'export'}   (neighbors.png there shows what it finds alike)"]
    return "\n".join([*lines, "", "Next", *next_commands(config, run, test)])


def next_commands(config: TrainConfig, run: Path, test: Images | None) -> list[str]:
    """Commands that use the encoder, and train and compare its baseline, as far as the data allows."""
    name = shlex.quote(str(run))
    data = f"--dataset-name {config.dataset_name}"
    if config.data_root:
        data += f" --data-root {shlex.quote(config.data_root)}"
    if config.dataset_label:
        data += f" --dataset-label {shlex.quote(config.dataset_label)}"
    commands = [
        f"  care-hub embed YOUR_IMAGES --encoder {name} -o embeddings.parquet",
        f"  python -c \"import care_hub; print(care_hub.load_encoder('{run}').encode('YOUR_IMAGES').shape)\"",
    ]
    if test and test.labels is not None:
        commands += [f"  python eval_linear.py --encoder {name} {data}   # a linear head"]
    if config.weight:
        plain = shlex.quote(f"{run.name}-plain")
        if config.push_to_hub:
            plain += " --push-to-hub ''"
        train = f"train.py --config {shlex.quote(str(run / 'config.yaml'))} --weight 0 --run-name {plain}"
        commands += [f"  accelerate launch {train}   # the baseline"]
        if test:
            twin = shlex.quote(f"{run}-plain")
            commands += [f"  care-hub equivariance {name} {twin} {data} -o compared"]
    return commands
