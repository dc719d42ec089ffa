"""Writers of one folder, killed, at once, or out of room: `python tests/campaigns/writers.py [campaign ...]`.

Each attempt forks processes that write, kills them at a random moment or limits them, and looks at what they
leave: every export loads, no record is lost, every file of embeddings is the one of an undisturbed call.
"""

# ruff: noqa: E402, B023
# An import needs the lines before it; an attempt ends before the next begins, so that closures may name both.
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # else what is forked would wait for threads that it does not have
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np
import torch
from helpers import OLD, randomized
from PIL import Image

import care_hub
from care_hub import embed_folder
from care_hub.config import EvalConfig
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.commands import evaluate, record
from care_hub.hub.evaluation_record import read_record
from care_hub.hub.export import copy_export
from care_hub.hub.linear_head import LinearHead, read_heads

Attempts = Iterator[tuple[str, str]]  # what was tried, and what is wrong after it: nothing, if it survived
CHANCE = random.Random(0)
REFUSED, BROKEN = 1, 2  # exit statuses


def forked(work: Callable[[], object], log: Path | None = None, limit: int | None = None) -> int:
    """Do `work` in another process, whose files have at most `limit` bytes; returns its id."""
    if pid := os.fork():
        return pid
    status = BROKEN
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open(os.devnull, "w") as silence, redirect_stderr(silence):
            work()
        status = 0
    except CareHubError as error:
        status = REFUSED
        if log:
            log.write_text(str(error))
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Exit status of a process, negative for the signal that ended it, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(work: Callable[[], object], seconds: float) -> int:
    """Do `work` in another process, which gets SIGKILL after at most `seconds`; its exit status."""
    pid = forked(work)
    time.sleep(CHANCE.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


def forever(*works: Callable[[], object]) -> Callable[[], None]:
    """All of `works`, over and over."""

    def loop() -> None:
        while True:
            for work in works:
                work()

    return loop


def problem(check: Callable[[], object]) -> str:
    """The error of `check`, if there is one."""
    try:
        check()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def loads(folder: Path) -> None:
    """Encoder, heads and card."""
    care_hub.load_encoder(folder)
    care_hub.hub.card.card_text(folder)


def killed_heads(root: Path, photos: Path) -> Attempts:
    """An export of version 0.1, which had the sums of heads in config.json, gets its head anew, in a loop."""
    head = LinearHead.load(OLD / "export" / "linear_head.shapes.safetensors")
    for k in range(60):
        folder = shutil.copytree(OLD / "export", root / f"head{k}")
        numbers = itertools.count()
        killed(forever(lambda: replace(head, metrics={"top1": next(numbers)}).save(folder)), 0.05)
        yield "head saved in a loop, killed", problem(lambda: loads(folder))


def killed_exports(root: Path, photos: Path) -> Attempts:
    """One folder gets one encoder after the other, with a projection head and without."""
    first, second = (
        randomized(Encoder.new("resnet10_w16_small", size, hidden=32), size) for size in (32, 40)
    )
    second.config, second.projection = replace(second.config, projection=None), None
    folder, known = first.save_pretrained(root / "replaced"), {first.fingerprint, second.fingerprint}

    def check() -> None:
        assert care_hub.load_encoder(folder).fingerprint in known, "a mixture of encoders"

    for _ in range(60):
        killed(forever(lambda: second.save_pretrained(folder), lambda: first.save_pretrained(folder)), 0.1)
        yield "encoder saved in a loop, killed", problem(check)


def killed_records(root: Path, photos: Path) -> Attempts:
    """What was recorded before the kill stays, the card can be written."""
    folder = shutil.copytree(OLD / "export", root / "recorded")
    for k in range(60):
        record(folder, "accuracy", "shapes", {f"before {k}": {"top1": 1.0}})
        killed(forever(lambda: record(folder, "accuracy", "shapes", {"again": {"top1": 2.0}})), 0.1)

        def check() -> None:
            missing = {f"before {j}" for j in range(k + 1)} - read_record(folder)["accuracy"]["shapes"].keys()
            assert not missing, f"lost: {missing}"
            loads(folder)

        yield "record and card in a loop, killed", problem(check)


def killed_copies(root: Path, photos: Path) -> Attempts:
    """A copy that was interrupted is no export yet, or a whole one, and the same call finishes it."""
    for k in range(30):
        target = root / f"copy{k}"
        target.mkdir()
        killed(lambda: copy_export(OLD / "export", target), 0.02)

        def check() -> None:
            if (target / "config.json").exists():
                loads(target)
            copy_export(OLD / "export", target)
            loads(target)

        yield "export copied, killed", problem(check)


def killed_evaluations(root: Path, photos: Path) -> Attempts:
    """All of eval_linear.py, killed as it writes its results; a probe is finished by the same command."""
    for k in range(20):
        protocol, target = ("lbfgs", "finetune")[k % 2], root / f"evaluated{k}"
        config = EvalConfig(
            "imagefolder",
            data_root=str(photos),
            encoder=str(OLD / "export"),
            output_dir=str(target),
            protocol=protocol,
        )
        pid = forked(lambda: evaluate(config))
        while not (target.exists() and any(target.iterdir())):
            time.sleep(0.001)
        time.sleep(CHANCE.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        status = ended(pid)

        def check() -> None:
            if (target / "config.json").exists():
                loads(target)
            if protocol == "lbfgs":
                assert ended(forked(lambda: evaluate(config))) == 0
                loads(target)

        yield f"eval_linear, {protocol}, {'killed' if status < 0 else 'ended before'}", problem(check)


def two_writers(root: Path, photos: Path) -> Attempts:
    """250 records and 5 heads each, none of them lost."""
    for k in range(3):
        folder = shutil.copytree(OLD / "export", root / f"two{k}")
        width = LinearHead.load(folder / "linear_head.shapes.safetensors").weight.shape[1]

        def write(name: str) -> None:
            for j in range(250):
                record(folder, "accuracy", "shapes", {f"{name} {j}": {"top1": 1.0}})
                if j % 50 == 0:
                    LinearHead(f"{name}{j}", torch.ones(2, width), torch.ones(2), ["a", "b"], {}).save(folder)

        pids = [forked(lambda: write(name)) for name in ("one", "two")]
        statuses = [ended(pid) for pid in pids]

        def check() -> None:
            assert statuses == [0, 0], f"exit statuses {statuses}"
            found = read_record(folder)["accuracy"]["shapes"]
            assert {f"{name} {j}" for name in ("one", "two") for j in range(250)} <= found.keys()
            assert len(read_heads(folder)) == 11
            loads(folder)

        yield "two writers, 250 records each", problem(check)


def full_exports(root: Path, photos: Path) -> Attempts:
    """No room, from some size of a file on: a sentence, and the export that was there."""
    encoder = randomized(Encoder.new("resnet10_w16_small", hidden=32))
    for k in range(20):
        folder = shutil.copytree(OLD / "export", root / f"full{k}")
        limit, log = CHANCE.choice((0, 100, 1000, 5000, 100_000, 300_000)), root / "sentence"
        log.write_text("")

        def write() -> None:
            if k % 2:
                record(folder, "accuracy", "shapes", {"x" * 5000: {"top1": 1.0}})
            encoder.save_pretrained(folder)

        status = ended(forked(write, log, limit))

        def check() -> None:
            assert status in (0, REFUSED), f"exit status {status}"
            care_hub.load_encoder(folder)

        yield f"export, {limit:,} bytes a file: exit {status}", problem(check)


def embeddings_of(photos: Path, output: Path) -> Callable[[], str]:
    """A call of `care-hub embed`, in parts of 64 images."""
    embed_folder.PART = 64
    return lambda: embed_folder.embed_folder(
        str(photos), str(OLD / "export"), str(output), "backbone", 16, False
    )


def is_finished(output: Path, *expected: bytes) -> None:
    assert output.read_bytes() in expected, "other rows"
    assert not output.with_name(f"{output.name}.parts").exists(), "its parts are still there"


def undisturbed(photos: Path, output: Path) -> tuple[bytes, float]:
    """What a call alone writes, and the seconds that it takes."""
    began = time.perf_counter()
    assert ended(forked(embeddings_of(photos, output))) == 0
    return output.read_bytes(), time.perf_counter() - began


def killed_embeds(root: Path, photos: Path) -> Attempts:
    """Killed three times, then let through."""
    for suffix in ("parquet", "safetensors", "npy"):
        expected, seconds = undisturbed(photos, root / f"alone.{suffix}")
        for k in range(10):
            output = root / f"killed{k}.{suffix}"
            work = embeddings_of(photos, output)
            kills = sum(killed(work, seconds) < 0 for _ in range(3))
            status = ended(forked(work))

            def check() -> None:
                assert status == 0, f"exit status {status}"
                is_finished(output, expected)

            yield f"embed to {suffix}, killed {kills} times", problem(check)


def two_embeds(root: Path, photos: Path) -> Attempts:
    """The second is refused unless the first has ended."""
    expected, seconds = undisturbed(photos, root / "alone.npy")
    for k in range(10):
        output, log = root / f"both{k}.npy", root / "sentence"
        log.write_text("")
        first = forked(embeddings_of(photos, output), log)
        time.sleep(CHANCE.uniform(0, seconds * 1.1))
        second = forked(embeddings_of(photos, output), log)
        statuses = [ended(pid) for pid in (first, second)]

        def check() -> None:
            assert 0 in statuses and set(statuses) <= {0, REFUSED}, log.read_text()
            assert REFUSED not in statuses or "another process is writing" in log.read_text(), log.read_text()
            is_finished(output, expected)

        yield f"two embeds at once, exit {statuses}", problem(check)


def full_embeds(root: Path, photos: Path) -> Attempts:
    """No room, then room: a sentence, then the rows."""
    for suffix in ("parquet", "safetensors", "npy"):
        expected, _ = undisturbed(photos, root / f"alone.{suffix}")
        for k in range(6):
            output, log = root / f"full{k}.{suffix}", root / "sentence"
            log.write_text("")
            limit = CHANCE.choice((0, 100, len(expected) // 20, len(expected) // 2, len(expected) - 1))
            status = ended(forked(embeddings_of(photos, output), log, limit))

            def check() -> None:
                assert status == REFUSED and not output.exists(), f"exit status {status}"
                assert limit == 0 or "can't be written" in log.read_text(), log.read_text()
                assert ended(forked(embeddings_of(photos, output))) == 0
                is_finished(output, expected)

            yield f"embed to {suffix}, {limit:,} bytes a file", problem(check)


def changed_images(root: Path, photos: Path) -> Attempts:
    """An image changes during a call that is killed; the next one gives the rows of images as they are."""
    for k in range(10):
        folder, output, log = (
            shutil.copytree(photos, root / f"images{k}"),
            root / f"z{k}.npy",
            root / "sentence",
        )
        log.write_text("")
        before, seconds = undisturbed(folder, root / f"before{k}.npy")
        one = CHANCE.choice(sorted(folder.rglob("*.png")))
        pid = forked(embeddings_of(folder, output), log)
        time.sleep(CHANCE.uniform(0, seconds))
        if k % 3:
            image(CHANCE.randrange(1 << 30)).save(one)
        else:
            one.unlink()
        time.sleep(CHANCE.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        first = ended(pid)
        after, _ = undisturbed(folder, root / f"after{k}.npy")

        def check() -> None:
            assert first in (0, REFUSED, -signal.SIGKILL), f"exit status {first}"
            if first == 0:
                is_finished(output, before, after)
            assert ended(forked(embeddings_of(folder, output), log)) == 0, log.read_text()
            is_finished(output, after)

        yield f"an image changes, exit {first}", problem(check)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (40, 48, 3)).astype(np.uint8))


def main() -> int:
    """All attempts, a line each; 1 if any failed."""
    torch.set_num_threads(1)
    survived = tried = 0
    campaigns = (
        killed_heads,
        killed_exports,
        killed_records,
        killed_copies,
        killed_evaluations,
        two_writers,
        full_exports,
        killed_embeds,
        two_embeds,
        full_embeds,
        changed_images,
    )
    for campaign in campaigns:
        if sys.argv[1:] and campaign.__name__ not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder, "photos")
            for k in range(500):
                path = photos / ("train", "test")[k % 5 == 0] / ("a", "b")[k % 2] / f"{k:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image(k).save(path)
            root = Path(folder, "work")
            root.mkdir()
            for what, wrong in campaign(root, photos):
                tried, survived = tried + 1, survived + (not wrong)
                print(f"{tried:4}  {what:60}  {wrong or 'survived'}", flush=True)
    print(f"{survived} / {tried}")
    return int(survived < tried)


if __name__ == "__main__":
    sys.exit(main())
