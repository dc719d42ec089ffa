"""Checkpoints: safetensors and JSON, complete or absent, with their sums, written while training goes on."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict
from uuid import uuid4

import torch
from torch import Tensor

from ..errors import CareHubError
from ..files import file_errors, make_folder, read_tensors, write_tensors
from ..hub.export import READ_ERRORS, sha256
from ..schema import check_type

logger = logging.getLogger(__name__)
Tensors = dict[str, Tensor]
State = dict[str, Any]
RETAINED = 2
FILES = ("model.safetensors", "optimizer.safetensors")
STATE_BEFORE_SUMS = {"seconds", "scaler", "step", "optimizer"}  # what version 0.1.0 wrote into state.json
SETTINGS = ("momentum", "betas", "trust_coeff", "weight_decay")  # some of which each kind of optimizer has


class Layout(TypedDict):
    """What JSON holds of an optimizer; its tensors are in a file of their own."""

    param_groups: list[dict[str, Any]]
    plain: dict[str, Any]  # "<parameter>.<name>" -> value


class SavedState(TypedDict):
    """state.json, but for its sums; the conditions of the run are there too."""

    step: int
    seconds: float
    scaler: dict[str, float] | None
    optimizer: Layout


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """For `with`: what can't be written in the folder `run` becomes a CareHubError that says how to go on."""
    try:
        with file_errors(run):
            yield
    except CareHubError as error:
        raise CareHubError(f"{error} Once it can, resume the run with {resume_options(run)}.") from error


def resume_options(run: Path) -> str:
    """What to give to go on with the run in the folder `run`, for a sentence."""
    return f"`resume=True` `run_name='{run.name}'` `save_root='{run.parent}'`"


class CheckpointWriter:
    """Saves checkpoints in `folder`, that of a run, one at a time, in a thread.

    A training step waits for a copy of the tensors, not for the disk. `step`: of the checkpoint
    from which the run was resumed, which is not written again.
    """

    def __init__(self, folder: Path, step: int | None = None):
        self.folder, self.pool, self.step = folder, ThreadPoolExecutor(1), step
        self.running: Future[None] | None = None

    def save(self, step: int, model: Tensors, optimizer: State, extra: State) -> None:
        """Begin to write; first waits for the checkpoint before."""
        self.wait()
        if step == self.step:
            return
        tensors, layout = _flatten(optimizer)
        extra, self.step = extra | {"step": step, "optimizer": layout}, step
        self.running = self.pool.submit(_save, self.folder, _copies(model), _copies(tensors), extra)

    def wait(self) -> None:
        """Until all is on disk. Raises CareHubError if it could not be written."""
        running, self.running = self.running, None
        if running:
            with resumable(self.folder.parent):
                try:
                    running.result()
                except CareHubError as error:
                    raise CareHubError(
                        f"the checkpoint of step {self.step} can't be written: {error}"
                    ) from error

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was begun could not be written; waits for nothing."""
        return self.running is not None and self.running.done() and self.running.exception() is not None


def _copies(tensors: Tensors) -> Tensors:
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _save(folder: Path, model: Tensors, optimizer: Tensors, extra: State) -> None:
    """Write `folder`/step-XXXXXXXX and remove all but it and those before it that are retained.

    Files are written and synced under a temporary name in the same folder, then renamed: a crash
    leaves the old checkpoints and no half one. Tensors are contiguous and on the CPU; `extra` is
    JSON (step, seconds, ...). Raises CareHubError where something can't be written.
    """
    make_folder(folder)
    final, temporary = folder / f"step-{extra['step']:08d}", folder / f".writing-{uuid4().hex}"
    try:
        with file_errors(final):
            temporary.mkdir()
            for name, tensors in zip(FILES, (model, optimizer), strict=True):
                write_tensors(temporary / name, tensors)
            sums = {name: sha256(temporary / name) for name in FILES} | {"state.json": _sum(extra)}
            (temporary / "state.json").write_text(json.dumps(extra | {"sha256": sums}))
            for path in temporary.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            remove(final)
            temporary.rename(final)
    finally:
        remove(temporary)
    found = complete_checkpoints(folder)  # newer ones were damaged: the run was resumed from before them
    older = [path for path in found if path < final]
    for path in {*found} - {final, *older[-(RETAINED - 1) :]}:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sum(state: State) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first; files may be damaged, but none is half written."""
    return sorted(folder.glob("step-*"))


def newest_sound(folder: Path, load: Callable[[Path], object]) -> Path:
    """The newest checkpoint in `folder` that `load` takes; a warning names it and those passed over.

    Raises CareHubError if there is none.
    """
    problems: list[str] = []
    for path in reversed(complete_checkpoints(folder)):
        try:
            load(path)
        except CareHubError as error:
            problems.append(str(error).rstrip("."))
            continue
        if problems:
            logger.warning("%s; resuming from '%s' instead.", "; ".join(problems), path)
        return path
    none = f"there is no complete checkpoint in '{folder}' to resume from"
    raise CareHubError("; ".join(problems or [f"{none}; `resume='auto'` starts the run again"]) + ".")


def load_checkpoint(path: Path, own: Tensors | None = None) -> tuple[Tensors, State, State]:
    """(model state, optimizer state, extra) of the checkpoint `path`; all numbers are finite.

    Raises CareHubError if it is damaged, or not like `own`, the state of the model that it is for.
    """
    try:
        found = {name: sha256(path / name) for name in FILES}
        extra = json.loads((path / "state.json").read_text())
        if extra.keys() != STATE_BEFORE_SUMS:
            expected = extra.pop("sha256")
            check_type(expected, dict[str, str], "sha256")
            found["state.json"] = _sum(extra)
            if wrong := [name for name in found if found[name] != expected[name]]:
                raise CareHubError(f"the sha256 of {wrong[0]} is wrong")
        check_type(extra, SavedState, "state")
        model, tensors = read_tensors(path / FILES[0], own), read_tensors(path / FILES[1])
        state = _unflatten(tensors, extra.pop("optimizer"))
        if path.name != f"step-{extra['step']:08d}" or extra["seconds"] < 0:
            raise ValueError(f"step {extra['step']}, {extra['seconds']} seconds")
        return model, state, extra
    except CareHubError as error:
        raise CareHubError(f"the checkpoint '{path}' is damaged: {str(error).rstrip('.')}.") from error
    except READ_ERRORS as error:
        raise CareHubError(
            f"the checkpoint '{path}' is damaged: its state.json can't be used ({error!r:.200})."
        ) from error


def check_optimizer(optimizer: torch.optim.Optimizer, state: State, path: Path) -> None:
    """Raise CareHubError unless `state`, read from `path`, is of the same kind and shapes as `optimizer`."""
    try:
        (own,), (saved,) = optimizer.param_groups, state["param_groups"]
        shapes = {k: parameter.shape for k, parameter in enumerate(own["params"])}
        tensors = [(k, v) for k, of in state["state"].items() for v in of.values() if isinstance(v, Tensor)]
        decoupled = {"decoupled_weight_decay"} & own.keys() & saved.keys()  # torch 2.6 does not tell it
        fits = saved["params"] == list(shapes)
        fits &= all(json.dumps(own.get(k)) == json.dumps(saved.get(k)) for k in (*SETTINGS, *decoupled))
        fits &= all(v.shape in ((), shapes[k]) for k, v in tensors)
    except READ_ERRORS:
        fits = False
    if not fits:
        raise CareHubError(f"the optimizer in the checkpoint '{path}' is not the one of this run.")


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
