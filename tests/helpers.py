"""What tests share: run a command as a user would, in a process of its own or in this one."""

import hashlib
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from loopback_hub import LoopbackHub
from PIL import Image
from processes import script, scripts, start, status
from safetensors.torch import load_file, save

from care_hub import cli
from care_hub.hub.export import module_files
from care_hub.hub.rotation_set import FittedTransformation
from care_hub.hub.sentence_transformer import NAMES
from care_hub.rotation import Rotation

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("CARE_HUB_TEST_DATA", ROOT.parent / "shared"))  # real data, where it is at hand
OLD = Path(__file__).parent / "old"  # an export and a run folder as version 0.1.0 wrote them
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
HEADLESS += ("--disable-sync", "--disable-background-networking", "--disable-component-update")
TORCHRUN = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PHOTO = Image.radial_gradient("L").convert("RGB")  # the one in a model card
IMAGES = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)
TINY = (
    *("--weight-start-epochs", "0"),  # so that a few steps see every loss
    *("--batch-size", "16", "--equiv-splits", "4", "--projection-hidden", "32", "--projection-dim", "16"),
    *("--knn-bank", "200", "--mixed-precision", "no"),
)


def run(*words, ok: bool = True, cwd=None, env=None, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a command as a user would; fails the test with its output if the exit status is not as expected."""
    words = [sys.executable if w == "python" else str(w) for w in words]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | (env or {})
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout)
    assert (done.returncode == 0) == ok, (
        f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def run_forked(*words, processes: int = 1, ok: bool = True) -> subprocess.CompletedProcess:
    """`run` of a script (or -m and a module), in one process or a group of two that start sooner."""
    words = [str(w) for w in words]
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder), {1: script, 2: scripts}[processes], *words)
        ended = status(process)
        said = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    assert ended is not None and (ended == 0) == ok, f"exit {ended}\n{said[0][-3000:]}\n{said[1][-3000:]}"
    return subprocess.CompletedProcess(words, ended, *said)


def train(root: Path, *flags, ok: bool = True, launcher=("python",), env=None) -> subprocess.CompletedProcess:
    """train.py with a tiny network and batch."""
    return run(*launcher, ROOT / "train.py", "--save-root", root, *TINY, *flags, ok=ok, env=env)


def train_here(root: Path, *flags) -> str:
    """`train` in this process, which spares the start of another; returns what it printed."""
    return command(cli.train, "--save-root", root, *TINY, *flags)


def command(function, *words, ok: bool = True) -> str:
    """A click command in this process: its output, on both streams."""
    done = CliRunner().invoke(function, [str(w) for w in words])
    assert (done.exit_code == 0) == ok and "Traceback" not in done.output, done.output
    return done.output


def refusal(*flags) -> str:
    """The one sentence with which train.py ends."""
    return command(cli.train, *flags, ok=False)


def care_hub_command(*words, ok: bool = True) -> str:
    """`care-hub ...` in this process."""
    return command(cli.main, *words, ok=ok)


def eval_linear(encoder, *flags, ok: bool = True) -> dict | str:
    """eval_linear.py in this process: its result, or the sentence with which it ends."""
    done = CliRunner().invoke(cli.eval_linear, [str(w) for w in ("--encoder", encoder, *flags)])
    assert (done.exit_code == 0) == ok and "Traceback" not in done.output, done.output
    return json.loads(done.stdout.splitlines()[-1]) if ok else done.output


def in_browser(page: Path, width: int, script: str) -> Any:
    """What the JavaScript `script` returns of `d`, the document of `page` in a frame of `width` pixels.

    Fails the test if anything is said on the console.
    """
    (page.parent / "frame.html").write_text(f"""<title></title>
        <iframe src="{page.name}" style="border:0;width:{width}px;height:900px"></iframe><script>
        document.querySelector("iframe").onload = event => {{
            const d = event.target.contentDocument;
            document.title = JSON.stringify((() => {{ {script} }})());
        }}</script>""")
    flags = [f"--user-data-dir={page.parent / 'profile'}", *HEADLESS, "--window-size=1400,1000"]
    flags += ["--virtual-time-budget=5000", "--allow-file-access-from-files", "--enable-logging=stderr"]
    words = [str(BROWSER), *flags, "--dump-dom", f"file://{page.parent}/frame.html"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert "CONSOLE" not in done.stderr, done.stderr[-3000:]
    return json.loads(html.unescape(re.search(r"<title>(.*)</title>", done.stdout).group(1)))


class Killed(BaseException):
    """What no code catches, as none catches SIGKILL."""


def killed_at_each_rename(write: Callable[[], object], monkeypatch) -> Iterator[int]:
    """Call `write` until it comes to its end: it is killed at its first rename, the next time at its second.

    Gives the number of renames that were done, after each call.
    """
    rename, killed = os.replace, True
    for allowed in itertools.count():
        left = iter(range(allowed))

        def counted(source, target, left=left):
            if next(left, None) is None:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            try:
                write()
                killed = False
            except Killed:
                pass
        yield allowed
        if not killed:
            return


def metrics(run_folder: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def randomized(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight and statistic a value of its own, so that nothing is equal by being zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point():
                t.copy_(
                    torch.rand(t.shape, generator=g) + 0.5
                    if "running_var" in name
                    else 0.1 * torch.randn(t.shape, generator=g)
                )
                if t.ndim == 1 and name.endswith("weight"):
                    t.add_(1)
    return module.eval()


def stored(server: LoopbackHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """The files of a repository."""
    return server.repositories[repo_id].files(revision)[1]


def snippets(card: str) -> list[str]:
    """The Python in a card."""
    return re.findall(r"```python\n(.*?)```", card, flags=re.S)


def visible(folder: Path) -> dict[str, bytes]:
    """Path -> content of the files of a folder, but for hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def own_modules(folder: Path) -> bool:
    """Whether what SentenceTransformer finds in `folder` is made of the encoder there, to the last byte."""
    files, expected = visible(folder), module_files(folder)
    return {name: files[name] for name in NAMES if name in files} == expected


def edited(export: Path, change: Callable[[dict], object]) -> dict[str, bytes]:
    """The export's files with config.json changed, its sums left alone."""
    content = visible(export)
    config = json.loads(content["config.json"])
    change(config)
    return content | {"config.json": json.dumps(config).encode()}


def with_weights(export: Path, name: str, change: Callable[[dict], dict]) -> dict[str, bytes]:
    """The export's files with one tensor file changed, its sum in config.json made to fit."""
    data = save(change(load_file(export / name)), metadata={"format": "pt"})
    checksum = hashlib.sha256(data).hexdigest()
    return edited(export, lambda config: config["care"]["sha256"].update({name: checksum})) | {name: data}


def measured(**attributes: float) -> dict:
    """Equivariance results, as `care-hub equivariance` records them."""
    crop = {
        "rotation_invariance_ratio": [0.5, 0.4, 0.6],
        "hit_at_1": [31.5, 20, 40],
        "variance": [0.9, 0.8, 1],
    }
    families = {"crop": crop, "grayscale": crop | {"rotation_invariance_ratio": [None, None, None]}}
    spaces = {"projection": attributes, "backbone": attributes}
    return {"images": 200, "draws": 2, "families": families, "attributes": spaces}


GOOD = {  # measures of a transformation by which an encoder can be steered
    "same_image_hit_at_1": (31.0, 25.0, 37.0),
    "same_image_hit_at_1_unrotated": (0.0, 0.0, 0.0),
    "cosine": (0.9, 0.8, 0.95),
    "cosine_unrotated": (0.6, 0.5, 0.7),
}

TURN = Rotation.random(16, 5).power(0.1)  # of brightness 2


def fitted(name, strengths, neutral=1.0, scale="log", overall=GOOD, candidates=50):
    measured = [overall for _ in strengths]
    return FittedTransformation(
        name, "a factor", scale, neutral, strengths, measured, overall, candidates, "shapes", 2000, "0.2.0"
    )
