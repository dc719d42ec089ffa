"""A run's folder: made or found, saved to, resumed from, and what is left in it at the end."""

import errno
import fcntl
import itertools
import json
import logging
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import accelerate
import timm
import torch
from accelerate import Accelerator
from torch import nn

from ..config import LABEL_LENGTH, TrainConfig, plain_values, source_name, to_yaml
from ..data.images import Images
from ..distributed import from_main
from ..encoder import Encoder
from ..errors import CareHubError, printable
from ..factory import any_encoder
from ..files import file_errors, write_text
from ..hub.card import card_license, write_card
from ..hub.export import fill, folder_lock, read_config
from ..hub.push import push_folder
from ..hub.registry import locate
from ..report.figures import plot_geometry, plot_neighbors
from .checkpoint import (
    check_optimizer,
    complete_checkpoints,
    load_checkpoint,
    newest_sound,
    remove,
    resumable,
)

logger = logging.getLogger(__name__)
SHEET_IMAGES = 2000  # among which neighbors are looked for


def initial_encoder(config: TrainConfig) -> Encoder | None:
    """The encoder that `init` names, or the run's own copy of it if it is resumed; None without `init`.

    Raises CareHubError where it can't be loaded.
    """
    if not config.init:
        return None
    own = Path(config.save_root) / str(config.run_name) / "init"
    if config.resume and (own / "config.json").is_file():
        return Encoder.from_pretrained(own)
    encoder, license = any_encoder(config.init), _license(config.init)
    init = {"name": source_name(config.init)} | ({"license": license} if license else {})
    encoder.config = replace(encoder.config, init=init)
    return encoder


def _license(source: str) -> str:
    """The license of an encoder that has been loaded, as far as its card or its configuration names one."""
    try:
        folder = locate(source, local_files_only=True)
    except CareHubError:  # a name of timm's
        return getattr(timm.get_pretrained_cfg(source), "license", None) or ""
    license = card_license(folder)
    if license in ("", "other"):
        config, stored = read_config(folder, plain=True)
        license = config.init.get("license") or str(stored["pretrained_cfg"].get("license") or license)
    return printable(license)[:LABEL_LENGTH]


@contextmanager
def open_run(config: TrainConfig) -> Iterator[Path]:
    """For `with`: make the run folder and write config.yaml, or find the one to resume; it is then locked.

    All processes call it, and get the same. Raises CareHubError, on all of them, if the folder
    exists, can't be made or is in use.
    """
    with ExitStack() as stack:
        yield Path(config.save_root) / from_main(lambda: _open(config, stack))


def _open(config: TrainConfig, stack: ExitStack) -> str:
    name = config.run_name if config.resume is True and config.run_name else _make_folder(config)
    folder = Path(config.save_root) / name
    stack.enter_context(_lock(folder))
    export = folder / "export"  # into which others may be writing their evaluations
    with folder_lock(export) if export.is_dir() else nullcontext():
        for pattern in (".writing-*", "*/.writing-*"):
            for left in folder.glob(pattern):  # by a process that was killed
                remove(left)
    return name


