"""Checkpoints that somebody else made: what is read is what the manifest lists, in the folder, and nothing runs."""

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.checkpoint import manifest as manifests
from lm.checkpoint.checkpoints import read_attachment
from lm.checkpoint.manifest import BadCheckpoint, FileChecksum, Manifest, epath
from lm.errors import LmError, StorageError

from .made import Writer, abstract, bits, rewrite_manifest, small

ABSTRACT = abstract(small(0))


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "state/../../secret", "..", ".", "", "state//_METADATA", "./config.json", "a\0b"],
)
def test_names_of_files_elsewhere_are_refused_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path / "run")
    writer.write(1)
    (tmp_path / "run" / "secret").write_text("a secret")
    folder = tmp_path / "run" / "1"
    files = Manifest.read(epath.Path(folder), 1).files
    rewrite_manifest(folder, files={name: FileChecksum(8, "0" * 64), **files})

    def no_reading(path: object) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(manifests.FileChecksum, "of", no_reading)
    with pytest.raises(StorageError, match="names a file that is not in the folder: "):
        writer.restore(1, ABSTRACT)
    with pytest.raises(StorageError, match="names a file that is not in the folder: "):
        read_attachment(tmp_path / "run", 1, name)


def link_a_file(folder: Path) -> str:
    (folder / "config.json").rename(folder.parent / "elsewhere")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere")
    return "config.json is a link"


def link_a_folder(folder: Path) -> str:
    (folder / "state").rename(folder.parent / "elsewhere")
    (folder / "state").symlink_to("../elsewhere")
    return "state is a link"


def add_a_file(folder: Path) -> str:
    (folder / "state" / "d" / "more").write_text("more")
    return "state/d/more was not written by the save"


@pytest.mark.parametrize("change", [link_a_file, link_a_folder, add_a_file])
def test_links_and_files_that_were_not_saved_are_refused(change: Callable[[Path], str], tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.write(1, 2)
    problem = change(tmp_path / "2")
    restored = writer.restore_newest(ABSTRACT)
    assert restored is not None
    assert (restored[0], bits(restored[1])) == (1, bits(small(1)))
    assert problem in writer.said[0]


def test_a_run_may_be_a_link(tmp_path: Path) -> None:
    Writer(tmp_path / "there").write(1)
    (tmp_path / "here").symlink_to("there")
    assert bits(Writer(tmp_path / "here").restore(1, ABSTRACT)) == bits(small(1))


@pytest.mark.parametrize("body", [{"leaves": 3}, {"files": {"a": 1}}, {"format": "2"}, {"more": 1}], ids=str)
def test_a_manifest_of_another_shape_is_no_manifest(body: dict[str, object], tmp_path: Path) -> None:
    import json

    Writer(tmp_path).write(1)
    path = tmp_path / "1" / "manifest.json"
    changed = {**json.loads(path.read_text()), **body}
    changed.pop("sha256")
    path.write_text(json.dumps({**changed, "sha256": manifests._checksum(changed)}))
    with pytest.raises(BadCheckpoint, match=r"manifest.json is none: "):
        Manifest.read(epath.Path(tmp_path / "1"), 1)


class Attack:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that Orbax gives up
def test_what_a_pickle_would_do_is_not_done(tmp_path: Path) -> None:
    Writer(tmp_path / "good").write(1)
    names = Manifest.read(epath.Path(tmp_path / "good" / "1"), 1).files
    plain = pickle.dumps(Attack(tmp_path / "done"))
    with (tmp_path / "array.npy").open("wb") as file:
        np.save(file, np.array([Attack(tmp_path / "done")], object), allow_pickle=True)
    refused: set[str] = set()
    for name in names:
        for contents in plain, (tmp_path / "array.npy").read_bytes():
            run = tmp_path / "run"
            shutil.copytree(tmp_path / "good", run)
            (run / "1" / name).write_bytes(contents)
            rewrite_manifest(run / "1")
            try:
                state = Writer(run).restore(1, ABSTRACT)
            except LmError:
                refused.add(name)
            else:  # of a file that nothing depends on
                assert bits(state) == bits(small(1))
            assert not (tmp_path / "done").exists(), name
            shutil.rmtree(run)
    assert {"state/_METADATA", "state/manifest.ocdbt"} <= refused
    assert any(name.startswith("state/d/") for name in refused)
    pickle.loads(plain)
    assert (tmp_path / "done").exists()


AUDITED = """
    import sys
    import jax
    from tests.checkpoint.made import ABSTRACT_OF_SMALL, Writer
    Writer(sys.argv[1]).restore(1, ABSTRACT_OF_SMALL)  # what is imported late is by now

    def audit(event, arguments):
        if event in ("pickle.find_class", "exec", "compile", "marshal.loads", "os.system", "subprocess.Popen"):
            seen.append((event, str(arguments)[:200]))

    seen = []
    sys.addaudithook(audit)
    Writer(sys.argv[1]).restore(1, ABSTRACT_OF_SMALL)
    exec("1 + 1")
    print(seen)
"""


def test_restoring_runs_nothing_that_was_loaded(tmp_path: Path) -> None:
    Writer(tmp_path).write(1)
    root = Path(__file__).parent.parent.parent
    code = textwrap.dedent(AUDITED).replace("ABSTRACT_OF_SMALL", "abstract(small(0))")
    code = code.replace("import abstract(small(0)), Writer", "import Writer, abstract, small")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    events = [event for event, _ in eval(ended.stdout.splitlines()[-1])]
    assert events == ["compile", "exec"]  # those of the line that shows that they are seen
