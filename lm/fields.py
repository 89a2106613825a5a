"""What a config may hold: values that fit declared types, and the dotted keys that name them.

A leaf is an `int`, `float`, `str`, `bool`, `Literal`, a union such as `X | None`, or a tuple of these. A
section is a dataclass; a field may also be `Section | None` or `tuple[Section, ...]`. Wherever a value comes
from (Python, JSON, a command line), it goes through one function, `decode`.
"""

import ast
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import zip_longest
from typing import Any, Literal, Union

from lm.errors import ConfigError


def decode(kind: Any, value: Any, key: str, root: type) -> Any:
    """`value`, from Python or JSON, as declared type `kind` holds it.

    A number may stand for a float, and a list for a tuple; a section is an instance or a dict. Raises
    ConfigError that names `key`, the place in `root`.
    """

    def unfit() -> ConfigError:
        return ConfigError(f"{key or 'config'}: expected {_describe(kind)}, got {short(value)}")

    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if is_section(kind):
        if type(value) is not kind and not isinstance(value, dict):
            raise unfit()
        given, kinds = field_values(kind, value), field_types(kind)
        for name in given:
            if name not in kinds:
                raise unknown(join(key, name), root)
        for name in kinds:
            if name not in given:
                raise ConfigError(f"{join(key, name)}: no value is given, and it has no default")
        return kind(**{name: decode(kinds[name], given[name], join(key, name), root) for name in kinds})
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in members:
            return None
        rest = [member for member in members if member is not types.NoneType]
        if len(rest) == 1:
            return decode(rest[0], value, key, root)
        for member in rest:
            try:
                return decode(member, value, key, root)
            except ConfigError:
                continue
        raise unfit()
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in members):
            return value
        close = get_close_matches(str(value), map(str, members), 1)
        raise ConfigError(f"{unfit()}; did you mean {close[0]!r}?") if close else unfit()
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise unfit()
        kinds_of_items = _item_types(kind, len(value))
        if len(kinds_of_items) != len(value):
            raise ConfigError(f"{key}: expected {len(kinds_of_items)} values, got {short(value)}")
        items = enumerate(zip(kinds_of_items, value, strict=True))
        return tuple(decode(item_kind, item, join(key, i), root) for i, (item_kind, item) in items)
    if kind is float and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind in (int, float, str, bool):
        accepted = int | float if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise unfit()
        try:
            return kind(value)
        except OverflowError as error:  # an integer beyond all floats
            raise unfit() from error
    raise TypeError(f"{key}: a config cannot hold {kind}")


def parse(kind: Any, text: str) -> Any:
    """`text` of a command line as a value for `decode`; text that does not fit `kind` stays as it is.

    Integers may be `1_000` or `3e5`, booleans are `true` and `false`, absent values `none`, and tuples
    `a,b` or as Python writes them; `()` and nothing are the empty tuple.
    """
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if types.NoneType in members and text.lower() == "none":
            return None
        for member in members:
            try:
                return decode(member, parse(member, text), "", member)
            except (ConfigError, TypeError):
                continue
    elif origin is Literal:
        return next((choice for choice in members if str(choice) == text), text)
    elif origin is tuple:
        if text.startswith(("(", "[")):
            try:
                value = ast.literal_eval(text)
                return value if isinstance(value, tuple | list) else [value]
            except (ValueError, SyntaxError):
                text = text.strip("()[]")
        items = [item.strip() for item in text.removesuffix(",").split(",")] if text.strip() else []
        kinds = (*_item_types(kind, len(items)), *[str] * len(items))
        return [parse(item_kind, item) for item_kind, item in zip(kinds, items, strict=False)]
    elif kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    elif kind in (int, float):
        try:
            exact = kind is float or "e" not in text.lower()
            number = kind(text) if exact else float(text)
            # Above 2**53 a float no longer tells which integer was meant
            return number if exact or not number.is_integer() or number >= 2**53 else int(number)
        except ValueError:
            return text
    return text


def is_section(kind_or_value: Any) -> bool:
    return dataclasses.is_dataclass(kind_or_value)


def section_in(kind: Any) -> Any:
    """The dataclass in `Section`, `Section | None` or `tuple[Section, ...]`; None in anything else."""
    members = [member for member in typing.get_args(kind) if member not in (types.NoneType, Ellipsis)]
    inner = members[0] if len(members) == 1 else kind
    return inner if is_section(inner) else None


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """The declared types of a section's fields, in order."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def field_values(section: Any, value: Any) -> dict[str, Any]:
    """What `value`, an instance, a dict or None, gives for the fields of `section`, with its defaults."""
    fields = dataclasses.fields(section)
    if type(value) is section:
        return {field.name: getattr(value, field.name) for field in fields}
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return {**defaults, **made, **(value or {})}


def declarations(kind: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All keys that `kind` declares, with their types; every index is 0, a section precedes its fields."""
    yield key, kind
    if section := section_in(kind):
        inside = join(key, 0) if typing.get_origin(kind) is tuple else key
        for name, below in field_types(section).items():
            yield from declarations(below, join(inside, name))


def unknown(key: str, root: type) -> ConfigError:
    """The error for a key that names no leaf of `root`, with the nearest one that does."""
    kinds = dict(declarations(root))
    declared = re.sub(r"(?<=\.)\d+(?=\.|$)", "0", key)
    inside = [k for k in kinds if k.rpartition(".")[0] in (declared, f"{declared}.0")]
    if inside:
        return ConfigError(f"{key!r} is a section; its keys are {', '.join(inside)}")
    guess = _nearest(declared, [k for k in kinds if not section_in(kinds[k])])
    if not guess:
        return ConfigError(f"unknown key {key!r}; the sections are {', '.join(field_types(root))}")
    words = zip_longest(guess.split("."), key.split("."), fillvalue="")
    guess = ".".join(b if a == "0" and b.isdigit() else a for a, b in words if a)
    return ConfigError(f"unknown key {key!r}; did you mean {guess!r}?")


def join(key: str, name: str | int) -> str:
    return f"{key}.{name}" if key and name != "" else f"{key}{name}"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(key: str, keys: Sequence[str]) -> str | None:
    """A like name in the same section, else a like name in another, else the most alike key."""
    section, _, name = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    for candidates in (siblings, keys):
        if close := get_close_matches(name, [k.rpartition(".")[2] for k in candidates], 1):
            namesakes = [k for k in candidates if k.rpartition(".")[2] == close[0]]
            return get_close_matches(key, namesakes, 1, cutoff=0)[0]
    return next(iter(get_close_matches(key, keys, 1)), None)


def _item_types(kind: Any, count: int) -> tuple[Any, ...]:
    members = typing.get_args(kind)
    return members[:1] * count if members[-1] is Ellipsis else members


def _describe(kind: Any) -> str:
    members = typing.get_args(kind)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_describe, members))
    if typing.get_origin(kind) is Literal:
        return ("one of " if len(members) > 1 else "") + ", ".join(map(repr, members))
    if typing.get_origin(kind) is tuple:
        return "a tuple"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return "none" if kind is types.NoneType else names.get(kind) or kind.__name__
