"""Hostile values and folders: each ends in a sentence, or changes nothing; none is executed or published.

`python tests/campaigns/hostile.py` tries values, each in a place of an export or a rotation where a value of
another kind belongs, words, each in all places where an export has words, which are then shown, and folders,
each of which is loaded, described, classified with and pushed.
"""

import ast
import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # a small Hub speaks plain LFS
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml
from click.testing import CliRunner
from loopback_hub import WRITER, LoopbackHub
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import care_hub
from care_hub import cli
from care_hub.errors import UNPRINTABLE, CareHubError
from care_hub.factory import push_export
from care_hub.files import write_tensors
from care_hub.hub import registry
from care_hub.hub.card import BEGIN, END, card_text, write_card
from care_hub.hub.evaluation_record import add_result, read_record
from care_hub.hub.export import sha256
from care_hub.hub.linear_head import LinearHead
from care_hub.hub.rotation_set import FittedTransformation, RotationSet
from care_hub.report.page import write_page
from care_hub.rotation import Rotation

SECONDS, MEGABYTES = 20, 500  # an attempt takes less
SECRET = "the user's secret"
MODEL, PROJECTION, HEAD = "model.safetensors", "projection.safetensors", "linear_head.shapes.safetensors"
CONTRASTIVE = "contrastive_head.safetensors"
RECORD, ROTATION = "evaluation.json", "rotation.safetensors"
INF, NAN, HUGE, DEEP = float("inf"), float("nan"), 10**400, "<deep>"  # DEEP: 100,000 lists in each other
WRONG = {
    int: ["7", 1.5, True, [1], {"a": 1}, HUGE, NAN, DEEP],
    float: ["0.5", True, [0.5], {"a": 1}, HUGE, NAN, INF, DEEP],
    str: [7, 1.5, True, ["a"], {"a": "b"}, DEEP],
    dict: [7, 1.5, True, "a", [1], DEEP],
    list: [7, 1.5, True, "abc", {"a": 1}, DEEP],
}
CARE = {
    "model": [*WRONG[str], None, "hf-hub:evil/x", "local-dir:/etc", "../x", "a\0b", "a" * 10**5, "resnet50"],
    "image_size": [*WRONG[int], None, 0, -1, 2**31],
    "crop_pct": [*WRONG[float], None, 0, 1e-300, 2],
    "mean": [*WRONG[list], None, [0, 0], [0] * 4, *([x, 0, 0] for x in WRONG[float])],
    "std": [*WRONG[list], None, [0, 1, 1], [-1, 1, 1], *([x, 1, 1] for x in WRONG[float])],
    "projection": [*WRONG[dict], {}, {"inputs": 128, "hidden": 32, "outputs": 16, "norm": True, "more": 1}],
    "projection.inputs": [*WRONG[int], None, 0, -1, 2**62],
    "projection.hidden": [*WRONG[int], None, 0, -1, 2**62],
    "projection.outputs": [*WRONG[int], None, 0, -1, 2**62],
    "projection.norm": [1, 1.5, "true", None, [True], {}],
    "contrastive_head": [*WRONG[dict], {}],
    "contrastive_head.inputs": [*WRONG[int], None, 0, -1, 2**62],
    "method": WRONG[str],
    "weight": WRONG[float],
    "groups": WRONG[int],
    "dataset": WRONG[str],
    "seed": WRONG[int],
    "training": [*WRONG[dict], {"lr": HUGE}, {"lr": NAN}, {"lr": DEEP}],
    "results": [*WRONG[dict], *({"knn_top1": x} for x in WRONG[float])],
    "versions": [*WRONG[dict], *({"torch": x} for x in WRONG[str])],
    "finetuned": WRONG[str],
    "sha256": [*WRONG[dict], *({MODEL: x} for x in WRONG[str]), {MODEL: "0" * 64}],
    "invented": [HUGE, NAN, DEEP],
}
TIMM = {
    "architecture": [*WRONG[str], "resnet50"],
    "num_classes": [x for x in WRONG[int] if x is not True],
    "num_features": WRONG[int],
    "pretrained_cfg": WRONG[dict],
    "model_args": WRONG[dict],
}
METRICS = {"top1": float, "top5": float, "top1_std": float, "seeds": int, "n_train": int}
ABOUT = {"class_names": [*WRONG[list], [], ["a"] * 9, ["a"] * 11, *([x] * 10 for x in WRONG[str])]}
ABOUT |= {"metrics": [*WRONG[dict], *({name: x} for name, kind in METRICS.items() for x in WRONG[kind])]}
CROP = ("equivariance", "shapes", "families", "crop", "variance")
RESULTS = {
    (): WRONG[dict],
    ("accuracy",): WRONG[dict],
    ("accuracy", "shapes"): WRONG[dict],
    ("accuracy", "shapes", "kNN"): [*WRONG[dict], {}],
    **{("accuracy", "shapes", "kNN", name): WRONG[kind] for name, kind in METRICS.items()},
    ("equivariance", "shapes", "images"): WRONG[int],
    ("equivariance", "shapes", "draws"): WRONG[int],
    CROP[:3]: WRONG[dict],
    CROP[:4]: WRONG[dict],
    CROP: [*WRONG[list], [1, 2], [1, 2, 3, 4], [None, 1, 2], *([x, 0, 1] for x in WRONG[float])],
    ("equivariance", "shapes", "attributes"): [*WRONG[dict], {}],
    ("equivariance", "shapes", "attributes", "backbone", "label"): WRONG[float],
}
NUMBERS = (torch.int64, torch.complex64, torch.float64, torch.bool, torch.uint8, torch.float8_e4m3fn)
TENSORS = {
    MODEL: ("conv1.weight", "layer1.0.conv1.weight", "bn1.bias", "bn1.running_var"),
    PROJECTION: ("0.weight", "1.running_mean", "3.bias"),
    CONTRASTIVE: ("0.weight",),
    HEAD: ("weight", "bias"),
}


