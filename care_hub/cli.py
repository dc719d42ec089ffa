"""Words to actions: the `care-hub` command; train.py and eval_linear.py are two of its commands.

Imports stand inside the functions here, so that `--help` is light.
"""

import dataclasses
import io
import json
import logging
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from .config import (
    FORMER_NAMES,
    PUBLIC_CODE,
    RECIPES,
    DataConfig,
    EvalConfig,
    TrainConfig,
    kinds_of,
    read_yaml,
    recipes,
    typed_options,
)
from .cores import cores
from .errors import CareHubError, printable

Function = TypeVar("Function", bound=Callable[..., Any])
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
FORMER_FLAGS = {"--no-equivariance-crop": "--equivariance-crop=false"}
METAVARS: dict[type, str] = {int: "INTEGER", float: "FLOAT", str: "TEXT"}
LAUNCHED = {"LOCAL_WORLD_SIZE", "ACCELERATE_DYNAMO_MODE"}  # launchers put these into the environment
AT_LEAST_1, PATH = click.IntRange(min=1), click.Path()
batch_size_option = click.option("--batch-size", type=AT_LEAST_1, default=256)
encoder_option = click.option(
    "--encoder", required=True, help="a run folder, an export folder, a registry name or a Hub id"
)


class ScreenHandler(logging.Handler):
    """What care_hub logs, beside progress bars: warnings on standard error, as results may be piped."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        with suppress(OSError):  # the terminal is gone, or the `tee` behind it: the work goes on
            tqdm.write("\n".join(map(printable, self.format(record).split("\n"))), file=stream)
            stream.flush()


class Failure(click.ClickException):
    """An error sentence with the exit status, which holds also where nobody can read the sentence."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # of the class, says click

    def show(self, file: Any = None) -> None:
        """On standard error, unless the terminal is gone, or the `tee` behind it."""
        with suppress(OSError):
            super().show(file)


class Command(click.Command):
    """A command whose user errors are one sentence and an exit status, and whose help shows groups."""

    def invoke(self, context: click.Context) -> Any:
        """Run it, with care_hub's log on the screen."""
        use_all_cores()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # no name ends a command that has done its work
        log, screen = logging.getLogger("care_hub"), ScreenHandler()
        log.addHandler(screen)
        log.setLevel(logging.INFO)
        try:
            return super().invoke(context)
        except CareHubError as error:
            raise Failure(self._sentence(str(error)), error.exit_code) from error
        except PermissionError as error:
            sentence = printable(f"'{error.filename}' can't be used ({error.strerror}).")
            raise click.ClickException(sentence) from error
        finally:
            log.removeHandler(screen)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Former names of options are understood, and not shown; those of the public code are explained."""
        former = {flag(before): flag(now) for before, now in FORMER_NAMES.items()} | FORMER_FLAGS
        words = [word.partition("=") for word in args]
        now = [former.get(name, name) + sign + value for name, sign, value in words]
        try:
            return super().parse_args(context, now)
        except click.NoSuchOption:
            if advice := self._instead([name for name, _, _ in words]):
                raise click.ClickException(advice) from None
            raise

    def _instead(self, words: list[str]) -> str:
        """What to give instead of the options of the public code among `words`."""
        if "equiv_splits" not in {parameter.name for parameter in self.params}:
            return ""
        names = {word: word.lstrip("-").replace("-", "_") for word in words if word.startswith("-")}
        found = [f"for {w} give {PUBLIC_CODE[name]}" for w, name in names.items() if name in PUBLIC_CODE]
        return self._sentence("options have other names here: " + "; ".join(found) + ".") if found else ""

    def _sentence(self, message: str) -> str:
        """An error as the command line speaks: `option=value` in backticks becomes a flag."""
        known = {parameter.name for parameter in self.params if isinstance(parameter, click.Option)}

        def as_flag(match: re.Match[str]) -> str:
            name, value = match["name"], match["value"] or "True"
            if name not in known:
                return match[0]
            if value[0] in "'\"":
                value = shlex.quote(value.strip(value[0]))
            return flag(name) if value == "True" else f"{flag(name)} {value}"

        message = re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]+))?`", as_flag, message)
        return message[0].upper() + message[1:] if message[0].islower() else message

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under the headings of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            if row := parameter.get_help_record(context):
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(row)
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(rows)


class Option(click.Option):
    """An option with the heading under which `--help` shows it."""

    def __init__(self, *args: Any, group: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class Group(click.Group):
    """Commands with their whole summaries."""

    command_class = Command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """One line or more for each command."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(1000)) for name, command in self.commands.items()]
            )


