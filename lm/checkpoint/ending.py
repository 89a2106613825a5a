"""The end of a process whose last save hangs: the interpreter would wait for Orbax's threads for ever."""

import contextlib
import os
import sys
import threading
import time

EXIT_SECONDS = 5.0
"""What a process that is done may still take to end by itself."""


def end_without(thread: threading.Thread, code: int) -> None:
    """Lets the process end although the thread, and others of Orbax that the interpreter waits for, may never."""

    def end() -> None:
        while not _main_thread_has_ended():
            time.sleep(0.1)
        thread.join(EXIT_SECONDS)
        if thread.is_alive():
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def _main_thread_has_ended() -> bool:
    """Whether it only waits for others. It counts as alive for so long, and may not be joined."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame is None or (frame.f_code.co_filename, frame.f_code.co_name) == (threading.__file__, "_shutdown")
