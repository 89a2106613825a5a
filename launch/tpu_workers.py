"""The hosts of Cloud TPU slices: what lm needs is installed there, in the versions with which the run began."""

import hashlib
import shlex
from typing import TYPE_CHECKING

from launch import keep
from launch.background import Background
from launch.commands import Commands
from launch.hosts import Host, Hosts
from launch.target import Run
from launch.tpu_slices import Quiet

if TYPE_CHECKING:
    from launch.tpu_vm import TpuVm

INSTALL_SECONDS = 1800.0
ACTIVATE = "[ ! -e ~/lm-python/bin/activate ] || . ~/lm-python/bin/activate"
_VERSIONS = """\
import importlib.metadata as m, platform
print("python==" + platform.python_version())
found = {(d.metadata["Name"], d.version) for d in m.distributions()}
print(*sorted(f"{name}=={version}" for name, version in found if name != "lm"), sep="\\n")"""


class Workers(Background):
    """The hosts of the slices. JAX, and lm with it, finds out there which process each of them is."""

    def __init__(self, name: str, commands: Commands, hosts: list[Host], spec: "TpuVm"):
        quiet = Quiet(dry_run=commands.dry_run, yes=commands.yes, take_over=commands.take_over, say=commands.say)
        # The TPU, or an error: never the CPU in its place.
        super().__init__(name, quiet, hosts, spec.folder, lambda i: {"JAX_PLATFORMS": "tpu,cpu"})
        self.spec = spec

    def _sync(self, run: Run) -> None:
        super()._sync(run)
        if not self.spec.install:
            return
        versions = keep.read(kept_versions(self.name, run))
        doing, what = "installing what lm needs", "what lm needs could not be installed (tpu_vm.install)"
        if versions:
            doing += ", in the versions with which this run began"
            what += (
                f", in the versions of {keep.kept(kept_versions(self.name, run))}; --allow versions takes the newest"
            )
        with self.commands.stage(doing, f"nothing was started; `{self.verb('up')}` goes on"):
            self.hosts.each(self._install(run, versions), what, given=_libraries(versions), seconds=INSTALL_SECONDS)
            if not versions:
                first = Hosts(self.hosts.hosts[:1], self.commands)
                script = "\n".join([*run.prelude({}, "."), f"{run.python} -c {shlex.quote(_VERSIONS)}"])
                (found,) = first.each(script, "which versions were installed is not known")
                if found:  # not in a dry run
                    keep.keep(kept_versions(self.name, run), found)

    def _install(self, run: Run, versions: str) -> str:
        lines = [f"cd {self.base}/code-{run.code} || exit 1", "set -eo pipefail"]
        if versions:
            file = f"{self.base}/versions.txt"
            python = versions.splitlines()[0].removeprefix("python==")
            lines += [f"cat > {file}", f"export LM_PYTHON={python} UV_CONSTRAINT={file} PIP_CONSTRAINT={file}"]
        return "\n".join([*lines, *self.spec.install])


def kept_versions(name: str, run: Run) -> str:
    """Where they are kept here: by the run, which may be gone on with by another launch."""
    where = run.dir if "://" in run.dir else f"{name} {run.dir}"
    return f"versions/{hashlib.sha256(where.encode()).hexdigest()[:16]}.txt"


def _libraries(versions: str) -> bytes | None:
    """As uv and pip read them."""
    return "".join(f"{line}\n" for line in versions.splitlines()[1:]).encode() or None