def use_all_cores() -> None:
    """Share the cores among this machine's processes: launchers ask for one thread each.

    One thread is left where a user asked for it. Before torch is imported, which reads the number then.
    """
    given, launched = os.environ.get("OMP_NUM_THREADS"), os.environ.keys() & LAUNCHED
    if not given or (given == "1" and launched and not one_thread_is_wanted()):
        share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, share))


def one_thread_is_wanted() -> bool:
    """Whether the launcher of this process was itself started with a number of threads."""
    import psutil

    from .training.preemption import LAUNCHER

    with suppress(psutil.Error):
        if LAUNCHER:
            parent = psutil.Process(LAUNCHER)
            words = [word.replace("-", "_").partition("=")[0] for word in parent.cmdline()]
            return "OMP_NUM_THREADS" in parent.environ() or "__num_cpu_threads_per_process" in words
    return False


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def options_of(config_class: type[DataConfig], required: bool = True) -> Callable[[Function], Function]:
    """One click option for each field of a dataclass of options; none must be given unless `required`."""

    def decorate(command: Function) -> Function:
        for option in reversed(dataclasses.fields(config_class)):
            hint = typing.get_type_hints(config_class)[option.name]
            command = _option_of(option, hint, required)(command)
        return command

    return decorate


def _option_of(option: dataclasses.Field, hint: Any, required: bool) -> Callable[[Function], Function]:
    about, default = option.metadata, option.default
    settings = {
        "help": about["help"],
        "default": default,
        "required": required and default == "",
        "cls": Option,
    }
    settings |= {"group": about["group"], "show_default": default != ""}
    name = flag(option.name)
    kinds = kinds_of(hint)
    if hint is bool:
        name, settings["is_flag"] = f"{name}/--no-{name[2:]}" if default else name, True
    elif bool in kinds:  # a flag that takes a word as well
        settings |= {"is_flag": False, "flag_value": "true", "show_default": False, "type": click.UNPROCESSED}
        settings["metavar"] = f"[{'|'.join(about['choices'])}]"
    else:  # as typed: `typed_options` reads it, as it reads YAML
        names = (
            f"[{'|'.join(about['choices'])}]" if about["choices"] else " ".join(METAVARS[k] for k in kinds)
        )
        settings |= {"type": click.UNPROCESSED, "nargs": len(kinds), "metavar": names}
    return click.option(name, option.name, **settings)


def resolve(given: dict[str, Any], config_file: str | None) -> TrainConfig:
    """Options: defaults < the saved run (with --resume) < the YAML file < flags given by hand."""
    values = typed_options(TrainConfig, (read_yaml(config_file) if config_file else {}) | given)
    if values.get("resume") and values.get("run_name"):
        values = _resumed(values)
    return TrainConfig(**values)


