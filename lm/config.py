"""Configs as trees of frozen dataclasses: loaded, overridden, checked, shown, stored and compared.

A dotted key names a leaf: `train.steps`, `data.sources.0.path`. What a leaf may be is in `lm/fields.py`.
"""

import dataclasses
import importlib
import json
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from lm.errors import ConfigError, StorageError, some
from lm.fields import (
    declarations,
    decode,
    field_types,
    field_values,
    is_section,
    join,
    parse,
    section_in,
    short,
    unknown,
)

T = TypeVar("T")
_FREE = "free"


def free(default: T) -> T:
    """A field that may change when a run is resumed; for a section, all of its leaves may."""
    return dataclasses.field(default=default, metadata={_FREE: True})


def load(source: str, root: type[T], overrides: Sequence[str] = ()) -> T:
    """The checked config in `source`: a `.py` file with a `config`, a `.json` file or a run directory.

    `overrides` are `["--train.steps", "50", "--run.dir=runs/a"]`. JSON files and run directories may be URLs.
    Nothing is written, and `sys.path` and `sys.modules` are left without the config and its siblings.
    Raises ConfigError, whose lines each name the file or the key.
    """
    value = _execute(source, root) if source.endswith(".py") else _as_today(root, _read_json(source))
    try:
        config = decode(root, value, "", root)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    config = override(config, overrides)
    check(config)
    return config


def override(config: T, arguments: Sequence[str]) -> T:
    """`config` with the leaves that command line `arguments` name set to their values; see `load`.

    An absent section (`None`) is filled with defaults by setting one of its leaves, and so is the element
    after the last of a tuple of sections. Raises ConfigError for an unknown key or an unfit value.
    """
    root = type(config)
    value: Any = config
    for key, text in _pairs(arguments).items():
        value = _assign(root, value, key.split("."), text, "", root)
    return decode(root, value, "", root)


def check(config: Any) -> None:
    """Raises ConfigError with the first problems that the sections find, one line each.

    A section may define `check(self) -> Iterable[tuple[str, str]]`, which yields a field (or a dotted key
    below the section) and what is wrong with it. It runs only if the sections in it have no problem, so
    it may rely on them.
    """
    problems = [f"{key}: {problem}" for key, problem in _problems(config, "")]
    if problems:
        raise ConfigError(some(problems, 5, "\n"))


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as nested dicts and lists that JSON holds exactly; non-finite floats are strings."""

    def encode(value: Any) -> Any:
        if is_section(value):
            return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [encode(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return encode(config)


def from_dict(root: type[T], data: dict[str, Any]) -> T:
    """The inverse of `to_dict`. Missing keys take their defaults; raises ConfigError for anything unfit.

    A root may define `RENAMED`, the keys of today by those that stood in older files.
    """
    return decode(root, _as_today(root, data), "", root)


def to_json(config: Any) -> str:
    """`config` as the text of a `config.json`, keys in the order of declaration."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"


def leaves(config: Any) -> dict[str, Any]:
    """All values by dotted key, in the order of declaration; an absent or empty section is a leaf."""
    return {key: value for key, value, _ in _leaves(config, "", False)}


def flat(data: Any, key: str = "") -> dict[str, Any]:
    """The same of what stands in a config.json, whichever version of lm wrote it."""
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        data = {str(i): item for i, item in enumerate(data)}
    if not isinstance(data, dict) or not data:
        return {key: data}
    return {leaf: value for name, below in data.items() for leaf, value in flat(below, join(key, name)).items()}


def show(config: Any) -> str:
    """One line `train.steps = 50` per leaf, values as Python writes them."""
    return "\n".join(f"{key} = {_spell(value)}" for key, value in leaves(config).items())


@dataclasses.dataclass(frozen=True)
class Difference:
    """A leaf that differs between configs `a` and `b`; `ABSENT` where one of them has no such leaf."""

    key: str
    a: Any
    b: Any
    free: bool  # it may change when a run is resumed


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def diff(a: T, b: T) -> list[Difference]:
    """The leaves that differ, in the order of declaration, those that only `b` has last."""
    before, after = ({key: rest for key, *rest in _leaves(config, "", False)} for config in (a, b))
    found = []
    for key in before | after:
        (x, x_free), (y, y_free) = (side.get(key, (ABSENT, True)) for side in (before, after))
        if x != y and _spell(x) != _spell(y):  # a NaN differs from itself, its spelling does not
            found.append(Difference(key, x, y, x_free and y_free))
    return found


def format_diff(differences: Sequence[Difference]) -> str:
    """One line `train.steps: 50 -> 100` per difference, the free ones marked."""
    return "\n".join(
        f"{d.key}: {_spell(d.a)} -> {_spell(d.b)}{'  (may change on resume)' if d.free else ''}" for d in differences
    )


# Keys and sections


def _leaves(value: Any, key: str, is_free: bool) -> Iterator[tuple[str, Any, bool]]:
    if is_section(value):
        for field in dataclasses.fields(value):
            below = is_free or field.metadata.get(_FREE, False)
            yield from _leaves(getattr(value, field.name), join(key, field.name), below)
    elif isinstance(value, tuple) and value and all(map(is_section, value)):
        for i, item in enumerate(value):
            yield from _leaves(item, join(key, str(i)), is_free)
    else:
        yield key, value, is_free


