"""What comes out of JSON is checked by one schema: the declared types of dataclasses and TypedDicts."""

import dataclasses
import reprlib
import sys
import types
import typing
from contextlib import suppress
from functools import cache
from typing import Any


def check_type(value: Any, hint: Any, name: str, depth: int = 16) -> None:
    """Raise ValueError that names the place, unless `value`, called `name` and out of JSON, is a `hint`.

    `hint` is what a dataclass may declare: bool, int (of 64 bits), float (a finite number), str,
    None, Any, list[...], tuple[...], dict[str, ...], a union, a TypedDict (which may have other
    entries too), or a dataclass (others only if it has a field `extra`; None for whatever has a
    default). Nothing is nested more than `depth` times.

    >>> check_type({"lr": [0.1, "0.2"]}, dict[str, list[float]], "care")
    Traceback (most recent call last):
    ValueError: care.lr[1] is '0.2'
    """
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    parts: dict[str, tuple[Any, Any]] = {}  # place -> value and hint
    if hint is Any:
        hints: dict[type, Any] = {dict: dict[str, Any], list: list[Any]}
        return check_type(value, hints.get(type(value), str | float | bool | None), name, depth)
    if origin in (typing.Union, types.UnionType):
        for kind in kinds:
            with suppress(ValueError):
                return check_type(value, kind, name, depth)
        sound = False
    elif dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        fields, required, may_be_none = _fields(hint)
        is_open = typing.is_typeddict(hint) or "extra" in fields
        sound = isinstance(value, dict) and (is_open or value.keys() <= fields.keys())
        if sound and (missing := required - value.keys()):
            raise ValueError(f"{name} has no {min(missing)}")
        given = {k: v for k, v in value.items() if v is not None or k not in may_be_none} if sound else {}
        parts = {f".{k}": (v, fields.get(k, Any)) for k, v in given.items()}
    elif origin is dict:
        sound = isinstance(value, dict)
        parts = {f".{k}": (v, kinds[1]) for k, v in value.items()} if sound else {}
    elif origin in (list, tuple):
        sound = isinstance(value, list | tuple) and (origin is list or len(value) == len(kinds))
        each = kinds * len(value) if sound and origin is list else kinds
        parts = {f"[{k}]": pair for k, pair in enumerate(zip(value, each, strict=True))} if sound else {}
    elif hint is float:
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        sound = sound and abs(value) <= sys.float_info.max  # NaN is not
    else:
        sound = type(value) is (hint or types.NoneType) and (type(value) is not int or abs(value) < 2**63)
    if not sound or depth == 0:
        raise ValueError(f"{name} is {reprlib.repr(value)}")
    for place, (part, kind) in parts.items():
        check_type(part, kind, f"{name}{place}", depth - 1)


@cache
def _fields(hint: Any) -> tuple[dict[str, Any], frozenset[str], frozenset[str]]:
    """Of a dataclass or TypedDict: types of all fields, names that must be there, names that may be None."""
    hints = typing.get_type_hints(hint)
    if typing.is_typeddict(hint):
        return hints, hint.__required_keys__, frozenset()
    missing, fields = dataclasses.MISSING, dataclasses.fields(hint)
    required = frozenset(f.name for f in fields if f.default is missing and f.default_factory is missing)
    return hints, required, frozenset(hints) - required