def _resumed(values: dict[str, Any]) -> dict[str, Any]:
    """The options of the run to resume, changed only where a resumed run may change."""
    saved = Path(values.get("save_root", TrainConfig.save_root)) / values["run_name"] / "config.yaml"
    if not saved.is_file():
        if values["resume"] == "auto":
            return values
        raise CareHubError(f"there is no run to resume at '{saved.parent}'.")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}  # of options newer than the run
    before = defaults | typed_options(TrainConfig, read_yaml(saved))
    fixed = {f.name for f in dataclasses.fields(TrainConfig) if not f.metadata["changeable"]}
    for name in values.keys() & fixed:
        if before[name] != values[name]:
            change = f"`{name}` was {before[name]} in this run and can't become {values[name]}"
            raise CareHubError(f"{change} when it is resumed; start a new run for that.")
    return before | values


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--config", "config_file", metavar="FILE.yaml|RECIPE", help="sets any option; flags win")
@options_of(TrainConfig)
@click.pass_context
def train(context: click.Context, config_file: str | None, **values: Any) -> None:
    """Train CARE, or its plain baseline, and export the encoder."""
    default = click.core.ParameterSource.DEFAULT
    given = {k: v for k, v in values.items() if context.get_parameter_source(k) != default}
    config = resolve(given, config_file)
    from .training import preemption  # noqa: F401, I001  before torch: it notes who has started this process
    import torch.distributed

    from .training.trainer import train as run_training

    run_training(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@click.command("eval_linear", cls=Command, context_settings=SETTINGS)
@options_of(EvalConfig)
def eval_linear(**values: Any) -> None:
    """Train a linear head on the frozen encoder's backbone features and save it.

    The last line is the result as JSON.
    """
    config = EvalConfig(**values)  # refused, if so, before torch is imported
    from .evaluate.commands import evaluate

    _print_json(evaluate(config))


def _print_json(result: dict[str, Any]) -> None:
    """The result, on the process that has one."""
    if result:
        print(json.dumps(result))


@click.group(cls=Group, context_settings=SETTINGS)
@click.version_option(package_name="care-hub")
def main() -> None:
    """Equivariant image embeddings."""


main.add_command(train)
main.add_command(eval_linear, "probe")


@main.command("recipes")
def recipes_command() -> None:
    """Show the recipes that `care-hub train --config NAME` takes, and where their files are."""
    rows = recipes()
    width = max(map(len, rows))
    for name, about in rows.items():
        print(f"{name:<{width}}  {about}")
    print(f"\nin {printable(str(RECIPES))}")


@main.command()
@click.argument("images", type=PATH)
@encoder_option
@click.option("-o", "--output", required=True, type=PATH, help="a .parquet, .safetensors or .npy file")
@click.option(
    "--space",
    type=click.Choice(["projection", "backbone"]),
    default="projection",
    help="unit vectors that rotate, or raw features for probes",
)
@batch_size_option
@click.option("--skip-broken-images", is_flag=True, help="name broken images and leave them out")
def embed(images: str, **options: Any) -> None:
    """Turn a folder of IMAGES (or one image) into embeddings. The same command resumes after a break."""
    from .embed_folder import embed_folder

    if summary := embed_folder(images, **options):
        print(summary)


def split_data_options(options: dict[str, Any]) -> DataConfig:
    """The data set among the options of a command, which keeps the rest."""
    return DataConfig(**{f.name: options.pop(f.name) for f in dataclasses.fields(DataConfig)})


@main.command()
@click.argument("encoder")
@options_of(DataConfig)
@click.option("--k", type=AT_LEAST_1, default=200, help="neighbors that vote")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    help="votes weigh e^(similarity / t)",
)
@click.option("--bank", type=AT_LEAST_1, help="so many training images vote (default: all)")
def knn(encoder: str, **options: Any) -> None:
    """Weighted kNN on ENCODER's backbone features, saved in its card. The last line is the result as JSON."""
    from .evaluate.commands import evaluate_knn

    _print_json(evaluate_knn(encoder, split_data_options(options), **options))


@main.command()
@click.argument("encoders", nargs=-1, required=True)
@options_of(DataConfig)
@click.option("--images", type=click.IntRange(min=4), default=2000, help="test images, half of them to fit")
@click.option("--draws", type=AT_LEAST_1, default=16, help="augmentations of each family")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="seed of the augmentations and of the bootstrap",
)
@click.option("-o", "--output", type=PATH, help="a folder for equivariance.json and figures of all encoders")
def equivariance(encoders: tuple[str, ...], **options: Any) -> None:
    """How far augmentations act as rotations on the embeddings of ENCODERS; saved in their cards.

    ENCODERS may be networks of timm's too (architecture.tag, a folder or a repository): their features.
    """
    from .evaluate.commands import evaluate_equivariance
    from .report.tables import geometry_text

    if results := evaluate_equivariance(encoders, split_data_options(options), **options):
        print(geometry_text(results))


@main.command()
@click.argument("encoder")
@click.option("--images", type=PATH, help="a folder of images, instead of a data set")
@options_of(DataConfig, required=False)
@click.option(
    "--transform",
    "transforms",
    metavar="NAME[=STRENGTH,...]",
    multiple=True,
    help="brightness=0.7,1.4, or a chain: brightness=1.4+blur=4 (default: all transformations); repeatable",
)
@click.option(
    "--pairs",
    metavar="NAME BEFORE AFTER",
    nargs=3,
    multiple=True,
    help="a change of your own: two folders, or two files of embeddings, with the same names; repeatable",
)
@click.option("--limit", type=click.IntRange(min=4), default=2000, help="images at most, half of them to fit")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="of the choice of images")
@click.option("--output-dir", type=PATH, help="a folder for a copy of the encoder with its rotations")
def rotations(encoder: str, images: str | None, **options: Any) -> None:
    """Fit a rotation to each of several transformations of images, measure them, and save them with ENCODER.

    Transformations: brightness, contrast, saturation, hue, blur, grayscale, crop, flip, rotation, jpeg,
    gamma, white_balance. Images of a data set are those of its test split, if it has one.
    """
    from .report.tables import rotations_text
    from .steering.fitting import rotations as fit_rotations

    data = {f.name: (options.pop(f.name), f.default) for f in dataclasses.fields(DataConfig)}
    given = {name: value for name, (value, default) in data.items() if value != default}
    if images and given:
        raise CareHubError(f"`images` needs no `{next(iter(given))}`; leave one of them out.")
    if found := fit_rotations(encoder, images, DataConfig(**given) if given else None, **options):
        print(rotations_text(found))