class Escaped:
    """What would leave a file behind, were it ever unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Hang(BaseException):
    """Caught by nothing on its way."""


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000))


def put(values: dict, place: tuple[str, ...], value: object) -> None:
    for name in place[:-1]:
        values = values[name]
    values[place[-1]] = value


def rewrite(path: Path, change: Callable[[dict], dict], **about: str) -> None:
    """Change tensors and metadata of a file, its sum in config.json too, as someone who means it would."""
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in (file.metadata() or {}).items() if k != "sha256"} | about
    write_tensors(path, change(load_file(path)), metadata)
    config = path.with_name("config.json")
    if config.is_file() and path.name != ROTATION:
        values = json.loads(config.read_text())
        values["care"]["sha256"][path.name] = sha256(path)
        write_json(config, values)


Attempt = tuple[str, Callable[[Path], object], Callable[[Path], object]]  # title, damage, use


def values() -> Iterator[Attempt]:
    """Values in places where they do not belong, and what reads these places."""

    def in_config(place: tuple[str, ...], value: object) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text())
            put(config, place, value)
            write_json(folder / "config.json", config)

        return change

    def in_record(place: tuple[str, ...], value: object) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            record = json.loads((folder / RECORD).read_text())
            put(record, ("results", *place), value)
            write_json(folder / RECORD, record)

        return change

    def in_head(name: str, value: object) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            write_json(folder / "value", value)
            rewrite(folder / HEAD, dict, **{name: (folder / "value").read_text()})

        return change

    def in_tensor(file: str, change: Callable[[dict], dict]) -> Callable[[Path], None]:
        return lambda folder: rewrite(folder / file, change)

    use = dict.fromkeys((MODEL, PROJECTION, CONTRASTIVE), care_hub.load_encoder)
    use[HEAD] = care_hub.load_linear_head
    for place, wrong in CARE.items():
        for value in wrong:
            yield f"care.{place}", in_config(("care", *place.split(".")), value), care_hub.load_encoder
    for place, wrong in TIMM.items():
        for value in wrong:
            yield place, in_config((place,), value), care_hub.load_encoder
    for place, wrong in ABOUT.items():
        for value in wrong:
            yield f"head {place}", in_head(place, value), care_hub.load_linear_head
    for path, wrong in RESULTS.items():
        for value in wrong:
            yield f"record {'.'.join(path)}", in_record(path, value), believe
    for file, names in TENSORS.items():
        for name in names:
            for dtype in NUMBERS:
                yield (
                    f"{name} {dtype}",
                    in_tensor(file, lambda t, n=name, d=dtype: t | {n: t[n].to(d)}),
                    use[file],
                )
            for number in (NAN, INF, -INF):
                odd = in_tensor(file, lambda t, n=name, x=number: t | {n: t[n].clone().fill_(x)})
                yield f"{name} {number}", odd, use[file]
            for shape in ((), (0,), (1, 1, 1, 1, 1)):
                other = in_tensor(file, lambda t, n=name, s=shape: t | {n: torch.ones(s)})
                yield f"{name} {shape}", other, use[file]
        yield f"{file} more", in_tensor(file, lambda t: t | {"more": torch.ones(1)}), use[file]
        yield (
            f"{file} less",
            in_tensor(file, lambda t, n=names[0]: {k: v for k, v in t.items() if k != n}),
            use[file],
        )
    for dtype in NUMBERS:
        if dtype != torch.float64:
            yield f"counter {dtype}", in_tensor(MODEL, lambda t, d=dtype: t | {
                "bn1.num_batches_tracked": torch.ones((), dtype=torch.int32 if d == torch.int64 else d)
            }), care_hub.load_encoder  # fmt: skip
            yield f"rotation {dtype}", in_tensor(ROTATION, lambda t, d=dtype: {
                "rotation": t["rotation"].to(d)}), turn  # fmt: skip
    for shape in ((), (0, 0), (3,), (2, 3), (1, 2**20)):
        yield f"rotation {shape}", in_tensor(ROTATION, lambda t, s=shape: {"rotation": torch.ones(s)}), turn
    for number in (NAN, INF, 0, 2, 1e300):
        yield f"rotation {number}", in_tensor(ROTATION, lambda t, x=number: {
            "rotation": t["rotation"].clone().fill_(x)}), turn  # fmt: skip
    yield "rotation more", in_tensor(ROTATION, lambda t: t | {"more": torch.ones(1)}), turn
    yield "rotation less", in_tensor(ROTATION, lambda t: {"other": t["rotation"]}), turn


def turn(folder: Path) -> object:
    return Rotation.load(folder / ROTATION)


def believe(folder: Path) -> None:
    """Read the record: a warning and nothing is right, as is a sentence."""
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger("care_hub").addHandler(handler)
    try:
        found = read_record(folder)
    finally:
        logging.getLogger("care_hub").removeHandler(handler)
    if not found and "is no record of care_hub" in told.getvalue():
        raise CareHubError(told.getvalue())


SCRIPT, CODE = "<script>alert(1)</script>", '"); import os; os.mkdir("executed")  # '
WORDS = [
    f"\x1b[31m{SCRIPT}{END}\nFORGED\n```\nFORGED `{SCRIPT}` | {CODE}\u202e \ud800 <img onerror=alert(1)>",
    "\x1b[31mred",
    "\x9b31m",
    "\x1b]0;title\x07",
    "\u202egnp.exe",
    "\u2028FORGED",
    "\ud800",
    "\0",
    " ",
    "_",
    "$x$",
    SCRIPT,
    f"</script>{SCRIPT}",
    "<img src=x onerror=alert(1)>",
    "' onload='alert(1)",
    '" onload="alert(1)',
    "two\nFORGED",
    "two\r\n\r\n# FORGED",
    "```\nFORGED\n```",
    "~~~\nFORGED",
    "\n---\nFORGED: 1\n---\n",
    "- a\n- FORGED",
    f"`{SCRIPT}`",
    f"a | b |\n| FORGED | {SCRIPT}",
    f"{END}\nFORGED",
    f"{BEGIN}{END}",
    f"```\n{SCRIPT}",
    CODE,
    "[x](javascript:alert(1))",
    "x](javascript:alert(1))",
    "{{ 7 * 191 }}",
    "{% for %}",
    "%s%(a)s{0}",
    "a" * 5000,
]


def speak(export: Path, word: str) -> None:
    """Put `word` wherever an export or a run folder around it has words."""
    config = json.loads((export / "config.json").read_text())
    one, utf8 = {word: word}, word.encode(errors="replace").decode()
    config["care"] |= {"method": word, "dataset": word, "finetuned": word, "versions": one, "invented": one}
    config["care"] |= {"init": {"name": word, "license": word}, "training": one | {"nested": [one]}}
    write_json(export / "config.json", config)
    about = {"class_names": json.dumps([word] * 10), "metrics": json.dumps({"top1": 50.0, "protocol": word})}
    rewrite(export / HEAD, dict, dataset=utf8, **about)
    of_word = {word: {"variance": [0.9, 0.8, 1.0]}}
    measured = {
        "images": 9,
        "draws": 2,
        "families": of_word,
        "attributes": {word: {word: 1.0}, "b": {word: 1.0}},
    }
    results = {"accuracy": {word: {word: {"top1": 50.0}}}, "equivariance": {word: measured}}
    write_json(export / RECORD, {"encoder": sha256(export / MODEL), "results": results})
    found = FittedTransformation(utf8, word, "log", 1.0, [2.0], [{}], {}, 50, word, 9, word)
    turns, moved = {utf8: torch.eye(16)[None]}, {utf8: torch.eye(16)[:, :1]}
    RotationSet({utf8: found}, turns, encoder_name=utf8, moved=moved).save(export)
    with contextlib.suppress(OSError, ValueError):  # no name of a file
        (export / f"{utf8}.png").write_bytes(b"")
    options = {"dataset_name": word, "dataset_label": word[:9], "data_root": word, "run_name": word}
    (export.parent / "config.yaml").write_text(yaml.safe_dump(options))
    (export.parent / "results.json").write_text('{"knn_top1": 50.0}')


def shown(export: Path, word: str, hub: LoopbackHub) -> Iterator[tuple[str, str]]:
    """Each output in which `word` is shown, and its text."""
    yield "card", card_text(export)
    yield "card", card_text(export, "lab/tiny")
    image = export.parent / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    entry = registry.Entry(f"x.{word}", folder=export, license=word, metrics={word: 1.0})
    hub.put(f"lab/{word}", {"README.md": b"---\ntags:\n- care_hub\n---\n"})
    registry.register_encoder(entry)
    try:
        for words in (
            ["info", export],
            ["list", "--pretrained"],
            ["list", "--hub"],
            ["classify", image, "--encoder", export],
            ["classify", image, "--encoder", export, "--dataset", word],
            ["search", export / "absent", "--query", image, "--encoder", word],
        ):
            done = CliRunner().invoke(cli.main, list(map(str, words)))
            if done.exception and not isinstance(done.exception, SystemExit):
                raise done.exception
            yield "terminal", done.output.replace("\t", " ")  # columns
    finally:
        registry._registered.pop(entry.name)
    yield "page", write_page([str(export.parent)], str(export.parent / "page.html")).read_text()


class Tags(HTMLParser):
    """What a page has besides text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attributes)}


