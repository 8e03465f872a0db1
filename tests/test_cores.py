"""Threads follow the cores that are granted, not those of the host."""

import math
import os
import subprocess
import sys

import pytest

from studytiny.cores import cpu_quota, granted_cores


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n", encoding="ascii")


@pytest.fixture
def quota(tmp_path):
    """Reads made-up control groups under tmp_path as those of a process whose /proc/self/cgroup says ``own``."""

    def read(own):
        (tmp_path / "own").write_text(own + "\n", encoding="ascii")
        return cpu_quota(tmp_path / "cgroup", tmp_path / "own")

    return read


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000", 2), ("150000 100000", 1.5), ("50000 100000", 0.5), ("max 100000", math.inf)]
)
def test_quota_of_version_2(tmp_path, quota, text, cores):
    write(tmp_path / "cgroup", cpu__max=text)
    assert quota("0::/") == cores


def test_the_tightest_group_above_counts(tmp_path, quota):
    write(tmp_path / "cgroup" / "a", cpu__max="300000 100000")
    write(tmp_path / "cgroup" / "a" / "b", cpu__max="max 100000")
    assert quota("0::/a/b") == 3


def test_a_path_of_the_host_falls_back_to_the_containers_root(tmp_path, quota):
    write(tmp_path / "cgroup", cpu__max="200000 100000")
    assert quota("0::/docker/0123/not/here") == 2


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_quota_of_version_1(tmp_path, quota, folder):
    write(tmp_path / "cgroup" / folder, cpu__cfs_quota_us="400000", cpu__cfs_period_us="100000")
    assert quota("5:memory:/x\n4:cpu,cpuacct:/") == 4


def test_minus_one_of_version_1_is_no_limit(tmp_path, quota):
    write(tmp_path / "cgroup" / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert quota("4:cpu:/") == math.inf


@pytest.mark.parametrize("text", ["", "x y", "1 0", "1", "\N{SNOWMAN}"])
def test_damaged_files_are_no_limit(tmp_path, quota, text):
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup" / "cpu.max").write_text(text, encoding="utf-8")
    assert quota("0::/") == math.inf


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can bind a process to cores")
def test_a_process_bound_to_one_core_uses_one_thread():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import studytiny.cores as c; print(c.granted_cores(), c.use_granted_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["1", "1"]


def test_there_is_at_least_one_core():
    assert granted_cores() >= 1


def test_one_thread_here_leaves_the_others_as_they_are():
    code = """
import threading, torch
from studytiny.cores import use_one_thread_here
torch.set_num_threads(3)
threads = []
def ask():
    threads.append(torch.get_num_threads())
def inside():
    use_one_thread_here()
    ask()
for target in (inside, ask):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
ask()
print(*threads)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "1",
        "3",
        "3",
    ]
