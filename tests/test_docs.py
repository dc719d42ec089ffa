"""README and docs: their code is run as a reader would type it, their links lead somewhere, README is short.

Every page is run in a folder of its own that has the repository's scripts, its bash and python blocks in
order. The rules below say what is not run as it stands: what trains for minutes is stopped after two steps,
what takes hours is planned with a small network (`--dry-run`) or has its options checked, rotations are those
of one family of augmentations, and the Hub is one on loopback. A block that imports a package which is no
requirement, and not at hand, is left out, and the page said to be skipped.
"""

import importlib.util
import re
import runpy
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT, command
from torch.distributed.run import get_args_parser as torchrun_parser

from care_hub import cli
from care_hub.config import DataConfig, recipes
from care_hub.data import shapes
from care_hub.data.images import InMemoryImages
from care_hub.data.sources import dataset_spec
from care_hub.evaluate import linear
from care_hub.factory import load_rotations
from care_hub.hub.linear_head import LinearHead, head_files
from care_hub.hub.registry import entries
from care_hub.training import trainer
from care_hub.transformations import TRANSFORMATIONS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")

# Set-up, this very test, a login for which the fixture `server` has a token, and what .ci/run does.
SKIPPED = {"pip", "pytest", "hf", "mkdocs", "lint-imports", "mypy"}
PROGRAMS = {
    "train.py": cli.train,
    "eval_linear.py": cli.eval_linear,
    "care_hub": cli.main,
    "care-hub": cli.main,
}
SCRIPTS = {"train": "train.py", "probe": "eval_linear.py"}  # commands that are scripts too
REPLACED = {  # in the text of every block
    "YOUR_NAME": "alice",  # the user of the loopback Hub
    "TrainConfig(": "TrainConfig(max_steps=2, projection_hidden=32, mixed_precision='no', ",
}
OTHERS = ("faiss", "lancedb", "onnxruntime", "sentence_transformers", "transformers", "usearch")
NEEDED = {"add_faiss_index": "faiss", "torch.onnx": "onnxscript"}  # by what does not name it
SHORT_RUN = ("--projection-hidden", "32", "--mixed-precision", "no", "--max-steps")
FEW_SHAPES = {"train": 500, "test": 200}


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, what stands behind it, code) of every fenced block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a bash block."""
    text = ""
    for line in block.replace("\\\n", " ").splitlines():
        text += line + "\n"
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        text = ""
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def absent(code: str) -> set[str]:
    """Packages that a block needs and that are not installed."""
    named = {name for name in OTHERS if re.search(rf"^(import|from) {name}\b", code, re.MULTILINE)}
    named |= {package for words, package in NEEDED.items() if words in code}
    return {name for name in named if not importlib.util.find_spec(name)}


def without_launcher(words: list[str]) -> list[str]:
    """The program and its options, once the launcher has accepted its own."""
    if words[:2] == ["accelerate", "launch"]:
        found = launch_command_parser().parse_args(words[2:])
    elif words[0] == "torchrun":
        found = torchrun_parser().parse_args(words[1:])
    else:
        return words[1:] if words[0] == "python" else words
    return [found.training_script, *found.training_script_args]


def run_words(words: list[str], namespace: dict) -> None:
    """One command of a bash block, in this process."""
    if words[0] in SKIPPED:
        return
    if words[0] == "mkdir":
        Path(words[-1]).mkdir(exist_ok=True)
        return
    program, *options = without_launcher(words)
    if program in ("care-hub", "care_hub") and options[0] in SCRIPTS:
        program, *options = SCRIPTS[options[0]], *options[1:]
    if program == "-c":
        exec(textwrap.dedent(options[0]), namespace)
    elif program == "train.py":
        command(cli.train, *options, *shortened(options))
    elif program == "eval_linear.py" and "cifar10" in options:  # of a run that takes hours
        cli.eval_linear.make_context(program, options)
    elif options[:1] == ["verify"]:  # here there are fewer images than those that its figures are of
        assert "test images, of which there are" in command(cli.main, *options, ok=False)
    elif program in PROGRAMS:
        command(PROGRAMS[program], *options, *fewer_images(options))
    else:
        run_script(program, options)


def fewer_images(options: list[str]) -> list[str]:
    """What is added to the options of `care-hub`."""
    if "equivariance" in options:
        return ["--images", "8", "--draws", "1"]
    if "search" in options:  # after a fit to few images
        return ["--force"]
    if "rotations" not in options:
        return []
    named = "--transform" in options or "--pairs" in options
    return ["--limit", "8", *([] if named else ["--transform", "brightness", "--transform", "contrast"])]


def shortened(options: list[str]) -> list[str]:
    """What is added to the options of train.py."""
    if "--config" in options and options[options.index("--config") + 1] in recipes():
        return ["--dry-run", *([] if "--init" in options else ["--model", "resnet10_w16_small"])]
    steps = 2
    if "--max-steps" in options:
        steps = int(options[options.index("--max-steps") + 1]) // 100
    return [*SHORT_RUN, str(steps)]


def run_script(path: str, options: list[str]) -> None:
    """A script of the repository; of those that take hours only the options are checked."""
    main: click.Command = runpy.run_path(path)["main"]
    if path.startswith("docs/"):
        command(main, *options)
    else:
        main.make_context(path, options)


def stand_ins(data: DataConfig, size: int | None = None, progress: bool = True, decode: bool = True):
    """512 black images in place of a data set that is elsewhere."""
    if data.dataset_name == "shapes" or Path(data.data_root or "absent").is_dir():
        return load_splits(data, size, progress, decode)
    size = size or dataset_spec(data.dataset_name).size
    pixels = torch.zeros(512, 3, size, size, dtype=torch.uint8)
    images = InMemoryImages(size, torch.zeros(512, dtype=torch.long), ["black"], pixels)
    return images, images


load_splits = trainer.load_splits


@pytest.fixture
def reader(tmp_path, monkeypatch, one_family):
    """The working directory of a reader: a copy of the repository, but for its size."""
    for name in ("train.py", "eval_linear.py", "benchmarks", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "draw_claim.py").symlink_to(ROOT / "docs" / "draw_claim.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(shapes, "SIZES", FEW_SHAPES)
    monkeypatch.setattr(linear, "PENALTIES", linear.PENALTIES[:1])
    monkeypatch.setattr(linear, "FEW", 0)  # one split is enough to choose it
    monkeypatch.setattr(trainer, "load_splits", stand_ins)
    return tmp_path


RUN = [page if page.stem != "works_with" else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]


@pytest.mark.launches
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_code_runs(page, reader, server):
    namespace: dict = {}
    missing: set[str] = set()
    for language, more, code in blocks(page):
        for before, after in REPLACED.items():
            code = code.replace(before, after)
        if language == "bash":
            for words in commands(code):
                run_words(words, namespace)
        elif language == "python" and (needed := absent(code)):
            missing |= needed
        elif language == "python":
            exec(compile(code, page.name, "exec"), namespace)
        elif title := re.search(r'title="(.+)"', more):  # a file that the reader saves
            (reader / title[1]).write_text(code)
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}; the rest has run")


@pytest.mark.parametrize("package", ["faiss", "usearch"])
def test_a_query_serves_the_index_of(package):
    pytest.importorskip(package)
    codes = [code for _, _, code in blocks(ROOT / "docs" / "rotations.md")]
    (code,) = [code for code in codes if code.startswith((f"import {package}", f"from {package}"))]
    z = torch.nn.functional.normalize(torch.randn(41, 128, generator=torch.Generator().manual_seed(0)))
    namespace = {"stored": z[1:].numpy(), "query": z[:1].numpy()}
    exec(code, namespace)
    assert namespace["nearest"].ravel().tolist() == (z[1:] @ z[0]).topk(10).indices.tolist()


def test_all_code_is_in_a_language_that_is_run():
    assert {language for page in PAGES for language, *_ in blocks(page)} <= {"bash", "python", "yaml"}


def test_readme_begins_with_the_two_commands():
    first, second = [code for language, _, code in blocks(README) if language == "bash"][:2]
    assert first == "pip install -e . && accelerate launch train.py\n"
    assert second == 'pip install -e ".[test]" && pytest\n'


def test_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 110 and not line.startswith("|")] == []


def anchors(page: Path) -> set[str]:
    """Of the headings of a page."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in (a or b for a, b in LINK.findall(text)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert {name for entry in nav for name in entry.values()} == {page.name for page in PAGES[1:]}