def _problems(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, tuple):
        return [problem for i, item in enumerate(value) for problem in _problems(item, join(key, str(i)))]
    if not is_section(value):
        return []
    below = [
        problem
        for field in dataclasses.fields(value)
        for problem in _problems(getattr(value, field.name), join(key, field.name))
    ]
    if below or not hasattr(value, "check"):
        return below
    return [(join(key, field), problem) for field, problem in value.check()]


def _pairs(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as a dict."""
    pairs: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, text = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key:
            raise ConfigError(f"unexpected {option!r}; a value follows its key, as in --section.key value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE or --{key}=VALUE")
            text = rest.pop(0)
        if key in pairs:
            raise ConfigError(f"--{key} is given twice, as {pairs[key]!r} and as {text!r}")
        pairs[key] = text
    return pairs


def _assign(kind: Any, value: Any, path: list[str], text: str, key: str, root: type) -> Any:
    """`value`, at `key`, with `text` for what `path` names below it; to be decoded as a whole."""
    section, many = section_in(kind), typing.get_origin(kind) is tuple
    if not path:
        if section and parse(kind, text) not in (None, (), []):
            raise unknown(key, root)
        return parse(kind, text)
    name, *rest = path
    if section and many and name.isdigit():
        items = [*(value or ())]
        if int(name) > len(items):
            raise ConfigError(f"{join(key, name)}: {key} has {len(items)} elements, the next is {len(items)}")
        i = int(name)
        new = _assign(section, items[i] if i < len(items) else None, rest, text, join(key, i), root)
        return [*items[:i], new, *items[i + 1 :]]
    if not section or many or name not in field_types(section):
        raise unknown(join(key, ".".join(path)), root)
    values = field_values(section, value)
    new = _assign(field_types(section)[name], values.get(name), rest, text, join(key, name), root)
    return {**values, name: new}


def _spell(value: Any) -> str:
    """`value` as Python writes it, which `repr` does for all but non-finite floats."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_spell, value))}{',' * (len(value) == 1)})"
    return f"float({str(value)!r})" if isinstance(value, float) and not math.isfinite(value) else repr(value)


# Files


def _as_today(root: type, data: Any) -> Any:
    """`data` with the keys of today; what is no dict of dicts is left to `decode`."""
    for old, new in getattr(root, "RENAMED", {}).items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if isinstance(data, dict) and isinstance(data.get(section), dict) and name in data[section]:
            values = dict(data[section])
            moved = {new_name: values.pop(name), **data.get(new_section, {})}
            data = {**data, section: values, new_section: moved}
    return data


def _read_json(source: str) -> Any:
    path: Any = Path(source)
    try:
        if "://" in source:
            from etils import epath  # slow to import, and only buckets need it

            path = epath.Path(source)
        if not path.exists():
            raise ConfigError(f"{source}: no such file or run directory{_like(path)}")
        if path.is_dir():
            path /= "config.json"
            if not path.exists():
                raise ConfigError(f"{source}: not a run directory, it has no config.json")
        elif path.suffix != ".json":
            raise ConfigError(f"{source}: a config is a .py file, a .json file or a run directory")
        data = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    except ConfigError:
        raise
    except (ImportError, KeyError) as error:  # the last for a URL that epath knows nothing of
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        kind = StorageError if "://" in source else ConfigError  # a bucket may answer the next time
        raise kind(f"{source}: cannot be read: {error}") from error
    return data


def _execute(source: str, root: type) -> Any:
    """The `config` of a Python file. Raises ConfigError with the line where the file goes wrong."""
    path = Path(source)
    if "://" in source:
        raise ConfigError(f"{source}: a Python config must be a local file; copy it here first")
    try:
        if not path.exists():
            raise ConfigError(f"{source}: no such file{_like(path)}")
        code = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from error
    module = types.ModuleType("__config__")
    module.__file__ = str(path)
    folder = path.resolve().parent
    try:
        with _importing_from(folder):
            exec(compile(code, str(path), "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or source}:{error.lineno or 1}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        own = [f"{file}:{line}" for file, line in places if file[0] != "<" and Path(file).resolve().parent == folder]
        raise ConfigError(f"{own[-1] if own else source}: {_explain(error, root)}") from error
    if type(config := module.__dict__.get("config")) is not root:
        found = f"is {short(config)}" if "config" in module.__dict__ else "is missing"
        raise ConfigError(f"{source}: `config` {found}; it must be a {root.__name__}")
    return config


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Imports find modules in `folder` first, write no byte code and forget those modules afterwards."""
    before, search, write_nothing = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()  # a file written within the clock's last tick is not seen otherwise
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = search, write_nothing
        # Other modules stay: importing them again would give every class in them a second identity
        new = {name: module for name, module in sys.modules.items() if name not in before}
        for name in new:
            module = new.get(name.partition(".")[0])
            places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or "/"]
            if Path(places[0]).parent == folder:
                del sys.modules[name]


def _explain(error: BaseException, root: type) -> str:
    """One line for an exception of a config file, with the nearest field for an unknown one."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if match:
        name, field = match.groups()
        for section in filter(None, (section_in(kind) for _, kind in declarations(root))):
            if section.__name__ == name and (close := get_close_matches(field, field_types(section), 1)):
                return f"{name} has no field {field!r}; did you mean {close[0]!r}?"
    return text


def _like(path: Any) -> str:
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
