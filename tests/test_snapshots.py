"""Snapshots of a run: kill -9, a full disk or a flipped bit cost no more than the work since a save."""

import contextlib
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from studytiny import UserError
from train.snapshots import LOCK_FILE, STATE_FOLDER, Snapshot, load_snapshot, locked, newest_step, save_snapshot

ROOT = Path(__file__).parent.parent


def make_snapshot(step, size=100):
    """What a run may hold at ``step``; of the same step always the same."""
    tensors = {
        "weight": torch.randn(size, generator=torch.Generator().manual_seed(step)),
        "step": torch.tensor(float(step)),
        "random": torch.Generator().manual_seed(step).get_state()[:64],
    }
    return Snapshot(tensors, {"step": step, "history": [{"loss": 0.1 * step}], "名字": "小天"})


def assert_equal(snapshot, expected):
    """To the bit, so that NaN equals itself and 0.0 does not equal -0.0."""
    assert snapshot.values == expected.values
    assert snapshot.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        loaded = snapshot.tensors[name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape), name
        loaded, tensor = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (loaded, tensor))
        assert torch.equal(loaded, tensor), name


def files(folder):
    return sorted(path.name for path in (folder / STATE_FOLDER).iterdir())


def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "float32": torch.tensor([1.0, -0.0, float("nan"), float("-inf"), 1e-45]),
        "float64": torch.tensor(torch.pi, dtype=torch.float64),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(2, 2, 2).half(),
        "uint8": torch.get_rng_state(),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False, True]),
        "zero-dimensional": torch.tensor(7),
        "zero-dimensional bool": torch.tensor(True),
        "empty": torch.zeros(2, 0, 3),
        "transposed": torch.randn(3, 4).t(),
        "every second": base[::2],
        "shared": base,
        "shared again": base,
        "part of it": base[3:5],
        "a parameter": torch.nn.Parameter(torch.randn(3)),
        "名字/with.dots": torch.ones(1),
    }
    values = {
        "step": 3,
        "none": None,
        "text": '你好 \udcff\u0000\n"\\',
        "nested": [1, 2.5, {"a": [True]}],
        "big": 10**30,
    }
    save_snapshot(tmp_path, Snapshot(tensors, values), 3)
    snapshot, skipped = load_snapshot(tmp_path)
    assert_equal(snapshot, Snapshot(tensors, values))
    assert skipped == []
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in snapshot.tensors.values())
    snapshot.tensors["shared"].zero_()
    assert snapshot.tensors["shared again"].any()


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    torch.manual_seed(5)
    torch.randn(3)
    save_snapshot(tmp_path, Snapshot({"rng": torch.get_rng_state()}, {}), 1)
    expected = torch.randn(20)
    torch.manual_seed(6)
    torch.set_rng_state(load_snapshot(tmp_path)[0].tensors["rng"])
    assert torch.equal(torch.randn(20), expected)


def test_order_of_tensors_makes_no_difference(tmp_path):
    snapshot = make_snapshot(1)
    checksums = set()
    for order in (list(snapshot.tensors), list(snapshot.tensors)[::-1]):
        path = save_snapshot(tmp_path, Snapshot({name: snapshot.tensors[name] for name in order}, snapshot.values), 1)
        assert_equal(load_snapshot(tmp_path)[0], snapshot)
        with safe_open(path, framework="pt") as file:
            checksums.add(file.metadata()["sha256"])
    assert len(checksums) == 1


def test_only_the_newest_two_stay(tmp_path):
    assert newest_step(tmp_path) is None
    for step in (630, 9, 10, 99_999_999, 100_000_000, 200_000_000):  # past eight digits names no longer sort as text
        path = save_snapshot(tmp_path, make_snapshot(step), step)
        assert newest_step(tmp_path) == step
    assert files(tmp_path) == ["step-100000000.safetensors", path.name]
    assert load_snapshot(tmp_path)[0].values["step"] == 200_000_000


def test_what_was_saved_last_counts_even_after_going_back(tmp_path):
    for step in (10, 20, 15):
        save_snapshot(tmp_path, make_snapshot(step), step)
    assert files(tmp_path) == ["step-00000010.safetensors", "step-00000015.safetensors"]
    assert_equal(load_snapshot(tmp_path)[0], make_snapshot(15))