def _lock(folder: Path) -> TextIO:
    """A file in `folder` which only one process has at a time. Raises CareHubError if another has it.

    The lock is the system's: it ends when the file is closed or the process ends, however it does.
    Unlike that of filelock, it isn't inherited by loader processes, which outlive a killed one by
    seconds.
    """
    with file_errors(folder):
        file = open(folder / ".lock", "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = (folder / ".lock").read_text() or "another process"
                advice = "wait for it or stop it"
                raise CareHubError(f"the run '{folder}' is in use by {holder}; {advice}.") from error
            logger.warning("'%s' can't be locked (%s); let nothing else train there.", folder, error.strerror)
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
        return file


def _make_folder(config: TrainConfig) -> str:
    root, stem = Path(config.save_root), f"{config.dataset_name.replace('/', '-')}-{config.method}"
    numbered = (f"{stem}-{k}" for k in itertools.count(1))
    for name in [config.run_name] if config.run_name else numbered:
        if config.resume == "auto" and (root / name / "config.yaml").is_file():
            return name
        try:
            (root / name).mkdir(parents=True, exist_ok=config.resume == "auto" and _is_bare(root / name))
            write_text(root / name / "config.yaml", to_yaml(config))
            return name
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise CareHubError(f"the run folder '{root / name}' can't be made ({reason}).") from error
    advice = "choose another `run_name`, or resume it with `resume=True`"
    raise CareHubError(f"the run folder '{root / name}' exists; {advice}.")


def _is_bare(folder: Path) -> bool:
    """Whether a run was killed here between its folder and its first file."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def has_checkpoint(config: TrainConfig, folder: Path) -> bool:
    """Whether to restore one, the same on all processes; without `resume='auto'` there has to be one."""
    return config.resume is True or from_main(lambda: bool(complete_checkpoints(folder / "checkpoints")))


def finished_results(config: TrainConfig) -> dict[str, float]:
    """The results of a run whose export, of these very options, is complete; none of any other."""
    folder = Path(config.save_root) / str(config.run_name)
    with suppress(CareHubError, OSError, ValueError):
        complete = (folder / "export" / "README.md").is_file()  # which is written last
        export = read_config(folder / "export")[0]
        config = config.start_from(export) if config.init else config
        # An option that is newer than the run has its default.
        options = TrainConfig().published() | export.training
        if complete and plain_values(options) == plain_values(config.published()):
            return json.loads((folder / "results.json").read_text())
    return {}


def restore(
    run: Path, method: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[int, float]:
    """Weights, optimizer and position of the newest sound checkpoint -> (step, seconds trained).

    All else follows from the seed. Logs the `conditions` that have changed. Raises CareHubError if
    all are damaged or another model's.
    """

    def load(path: Path) -> tuple[dict, dict]:
        module = accelerator.unwrap_model(method)
        model, state, extra = load_checkpoint(path, module.state_dict())
        fill(module, model, path)
        check_optimizer(optimizer, state, path)
        return state, extra

    state, extra = load(from_main(lambda: newest_sound(run / "checkpoints", load)))
    optimizer.load_state_dict(state)
    for parameter, saved in optimizer.state.items():
        # A fused optimizer pairs numbers by their place in memory: its state needs the layout of the weights.
        for name, value in saved.items():
            if getattr(value, "shape", None) == parameter.shape:
                saved[name] = torch.empty_like(parameter).copy_(value)
    if accelerator.scaler and extra["scaler"]:
        accelerator.scaler.load_state_dict(extra["scaler"])
    now = conditions(accelerator)
    changed = [name for name in now if extra.get(name, now[name]) != now[name]]  # version 0.1.0 wrote none
    if changed and accelerator.is_main_process:
        text = printable(", ".join(f"{name} {extra[name]} -> {now[name]}" for name in changed))
        logger.info("resumed with %s: the same run up to rounding, not to the bit", text)
    return extra["step"], extra["seconds"]


def conditions(accelerator: Accelerator) -> dict[str, int | str]:
    """What the rounding of a run depends on beside its options."""
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
    }


def rehearse(encoder: Encoder, images: int) -> None:
    """Save the untrained encoder, load it again, and take a gradient of the copy on `images` black images.

    So what would fail at the end of a run does so before its first step. Nothing is left behind,
    the global random state included. Raises CareHubError.
    """
    size, model = encoder.config.image_size, encoder.config.model
    with torch.random.fork_rng([]):
        with TemporaryDirectory() as folder:
            copy = Encoder.from_folder(encoder.save_pretrained(folder))
        if encoder.frozen:
            copy.freeze_backbone()
        x = torch.zeros(images, 3, size, size)
        if not torch.equal(copy.embed(x), encoder.embed(x)):
            raise CareHubError(f"model '{model}' gives other embeddings once it is saved and loaded.")
        try:
            copy.train()(x).sum().backward()
        except Exception as error:  # whatever a network raises
            few = f"{images} image{'s' * (images > 1)} of {size} pixels"
            raise CareHubError(f"model '{model}' can't be trained on {few} ({error}).") from error


def export_run(
    run: Path,
    config: TrainConfig,
    encoder: Encoder,
    images: Images,
    results: dict[str, float],
    families: dict[str, Any],
) -> None:
    """Write export/ with its card and a sheet of neighbors among `images`, results.json, and a figure
    of the `families` of augmentations that were measured, if there are any.
    """
    encoder.config = replace(
        encoder.config,
        method=config.method_name,
        weight=config.weight,
        groups=config.equiv_splits,
        dataset=config.data_label,
        seed=config.seed,
        training=plain_values(config.published()),
        results=results,
        versions={"python": platform.python_version()}
        | {package.__name__: package.__version__ for package in (torch, timm, accelerate)},
    )
    with resumable(run):
        encoder.save_pretrained(run / "export")
        write_text(run / "results.json", json.dumps(results, indent=2) + "\n")
        if families:
            plot_geometry({"": {"families": families}}, run / "equivariance.png")
        some = images.take(torch.arange(min(SHEET_IMAGES, len(images))))
        plot_neighbors({"": encoder}, some, run / "export" / "neighbors.png")
        write_card(run / "export")


def push_run(run: Path, repo_id: str) -> None:
    """Push the export, which stays whatever happens. Raises CareHubError that says how to push it later."""
    try:
        logger.info("\nPushed     %s", push_folder(run / "export", repo_id))
    except CareHubError as error:
        later = f"Push it later: care-hub push {shlex.quote(str(run))} {repo_id}"
        raise CareHubError(f"the run is saved, but it could not be pushed: {error} {later}") from error
