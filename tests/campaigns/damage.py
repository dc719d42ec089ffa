"""Damaged checkpoints and metrics: a run resumes from an older one and ends with the same bits.

`python tests/campaigns/damage.py`: a run of six steps whose newest checkpoint (of step 4) or metrics are
damaged in one of many ways is resumed; a warning must name both checkpoints, and the encoder be that of a run
that never stopped.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from forked import METHODS, STEPS, Table, prepare, train_forked
from kills import content
from safetensors.torch import load_file

from care_hub.files import write_tensors
from care_hub.hub.export import sha256
from care_hub.training.checkpoint import FILES, _sum

MODEL, OPTIMIZER = FILES


def seal(path: Path, change: Callable[[dict], object] = lambda state: None) -> None:
    """Change state.json and make all sums fit, as someone would who means it."""
    state = json.loads((path / "state.json").read_text())
    state.pop("sha256", None)
    change(state)
    sums = {name: sha256(path / name) for name in FILES} | {"state.json": _sum(state)}
    (path / "state.json").write_text(json.dumps(state | {"sha256": sums}))


def tensors(name: str, change: Callable[[dict], object], sealed: bool = True) -> Callable[[Path], None]:
    """Changes tensors of a file of a checkpoint; `sealed`: and makes the sums fit."""

    def damage(path: Path) -> None:
        content = load_file(path / name)
        change(content)
        write_tensors(path / name, {k: v.contiguous() for k, v in content.items()})
        if sealed:
            seal(path)
        else:
            unsum(path)

    return damage


def unsum(path: Path) -> None:
    """As versions before the sums wrote it."""
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(
        json.dumps({k: state[k] for k in ("seconds", "scaler", "step", "optimizer")})
    )


def flip(name: str, place: float, bit: int = 1) -> Callable[[Path], None]:
    """Flips a bit."""

    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[int(place * len(data))] ^= bit
        (path / name).write_bytes(data)

    return damage


def overwrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes the bytes of a file."""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def fill(value: float) -> Callable[[dict], object]:
    """Sets a number of the first tensor of floats."""

    def change(content: dict) -> None:
        next(t for t in content.values() if t.is_floating_point()).view(-1)[:1].fill_(value)

    return change


def widen(content: dict) -> None:
    """As of a model with a wider projection."""
    for name, value in content.items():
        content[name] = torch.cat([value, value]) if value.ndim else value


def adam(content: dict) -> None:
    """As Adam's state."""
    for name in list(content):
        key = name.partition(".")[0]
        value = content.pop(name)
        content |= {
            f"{key}.exp_avg": value,
            f"{key}.exp_avg_sq": value.clone(),
            f"{key}.step": torch.ones(()),
        }