def test_loaded_snapshot_does_not_hold_its_file(tmp_path):
    """A file that is still mapped cannot be replaced on Windows; Linux shows the mapping."""
    path = save_snapshot(tmp_path, make_snapshot(1, size=10_000), 1)
    snapshot, _ = load_snapshot(tmp_path)
    save_snapshot(tmp_path, make_snapshot(2), 1)
    assert_equal(snapshot, make_snapshot(1, size=10_000))
    if Path("/proc/self/maps").exists():
        assert path.name not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_values_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    save_snapshot(tmp_path, make_snapshot(1), 1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            save_snapshot(tmp_path, Snapshot({}, {"loss": value}), 2)
    assert files(tmp_path) == ["step-00000001.safetensors"]


# Damage


def load_damaged(folder, data):
    """Loads with ``data`` as snapshot 630 and an intact 600; everything is put back afterwards."""
    path = folder / STATE_FOLDER / "step-00000630.safetensors"
    path.write_bytes(data)
    try:
        return load_snapshot(folder)
    finally:
        path.unlink(missing_ok=True)
        path.with_suffix(".damaged").unlink(missing_ok=True)


def assert_falls_back(folder, data):
    snapshot, skipped = load_damaged(folder, data)
    assert_equal(snapshot, make_snapshot(600))
    assert len(skipped) == 1
    assert "step-00000630.safetensors 已损坏" in skipped[0]
    assert skipped[0].endswith("改用前一份：第 600 步。")
    return skipped[0]


def flip_bits(folder, positions=None, flips=200):
    """Flips one bit at a time, at random places or at the given ones; returns how many were flipped."""
    save_snapshot(folder, make_snapshot(600), 600)
    path = save_snapshot(folder, make_snapshot(630), 630)
    intact = path.read_bytes()
    chance = random.Random(0)
    positions = positions or [chance.randrange(8 * len(intact)) for _ in range(flips)]
    for position in positions:
        data = bytearray(intact)
        data[position // 8] ^= 1 << position % 8
        assert_falls_back(folder, data)
    assert load_damaged(folder, intact)[1] == []  # it was the flips
    return len(positions)


def test_one_flipped_bit_anywhere_is_noticed_and_the_save_before_it_used(tmp_path):
    assert flip_bits(tmp_path) == 200


def test_every_bit_of_the_header_is_guarded(tmp_path):
    """Names, shapes, values and the checksum itself stand there; every third bit is enough for a test."""
    assert flip_bits(tmp_path, positions=range(0, 8 * 400, 3)) > 1000


def test_a_file_cut_short_is_noticed(tmp_path):
    save_snapshot(tmp_path, make_snapshot(600), 600)
    intact = save_snapshot(tmp_path, make_snapshot(630), 630).read_bytes()
    for length in (*range(0, len(intact), 37), len(intact) - 1):
        assert_falls_back(tmp_path, intact[:length])
    assert_falls_back(tmp_path, intact + b"\0")


def test_a_file_of_another_kind_is_noticed(tmp_path):
    from safetensors.torch import save

    save_snapshot(tmp_path, make_snapshot(600), 600)
    tensors = make_snapshot(630).tensors
    for data in (save(tensors), save(tensors, {"values": "{}"}), save(tensors, {"values": "{}", "sha256": ""}), b"{}"):
        assert_falls_back(tmp_path, data)
    values_of_another = save(tensors, {"values": '{"step": 631}', "sha256": "0" * 64})
    assert "校验和不符" in assert_falls_back(tmp_path, values_of_another)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_intact_one_to_fall_back_to_stays_after_damage(tmp_path):
    """The damaged one does not count as one of the two that are kept."""
    for step in (600, 630):
        path = save_snapshot(tmp_path, make_snapshot(step), step)
    flip(path)
    assert load_snapshot(tmp_path)[1]
    assert newest_step(tmp_path) == 600
    assert load_snapshot(tmp_path)[1] == []  # said once
    flip(save_snapshot(tmp_path, make_snapshot(640), 640))
    snapshot, skipped = load_snapshot(tmp_path)
    assert_equal(snapshot, make_snapshot(600))
    assert len(skipped) == 1
    save_snapshot(tmp_path, make_snapshot(650), 650)
    assert files(tmp_path) == ["step-00000600.safetensors", "step-00000650.safetensors"]


def test_nothing_intact_is_one_sentence_and_removes_nothing(tmp_path):
    with pytest.raises(UserError, match=r"没有保存过.*--resume"):
        load_snapshot(tmp_path)
    for step in (600, 630):
        save_snapshot(tmp_path, make_snapshot(step), step)
    for name in files(tmp_path):
        flip(tmp_path / STATE_FOLDER / name)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"00000630.*00000600.*--out.*。$"):
        load_snapshot(tmp_path)
    assert files(tmp_path) == before


# Processes that die, disks that are full


def save_for_ever(folder, acknowledged, size):
    with locked(folder):
        step = newest_step(folder) or 0
        while True:
            step += 1
            save_snapshot(folder, make_snapshot(step, size), step)
            acknowledged.send(step)


def kill_while_saving(folder, kills, size=200_000, seed=0):
    """Kills a process that does nothing but save, again and again, and looks at what it left each time.

    Returns:
        How many kills left a half-written file behind: those that hit the middle of a write.
    """
    chance = random.Random(seed)
    # A fork of a process that has imported torch already starts at once; Windows has no forks.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["train.snapshots"])
    interrupted = 0
    for _ in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(folder, sender, size), daemon=True)
        process.start()
        sender.close()
        acknowledged = receiver.recv()
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError, OSError):  # the end, perhaps in the middle of a message
            while True:
                acknowledged = receiver.recv()
        receiver.close()
        interrupted += any((folder / STATE_FOLDER).glob(".*.tmp"))
        snapshot, skipped = load_snapshot(folder)
        assert skipped == []
        assert acknowledged <= snapshot.values["step"] <= acknowledged + 1
        assert_equal(snapshot, make_snapshot(snapshot.values["step"], size))
        assert len(list((folder / STATE_FOLDER).iterdir())) <= 4  # two kept, one not yet dropped, one half-written
    return interrupted


