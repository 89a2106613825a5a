"""The code that a launch takes along: this working tree, as one archive that is the same bytes for the same files."""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from lm.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 200 * 2**20
"""Of the archive: what is larger has data in it that does not belong there."""
_LEFT_OUT = {"__pycache__", "runs", "build", "dist", "node_modules"}


def pack(root: Path = ROOT) -> tuple[bytes, str]:
    """A gzipped tar of the tree, and a short digest that names it.

    In a git checkout: what git tracks or would add, as it is now, changes that are not committed included. Else
    all but hidden folders, runs and caches. Raises ConfigError when that is too much.
    """
    archive = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=archive, mode="wb", mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        sizes: dict[str, int] = {}
        for name in sorted(_names(root)):
            tar.add(root / name, arcname=name, recursive=False, filter=_plain)
            sizes[name] = (root / name).lstat().st_size
            if sum(sizes.values()) > LARGEST_BYTES:
                most = max(sizes, key=sizes.__getitem__)
                raise ConfigError(
                    f"the working tree {root} has more than {LARGEST_BYTES >> 20} MiB to send, of which {most} is "
                    f"{sizes[most] >> 20}: move data out of it, or name it in .gitignore"
                )
    data = archive.getvalue()
    return data, hashlib.sha256(data).hexdigest()[:12]


def unpack(base: str, code: str, new: str = "new") -> str:
    """Shell that makes the folder `code-CODE` in `base` of an archive at its standard input: whole, or not at all."""
    return f"""\
cd {base} || exit 1
[ -d code-{code} ] && exit 0
new={new}.$$.$RANDOM  # another one may copy the same at the same time
mkdir "$new" || exit 1
said=$(tar -xzf - -C "$new" 2>&1) || {{
    rm -rf "$new"
    {{ grep -m 1 'No space' <<< "$said" || head -n 1 <<< "$said"; }} >&2
    exit 1
}}
mv -T "$new" code-{code} 2> /dev/null || {{ rm -rf "$new"; [ -d code-{code} ]; }}"""


def _names(root: Path) -> Iterator[str]:
    if not (root / "pyproject.toml").exists():  # installed: beside it are all other packages
        for package in ("lm", "launch"):
            yield from _walk(root, root / package)
        return
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        try:
            listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
        except (OSError, subprocess.CalledProcessError):
            pass
        else:
            # What is deleted and not committed is still listed; a folder is another checkout.
            yield from {name for name in listed if name and (root / name).is_file()}
            return
    yield from _walk(root, root)


def _walk(root: Path, top: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and name[0] != "." and ".egg-" not in name]
        for name in files:
            if not name.endswith(".pyc") and (Path(folder) / name).is_file():
                yield (Path(folder) / name).relative_to(root).as_posix()


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs from one checkout to another."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    info.mode = 0o755 if info.mode & 0o100 else 0o644
    return info
