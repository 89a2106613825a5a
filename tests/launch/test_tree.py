"""What a launch takes along."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from launch import tree
from launch.tree import pack, unpack
from lm.errors import ConfigError


def names(data: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return set(tar.getnames())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("lm/a.py", "runs/one/log.txt", "lm/__pycache__/a.pyc", ".hidden/x", "data.bin", "gone.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "pyproject.toml").write_text("")
    return root


def test_a_tree_without_git(checkout: Path) -> None:
    assert names(pack(checkout)[0]) == {"lm/a.py", "data.bin", "gone.py", "pyproject.toml"}


def test_a_checkout_with_changes(checkout: Path) -> None:
    if not shutil.which("git"):
        pytest.skip("needs git")
    (checkout / ".gitignore").write_text("runs\n__pycache__\n*.bin\n")
    subprocess.run(["git", "init", "-q", checkout], check=True)
    subprocess.run(["git", "-C", checkout, "add", "gone.py", "lm"], check=True)
    (checkout / "gone.py").unlink()
    (checkout / "new.py").write_text("not committed")
    assert names(pack(checkout)[0]) == {"lm/a.py", "new.py", ".gitignore", ".hidden/x", "pyproject.toml"}


def test_the_same_files_are_the_same_bytes(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkout, other)
    (other / "lm" / "a.py").touch()
    assert pack(checkout) == pack(other)
    (other / "lm" / "a.py").write_text("changed")
    assert pack(checkout)[1] != pack(other)[1]


def test_too_much(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LARGEST_BYTES", 2**20)
    (checkout / "data.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(ConfigError, match=r"more than 1 MiB to send, of which data.bin is 3: move data out"):
        pack(checkout)


def test_an_archive_arrives_whole_or_not_at_all(checkout: Path, tmp_path: Path) -> None:
    data, code = pack(checkout)
    there = tmp_path / "there"
    there.mkdir()

    def run(given: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["bash", "-c", unpack(str(there), code)], input=given, capture_output=True)

    for cut in (0, 10, len(data) // 2, len(data) - 1):
        broken = run(data[:cut])
        assert broken.returncode != 0
        assert broken.stderr
        assert not list(there.iterdir())
    for _ in range(2):
        assert run(data).returncode == 0
    assert (there / f"code-{code}" / "lm" / "a.py").read_text() == "lm/a.py"