def test_no_acknowledged_save_is_lost_to_kill_9(tmp_path):
    kill_while_saving(tmp_path, kills=10)
    step = newest_step(tmp_path) + 1
    save_snapshot(tmp_path, make_snapshot(step), step)
    assert len(files(tmp_path)) == 2  # what the killed ones left behind is gone


def start(script, *arguments, before=()):
    command = [*before, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")


FILL = """
import contextlib, errno, sys, torch
from pathlib import Path
from train.snapshots import Snapshot, load_snapshot, save_snapshot
folder, limit = sys.argv[1], int(sys.argv[2])
def save(step, size):
    save_snapshot(folder, Snapshot({"weight": torch.full((size,), float(step))}, {"step": step}), step)
save(1, 1000)
save(2, 1000)
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    save(3, 1_000_000)
except OSError as error:
    print(errno.errorcode[error.errno])
print(*sorted(path.name for path in (Path(folder) / "state").iterdir()))
snapshot, skipped = load_snapshot(folder)
print(snapshot.values["step"], snapshot.tensors["weight"].unique().item(), skipped)
# Room again, but a killed save's half of a file fills it: that file must go first.
(Path(folder) / "state" / ".step-00000003.safetensors.abcd.tmp").write_bytes(bytes(900_000))
save(3, 100_000)
print(load_snapshot(folder)[0].values["step"])
"""


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_full_disk_keeps_the_earlier_saves(tmp_path, kind):
    """Once a real, tiny disk, where this system lets us have one; once a limit on the size of files."""
    before = []
    if kind == "limit":
        pytest.importorskip("resource", reason="this system knows no limit on the size of files")
    else:
        before = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(tmp_path)]
        if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True).returncode:
            pytest.skip("this system lets us mount no disk of our own")
    process = start(FILL, tmp_path, 1_000_000 if kind == "limit" else 0, before=before)
    output, _ = process.communicate(timeout=120)
    assert output.splitlines() == [
        "EFBIG" if kind == "limit" else "ENOSPC",
        "step-00000001.safetensors step-00000002.safetensors",
        "2 2.0 []",
        "3",
    ]
    assert process.returncode == 0


HOLD = """
import sys
from train.snapshots import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_one_folder_takes_one_run_and_kill_9_frees_it(tmp_path):
    folder = tmp_path / "还没有的文件夹"
    process = start(HOLD, folder)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=r"另一个训练正在使用 .*--out"), locked(folder):
            pytest.fail("two runs in one folder")
        with locked(tmp_path / "another"):
            pass
    finally:
        process.kill()
        process.communicate()
    with locked(folder):  # nobody had to clean up
        assert (folder / LOCK_FILE).exists()
    with locked(folder):  # and an ordinary end frees it too
        pass


def test_lock_is_freed_by_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass
