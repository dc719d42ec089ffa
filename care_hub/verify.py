"""`care-hub verify`: every figure that a card states, evaluated anew and compared."""

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from .augment import AugmentationConfig
from .config import DataConfig, EvalConfig, TrainConfig
from .data.images import Images
from .data.sources import data_of, load_splits
from .distributed import inference_accelerator
from .encoder import Encoder
from .errors import CareHubError, printable
from .evaluate.commands import equivariance_results, equivariance_subsets, knn_results, mean_over_seeds
from .evaluate.features import LabeledImages, embed_all, labeled, recorded_augmentation, remember_features
from .evaluate.linear import linear_probe, top_accuracies
from .evaluate.monitor import final_results
from .hub.card import FAMILY_METRICS, ROTATION_METRICS, public_name, stale_rows, stated_data
from .hub.evaluation_record import Record, read_record
from .hub.linear_head import LinearHead, read_heads
from .hub.registry import locate
from .hub.rotation_set import FittedTransformation, RotationSet, read_rotations
from .metrics import FINAL_METRICS, METRICS
from .report.tables import number, text_table
from .steering.fitting import chosen_images, measure_rotations

logger = logging.getLogger(__name__)

POINTS, SHARE = 0.1, 0.01  # how far figures in percent, and all others, may be from what a card says
ROUNDING = 5e-5  # of final figures, which had four decimals in former versions
ACCURACIES = ("top1", "top5", "top1_std", "top5_std")
COUNTS = {"n_train": "training images", "n_test": "test images", "images": "images"}
FINAL_KEYS = (*FINAL_METRICS, "motionless")  # that are not of training itself
SETTINGS = ("optimizer", "lr", "epochs", "augmented_copies", "label_fraction", "seed", "seeds")  # of probes
NOT_ALL_MEASURED = 3  # exit status where nothing differs; 2 is that of a wrong option


class Figure(NamedTuple):
    """A number, or (mean, lower, upper) of one, that is stated, and what is measured."""

    dataset: str
    name: str
    unit: str  # "%" (compared to 0.1 percentage points), "images" (exactly) or any other (to 1 %)
    stated: Any  # None: unknown
    measured: Any
    in_card: bool = True  # not only in the files beside it
    rounding: float = 0.0  # of what is stated with four decimals

    @property
    def agrees(self) -> bool:
        """Whether what is measured is what is stated.

        >>> Figure("pets", "kNN top-1", "%", 50.0, 50.1).agrees, Figure("pets", "γ", "", 0.5, 0.51).agrees
        (True, False)
        """
        stated, measured = _numbers(self.stated), _numbers(self.measured)
        return len(stated) == len(measured) and all(map(self._near, stated, measured))

    def _near(self, stated: float | None, measured: float | None) -> bool:
        if stated is None or measured is None:
            return stated is measured
        allowed = {"%": POINTS, "images": 0.0}.get(self.unit, SHARE * abs(stated))
        allowed += self.rounding if round(stated, 4) == stated else 0
        return abs(measured - stated) <= allowed + 1e-9


def _numbers(value: Any) -> Sequence[float | None]:
    return value if isinstance(value, list | tuple) else [value]


@dataclass
class Verification:
    """What `verify` found."""

    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what could not be measured here, and why
    stale: list[str] = field(default_factory=list)  # rows of the card that are not those of its files
    training: list[str] = field(
        default_factory=list
    )  # names of figures of the training itself, not in the card

    @property
    def differing(self) -> list[Figure]:
        """The figures that were not reproduced."""
        return [figure for figure in self.figures if not figure.agrees]

    @property
    def exit_code(self) -> int:
        """0: all that is stated was reproduced; 1: something was not; 3: something could not be measured."""
        if self.differing or self.stale:
            return 1
        return NOT_ALL_MEASURED if self.missing else 0

    def __str__(self) -> str:
        """The table of the card's figures, and of others that differ; then the verdict in a few lines."""
        shown = [figure for figure in self.figures if figure.in_card or not figure.agrees]
        rows = [[f"{f.dataset}: {f.name}", *map(partial(_text, f.unit), f[3:5]), _verdict(f)] for f in shown]
        lines = [text_table([["figure", "card", "measured", ""], *rows]), ""] if rows else []
        lines += [f"The card says otherwise than the files beside it: {row}" for row in self.stale]
        others = len(self.figures) - sum(figure.in_card for figure in self.figures)
        counts = f"{len(self.figures) - others:,} figures of the card and {others:,} more in its files"
        lines.append(f"{counts} were measured; {len(self.differing) or 'none'} differ.")
        if self.missing:
            lines.append(f"Not measured here: {'; '.join(self.missing)}.")
        if self.training:
            lines.append(f"Not in the card, and only training can tell: {', '.join(self.training)}.")
        return "\n".join(map(printable, "\n".join(lines).split("\n")))


