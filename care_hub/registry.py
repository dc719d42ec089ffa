"""The registry of pretrained encoders under its public name, for packages that register theirs."""

from .hub.registry import Entry, entries, find_entry, register_encoder

find = find_entry

__all__ = ["Entry", "entries", "find", "find_entry", "register_encoder"]