def test_every_transformation_is_described():
    text = (ROOT / "docs" / "rotations.md").read_text(encoding="utf-8")
    for name, row in TRANSFORMATIONS.items():
        assert f"| `{name}` | {'on or off' if row.scale == 'switch' else ''}" in text


def test_readme_lists_every_ready_encoder():
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for name, entry in entries().items():
        if entry.folder is None:  # registered by other tests
            continue
        (row,) = [row for row in rows if f"`{name}`" in row]
        (head,) = map(LinearHead.load, head_files(entry.folder))
        for figure in (entry.metrics["knn_top1"], head.metrics["top1"]):
            assert f"| {figure:.1f} % |" in row


def section(page: Path, heading: str) -> str:
    return page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_readme_quotes_the_results():
    text = section(README, "When to use CARE, and when not")
    measured = re.findall(r"\d+\.\d+", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    known = {*measured, *(f"{100 * float(ratio):.0f}" for ratio in measured if float(ratio) < 1)}
    quoted = re.findall(r"([\d.]+)\s%", text)
    assert quoted and set(quoted) <= known


def test_rotations_quote_the_results():
    text = section(ROOT / "docs" / "rotations.md", "In between, and one after the other")
    rows = re.findall(r"^\| .+\|$", text, flags=re.MULTILINE)
    measured = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 5 and set(rows) <= set(measured)


@pytest.mark.slow
def test_rotations_quote_their_first_command(tmp_path):
    page = ROOT / "docs" / "rotations.md"
    _, _, code = blocks(page)[0]
    (words,) = commands(code)
    command(cli.main, *words[1:-1], str(tmp_path / "steerable"))
    found = load_rotations(tmp_path / "steerable")
    names = ("motion", "same_image_hit_at_1", "same_image_hit_at_1_linear", "cosine", "cosine_unrotated")
    rows = set()
    for name, about in found.fitted.items():
        values = [f"{about.overall[key][0]:.3g}" for key in names]
        if about.candidates == 2:
            values[1] += " of 2 candidates"
        rows.add(f"| {' | '.join([name, *values, 'yes' if about.steerable else 'no'])} |")
    _, *quoted = re.findall(r"^\| .+\|$", section(page, "What is measured"), flags=re.MULTILINE)
    assert set(quoted) == rows


@pytest.mark.slow
def test_figures_of_the_images_are_those_of_the_encoder():
    script = runpy.run_path(str(ROOT / "docs" / "draw_claim.py"))
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    encoder = script["care_hub"].load_encoder(script["ENCODER"])
    for row, factors in (("brightness × 0.7 (the figure)", (0.7, 1, 1)), ("saturation × 0.4", (1, 1, 0.4))):
        images, _, *found = script["found_images"](encoder, factors)
        rates = [100 * (indices == torch.arange(len(images))).float().mean() for indices in found]
        assert f"| {row} | {rates[0]:.0f} % | {rates[1]:.0f} % |" in text
