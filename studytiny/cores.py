"""How many processor cores this process may really use.

A container sees all the cores of its host and may be granted two of them. Threads beyond that do not help: they take
turns, and wherever all must have finished a part before the next one begins, they wait for each other.
"""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path, PurePosixPath

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def granted_cores() -> int:
    """Cores that affinity and the control groups (Linux) leave to this process, at least 1."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        allowed = os.cpu_count() or 1
    return max(1, math.floor(min(allowed, cpu_quota())))


def cpu_quota(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """Cores' worth of time that the control groups grant, infinite where they set no limit.

    A group is bound by its own limit and by those of all groups above it. Version 2 says "quota period" in ``cpu.max``,
    version 1 has a file for each (kernel documentation: cgroup-v2, cgroup-v1/cpuacct, sched-bwc).
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    quota = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's; then only the root is there, and it is the container's own.
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            mounts = (controllers, "cpu") if controllers else (".",)
            quota = min([quota, *(_quota_of(cgroups / mount / group) for mount in mounts)])
    return quota


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        cores = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file: no limit here
        return math.inf
    return cores if cores > 0 else math.inf  # version 1 writes -1 for none


def use_granted_cores() -> int:
    """Tells PyTorch to take no more threads than there are cores for it; returns how many that is.

    It never takes more than PyTorch would by itself, so ``OMP_NUM_THREADS`` still holds.
    """
    cores = granted_cores()
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
    return torch.get_num_threads()


def use_one_thread_here() -> None:
    """From now on PyTorch's operations in the calling thread do not ask other threads for help.

    Every thread that calls PyTorch gets helpers of its own, and where helpers outnumber the cores, OpenMP lets all of
    them sleep and wakes them for every operation: beside a main thread that has computed something, two threads write
    half as many characters as one.
    """
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
        # This was also a wish for threads to come, and for matrix products everywhere; said again, elsewhere, it holds.
        again = threading.Thread(target=torch.set_num_threads, args=(before,))
        again.start()
        again.join()
