"""By which code, and on which libraries, a run was trained: kept with every checkpoint.

Other code may compute something else, and another version of a library adds in another order. Either is refused unless
it is asked for. Of the code only that is kept which decides what a step computes.
"""

import json
from collections.abc import Collection, Iterator

from lm.errors import ConfigError, StorageError, some
from lm.parallel.agreement import facts_of

FILE = "code.json"
ALLOWED = ("code", "versions")
"""What `lm train --allow` takes."""
_PARTS = ("model", "kernels", "optim", "parallel", "data", "train/step", "train/state", "train/guard", "train/groups")
_TOLD = 5

Provenance = dict[str, dict[str, str]]


def provenance() -> Provenance:
    """Of this process: hashes of files, and versions by package."""
    facts = facts_of({})
    code = {name: digest for name, digest in facts["code"].items() if name.startswith(tuple(f"lm/{p}" for p in _PARTS))}
    return {"code": code, "versions": dict(facts["version"])}


def write(found: Provenance) -> bytes:
    return (json.dumps(found, indent=1, sort_keys=True) + "\n").encode()


def refuse_if_other(contents: bytes, step: int, allow: Collection[str]) -> list[str]:
    """What is another one now than when checkpoint `step` was saved with these `contents`, a line for each.

    Raises ConfigError for what is not in `allow`, StorageError for contents that `write` did not write.
    """
    try:
        saved = json.loads(contents)
        found = {section: list(_differences(section, saved[section])) for section in ALLOWED}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{FILE} of checkpoint {step} cannot be read: {error!r}") from None
    refused = [section for section in ALLOWED if found[section] and section not in allow]
    lines = [line for section in ALLOWED for line in found[section]]
    if refused:
        told = some(lines, _TOLD, "\n    ")
        raise ConfigError(
            f"checkpoint {step} was made by other {' and other '.join(refused)} than is here:\n    {told}\n"
            "what is computed may be another thing, if only in the last bits; to go on all the same, add "
            + " ".join(f"--allow {section}" for section in refused)
        )
    return lines


def _differences(section: str, saved: dict[str, str]) -> Iterator[str]:
    here = provenance()[section]
    for name in sorted({*saved, *here}):
        before, now = saved.get(name, "missing"), here.get(name, "missing")
        if before == now:
            continue
        if "missing" in (before, now):
            before, now = ("there" if one != "missing" else one for one in (before, now))
        yield f"{name}: {before} -> {now}"
