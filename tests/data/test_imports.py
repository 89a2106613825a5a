import subprocess
import sys


def test_looking_at_data_does_not_start_jax() -> None:
    modules = ", ".join(f"lm.data.{name}" for name in ("show", "stats", "find", "report", "build"))
    code = f"import sys, {modules}; print([m for m in ('jax', 'grain') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
