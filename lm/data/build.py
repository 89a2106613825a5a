"""`build`: text to tokenised shards, in parallel, continued where an interrupted build stopped.

The input is divided into parts that do not depend on each other. Part p becomes `train-p`, `heldout-p`
and then `part-p.json`, whose presence says that the part is done. `plan.json` is written first and says
what the parts are parts of; `manifest.json` is written last and is all that reading needs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter

from etils import epath

from lm.data import files, sources, workers
from lm.data.config import DataConfig
from lm.data.duplicates import FOLDERS, check_library, find_duplicates
from lm.data.manifest import FILE, SPLITS, Manifest, SourceCount, TokenizerRecord, read_manifest
from lm.data.middle import find_sentinels
from lm.data.overlap import INDEX, collect_overlap, index_evaluation_sets, overlap_lines
from lm.data.parts import Job, added, build_part
from lm.data.plan import (
    PART_FILES,
    PLAN,
    Plan,
    divide,
    file_differences,
    part_bytes,
    part_file,
    read_part,
    read_plan,
    refuse,
    setting_differences,
    settings_of,
)
from lm.data.progress import Meter, Progress
from lm.data.records import Shard
from lm.data.shares import WHOLE, Share, wait_until
from lm.data.sources import File
from lm.data.splits import holdout_below
from lm.data.tokenizers import FILE_NAMES, Tokenizer, load_tokenizer
from lm.data.vocabulary import Sample, make_tokenizer
from lm.errors import DataError, StorageError

PREPARED = "prepared.json"
"""Says, while a directory is being built, that what all parts need is there."""


def build(
    config: DataConfig,
    directory: epath.PathLike,
    progress: Progress,
    tokenizer: Tokenizer | None = None,
) -> Manifest:
    """Tokenises what `config` names into `directory`, or finds that this has been done.

    What was built is taken as it is, also when its sources have changed since or are not on this machine.
    The result does not depend on the number of processes. `tokenizer`: one that is shared with other sources, in place
    of the one that `config` says.

    Raises:
        DataError: bad input; or the directory holds data built with other settings or `paths`, or the
            unfinished build of sources that have changed.
        ConfigError: `data.filter` cannot be imported, or a library that is needed is not installed.
        StorageError: the result cannot be written.
    """
    manifest = build_share(config, directory, progress, tokenizer)
    assert manifest is not None  # of one share, nothing is left to others
    return manifest


def build_share(
    config: DataConfig,
    directory: epath.PathLike,
    progress: Progress,
    tokenizer: Tokenizer | None = None,
    share: Share = WHOLE,
) -> Manifest | None:
    """Like `build`, on one of several machines that see the same directory and sources. None: others are not done.

    Each builds its parts, and whichever ends last finishes the data. One that was stopped is started again with the
    same share; or `build` does what is missing.
    """
    folder = epath.Path(directory)
    if (folder / FILE).exists():  # before the lock: the directory may be one that cannot be written
        return _as_built(config, folder, progress)
    sources.load_filter(config.filter)  # before anything is read: its name may be mistaken
    check_library(config)
    listed = sources.list_files(config.paths, config.holdout_paths, config.tokens)

    def waiting() -> None:
        progress(f"another process is building {folder}; waiting for it")

    # Shares go side by side. A build of all that is missing goes alone: it would take away what they still read.
    alone = files.sole_writer(folder, waiting, shared=share != WHOLE)
    with alone, files.sole_writer(folder, waiting, share.lock):
        if not (folder / FILE).exists():
            files.remove_abandoned(folder)  # by builds that were killed: they may fill the disk
            return _build(config, folder, listed, progress, tokenizer, share)
    return _as_built(config, folder, progress)


def _as_built(config: DataConfig, folder: epath.Path, progress: Progress) -> Manifest:
    stored = read_plan(folder)
    settings = settings_of(config)
    refuse(folder, setting_differences(stored, settings))
    _kept_tokenizer(config, folder)
    changed = f"sources changed since; using the data as built; delete {folder} to build anew"
    same_paths = stored.get("paths") == list(config.paths)
    try:
        listed = sources.list_files(config.paths, config.holdout_paths, config.tokens)
    except DataError:
        if not any(sources.present(p) for p in config.paths + config.holdout_paths):
            progress("the sources are not here; using the data as built")
        elif same_paths:
            progress(changed)
        else:
            raise
        return read_manifest(folder)
    limit = stored["part_bytes"]
    plan = Plan(config.paths, settings, limit, divide(listed, limit), stored["holdout_below"])
    different = list(file_differences(folder, stored, plan))
    if different and same_paths:
        progress(changed)
        return read_manifest(folder)
    refuse(folder, different)
    if plan.to_dict() != stored:
        with contextlib.suppress(StorageError):  # in a directory that cannot be written, files are compared each time
            files.write_json(folder / PLAN, plan.to_dict())
    return read_manifest(folder)


def _build(
    config: DataConfig,
    folder: epath.Path,
    listed: list[File],
    progress: Progress,
    shared: Tokenizer | None,
    share: Share,
) -> Manifest | None:
    if share.first:
        plan, tokenizer = _prepare(config, folder, listed, progress, shared)
    else:
        ready = _prepared(config, folder, listed, progress, share)
        if ready is None:
            return read_manifest(folder)
        plan, tokenizer = ready
    _build_parts(config, folder, plan, share, progress)
    absent = sum(not part_file(folder, part).exists() for part in range(len(plan.parts)))
    if absent:
        progress(
            f"share {share} of {folder} is built; {absent} of {len(plan.parts)} parts are still to come from other "
            "machines. The last one finishes the data; `lm data build` without --part builds all that is missing"
        )
        return None
    return _finish(config, folder, plan, tokenizer, progress)


def _prepare(
    config: DataConfig, folder: epath.Path, listed: list[File], progress: Progress, shared: Tokenizer | None
) -> tuple[Plan, Tokenizer]:
    """What all parts need, written once."""
    settings = settings_of(config)
    # Before the first part is done nothing depends on an earlier plan, which may be of a mistaken config.
    begun = any(folder.glob(PART_FILES))
    stored = read_plan(folder) if begun else {}
    limit = stored["part_bytes"] if stored else part_bytes(listed)
    parts = divide(listed, limit)
    plan = Plan(
        config.paths, settings, limit, parts, stored["holdout_below"] if stored else holdout_below(config, parts)
    )
    if stored:
        refuse(folder, [*setting_differences(stored, settings), *file_differences(folder, stored, plan)])
    if plan.to_dict() != stored:
        files.write_json(folder / PLAN, plan.to_dict())
    path = folder / FILE_NAMES[config.tokenizer.kind]
    if begun and path.exists():
        tokenizer = _kept_tokenizer(config, folder)
    else:
        tokenizer = shared or make_tokenizer(config, [Sample(config, parts, plan.holdout_below)], progress)
        if config.fim_rate:
            find_sentinels(tokenizer, config.fim_tokens)  # before anything is built: it may have none
        files.write_atomically(path, tokenizer.serialize())
    if config.overlap_paths and not (begun and (folder / INDEX).exists()):
        index_evaluation_sets(config, folder / INDEX, progress)
    files.write_json(folder / PREPARED, {"plan": plan.identity})
    return plan, tokenizer


def _prepared(
    config: DataConfig, folder: epath.Path, listed: list[File], progress: Progress, share: Share
) -> tuple[Plan, Tokenizer] | None:
    """What the first of several machines wrote; waits until it is there. None: meanwhile others have built all."""
    plan: Plan | None = None

    def there() -> bool:
        nonlocal plan
        if (folder / FILE).exists():
            return True
        stored = read_plan(folder)
        if not stored or not (folder / PREPARED).exists():
            return False
        limit = stored["part_bytes"]
        plan = Plan(config.paths, settings_of(config), limit, divide(listed, limit), stored["holdout_below"])
        different = [*setting_differences(stored, plan.settings), *file_differences(folder, stored, plan)]
        if different and any(folder.glob(PART_FILES)):  # until then it may be of an earlier, mistaken config
            refuse(folder, different)
        return not different and json.loads((folder / PREPARED).read_text())["plan"] == plan.identity

    wait_until(there, f"share 1/{share.count} to write plan and tokenizer of this config and these files", progress)
    return None if plan is None or (folder / FILE).exists() else (plan, _kept_tokenizer(config, folder))


def _finish(config: DataConfig, folder: epath.Path, plan: Plan, tokenizer: Tokenizer, progress: Progress) -> Manifest:
    manifest = _collect(config, folder, plan, tokenizer)
    for abandoned in folder.glob("*.tmp"):  # by builds that were killed, on any machine
        if not abandoned.name.startswith(FILE):  # which another machine may be writing
            abandoned.unlink(missing_ok=True)
    for finished in folder.glob(FOLDERS):
        (folder / finished.name).rmtree(missing_ok=True)
    for temporary in (PREPARED, INDEX):
        (folder / temporary).unlink(missing_ok=True)
    files.write_json(folder / FILE, manifest.to_dict())
    left_out = Counter[str]()
    for source in manifest.sources.values():
        left_out.update(source.skipped)
    if left_out:
        progress("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items())))
    for line in overlap_lines(manifest.overlap) if manifest.overlap else ():
        progress(line)
    progress(
        f"built {folder}: {manifest.tokens('train'):,} tokens to train on, "
        f"{manifest.tokens('heldout'):,} held out, vocabulary {tokenizer.vocab_size}"
    )
    return manifest


def _kept_tokenizer(config: DataConfig, folder: epath.Path) -> Tokenizer:
    """The tokenizer in the directory. Raises DataError if the file that it was taken from is another now."""
    wanted = config.tokenizer
    kept = load_tokenizer(wanted.kind, folder / FILE_NAMES[wanted.kind])
    changed = (
        wanted.path is not None
        and epath.Path(wanted.path).exists()
        and load_tokenizer(wanted.kind, wanted.path).fingerprint != kept.fingerprint
    )
    if changed:
        raise DataError(
            f"{wanted.path}: changed since {folder} was built with it; choose another data.dir or delete that directory"
        )
    return kept


def _build_parts(config: DataConfig, folder: epath.Path, plan: Plan, share: Share, progress: Progress) -> None:
    missing = [part for part in range(len(plan.parts)) if share.has(part) and not part_file(folder, part).exists()]
    if not missing:
        return
    mine = sum(share.has(part) for part in range(len(plan.parts)))
    if len(missing) < mine:
        progress(f"{mine - len(missing)} of {mine} parts are there; going on")
    found = None
    if config.duplicates != "keep":
        found = find_duplicates(config, folder, plan, share, progress)
        if found is None:  # meanwhile others have built all
            return
    where, identity, left_out_in = os.fspath(folder), plan.identity, found and os.fspath(found)
    jobs = [Job(config, where, part, plan.parts[part], plan.holdout_below, identity, left_out_in) for part in missing]
    meter = Meter("tokenising", sum(piece.stop - piece.start for job in jobs for piece in job.pieces), progress)
    for _ in workers.run(build_part, jobs, config.workers, meter):
        pass
    meter.finish()


def _collect(config: DataConfig, folder: epath.Path, plan: Plan, tokenizer: Tokenizer) -> Manifest:
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    counts: dict[str, Counter[str]] = {}
    skipped: dict[str, Counter[str]] = {}
    checksums: dict[str, str | None] = {}
    overlaps = []
    identity = plan.identity
    for index in range(len(plan.parts)):
        record = read_part(folder, index)
        if record.get("plan", identity) != identity:  # records of earlier versions have none
            raise DataError(
                f"{folder}: part {index} was built by a process with another config, or of other files, that still ran "
                "when this build began; end it, delete the directory and build again"
            )
        for split, shard in record["shards"].items():
            splits[split].append(Shard(**shard))
        for source, count in record["sources"].items():
            skipped.setdefault(source, Counter()).update(count.pop("skipped"))
            before, checksum = checksums.get(source, f"{0:064x}"), count.pop("checksum", None)
            # Parts that an earlier version built have none.
            checksums[source] = None if before is None or checksum is None else added(before, checksum)
            counts.setdefault(source, Counter()).update(count)
        if config.overlap_paths:
            overlaps.append(record["overlap"])
    if not splits["train"]:
        left = "; all text was held out" if splits["heldout"] else ""
        raise DataError(f"data.paths: no document to train on in {', '.join(config.paths)}{left}")
    if not splits["heldout"] and (config.holdout_paths or config.holdout_fraction):
        raise DataError("data: no text was held out; check data.holdout_paths and data.holdout_fraction")
    return Manifest(
        TokenizerRecord(tokenizer.kind, tokenizer.file_name, tokenizer.fingerprint, tokenizer.vocab_size),
        {
            source: SourceCount(**counts[source], skipped=dict(skipped[source]), checksum=checksums[source])
            for source in counts
        },
        {split: tuple(shards) for split, shards in splits.items()},
        collect_overlap(overlaps, removed=config.overlap == "remove") if config.overlap_paths else None,
    )
