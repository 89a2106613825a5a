"""What this user keeps on this machine from one launch to the next, in ~/.config/lm (or XDG_CONFIG_HOME)."""

import os
from pathlib import Path

from lm.errors import ConfigError


def kept(name: str) -> Path:
    """The file of this name, which may not be there."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lm" / name


def read(name: str) -> str:
    """Its text; empty when it is not there. Raises ConfigError when it cannot be read."""
    try:
        return kept(name).read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise _wrong(name, "read", error) from error


def keep(name: str, text: str, *, first: bool = False) -> str:
    """Writes the whole file at once, with `first` only where there is none. Returns the text that is there then."""
    path = kept(name)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        try:
            if first:
                os.link(new, path)
            else:
                os.replace(new, path)
        except FileExistsError:
            return path.read_text()
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise _wrong(name, "written", error) from error
    return text


def forget(name: str) -> None:
    """Removes it, if it is there."""
    try:
        kept(name).unlink(missing_ok=True)
    except OSError as error:
        raise _wrong(name, "removed", error) from error


def _wrong(name: str, what: str, error: OSError) -> ConfigError:
    return ConfigError(f"{kept(name)} cannot be {what}: {error.strerror}; XDG_CONFIG_HOME=FOLDER names another place")
