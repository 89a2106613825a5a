"""Hosts that plain ssh reaches, one process on each."""

import dataclasses
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from launch import keep
from launch.background import Background
from launch.commands import Commands
from launch.hosts import Host
from launch.target import Run


@dataclasses.dataclass(frozen=True)
class Ssh:
    """A list of hosts. The first is process 0, which coordinates."""

    hosts: tuple[str, ...] = ()
    """As ssh takes them: name, user@name, or ssh://user@name:port."""
    address: str = ""
    """Of the first host, as the others reach it; empty: as it stands in `hosts`."""
    port: int = 8476
    """Of the coordinator."""
    options: tuple[str, ...] = ()
    """For ssh, as in its config: IdentityFile=…, ProxyJump=…."""
    connect_seconds: int = 10
    folder: str = "~/lm-launches"
    """For launches, on the hosts. Relative paths of the config start at the launch's folder in it."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.hosts:
            yield "hosts", "must name at least one host"
        if twice := [host for i, host in enumerate(self.hosts) if host in self.hosts[:i]]:
            yield "hosts", f"has {twice[0]} twice"
        for host in self.hosts:
            if not host or host.startswith("-") or any(c.isspace() for c in host):
                yield "hosts", f"{host!r} is no host; write name, user@name, or ssh://user@name:port"
        if not 0 < self.port < 65536:
            yield "port", f"must be from 1 to 65535, got {self.port}"
        if self.connect_seconds < 1:
            yield "connect_seconds", f"must be at least 1, got {self.connect_seconds}"
        if not self.folder.startswith(("/", "~/")):
            yield "folder", f"must start with / or ~/, got {self.folder!r}"


class SshHosts(Background):
    """One process on each host."""

    def up(self, run: Run) -> None:
        known, names = f"hosts/{self.name}.txt", [host.name for host in self.hosts.hosts]
        if not self.commands.dry_run and (gone := [host for host in keep.read(known).split() if host not in names]):
            self.commands.say(
                f"{self.name} was on {', '.join(gone)} too, at which is not looked now: what runs there is ended by "
                "`stop` with the hosts of then"
            )
        super().up(run)
        if not self.commands.dry_run:
            keep.keep(known, "\n".join(names) + "\n")

    def delete(self) -> None:
        super().delete()
        if not self.commands.dry_run:
            keep.forget(f"hosts/{self.name}.txt")


def target(name: str, ssh: Ssh, commands: Commands) -> Background:
    """The launch of this name on the hosts."""
    first = ssh.address or host_name(ssh.hosts[0])

    def variables(i: int) -> Mapping[str, str]:
        if len(ssh.hosts) == 1:
            return {}
        return {
            "JAX_COORDINATOR_ADDRESS": f"{first}:{ssh.port}",
            "JAX_NUM_PROCESSES": str(len(ssh.hosts)),
            "JAX_PROCESS_ID": str(i),
        }

    hosts = [Host(host, (*command(ssh), host)) for host in ssh.hosts]
    return SshHosts(name, commands, hosts, ssh.folder, variables)


def command(ssh: Ssh) -> tuple[str, ...]:
    """ssh with its options: it asks nothing, gives up soon, and takes one connection for many commands."""
    options = [
        *ssh.options,  # of an option given twice, ssh takes the first
        "BatchMode=yes",
        f"ConnectTimeout={ssh.connect_seconds}",
        # A host that was cut off is noticed in a connection that is open, too.
        "ServerAliveInterval=5",
        "ServerAliveCountMax=3",
        "ControlMaster=auto",
        "ControlPersist=60",
        f"ControlPath={_sockets()}/%C",
    ]
    return ("ssh", *(part for option in options for part in ("-o", option)))


def host_name(host: str) -> str:
    """Of a host as ssh takes it, without user and port."""
    return (urlsplit(host).hostname or "") if host.startswith("ssh://") else host.rpartition("@")[2]


def _sockets() -> Path:
    """A folder of this user alone; short, as a path of a socket has about a hundred characters."""
    folder = Path(f"/tmp/lm-ssh-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077 or folder.is_symlink():
        raise PermissionError(f"{folder} is not this user's alone; remove it")
    return folder
