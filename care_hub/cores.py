"""The cores that this process may use. Light: it is asked before torch is imported."""

import math
import os
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may run on; fewer where its container has a quota of their time."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(quota(), count)))


def quota(groups: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> float:
    """Cores' worth of time that Linux's control groups allow, of version 1 or 2; infinity for no limit."""
    limits = [math.inf]
    with suppress(OSError):  # another system
        for line in Path(groups).read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                top = Path(mount, "cpu") if controllers else Path(mount)
                own = top / group.lstrip("/")
                limits += [_limit(folder) for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return min(limits)


def _limit(folder: Path) -> float:
    """The quota of one group: microseconds of CPU time in each period of so many."""
    with suppress(OSError, ValueError):  # "max": without limit
        used, period = (folder / "cpu.max").read_text().split()
        return int(used) / int(period)
    with suppress(OSError, ValueError):
        used, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(used) / int(period) if int(used) > 0 else math.inf
    return math.inf
