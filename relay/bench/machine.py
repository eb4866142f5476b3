"""What the figures were measured on, and how a process's memory is read."""

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = (
    *("coder-chat-relay", "aio-pika", "aiormq", "pamqp", "msgspec", "asyncpg", "sqlalchemy", "websockets", "httpx"),
    *("faststream", "uvloop"),
)


def machine() -> Mapping[str, object]:
    """The machine, Python, and the libraries that matter here, by name; what cannot be found out is left out."""
    found: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mib": _memory_mib(),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return {name: value for name, value in found.items() if value}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (ValueError, OSError):
        return None


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process (of this one), pages that it shares counted by its share (PSS).

    Raises:
        OSError: The system does not tell: only Linux does.
    """
    text = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def peak_bytes(pid: int) -> int:
    """The most that a process ever had resident. Raises as `resident_bytes`."""
    text = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def can_read_memory() -> bool:
    """Whether `resident_bytes` works here."""
    return sys.platform == "linux" and Path("/proc/self/smaps_rollup").exists()
