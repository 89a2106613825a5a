"""Whose a launch is: an id that this user keeps, so that neither a new host name nor a moved checkout changes it."""

import dataclasses
import getpass
import secrets
import shlex
import socket

from launch import keep

_ID = "id"


@dataclasses.dataclass(frozen=True)
class Owner:
    """Written down as both, the id and, for people, the name."""

    id: str
    name: str

    def __str__(self) -> str:
        return f"{self.id} {self.name}"


def this_user(*, keep_it: bool = True) -> Owner:
    """Who runs this. An id is made at the first time, and kept unless `keep_it` is False."""
    found = keep.read(_ID).strip()
    if not found:
        found = secrets.token_hex(8)
        if keep_it:
            found = keep.keep(_ID, f"{found}\n", first=True).strip()
    return Owner(found, f"{getpass.getuser()}@{socket.gethostname()}")


def whose(text: str) -> str:
    """The name in what an `Owner` has written down; what others have written is taken as it is."""
    return text.strip().partition(" ")[2] or text.strip() or "somebody else"


def is_mine(text: str, owner: Owner) -> bool:
    """Whether an `Owner` with this id has written it."""
    return text.split(" ")[0].strip() == owner.id


def shell(owner: Owner, *, take_over: bool) -> str:
    """Bash: in the folder of a launch `mine` tells whether it is the owner's or nobody's, and else says whose."""
    own = shlex.quote(str(owner))
    take = f"echo {own} > owner.$$ && mv owner.$$ owner\n    return" if take_over else ""
    return f"""\
mine() {{
    [ ! -e owner ] || [ "$(cut -d ' ' -f 1 owner)" = {owner.id} ] && return
    {take}
    cut -d ' ' -f 2- owner; return 1
}}
claim() {{  # at once and whole, and never for the second
    echo {own} > owner.new.$$ && {{ ln owner.new.$$ owner 2> /dev/null; rm owner.new.$$; }} && mine
}}
"""
