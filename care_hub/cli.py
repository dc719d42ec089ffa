"""Words to actions: the options of train.py and the `care-hub` command."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import click

from .config import EvalConfig, TrainConfig, flag, read_yaml
from .errors import CareHubError

# What may change when a run is resumed; everything else would make it another run.
FREE_ON_RESUME = {"resume", "run_name", "save_root", "data_root", "max_steps", "num_workers", "log_with", "push_to_hub"}
FREE_ON_RESUME |= {"checkpoint_every", "knn_every", "dry_run", "compile"}


class Command(click.Command):
    """A command whose user errors are one sentence and exit status 1."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except CareHubError as error:
            message = str(error)
            raise click.ClickException(message[0].upper() + message[1:] if message[0].islower() else message) from error


class Group(click.Group):
    command_class = Command


def options_of(config_class):
    """One click option for each field of a dataclass of options."""
    return lambda command: _with_options(command, config_class)


def _with_options(command, config_class):
    kinds = typing.get_type_hints(config_class)
    for f in reversed(dataclasses.fields(config_class)):
        kind = next((k for k in typing.get_args(kinds[f.name]) if k is not type(None)), kinds[f.name])
        settings = {"help": f.metadata["help"], "default": f.default, "show_default": f.default not in (None, "")}
        settings["required"] = f.default == ""
        if typing.get_origin(kinds[f.name]) is tuple:
            settings |= {"nargs": len(typing.get_args(kinds[f.name])), "type": float}
        elif kind is bool:
            settings |= {"is_flag": True} if f.default is False else {}
            name = flag(f.name) if f.default is False else f"{flag(f.name)}/--no-{flag(f.name)[2:]}"
            command = click.option(name, f.name, **settings)(command)
            continue
        else:
            settings["type"] = click.Choice(f.metadata["choices"]) if f.metadata["choices"] else kind
        command = click.option(flag(f.name), f.name, **settings)(command)
    return command


