"""Machines that run lines of shell: this one, or those that ssh reaches; all of a list at once."""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from launch.commands import Commands, Done
from lm.errors import LaunchError

SECONDS = 60.0
"""What a short script may take on a host."""
AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine, and the command here that runs there what it is given as one more argument, with a shell."""

    name: str
    argv: tuple[str, ...]

    def command(self, script: str) -> list[str]:
        """The command here that runs the script there. Whatever shell the user has there, bash reads it."""
        return [*self.argv, f"exec bash -c {shlex.quote(script)}"]


THIS = Host("this machine", ("bash", "-c"))


class Hosts:
    """All of some hosts."""

    def __init__(self, hosts: Sequence[Host], commands: Commands):
        self.hosts = tuple(hosts)
        self.commands = commands

    def try_each(
        self, script: Callable[[int], str] | str, *, given: bytes | None = None, seconds: float = SECONDS
    ) -> list[Done]:
        """Runs a script on all at the same time, that of host i if it is a function of i."""
        texts = [script if isinstance(script, str) else script(i) for i in range(len(self.hosts))]

        def one(host: Host, text: str) -> Done:
            return self.commands.run(host.command(text), given=given, seconds=seconds)

        if self.commands.dry_run:
            return [one(host, text) for host, text in zip(self.hosts, texts, strict=True)]
        pool = ThreadPoolExecutor(min(AT_ONCE, len(self.hosts)))
        try:
            return list(pool.map(one, self.hosts, texts))
        except BaseException:  # Ctrl-C does not wait for a host that does not answer
            pool.shutdown(wait=False, cancel_futures=True)
            self.commands.kill()
            raise
        finally:
            pool.shutdown()

    def each(
        self,
        script: Callable[[int], str] | str,
        what: str,
        *,
        given: bytes | None = None,
        seconds: float = SECONDS,
        codes: Mapping[int, str] | None = None,
    ) -> list[str]:
        """What the script printed on each.

        Raises LaunchError that names every host where it did not end with 0: `what` went wrong, and why, which
        `codes` may tell by the exit code.
        """
        ended = self.try_each(script, given=given, seconds=seconds)
        raise_failed(what, self.failed(ended, codes))
        return [done.out for done in ended]

    def failed(self, ended: Sequence[Done], codes: Mapping[int, str] | None = None) -> dict[str, str]:
        """Why, by the name of the host, for those that did not end with 0."""
        why = codes or {}
        return {
            host.name: why.get(done.code, done.why).format(said=done.why)
            for host, done in zip(self.hosts, ended, strict=True)
            if done.code
        }


def raise_failed(what: str, failed: Mapping[str, str]) -> None:
    """Raises LaunchError when any host failed."""
    if failed:
        lines = [f"{what}:", *(f"    {name}: {why}" for name, why in failed.items())]
        raise LaunchError("\n".join(lines))