def acting(kind: str, text: str) -> set[str]:
    """Tags and attributes of a page; metadata, HTML, imports, fences and the number of markers in a card."""
    if kind != "card":
        return Tags(text).found if kind == "page" else set()
    metadata, body = text.split("\n---\n", 1)
    snippets = re.findall(r"^```python\n(.*?)^```$", body, flags=re.M | re.S)
    code = [at for snippet in snippets for at in ast.walk(ast.parse(snippet))]
    imports = {ast.unparse(at) for at in code if isinstance(at, ast.Import | ast.ImportFrom)}
    markers = {f"{body.count(marker)} x {marker}" for marker in (BEGIN, END)}
    fences = re.findall(r"^\W*(?:```|~~~).*", body, flags=re.M)
    return imports | markers | {*re.findall(r"<\S+", body), *fences, *yaml.safe_load(metadata)}


def escaped(kind: str, text: str, innocent: str) -> str:
    """What of a hostile word acts in `text`, which is `innocent` with another word; empty if it does not."""
    if found := UNPRINTABLE.search(text.replace("\n", "")):
        return f"{found[0]!r} in a {kind}"
    lines = text.split("\n---\n", 1)[-1]  # those of YAML are folded
    if line := re.search(r"^\W*FORGED.*", lines, flags=re.M):
        return f"a line of its own in a {kind}: {line[0]}"
    return " ".join(acting(kind, text) - acting(kind, innocent))