def resolve(given: dict, config_file: str | None) -> TrainConfig:
    """Options: defaults < the stored run (with --resume) < the YAML file < flags given by hand."""
    values = read_yaml(config_file) if config_file else {}
    values |= given
    if values.get("resume") and values.get("run_name"):
        stored = Path(values.get("save_root", TrainConfig.save_root)) / values["run_name"] / "config.yaml"
        if not stored.is_file():
            raise CareHubError(f"there is no run to resume at '{stored.parent}'.")
        before = read_yaml(stored)
        for name, value in values.items():
            value = list(value) if isinstance(value, tuple) else value
            if name not in FREE_ON_RESUME and before.get(name) != value:
                raise CareHubError(
                    f"{flag(name)} was {before.get(name)} in this run and can't become {value} on --resume; start a new run for that."
                )
        values = before | values
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise CareHubError(f"an option has a value of the wrong kind ({error}).") from error


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--config", "config_file", metavar="FILE.yaml", help="a YAML file that sets any option below; flags given by hand win")
@options_of(TrainConfig)
@click.pass_context
def train(context: click.Context, config_file: str | None, **values) -> None:
    """Train CARE, or its plain baseline, and export the encoder."""
    by_hand = {k: v for k, v in values.items() if context.get_parameter_source(k) != click.core.ParameterSource.DEFAULT}
    config = resolve(by_hand, config_file)
    import torch.distributed

    from .trainer import train as run

    run(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@click.command("eval_linear", cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@options_of(EvalConfig)
def eval_linear(**values) -> None:
    """Train a linear head on the frozen encoder's backbone features and save it. The last line is the result as JSON."""
    config = EvalConfig(**values)
    from .evaluate.commands import evaluate

    if result := evaluate(config):
        print(json.dumps(result))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="care-hub")
def main() -> None:
    """Equivariant image embeddings."""


@main.command()
@click.argument("pictures", type=click.Path())
@click.option("--encoder", required=True, help="a run folder, an export folder, a registry name or a Hub id")
@click.option("-o", "--output", required=True, type=click.Path(), help="a .parquet, .safetensors or .npy file")
@click.option(
    "--space",
    type=click.Choice(["projection", "backbone"]),
    default="projection",
    show_default=True,
    help="unit vectors that rotate, or raw features for probes",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--skip-broken-images", "skip_broken", is_flag=True, help="name broken pictures and leave them out instead of stopping")
def embed(pictures: str, **options) -> None:
    """Turn a folder of PICTURES (or one picture) into embeddings. Typed again after a break it goes on where it was."""
    from .embeddings import embed as run

    if said := run(pictures, **options):
        print(said)


def data_options(command):
    """Which pictures to measure on; named and meant as in train.py."""
    options = [
        click.option("--dataset-name", required=True, help="as in train.py"),
        click.option("--data-root", help="a local copy of it"),
        click.option("--image-column", help="the column with the pictures, where it has an unusual name"),
        click.option("--label-column", help="the column with the labels, where it has an unusual name"),
        click.option("--num-workers", "workers", type=click.IntRange(min=0), default=2, show_default=True, help="loader processes"),
        click.option("--skip-broken-images", "skip_broken", is_flag=True, help="count and name broken pictures instead of stopping"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("encoder")
@data_options
@click.option("--k", type=click.IntRange(min=1), default=200, show_default=True, help="neighbours that vote")
@click.option(
    "--temperature", type=click.FloatRange(min=0, min_open=True), default=0.5, show_default=True, help="votes weigh e^(similarity / t)"
)
@click.option("--bank", type=click.IntRange(min=1), help="so many training pictures vote (default: all)")
def knn(encoder: str, dataset_name: str, **options) -> None:
    """Weighted kNN on ENCODER's backbone features, kept in its card. The last line is the result as JSON."""
    from .evaluate.commands import knn as run

    if result := run(encoder, dataset_name, **options):
        print(json.dumps(result))


@main.command()
@click.argument("encoders", nargs=-1, required=True)
@data_options
@click.option(
    "--images", type=click.IntRange(min=4), default=2000, show_default=True, help="test pictures, half to fit and half to measure"
)
@click.option("--draws", type=click.IntRange(min=1), default=16, show_default=True, help="augmentations of each family")
@click.option("--seed", type=int, default=0, show_default=True, help="seed of the augmentations and of the bootstrap")
@click.option("-o", "--output", type=click.Path(), help="a folder for equivariance.json and figures, all encoders side by side")
def equivariance(encoders: tuple[str, ...], dataset_name: str, **options) -> None:
    """How far augmentations act as rotations on the embeddings of ENCODERS, and what those keep; kept in their cards."""
    from . import report
    from .evaluate.commands import equivariance as run

    print(report.geometry(run(encoders, dataset_name, **options)))


@main.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--dataset-name", help="what it was trained on, where the checkpoint does not say (sets the normalisation)")
def convert(checkpoint: str, out: str, dataset_name: str | None) -> None:
    """Turn a CHECKPOINT.pth.tar of the public CARE code into the export folder OUT."""
    from .convert import convert as run

    print(f"encoder written to {run(checkpoint, out, dataset_name)}")


@main.command()
@click.argument("pictures", type=click.Path())
@click.option("--encoder", required=True, help="a run folder, an export folder, a registry name or a Hub id")
@click.option("--dataset", help="which of its linear heads, where it has several")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
def classify(pictures: str, encoder: str, dataset: str | None, batch_size: int) -> None:
    """Name the class of each of PICTURES (a folder or one picture): path, label and probability, separated by tabs."""
    from .classifier import load_classifier
    from .data.pictures import named

    found, names = named(pictures)

    labels, probabilities = load_classifier(encoder, dataset).classify(found, batch_size, progress=sys.stderr.isatty())
    for name, label, row in zip(names, labels, probabilities, strict=True):
        print(f"{name}\t{label}\t{row.max():.4f}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", default="report.html", show_default=True, type=click.Path(), help="the page")
def report(runs: tuple[str, ...], output: str) -> None:
    """Put the run folders RUNS side by side on one self-contained HTML page: results, curves, geometry, neighbours."""
    from .page import write

    print(f"the page is {write(list(runs), output)}")


@main.command("list")
@click.argument("wildcard", default="")
@click.option("--pretrained", is_flag=True, help="encoders that load by name")
@click.option("--hub", is_flag=True, help="CARE repositories on the Hub")
@click.option("--author", help="with --hub: of this person or organisation")
def list_command(wildcard: str, pretrained: bool, hub: bool, author: str | None) -> None:
    """Show names that match WILDCARD: without an option the package's encoders and architectures."""
    from .registry import entries, list_models

    if hub:
        rows = list_models(wildcard, hub=True, author=author)
    else:
        rows = [_entry_line(entries()[name]) for name in list_models(wildcard, pretrained=True)]
        if not pretrained:
            from .models import SMALL

            rows += [f"{name}  (architecture)" for name in list_models(wildcard) if name in SMALL]
    print("\n".join(rows) if rows else "nothing found")


@main.command()
@click.argument("source")
@click.option("--revision", help="a branch, tag or commit on the Hub")
def info(source: str, revision: str | None) -> None:
    """Say what the encoder SOURCE (a folder, a registry name or a Hub id) is and how good; as JSON."""
    from .classifier import LinearHead, heads
    from .evaluate import record
    from .export import read_config
    from .registry import locate

    folder = locate(source, revision=revision)
    config = read_config(folder)
    care = {k: v for k, v in config["care"].items() if k not in ("training",)}
    loaded = [LinearHead.load(path) for path in heads(folder)]
    care["accuracy"] = record.read(folder).get("accuracy", {})
    care["linear_heads"] = {head.dataset: head.metrics | {"classes": len(head.class_names)} for head in loaded}
    print(json.dumps({"architecture": config["architecture"], "num_features": config["num_features"]} | care, indent=2))


@main.command()
@click.argument("folder", type=click.Path())
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private/--public", default=None, help="of a new repository")
@click.option("--revision", help="a branch, made if need be")
@click.option("--create-pr", is_flag=True, help="open a pull request instead of committing")
@click.option("--commit-message")
def push(folder: str, repository: str, **options) -> None:
    """Upload the export in FOLDER (or a run's) to ORG/NAME on the Hub, with its model card."""
    from .hub import push as run

    print(run(folder, repository, **options))


def _entry_line(entry) -> str:
    metrics = ", ".join(f"{k} {v:.1f} %" for k, v in entry.metrics.items())
    return f"{entry.name}  ({', '.join(filter(None, (entry.repo_id, metrics, entry.license)))})"
