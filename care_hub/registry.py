"""Pretrained encoders by name: those in the package, those that others register, and any folder or Hub repository."""

from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from .errors import CareHubError, suggest

SHIPPED = Path(__file__).parent / "pretrained"  # one export folder for each encoder, named like it


@dataclass(frozen=True)
class Entry:
    """A pretrained encoder. `name` is `architecture.tag`, as timm names weights; exactly one of `repo_id` (on the Hub) and
    `folder` says where it is. `sha256` is that of model.safetensors, checked on load; `metrics` are in per cent."""

    name: str
    repo_id: str | None = None
    revision: str | None = None
    folder: Path | None = None
    sha256: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    license: str = ""

    def __post_init__(self) -> None:
        if "." not in self.name or (self.repo_id is None) == (self.folder is None):
            raise CareHubError(f"a registry entry needs a name like architecture.tag and either repo_id or folder, got {self}.")


_registered: dict[str, Entry] = {}


def register_encoder(entry: Entry) -> None:
    """Make `entry` known to `load_encoder`, `create_model` and `list_models`. A package does the same without being
    imported by naming an Entry, or a function that returns a list of them, as an entry point of the group `care_hub.encoders`.
    """
    if entry.name in entries() and entries()[entry.name] != entry:
        raise CareHubError(f"there is already an encoder '{entry.name}'; give yours another tag.")
    _registered[entry.name] = entry


def entries() -> dict[str, Entry]:
    """All pretrained encoders, by name."""
    return _found() | _registered


@cache
def _found() -> dict[str, Entry]:
    import json
    import warnings
    from importlib.metadata import entry_points

    found: dict[str, Entry] = {}
    for folder in sorted(p.parent for p in SHIPPED.glob("*/config.json")):
        care = json.loads((folder / "config.json").read_text())["care"]
        metrics = {k: v for k, v in care.get("results", {}).items() if "top1" in k}
        found[folder.name] = Entry(
            folder.name, folder=folder, sha256=care["sha256"]["model.safetensors"], metrics=metrics, license="mit"
        )  # fmt: skip
    for point in entry_points(group="care_hub.encoders"):
        try:
            value = point.load()
            theirs = {entry.name: entry for entry in ([value] if isinstance(value, Entry) else value())}
            if taken := found.keys() & theirs.keys():
                raise CareHubError(f"there is already an encoder '{min(taken)}'")
            found |= theirs
        except Exception as error:  # another package's fault must not take ours down
            warnings.warn(f"the encoders of '{point.value}' can't be registered ({error}).", stacklevel=2)
    return found


def find(name: str) -> Entry | None:
    """The entry called `name`, or the first one of architecture `name`."""
    known = entries()
    return known.get(name) or next((entry for key, entry in known.items() if key.split(".", 1)[0] == name), None)


def locate(source: str | Path, **hub_options) -> Path:
    """A folder, a registry name or a Hub id -> the export folder, fetched if need be (`hub_options`: see `hub.fetch`)."""
    from .export import export_folder, sha256
    from .hub import fetch

    if Path(source).is_dir():
        return export_folder(source)
    entry = find(str(source))
    if entry is None:
        if str(source).count("/") != 1 or str(source).startswith((".", "/")):
            near = suggest(str(source), entries())
            raise CareHubError(
                f"'{source}' is not a folder, no Hub id like org/name and not in the registry{near or '; care-hub list shows it'}."
            )
        return fetch(str(source), **hub_options)
    folder = entry.folder or fetch(entry.repo_id, **({"revision": entry.revision} | {k: v for k, v in hub_options.items() if v}))
    if entry.sha256 and sha256(folder / "model.safetensors") != entry.sha256:
        raise CareHubError(f"the weights of '{entry.name}' are not those that were registered: their sha256 differs.")
    return folder


def list_models(filter: str = "", pretrained: bool = False, hub: bool = False, author: str | None = None) -> list[str]:
    """Names that match the wildcard `filter`: architectures (timm's registry, ours included); with `pretrained` the
    encoders that `load_encoder` knows by name; with `hub` the ids of CARE repositories on the Hub (of `author`)."""
    if hub:
        from .hub import search

        return [name for name in search(author) if fnmatch(name, filter or "*")]
    if pretrained:
        return sorted(name for name in entries() if fnmatch(name, filter or "*"))
    import timm

    from . import models  # noqa: F401  registers ours

    return timm.list_models(filter)