def try_words(root: Path, every: int = 1) -> Iterator[tuple[bool, str, str]]:
    """As `try_values`: of every so manieth word, which must be shown as text."""
    sound = make(root / "sound")
    innocent: list[str] = []
    for word in ["innocent", *WORDS[::every]]:
        export = root / "run" / "export"
        shutil.copytree(sound, export)
        try:
            speak(export, word)
            with LoopbackHub() as hub:
                os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER}
                outputs = list(shown(export, word, hub))
            innocent = innocent or [text for _, text in outputs]
            said = [escaped(*output, plain) for output, plain in zip(outputs, innocent, strict=True)]
        except BaseException as error:
            said = [repr(error)]
        yield not any(said), repr(word), "; ".join(filter(None, said)) or "shown as text"
        shutil.rmtree(export.parent)


FILES = ("config.json", MODEL, PROJECTION, CONTRASTIVE, HEAD, RECORD, "README.md", "neighbors.png")
# What loads as if nothing were there, as it should: these files may be absent, and text is text.
HARMLESS = {
    *((name, "missing") for name in (PROJECTION, CONTRASTIVE, RECORD, "README.md", "neighbors.png")),
    *(("README.md", trick) for trick in ("empty", "cut in half", "noise", "a pickle", "a web page")),
    *(("neighbors.png", trick) for trick in ("empty", "cut in half", "noise", "a pickle", "a web page")),
}