@main.command()
@click.argument("embeddings", nargs=-1, required=True, type=PATH)
@click.option("--query", required=True, type=PATH, help="an image")
@click.option("--encoder", help="default: the one that the embeddings name")
@click.option(
    "--steer",
    metavar="NAME=STRENGTH",
    multiple=True,
    help="turn the query by a rotation of the encoder, as brightness=1.4; repeatable, first to last",
)
@click.option(
    "--ignore", metavar="NAME,...", default="", help="what these transformations change does not count"
)
@click.option("--match", metavar="NAME,...", default="", help="only what these transformations change counts")
@click.option("-k", type=AT_LEAST_1, default=10, help="images to find")
@click.option("--force", is_flag=True, help="steer also by what was found not steerable")
@click.option("-o", "--output", type=PATH, help="an HTML page with the images")
def search(embeddings: tuple[str, ...], query: str, output: str | None, **options: Any) -> None:
    """Find the images nearest to a query in EMBEDDINGS, .parquet of `care-hub embed`: path, similarity."""
    from .steering.search import search as find

    for name in ("ignore", "match"):
        options[name] = [word.strip() for word in options[name].split(",") if word.strip()]
    hits = find(embeddings, query, **options)
    if output:
        from .report.sheet import write_sheet

        words = [Path(query).name, *options["steer"]]
        write_sheet(query, ", ".join(words), [(hit.file, hit.path, hit.similarity) for hit in hits], output)
    for hit in hits:
        print(f"{printable(hit.path)}\t{hit.similarity:.4f}")


@main.command()
@click.argument("embeddings", nargs=-1, required=True, type=PATH)
@click.option("--pairs", required=True, type=PATH, help="embeddings of some of the images by the new encoder")
@click.option("-o", "--output", required=True, type=PATH, help="a .parquet file")
@click.option("--force", is_flag=True, help="also where recall@10 on held-out pairs is below 50 %")
def upgrade(embeddings: tuple[str, ...], pairs: str, output: str, force: bool) -> None:
    """Carry EMBEDDINGS, .parquet of `care-hub embed`, over to a new encoder by a map fitted on pairs."""
    from .steering.upgrade import upgrade as carry_over

    print(printable(carry_over(embeddings, pairs, output, force)))


@main.command()
@click.argument("encoder")
@click.option("--images", required=True, type=PATH, help="a folder of images")
@click.option("-o", "--output", default="demo.html", type=PATH, help="the page")
@click.option("--limit", type=click.IntRange(min=2), default=2000, help="images at most, at random")
def demo(encoder: str, images: str, output: str, limit: int) -> None:
    """Make an HTML page, without network, on which sliders turn embeddings by ENCODER's rotations."""
    from .steering.demo import demo as make_page

    if summary := make_page(encoder, images, output, limit):
        print(summary)


@main.command()
@click.argument("checkpoint", type=PATH)
@click.argument("out", type=PATH)
@click.option("--dataset-name", help="what it was trained on, where the checkpoint does not say")
def convert(checkpoint: str, out: str, dataset_name: str | None) -> None:
    """Turn a CHECKPOINT.pth.tar of the public CARE code into the export folder OUT."""
    from .convert import convert_checkpoint

    print(printable(f"encoder written to {convert_checkpoint(checkpoint, out, dataset_name)}"))


@main.command()
@click.argument("images", type=PATH)
@encoder_option
@click.option("--dataset", help="which of its linear heads, where it has several")
@batch_size_option
def classify(images: str, encoder: str, dataset: str | None, batch_size: int) -> None:
    """Name the class of each of IMAGES (a folder or one image): path, label, probability, in columns."""
    from .data.decode import list_images
    from .factory import load_classifier

    found, names = list_images(images)
    classifier = load_classifier(encoder, dataset)
    labels, probabilities = classifier.classify(found, batch_size, progress=sys.stderr.isatty())
    for name, label, row in zip(names, labels, probabilities, strict=True):
        print(f"{printable(name)}\t{printable(label)}\t{row.max():.4f}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", default="report.html", type=PATH, help="the page")
