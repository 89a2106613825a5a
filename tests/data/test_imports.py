import subprocess
import sys


def test_looking_at_data_does_not_start_jax() -> None:
    code = "import sys, lm.data.show, lm.data.build; print([m for m in ('jax', 'grain') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