def tricks(root: Path) -> dict[str, Callable[[Path], object]]:
    """What may be found in place of a file."""
    secret, copy = root / "secret", root / "copy"
    secret.write_text(SECRET)

    def link(target: str | Path) -> Callable[[Path], object]:
        return lambda path: (path.unlink(), path.symlink_to(target))

    def content(data: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(data)

    return {
        "missing": Path.unlink,
        "empty": content(b""),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
        "a link to /dev/zero": link("/dev/zero"),
        "a link to /dev/random": link("/dev/random"),
        "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
        "a link to nothing": link("nothing"),
        "a link to a secret": link(secret),
        "a link to its content elsewhere": lambda path: (path.replace(copy), path.symlink_to(copy)),
        "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "noise": content(random.Random(0).randbytes(5000)),
        "a pickle": content(pickle.dumps(Escaped(root / "executed"))),
        "a web page": content(b"<html>busy</html>"),
        "a terabyte": lambda path: os.truncate(path, 1 << 40),
    }


def with_header(header: str | dict, size: int = 0, length: int | None = None) -> Callable[[Path], None]:
    """A safetensors file with this header and `size` bytes that take no room."""

    def change(folder: Path) -> None:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        path = folder / MODEL
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
        os.truncate(path, path.stat().st_size + size)

    return change


def of_model(**care: object) -> Callable[[Path], None]:
    """The same weights, said to be of a network that takes far more memory."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["care"] |= care
        write_json(folder / "config.json", config)

    return change


def in_cache(blobs: str, elsewhere: bool = False) -> Callable[[Path], None]:
    """The folder as a snapshot in a cache of the Hub, whose links lead to `blobs`; or out of the cache."""

    def change(folder: Path) -> None:
        snapshot = folder / "models--lab--tiny" / "snapshots" / ("0" * 40)
        store = folder / "elsewhere" if elsewhere else snapshot / blobs
        files = [path for path in folder.iterdir() if not path.name.startswith(".")]
        snapshot.mkdir(parents=True)
        store.mkdir(parents=True)
        for path in files:
            path.replace(Path(os.path.realpath(store)) / path.name)
            (snapshot / path.name).symlink_to(os.path.relpath(os.path.realpath(store / path.name), snapshot))

    return change


def readme(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "README.md").write_text(text)


F32 = {"dtype": "F32", "shape": [1 << 29], "data_offsets": [0, 1 << 31]}
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
OTHERS = {  # title -> what it does to a folder, whether it is refused
    "a configuration of 100,000 lists": (lambda f: write_json(f / "config.json", DEEP), True),
    "a header of 100,000 lists": (with_header("[" * 100_000), True),
    "a header longer than any file": (with_header("{}", length=2**63), True),
    "a header of 90 MB": (with_header("{" + " " * 90_000_000 + "}"), True),
    "one tensor of 2 GB": (with_header({"conv1.weight": F32}, 1 << 31), True),
    "2 GB that are not there": (with_header({"conv1.weight": F32}), True),
    "a tensor beyond all memory": (with_header({"conv1.weight": F32 | {"shape": [1 << 62, 1 << 62]}}), True),
    "a network of 27 GB": (of_model(model="vit_7b_patch16_dinov3", image_size=224), True),
    "a network with tables of 26 GB": (of_model(model="beit_base_patch16_224", image_size=2048), True),
    "a million laughs in the card": (readme(f"---\n{LAUGHS}---\n\nhello\n"), False),
    "metadata of other types in the card": (
        readme("---\ntags: 7\nlicense: [x]\ndatasets: {a: b}\n---\n"),
        False,
    ),
    "metadata that is called like options": (readme("---\nignore_metadata_errors: 1\nself: 2\n---\n"), False),
    "a cache of the Hub": (in_cache("../../blobs"), False),
    "a cache with shared blobs": (in_cache("../../../blobs"), False),
    "a cache with links out of it": (in_cache("", elsewhere=True), True),
    "sums of files elsewhere": (
        of_model(sha256={"../../secret": "0", "/etc/passwd": "0", "a\0b": "0"}),
        False,
    ),
    "code that the configuration names": (
        lambda f: (
            of_model(auto_map={"AutoModel": "evil.Model"})(f),
            (f / "evil.py").write_text("import os\nos.mkdir('executed')\n"),
        ),
        False,
    ),
    "pickled weights beside": (
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Escaped(f / "executed"))),
        False,
    ),
    "a lock that is a link": (lambda f: link_lock(f), True),
}


def link_lock(folder: Path) -> None:
    (folder / ".care_hub.lock").unlink(missing_ok=True)
    (folder / ".care_hub.lock").symlink_to(folder.parent / "secret")


def folders(root: Path) -> Iterator[tuple[str, Callable[[Path], object], bool]]:
    """Hostile folders: title, what makes one of an export, and whether something must be refused."""
    for trick, damage in tricks(root).items():
        for name in FILES:
            if (name, trick) != ("neighbors.png", "a terabyte"):  # which is the user's own to send
                refused = (name, trick) not in HARMLESS
                yield f"{name}: {trick}", lambda folder, n=name, d=damage: d(folder / n), refused
    for title, (damage, refused) in OTHERS.items():
        yield title, damage, refused


def make(folder: Path) -> Path:
    """A sound export with a head, a record, a card and a figure, and a rotation beside."""
    torch.manual_seed(0)
    encoder = care_hub.Encoder.new("resnet10_w16_small", hidden=32, outputs=16)
    encoder.set_contrastive_head(True)
    encoder.save_pretrained(folder)
    names = [f"class {k}" for k in range(10)]
    LinearHead("shapes", torch.randn(10, 128), torch.randn(10), names, {"top1": 61.5, "seeds": 1}).save(
        folder
    )
    triple = {"crop": {"variance": [0.9, 0.8, 1.0]}}
    spaces = {"projection": {"label": 1.0}, "backbone": {"label": 1.0}}
    found = {"images": 200, "draws": 2, "families": triple, "attributes": spaces}
    add_result(folder, "equivariance", "shapes", found)
    add_result(folder, "accuracy", "shapes", {"kNN": {"top1": 50.0}})
    Rotation.random(4).save(folder / ROTATION)
    (folder / "neighbors.png").write_bytes(b"\x89PNG")
    write_card(folder)
    return folder


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """For `with`: fails after SECONDS, or if memory grows by more than MEGABYTES."""

    def stop(*_: object) -> None:
        raise Hang(f"more than {SECONDS} seconds")

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1024 if sys.platform == "linux" else 1 << 20
        )

    before, former = peak(), signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    if peak() - before > MEGABYTES:
        raise MemoryError(f"{peak() - before:.0f} MB")


def outcome(use: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    """("refused", the sentence), ("done", "") or ("FAILED", why)."""
    try:
        with bounded():
            use(folder)
    except CareHubError as error:
        return ("FAILED", "shows the secret") if SECRET in str(error) else ("refused", str(error))
    except BaseException as error:
        return "FAILED", repr(error)
    return "done", ""


def show(folder: Path) -> None:
    """`care-hub info`."""
    with contextlib.redirect_stdout(io.StringIO()):
        cli.info.callback(str(folder), None)


def uses(hub: LoopbackHub) -> dict[str, Callable[[Path], object]]:
    """What people do with a folder."""
    return {
        "load": care_hub.load_encoder,
        "classify": care_hub.load_classifier,
        "info": show,
        "record": believe,
        "card": write_card,
        "push": lambda folder: push_export(folder, "lab/tiny"),
    }


def try_values(root: Path, every: int = 1) -> Iterator[tuple[bool, str, str]]:
    """Whether it survived, its title, and what was said; of every so manieth value."""
    sound = make(root / "sound")
    for title, damage, use in itertools.islice(values(), 0, None, every):
        folder = root / "export"
        shutil.copytree(sound, folder)
        damage(folder)
        kind, said = outcome(use, folder)
        yield kind == "refused", title, said or kind
        shutil.rmtree(folder)


def try_folders(root: Path, every: int = 1) -> Iterator[tuple[bool, str, str]]:
    """As `try_values`, of folders: nothing fails, what must be refused is, and no secret gets out."""
    sound = make(root / "sound")
    for title, damage, refused in itertools.islice(folders(root), 0, None, every):
        folder = root / "export"
        shutil.copytree(sound, folder)
        damage(folder)
        inner = next(folder.glob("models--*/snapshots/*"), folder)
        with LoopbackHub() as hub:
            os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER}
            found = {name: outcome(use, inner) for name, use in uses(hub).items()}
            sent = [
                files for repository in hub.repositories.values() for files in repository.commits.values()
            ]
        failed = [f"{name}: {said}" for name, (kind, said) in found.items() if kind == "FAILED"]
        told = [f"{name}: {said}" for name, (kind, said) in found.items() if kind == "refused"]
        if any(SECRET.encode() in content for files in sent for content in files.values()):
            failed.append("the secret was published")
        if (root / "secret").read_text() != SECRET:
            failed.append("the secret was overwritten")
        if (root / "executed").exists() or (folder / "executed").exists() or Path("executed").exists():
            failed.append("executed")
        if refused != bool(told):
            failed.append("not refused" if refused else "refused")
        yield not failed, title, "; ".join(failed or told[:1] or ["no harm"]) + (str(told) if failed else "")
        shutil.rmtree(folder)


def main() -> int:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    survived = tried = 0
    with tempfile.TemporaryDirectory() as place:
        for kind, attempts in (("value", try_values), ("word", try_words), ("folder", try_folders)):
            root = Path(place) / kind
            root.mkdir()
            for number, (good, title, said) in enumerate(attempts(root), 1):
                print(f"{kind} {number:3}  {'survived' if good else 'FAILED  '}  {title:45.45}  {said:.100}")
                survived, tried = survived + good, tried + 1
    print(f"{survived} / {tried}")
    return survived != tried


if __name__ == "__main__":
    sys.exit(main())
