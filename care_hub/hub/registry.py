"""From a name to the folder of a pretrained encoder: in the package, registered, or on the Hub."""

import os
import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path

from ..errors import CareHubError, suggest
from .client import fetch
from .export import export_folder, read_config, sha256

SHIPPED = Path(__file__).parents[1] / "pretrained"  # an export folder for each, named like it


@dataclass(frozen=True)
class Entry:
    """A pretrained encoder, called `architecture.tag` as timm calls weights.

    Exactly one of `repo_id` (on the Hub) and `folder` says where it is. `sha256` is that of
    model.safetensors, checked when the encoder is loaded. Raises CareHubError for a name without a
    tag.

    >>> Entry("resnet50_cifar.birds", repo_id="ann/birds", metrics={"top1": 91.5}, license="mit").repo_id
    'ann/birds'
    """

    name: str
    repo_id: str | None = None
    revision: str | None = None
    folder: Path | None = None
    sha256: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # in percent
    license: str = ""

    def __post_init__(self) -> None:
        if "." not in self.name or (self.repo_id is None) == (self.folder is None):
            needs = "a name like architecture.tag and either `repo_id` or `folder`"
            raise CareHubError(f"a registry entry needs {needs}, got {self}.")


_registered: dict[str, Entry] = {}


def register_encoder(entry: Entry) -> None:
    """Make `entry` known to `load_encoder`, `create_model` and `list_models`.

    A package does the same without being imported by naming an Entry, or a function that returns a
    list of them, as an entry point of the group `care_hub.encoders`. Raises CareHubError for a name
    that is taken.

    >>> register_encoder(Entry("resnet34_cifar.birds", repo_id="ann/birds"))
    >>> find_entry("resnet34_cifar.birds").repo_id
    'ann/birds'
    """
    if entries().get(entry.name, entry) != entry:
        raise CareHubError(f"there is already an encoder '{entry.name}'; give yours another tag.")
    _registered[entry.name] = entry


def entries() -> dict[str, Entry]:
    """All pretrained encoders, by name."""
    return _installed() | _registered


@cache
def _installed() -> dict[str, Entry]:
    """The encoders in the package, then those of other packages' entry points."""
    found = {}
    for path in sorted(SHIPPED.glob("*/config.json")):
        config, _ = read_config(path.parent)
        metrics = {k: v for k, v in config.results.items() if "top1" in k}
        checksum, name = config.sha256["model.safetensors"], path.parent.name
        found[name] = Entry(name, folder=path.parent, sha256=checksum, metrics=metrics, license="mit")
    for point in entry_points(group="care_hub.encoders"):
        try:
            value = point.load()
            theirs = {entry.name: entry for entry in ([value] if isinstance(value, Entry) else value())}
            if doubled := found.keys() & theirs.keys():
                raise CareHubError(f"there is already an encoder '{min(doubled)}'")
            found |= theirs
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # another package's fault, as sys.exit(), must not end this one
            warnings.warn(f"the encoders of '{point.value}' can't be registered ({error!r}).", stacklevel=2)
    return found


def find_entry(name: str) -> Entry | None:
    """The entry called `name`, or the first one of architecture `name`."""
    known = entries()
    return known.get(name) or next((e for e in known.values() if e.name.split(".")[0] == name), None)


def locate(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A run or export folder, a registry name or a Hub id -> the export folder, fetched if need be.

    `revision` and the rest are for the Hub: see `client.fetch`. Raises CareHubError where nothing
    is found, and where the weights are not those that were registered.
    """
    if os.path.isdir(source):  # false for an impossible name, where `Path.is_dir` raises
        return export_folder(source)
    name = str(source)
    download = partial(fetch, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if entry := find_entry(name):
        folder = entry.folder or download(str(entry.repo_id), revision or entry.revision)
        if entry.sha256 and sha256(folder / "model.safetensors") != entry.sha256:
            raise CareHubError(
                f"the weights of '{name}' are not those that were registered (another sha256)."
            )
        return folder
    if name.count("/") != 1 or name.startswith((".", "/")):
        near = suggest(name, entries()) or "; `care-hub list` shows it."
        raise CareHubError(f"'{name}' is not a folder, no Hub id like org/name and not in the registry{near}")
    try:
        return download(name, revision)
    except CareHubError as error:  # a misspelt folder is likelier than a misspelt repository
        raise CareHubError(f"there is no folder '{name}' here, and {error}") from error