def _text(unit: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        mean, low, high = (number(x, 3) for x in value)
        return f"{mean} ({low} to {high})"
    return number(value) + " %" * (unit == "%")


def _verdict(figure: Figure) -> str:
    return "ok" if figure.agrees else "differs"


class Unmeasurable(Exception):
    """Why something can't be measured again."""


@dataclass
class Site:
    """An encoder, and a data set to measure it on."""

    encoder: Encoder
    accelerator: Accelerator
    data: DataConfig

    @cached_property
    def splits(self) -> tuple[Images, Images | None]:
        """Training and test images."""
        return load_splits(self.data, self.encoder.config.image_size, self.accelerator.is_main_process)

    @property
    def both(self) -> tuple[Images, Images]:
        """Training and test images. Raises Unmeasurable without a test split."""
        train, test = self.splits
        if test is None:
            raise Unmeasurable("there is no test split here")
        return train, test

    @cached_property
    def labeled(self) -> tuple[LabeledImages, LabeledImages]:
        """Both splits with their labels."""
        return labeled(self.data.data_label, *self.both)


@dataclass
class Check:
    """Figures on one data set, and how they are measured."""

    dataset: str
    title: str  # what stands before the names of the figures
    stated: dict[str, Any]  # nested, as in the files
    in_card: Collection[str]  # the keys that the card shows
    measure: Callable[[Site], dict[str, Any]]  # gives the same keys; may raise Unmeasurable
    rounding: float = 0.0

    def figures(self, site: Site) -> Iterator[Figure]:
        """What is stated beside what is measured."""
        measured = self.measure(site)
        for path, stated in _leaves(self.stated):
            *parents, key = path
            title, unit = _title_and_unit(key)
            name = ", ".join(filter(None, (self.title, *parents[1:], title)))
            shown = key in self.in_card and "measured" not in parents
            yield Figure(self.dataset, name, unit, stated, _at(measured, path), shown, self.rounding)


def _leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The figures in nested dictionaries, and the keys that lead to them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        elif key in METRICS or key in ACCURACIES or key in COUNTS:
            yield (*path, key), value


def _at(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _title_and_unit(key: str) -> tuple[str, str]:
    if key in COUNTS:
        return COUNTS[key], "images"
    metric = METRICS[key.removesuffix("_std")]
    return metric.title + ", deviation" * key.endswith("_std"), metric.unit


def verify(source: str, data_root: Sequence[str] = (), download: bool = False) -> Verification | None:
    """`care-hub verify`: measure anew, as it was, every figure that the card of the encoder `source` states.

    `data_root`: copies of data sets, FOLDER or NAME=FOLDER with the card's name of the data set;
    `download`: fetch from the Hub what there is no copy of. Nothing is written. Figures in percent
    may be off by 0.1 percentage points, others by 1 %. None but on the main process. Raises
    CareHubError for an encoder or a copy that can't be read.
    """
    accelerator, folder = inference_accelerator(), locate(source)
    encoder = Encoder.from_folder(folder).to(accelerator.device)
    heads, record, rotations = read_heads(folder), read_record(folder), read_rotations(folder)
    checks = [*_final_checks(encoder), *_accuracy_checks(record, heads), *map(_head_check, heads)]
    checks += [_equivariance_check(*entry) for entry in record.get("equivariance", {}).items()]
    checks += _rotation_checks(rotations) if rotations else []
    options, names = stated_data(encoder.config, heads, record, rotations), {c.dataset for c in checks}
    roots = _roots(data_root, sorted(names))
    training = [key for key in encoder.config.results if key not in FINAL_KEYS]
    found = Verification(stale=stale_rows(folder), training=training)
    for name in filter(names.__contains__, options):
        mine = [check for check in checks if check.dataset == name]
        try:
            site = Site(encoder, accelerator, _data(name, options[name], roots.get(name), download))
            _check_counts(site, mine)
        except Unmeasurable as reason:
            found.missing.append(f"{name} ({reason})")
            continue
        with remember_features():
            for check in mine:
                logger.info("%s: %s ...", name, check.title or "equivariance")
                try:
                    found.figures += check.figures(site)
                except Unmeasurable as reason:
                    found.missing.append(f"{name}, {check.title} ({reason})")
    return found if accelerator.is_main_process else None


def _roots(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Data set -> the folder of its copy. Raises CareHubError for one that is none, or of no data set."""
    roots: dict[str, str] = {}
    for text in given:
        name, _, root = text.partition("=")
        if name not in names or not root:
            name, root = Path(text).resolve().name, text
        others = [other for other in names if other not in roots and other != "shapes"]
        if name not in names and len(others) != 1:
            known = ", ".join(names) or "there is none"
            raise CareHubError(
                f"`data_root` '{text}' is of no data set of the card ({known}); give NAME=FOLDER."
            )
        if not os.path.isdir(root):
            raise CareHubError(f"`data_root` '{root}' is not a folder.")
        roots[name if name in names else others[0]] = root
    return roots


def _data(name: str, options: dict[str, Any], root: str | None, download: bool) -> DataConfig:
    """How the data set is read. Raises Unmeasurable where there is no copy of it."""
    public = public_name(name, options)
    if root is None and public != "shapes" and not (public and download):
        raise Unmeasurable(
            f"no copy at hand; it is '{public}' on the Hub" if public else "no copy at hand; not public"
        )
    return data_of(name, options, root)


def _check_counts(site: Site, checks: Sequence[Check]) -> None:
    """Raise Unmeasurable where the test images are others than those on which figures were measured."""
    stated = {check.stated["n_test"] for check in checks if "n_test" in check.stated}
    if not stated:
        return
    test = site.both[1]
    here = {len(test), int((test.labels >= 0).sum()) if test.labels is not None else 0}
    if other := stated - here:
        raise Unmeasurable(f"measured on {min(other):,} test images, of which there are {len(test):,} here")


def _final_checks(encoder: Encoder) -> Iterator[Check]:
    """That of the figures of the end of training, but for those of training itself."""
    config = encoder.config
    stated = {key: value for key, value in config.results.items() if key in FINAL_KEYS}
    if config.dataset and stated:
        yield Check(config.dataset, "final", stated, FINAL_METRICS, measure_final, ROUNDING)


def measure_final(site: Site) -> dict[str, Any]:
    """The figures that training gives of its end, of the weights as they are stored."""
    config, data = site.encoder.config, dataclasses.asdict(site.data)
    taken = {"seed": config.seed} | {k: config.training[k] for k in ("knn_bank",) if k in config.training}
    options = TrainConfig(**data, **{k: v for k, v in taken.items() if v is not None})
    recipe = recorded_augmentation(config)
    return final_results(options, site.encoder, *site.splits, recipe, site.accelerator)[0]


def _accuracy_checks(record: Record, heads: Sequence[LinearHead]) -> Iterator[Check]:
    for dataset, by_label in record.get("accuracy", {}).items():
        for label, stated in by_label.items():
            head = next((head for head in heads if head.dataset == dataset), None)
            yield Check(dataset, label, stated, ACCURACIES, partial(_measure_accuracy, label, stated, head))


def _measure_accuracy(
    label: str, stated: dict[str, Any], head: LinearHead | None, site: Site
) -> dict[str, Any]:
    """Of the row `label` of the card. Raises Unmeasurable for settings that are not known."""
    if label == "kNN" and {"k", "temperature"} <= stated.keys():
        votes: tuple = stated["k"], stated["temperature"], stated.get("n_train")
        return knn_results(site.encoder, *site.labeled, site.accelerator, *votes)
    tuned = stated.get("protocol") == "finetune"
    one = tuned and "seeds" not in stated and head is not None and head.metrics.get("protocol") == "finetune"
    if head is not None and (one or head.metrics == stated):
        return _measure_head(head, site)  # trained again it would be another one, by rounding
    if tuned:
        raise Unmeasurable("fine-tuning began with other weights")
    settings = {name: stated[name] for name in ("protocol", *SETTINGS) if name in stated}
    config = EvalConfig(**dataclasses.asdict(site.data), encoder="the one at hand", **settings)
    if "protocol" not in stated or config.protocol_name != label:
        raise Unmeasurable("its settings are not recorded")
    return mean_over_seeds(linear_probe(site.encoder, *site.labeled, site.accelerator, config))


def _head_check(head: LinearHead) -> Check:
    return Check(head.dataset, "stored head", head.metrics, ACCURACIES, partial(_measure_head, head))


def _measure_head(head: LinearHead, site: Site) -> dict[str, Any]:
    """Accuracies of a head as it is stored; how it was trained is no figure of it."""
    _, test = site.labeled
    features = embed_all(site.encoder, test.images, site.accelerator, "backbone", title="test images")
    return head.metrics | top_accuracies(head(features), test.labels) | {"n_test": len(test)}


def _equivariance_check(dataset: str, found: dict[str, Any]) -> Check:
    keys = ("images", "n_test", "effective_rank", "families", "attributes")
    stated = {key: found[key] for key in keys if key in found}
    probed = {name for values in found["attributes"].values() for name in values}
    return Check(dataset, "", stated, {*FAMILY_METRICS, *probed}, partial(_measure_equivariance, found))


def _measure_equivariance(found: dict[str, Any], site: Site) -> dict[str, Any]:
    recipe = recorded_augmentation(site.encoder.config)
    if "recipe" in found:
        recipe = _recipe(found["recipe"])
    train, test = equivariance_subsets(*site.both, found["images"])
    results = equivariance_results(site.encoder, train, test, recipe, found["draws"], found.get("seed", 0))
    return results | {"n_test": len(site.both[1])}


def _recipe(values: dict[str, Any]) -> AugmentationConfig:
    """Another encoder's augmentation, as it is recorded. Raises Unmeasurable for what is none."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return AugmentationConfig(**given)
    except (TypeError, CareHubError) as error:
        raise Unmeasurable("its augmentation is not one") from error


def _rotation_checks(rotations: RotationSet) -> Iterator[Check]:
    pixels: dict[tuple, Tensor] = {}  # transformations are measured on the same images
    for name, found in rotations.fitted.items():
        stated = _rotation_figures(found)
        measure = partial(_measure_rotations, rotations, name, pixels)
        yield Check(found.dataset, f"rotations by {name}", stated, ROTATION_METRICS, measure)


def _measure_rotations(
    rotations: RotationSet, name: str, pixels: dict[tuple, Tensor], site: Site
) -> dict[str, Any]:
    found = rotations.fitted[name]
    if found.source not in ("data set", "folder"):
        raise Unmeasurable(
            "the pairs of images are not at hand" if found.source else "it is not recorded on what"
        )
    source = site.data if found.source == "data set" else str(site.data.data_root)
    key = (found.source, found.images, found.seed)
    if key not in pixels:
        pixels[key] = chosen_images(site.encoder, source, found.images, found.seed)
    return _rotation_figures(measure_rotations(site.encoder, rotations, name, pixels[key])[0])


def _rotation_figures(found: FittedTransformation) -> dict[str, Any]:
    each = zip(found.strengths, found.measured, strict=True)
    return {
        "images": found.images,
        "overall": found.overall,
        "measured": {f"{strength:g}": measured for strength, measured in each},
    }
