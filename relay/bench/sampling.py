"""Where a process's CPU time goes, by looking at its main thread some hundred times per CPU second.

Unlike a tracing profiler it does not make calls look dearer than they are. Time in C belongs to the line that called.
"""

import signal
from collections import Counter
from pathlib import Path
from types import FrameType

_PERIOD_SECONDS = 0.001  # of CPU time; the kernel gives what its own clock allows, often a fourth of that
_LINES = 45
_ROOT = str(Path(__file__).resolve().parents[2])


class Sampler:
    """Counts stacks between `start` and `stop`. In the main thread of a process only."""

    def __init__(self) -> None:
        self._lines: Counter[str] = Counter()
        self._own: Counter[str] = Counter()
        self._below: Counter[str] = Counter()
        self.samples = 0

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._look)
        if (loop_wakes := signal.set_wakeup_fd(-1)) != -1:  # asyncio is told of each signal: it need not be
            signal.set_wakeup_fd(loop_wakes, warn_on_full_buffer=False)
        signal.setitimer(signal.ITIMER_PROF, _PERIOD_SECONDS, _PERIOD_SECONDS)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)

    def _look(self, _: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self.samples += 1
        self._lines[f"{_where(frame)}:{frame.f_lineno} {frame.f_code.co_qualname}"] += 1
        self._own[_name(frame)] += 1
        stack = set()
        while frame is not None:
            stack.add(_name(frame))
            frame = frame.f_back
        self._below.update(stack)

    def text(self) -> str:
        """Three tables: functions with all that they call, functions by themselves, and lines."""
        parts = [f"{self.samples} samples of the main thread, evenly over its CPU time"]
        for title, counts in (
            ("with all that they call", self._below),
            ("by themselves", self._own),
            ("by line, what C code it calls included", self._lines),
        ):
            parts += ["", title, ""]
            parts += [f"{100 * n / max(1, self.samples):6.1f} %  {name}" for name, n in counts.most_common(_LINES)]
        return "\n".join(parts) + "\n"


def _name(frame: FrameType) -> str:
    return f"{_where(frame)} {frame.f_code.co_qualname}"


def _where(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    return path.removeprefix(_ROOT + "/").rpartition("site-packages/")[2].rpartition("/lib/python")[2]
