"""Checkpoints: safetensors and JSON, complete or absent, written while training goes on."""

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CareHubError
from ..files import file_errors, make_folder, write_tensors

Tensors = dict[str, Tensor]
State = dict[str, Any]
RETAINED = 2


class CheckpointWriter:
    """Saves checkpoints in `folder`, one at a time, in a thread.

    A training step waits for a copy of the tensors, not for the disk.
    """

    def __init__(self, folder: Path):
        self.folder, self.pool, self.step = folder, ThreadPoolExecutor(1), 0
        self.running: Future[None] | None = None

    def save(self, step: int, model: Tensors, optimizer: State, extra: State) -> None:
        """Begin to write; first waits for the checkpoint before."""
        self.wait()
        tensors, layout = _flatten(optimizer)
        extra, self.step = extra | {"step": step, "optimizer": layout}, step
        self.running = self.pool.submit(_save, self.folder, _copies(model), _copies(tensors), extra)

    def wait(self) -> None:
        """Until all is on disk. Raises CareHubError if it could not be written."""
        running, self.running = self.running, None
        try:
            if running:
                running.result()
        except CareHubError as error:
            raise CareHubError(f"the checkpoint of step {self.step} can't be written: {error}") from error


def _copies(tensors: Tensors) -> Tensors:
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _save(folder: Path, model: Tensors, optimizer: Tensors, extra: State) -> None:
    """Write `folder`/step-XXXXXXXX and remove all but the newest checkpoints.

    Files are written and synced under a temporary name in the same folder, then renamed: a crash
    leaves the old checkpoints and no half one. Tensors are contiguous and on the CPU; `extra` is
    JSON (step, seconds, ...). Raises CareHubError where something can't be written.
    """
    make_folder(folder)
    final, temporary = folder / f"step-{extra['step']:08d}", folder / f".writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    with file_errors(final):
        temporary.mkdir()
        write_tensors(temporary / "model.safetensors", model)
        write_tensors(temporary / "optimizer.safetensors", optimizer)
        (temporary / "state.json").write_text(json.dumps(extra))
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    for old in complete_checkpoints(folder)[:-RETAINED]:
        shutil.rmtree(old, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def load_checkpoint(folder: Path) -> tuple[Tensors, State, State]:
    """(model state, optimizer state, extra) of the newest checkpoint in `folder`.

    Raises CareHubError if there is none, or if it is damaged.
    """
    found = complete_checkpoints(folder)
    if not found:
        raise CareHubError(f"there is no complete checkpoint in '{folder}' to resume from.")
    path = found[-1]
    try:
        for file in path.iterdir():
            file.open("rb").close()  # safetensors calls missing what it may not read
        extra = json.loads((path / "state.json").read_text())
        model, tensors = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
        return model, _unflatten(tensors, extra.pop("optimizer")), extra
    except PermissionError as error:
        raise CareHubError(f"the checkpoint '{path}' can't be read ({error.strerror}).") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        advice = "remove it to resume from an older one"
        raise CareHubError(f"the checkpoint '{path}' is damaged ({error}); {advice}.") from error


def _flatten(optimizer: State) -> tuple[Tensors, State]:
    """An optimizer's state_dict as flat tensors and what JSON can hold."""
    flat = {f"{index}.{name}": v for index, of in optimizer["state"].items() for name, v in of.items()}
    tensors = {k: v for k, v in flat.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in flat.items() if k not in tensors}
    return tensors, {"param_groups": optimizer["param_groups"], "plain": plain}


def _unflatten(tensors: Tensors, layout: State) -> State:
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | layout["plain"]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": layout["param_groups"]}