def as_adam(sealed: bool) -> Callable[[Path], None]:
    """Adam's checkpoint in place of SGD's."""

    def damage(path: Path) -> None:
        tensors(OPTIMIZER, adam)(path)
        group = {"betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False}

        def change(state: dict) -> None:
            (old,) = state["optimizer"]["param_groups"]
            kept = {k: v for k, v in old.items() if k not in ("momentum", "dampening", "nesterov")}
            state["optimizer"]["param_groups"] = [kept | group]

        seal(path, change)
        if not sealed:
            unsum(path)

    return damage


def state(**changes: object) -> Callable[[Path], None]:
    """Changes values of state.json, with the sums made to fit."""
    return lambda path: seal(path, lambda content: content.update(changes))


def from_older(name: str) -> Callable[[Path], None]:
    """A file of the checkpoint before."""
    return lambda path: shutil.copy(path.with_name("step-00000002") / name, path / name)


def group_of(**changes: object) -> Callable[[Path], None]:
    """Changes the optimizer's settings, with the sums made to fit."""
    return lambda path: seal(path, lambda content: content["optimizer"]["param_groups"][0].update(changes))


def remove_all(path: Path) -> None:
    """An empty folder is left."""
    for file in path.iterdir():
        file.unlink()


def as_file(path: Path) -> None:
    """A file is in the folder's place."""
    shutil.rmtree(path)
    path.write_text("")


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "one bit of a weight": flip(MODEL, 0.9),
    "one bit of a tensor's name": flip(MODEL, 0.001),
    "one bit of the optimizer": flip(OPTIMIZER, 0.9),
    "one bit of state.json": flip("state.json", 0.5),
    "the word sha256": overwrite("state.json", lambda data: data.replace(b'"sha256"', b'"sha257"')),
    "weights cut short": overwrite(MODEL, lambda data: data[: len(data) // 2]),
    "optimizer cut short": overwrite(OPTIMIZER, lambda data: data[:-1]),
    "state.json cut short": overwrite("state.json", lambda data: data[:-20]),
    "weights empty": overwrite(MODEL, lambda data: b""),
    "state.json empty": overwrite("state.json", lambda data: b""),
    "state.json of zeros": overwrite("state.json", lambda data: bytes(len(data))),
    "state.json a list": overwrite("state.json", lambda data: b"[1, 2]"),
    "state.json nested deeply": overwrite("state.json", lambda data: b"[" * 100_000),
    "state.json without optimizer": lambda path: seal(path, lambda content: content.pop("optimizer")),
    "state.json with groups of another type": state(optimizer={"param_groups": 3, "plain": {}}),
    "state.json of another step": state(step=6),
    "state.json of seconds in words": state(seconds="many"),
    "state.json of infinite seconds": state(seconds=float("inf")),
    "state.json with a scaler in words": state(scaler="large"),
    "state.json with sums of another type": overwrite(
        "state.json", lambda data: json.dumps(json.loads(data) | {"sha256": [1]}).encode()
    ),
    "weights missing": lambda path: (path / MODEL).unlink(),
    "optimizer missing": lambda path: (path / OPTIMIZER).unlink(),
    "state.json missing": lambda path: (path / "state.json").unlink(),
    "an empty folder": remove_all,
    "a file instead": as_file,
    "older weights": from_older(MODEL),
    "older optimizer": from_older(OPTIMIZER),
    "NaN weights": tensors(MODEL, fill(float("nan"))),
    "NaN weights, no sums": tensors(MODEL, fill(float("nan")), sealed=False),
    "infinite momentum": tensors(OPTIMIZER, fill(float("inf"))),
    "a weight missing": tensors(MODEL, lambda content: content.pop(next(iter(content)))),
    "weights of a wider model": tensors(MODEL, widen),
    "optimizer of a wider model": tensors(OPTIMIZER, widen),
    "optimizer of a wider model, no sums": tensors(OPTIMIZER, widen, sealed=False),
    "Adam's for SGD's": as_adam(sealed=True),
    "Adam's for SGD's, no sums": as_adam(sealed=False),
    "another momentum": group_of(momentum=0.5),
}
METRICS: dict[str, Callable[[bytes], bytes]] = {
    "a damaged line": lambda data: data.replace(b'"step": 2,', b'"step": 2', 1),
    "a line of zeros": lambda data: bytes(300) + data[data.index(b"\n") :],
    "a list": lambda data: b"[]\n" + data,
    "bytes that are no text": lambda data: b"\xff\xfe\n" + data,
    "a step in words": lambda data: b'{"step": "two"}\n' + data,
    "a last line cut short": lambda data: data[:-10],
    "empty": lambda data: b"",
}


def main() -> int:
    """The exit status."""
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data, flags = prepare(root), ("--save-root", root, "--run-name")
        words = (*data, *STEPS, *METHODS["SimCLR"], *flags)
        assert train_forked((*words, "whole")).status == 0
        assert train_forked((*words, "first", "--max-steps", "4")).status == 0
        expected = content(root / "whole")
        run, resume = root / "run", (*flags, "run", "--resume", "--max-steps", "6")
        for title, damage in CHECKPOINTS.items():
            shutil.copytree(root / "first", run)
            damage(run / "checkpoints" / "step-00000004")
            again = train_forked(resume)
            told = "step-00000004'" in again.output and "step-00000002' instead" in again.output
            survived = again.status == 0 and again.told and told and content(run) == expected
            said = [line for line in again.output.splitlines() if "step-00000004" in line]
            table.add(survived, title, *(said or [again.output[-300:]]))
            shutil.rmtree(run)
        for title, change in METRICS.items():
            shutil.copytree(root / "first", run)
            path = run / "metrics.jsonl"
            path.write_bytes(change(path.read_bytes()))
            again = train_forked(resume)
            survived = again.status == 0 and again.told and content(run)[:2] == expected[:2]
            said = [line for line in again.output.splitlines() if "metrics.jsonl'" in line]
            table.add(survived, f"metrics: {title}", *said)
            shutil.rmtree(run)
        shutil.copytree(root / "first", run)
        for path in run.glob("checkpoints/step-*"):
            flip(MODEL, 0.9)(path)
        again = train_forked(resume)
        table.add(again.status == 1 and again.told, "all checkpoints", again.output.splitlines()[-1])
    return table.end()


if __name__ == "__main__":
    sys.exit(main())