def report(runs: tuple[str, ...], output: str) -> None:
    """Compare the run folders RUNS on one self-contained HTML page: results, curves, geometry, neighbors."""
    from .report.page import write_page

    print(printable(f"the page is {write_page(list(runs), output)}"))


@main.command("list")
@click.argument("wildcard", default="")
@click.option("--pretrained", is_flag=True, help="encoders that load by name")
@click.option("--hub", is_flag=True, help="CARE repositories on the Hub")
@click.option("--author", help="with --hub: of this user or organization")
def list_command(wildcard: str, pretrained: bool, hub: bool, author: str | None) -> None:
    """Show names that match WILDCARD: without an option the package's encoders and architectures."""
    if hub:
        from .hub.client import find_repositories  # without torch, so that an answer takes a second

        rows = find_repositories(author, wildcard)
    else:
        from .factory import list_models
        from .hub.registry import entries
        from .models import SMALL

        rows = [_entry_line(entries()[name]) for name in list_models(wildcard, pretrained=True)]
        if not pretrained:
            rows += [f"{name}  (architecture)" for name in list_models(wildcard) if name in SMALL]
    print("\n".join(map(printable, rows)) if rows else "nothing found")


def _entry_line(entry: Any) -> str:
    from .hub.rotation_set import read_rotations

    metrics = ", ".join(f"{k} {v:.1f} %" for k, v in entry.metrics.items())
    rotations = read_rotations(entry.folder) if entry.folder else None
    steered = f"steered by {' and '.join(rotations.steerable)}" if rotations and rotations.steerable else ""
    return f"{entry.name}  ({', '.join(filter(None, (entry.repo_id, metrics, steered, entry.license)))})"


@main.command()
@click.argument("source")
@click.option("--revision", help="a branch, tag or commit on the Hub")
def info(source: str, revision: str | None) -> None:
    """Say what the encoder SOURCE (a folder, a registry name or a Hub id) is and how good; as JSON."""
    from .files import read_header
    from .hub.evaluation_record import read_record
    from .hub.export import check_sums, read_config
    from .hub.linear_head import read_heads
    from .hub.registry import locate
    from .hub.rotation_set import read_rotations

    folder = locate(source, revision=revision)
    config, stored = read_config(folder)
    read_header(folder / "model.safetensors")
    check_sums(folder, config.sha256)
    about = {key: stored[key] for key in ("architecture", "num_features")}
    about |= {k: v for k, v in config.to_json().items() if k != "training"}
    about["accuracy"] = read_record(folder).get("accuracy", {})
    about["linear_heads"] = {
        head.dataset: head.metrics | {"classes": len(head.class_names)} for head in read_heads(folder)
    }
    if rotations := read_rotations(folder):
        about["rotations"] = {
            name: {"strengths": found.strengths, "steerable": found.steerable} | found.overall
            for name, found in rotations.fitted.items()
        }
    print(json.dumps(about, indent=2))


@main.command()
@click.argument("encoder")
@click.option(
    "--data-root",
    metavar="[NAME=]FOLDER",
    multiple=True,
    help="a copy of a data set of the card, by its own name or the card's; repeatable",
)
@click.option("--download", is_flag=True, help="fetch from the Hub the data sets that there is no copy of")
@click.pass_context
def verify(context: click.Context, encoder: str, **options: Any) -> None:
    """Measure anew every figure that the card of ENCODER states, as it was measured, and compare.

    Figures in percent may be off by 0.1 percentage points, others by 1 %. Exit status: 0 if all were
    reproduced, 1 if one was not, 3 if none differs but some could not be measured here. Nothing is written.
    """
    from .verify import verify as measure_again

    if found := measure_again(encoder, **options):
        print(found)
        context.exit(found.exit_code)


@main.command()
@click.argument("source", metavar="ENCODER")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private/--public", default=None, help="of a new repository")
@click.option("--revision", help="a branch, made if need be")
@click.option("--create-pr", is_flag=True, help="open a pull request instead of committing")
@click.option("--commit-message")
def push(source: str, repository: str, **options: Any) -> None:
    """Upload ENCODER (a run or export folder, or a registry name) to ORG/NAME on the Hub, with its card."""
    from .factory import push_export

    print(printable(push_export(source, repository, **options)))
