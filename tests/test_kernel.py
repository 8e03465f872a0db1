"""The int8 kernel: what it promises about its logits, and that whatever goes wrong PyTorch takes over in silence."""

import gc
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from studytiny import DialogueModel, kernel, load_model
from studytiny.kernel import Int8Kernel, KernelUnavailable, build_kernel, why_not

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ["cc", "gcc", "clang"])), reason="there is no C compiler (cc, gcc, clang) on this machine"
)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def clean(cache, monkeypatch):
    """A cache folder of the tests' own, and no memory of earlier attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(kernel, "cache_folder", lambda: cache / "studytiny")
    monkeypatch.delenv("STUDYTINY_KERNEL", raising=False)
    monkeypatch.delenv("CC", raising=False)
    kernel._attempt.cache_clear()
    yield
    kernel._attempt.cache_clear()


def read(engine: Int8Kernel, ids: list[int], slot: int = 0, start: int = 0) -> torch.Tensor:
    """Logits (T, V) of all tokens of one conversation, read at once."""
    rows = list(range(len(ids)))
    return engine.step(ids, [slot] * len(ids), [start + row for row in rows], rows)


def some_ids(model: DialogueModel, count: int, seed: int = 0) -> list[int]:
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def distance(engine: Int8Kernel, model: DialogueModel, ids: list[int]) -> float:
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0]
    return ((read(engine, ids) - expected).norm() / expected.norm()).item()


def lively(model: DialogueModel) -> DialogueModel:
    """Larger weights and uneven gains, so that attention and every gain have their say in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


@needs_compiler
class TestLogits:
    def test_kernel_is_built_where_there_is_a_compiler(self):
        assert build_kernel() is not None
        assert why_not() is None
        assert build_kernel() is build_kernel()

    def test_logits_are_close_to_pytorch(self, model):
        assert distance(Int8Kernel(lively(model), 1, 2), model, some_ids(model, 64)) < 0.05

    def test_bundled_model_chooses_as_in_pytorch(self):
        model, tokenizer = load_model("bundled", "cpu")
        ids = tokenizer.encode_dialogue(
            [
                {"role": "user", "content": "你好，你叫什么名字？"},
                {"role": "assistant", "content": "我是小天，很高兴认识你。"},
            ]
        ).ids
        engine = Int8Kernel(model, 1, 2)
        assert distance(engine, model, ids) < 0.06
        with torch.inference_mode():
            expected = model(torch.tensor([ids]))[0].log_softmax(-1)
        divergence = (expected.exp() * (expected - read(engine, ids).log_softmax(-1))).sum(-1).mean()
        assert divergence < 0.01

    @pytest.mark.parametrize(
        ("d_model", "n_head", "d_ff", "vocab_size", "n_layers", "max_length"),
        [
            (2, 1, 1, 1, 1, 1),
            (10, 5, 7, 3, 1, 9),
            (66, 3, 65, 129, 3, 33),
            (72, 1, 96, 64, 1, 16),
            (136, 1, 31, 65, 2, 50),
        ],
    )
    def test_any_sizes_work(self, d_model, n_head, d_ff, vocab_size, n_layers, max_length):
        torch.manual_seed(0)
        model = DialogueModel(vocab_size, d_model, n_head, n_layers, d_ff=d_ff, max_length=max_length).eval()
        assert distance(Int8Kernel(lively(model), 2, 2), model, some_ids(model, max_length)) < 0.05

    def test_layers_not_in_use_are_left_out(self, model):
        model.depth = 1
        assert distance(Int8Kernel(lively(model), 1, 1), model, some_ids(model, 20)) < 0.05

    def test_returned_logits_are_the_callers_to_keep(self, model):
        engine = Int8Kernel(model, 1, 1)
        first = read(engine, [1, 2, 3])
        copy = first.clone()
        read(engine, [4, 5, 6])
        assert first.equal(copy)


@needs_compiler
class TestEveryBitOfARow:
    def test_does_not_depend_on_chunks_slot_or_threads(self, model):
        ids = some_ids(lively(model), 60)
        expected = read(Int8Kernel(model, 1, 1), ids)
        for threads in (1, 2, 5):
            engine = Int8Kernel(model, 3, threads)
            assert read(engine, ids, slot=2).equal(expected)
            for chunk in (1, 7, 33):
                parts = [read(engine, ids[i : i + chunk], 1, i) for i in range(0, len(ids), chunk)]
                assert torch.cat(parts).equal(expected)

    def test_does_not_depend_on_the_other_rows(self, model):
        generator = torch.Generator().manual_seed(1)
        conversations = [some_ids(lively(model), 64, seed) for seed in range(9)]
        alone = [read(Int8Kernel(model, 1, 1), ids) for ids in conversations]
        engine, done = Int8Kernel(model, 9, 2), [0] * 9
        while min(done) < 64:  # steps of any number of rows of any conversations in any order
            rows: list[tuple[int, int, int]] = []
            for slot in torch.randperm(9, generator=generator).tolist():
                count = min(int(torch.randint(0, 9, (), generator=generator)), 64 - done[slot])
                rows += [(conversations[slot][i], slot, i) for i in range(done[slot], done[slot] + count)]
                done[slot] += count
            ids, slots, positions = [[row[i] for row in rows] for i in range(3)]
            wanted = [row for row in range(len(rows)) if torch.rand((), generator=generator) < 0.5][::-1]
            logits = engine.step(ids, slots, positions, wanted)
            assert logits.shape == (len(wanted), model.config.vocab_size)
            for row, got in zip(wanted, logits, strict=True):
                assert got.equal(alone[slots[row]][positions[row]])

    def test_does_not_depend_on_what_the_slot_held_before(self, model):
        engine = Int8Kernel(lively(model), 1, 2)
        first = read(engine, some_ids(model, 20))
        read(engine, some_ids(model, 64, seed=5))
        assert read(engine, some_ids(model, 20)).equal(first)

    @pytest.mark.parametrize("flags", [["-DSTUDYTINY_PLAIN"], ["-DSTUDYTINY_NO_VNNI"], ["-O1"]])
    def test_does_not_depend_on_how_the_kernel_was_compiled(self, model, flags):
        ids = some_ids(lively(model), 50)
        plain = Int8Kernel(model, 1, 2, kernel._compile(flags))
        assert read(plain, ids).equal(read(Int8Kernel(model, 1, 2), ids))


@needs_compiler
class TestUse:
    @pytest.mark.parametrize(
        ("ids", "slots", "positions", "wanted"),
        [
            ([1], [0], [64], [0]),
            ([1], [0], [-1], [0]),
            ([1], [2], [0], [0]),
            ([1], [-1], [0], [0]),
            ([-1], [0], [0], [0]),
            ([10**6], [0], [0], [0]),
            ([1], [0], [0], [1]),
            ([1, 2], [0, 0], [0, 1], [1, 1]),
            ([1, 2], [0, 0], [0, 2], [1]),
            ([1, 2], [0, 0], [1, 0], [1]),
            ([1, 2, 3], [0, 1, 0], [0, 0, 1], [1]),
            ([1, 2], [0], [0, 1], [1]),
            ([1], [0], [0, 1], [0]),
        ],
    )
    def test_rows_that_do_not_fit_are_refused(self, model, ids, slots, positions, wanted):
        with pytest.raises(ValueError):
            Int8Kernel(model, 2, 1).step(ids, slots, positions, wanted)

    def test_no_rows_and_no_wanted_rows_are_fine(self, model):
        engine = Int8Kernel(model, 1, 2)
        assert engine.step([], [], [], []).shape == (0, model.config.vocab_size)
        assert engine.step([1, 2], [0, 0], [0, 1], []).shape == (0, model.config.vocab_size)
        assert read(engine, [3], start=2)[0].equal(read(Int8Kernel(model, 1, 1), [1, 2, 3])[2])

    def test_models_of_another_kind_are_refused(self, published):
        with pytest.raises(KernelUnavailable, match="结构"):
            Int8Kernel(published, 1, 1)

    def test_closed_twice_and_used_after(self, model):
        engine = Int8Kernel(model, 1, 2)
        engine.close()
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            engine.step([1], [0], [0], [0])

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads and memory in /proc")
    def test_hundreds_of_kernels_leave_neither_threads_nor_memory(self, model):
        def state() -> tuple[int, int]:
            gc.collect()
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return int(fields["Threads"]), int(fields["VmRSS"].split()[0])

        def use(count: int) -> None:
            for i in range(count):
                engine = Int8Kernel(model, 8, 3)
                read(engine, [1, 2, 3])
                if i % 2:
                    engine.close()  # the others are closed when they are collected

        use(50)
        threads, memory = state()
        use(300)
        assert state()[0] == threads
        assert state()[1] - memory < 4096  # KiB; one kernel of them all would be more

    def test_several_kernels_work_at_once(self, model):
        ids = some_ids(model, 30)
        expected, wrong = read(Int8Kernel(model, 1, 1), ids), []

        def use() -> None:
            engine = Int8Kernel(model, 1, 2)
            wrong.extend(i for i in range(30) if not read(engine, ids).equal(expected))

        users = [threading.Thread(target=use) for _ in range(4)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        assert not wrong

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_fork_is_refused_and_does_not_hang(self):
        program = """if True:
            import os
            from studytiny import DialogueModel
            from studytiny.kernel import Int8Kernel
            model = DialogueModel(10, d_model=8, n_head=1, n_layers=1, max_length=8)
            engine = Int8Kernel(model, 1, 2)
            expected = engine.step([1], [0], [0], [0])
            child = os.fork()
            if not child:
                try:
                    engine.step([1], [0], [0], [0])
                except RuntimeError:
                    engine.close()
                    os._exit(7)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert engine.step([1], [0], [0], [0]).equal(expected)
        """
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=ROOT)


class TestWithoutKernel:
    def expect_none(self, words: str) -> None:
        assert build_kernel() is None
        assert words in why_not()
        with pytest.raises(KernelUnavailable, match=words):
            Int8Kernel(DialogueModel(10, d_model=8, n_head=1, n_layers=1, max_length=8), 1, 1)

    def compiler(self, tmp_path: Path, monkeypatch, script: str) -> None:
        path = tmp_path / "my compiler"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o700)
        monkeypatch.setenv("CC", f"'{path}'")

    def test_switched_off(self, monkeypatch):
        monkeypatch.setenv("STUDYTINY_KERNEL", "0")
        self.expect_none("STUDYTINY_KERNEL=0")

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        self.expect_none("没有找到 C 编译器")

    def test_compiler_that_is_not_there(self, monkeypatch):
        monkeypatch.setenv("CC", "no-such-compiler")
        self.expect_none("没有找到 C 编译器")

    @posix
    @pytest.mark.parametrize(
        ("script", "words"),
        [
            ("echo noise >&2; exit 1", "不能用"),  # fails at once
            ('case "$*" in *-dM*) exit 0;; esac; exit 1', "没有成功"),  # fails when it comes to it
            ("exit 0", "没有成功"),  # writes nothing
            ('while [ "$1" ]; do [ "$1" = -o ] && echo garbage > "$2"; shift; done', "OSError"),
            ("exec sleep 60", "TimeoutExpired"),
        ],
    )
    def test_broken_compiler_is_silent(self, tmp_path, monkeypatch, capfd, script, words):
        self.compiler(tmp_path, monkeypatch, script)
        monkeypatch.setattr(kernel, "COMPILE_SECONDS", 1)
        self.expect_none(words)
        assert capfd.readouterr() == ("", "")

    @posix
    @needs_compiler
    def test_library_of_something_else(self, tmp_path, monkeypatch):
        other = tmp_path / "other.c"
        other.write_text("int nothing;")
        # Compiles this file in place of kernel.c.
        self.compiler(
            tmp_path,
            monkeypatch,
            f"""case "$*" in *-dM*) exec cc "$@";; esac
                while [ "$1" != -o ]; do shift; done
                exec cc -shared -fPIC -o "$2" '{other}'""",
        )
        self.expect_none("AttributeError")

    @posix
    @needs_compiler
    def test_kernel_that_computes_nonsense_is_refused(self, monkeypatch):
        monkeypatch.setattr(kernel, "FLAGS", (*kernel.FLAGS, "-D__builtin_sqrtf(x)=(x)"))
        self.expect_none("算得不对")


BUILD = "from studytiny.kernel import build_kernel, why_not; assert build_kernel() is not None, why_not()"


def environment(folder: Path) -> dict[str, str]:
    """Of a process whose cache folder is ``folder``."""
    return {**os.environ, "XDG_CACHE_HOME": str(folder.parent)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="moves the cache folder as on Linux")
@needs_compiler
class TestCache:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setattr(kernel, "cache_folder", lambda: tmp_path / "studytiny")
        return tmp_path / "studytiny"

    def test_second_process_does_not_compile(self, folder, monkeypatch):
        assert build_kernel() is not None
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(list(folder.iterdir())) == 1
        kernel._attempt.cache_clear()
        monkeypatch.setattr(kernel, "_build", lambda *_: pytest.fail("compiled again"))
        assert build_kernel() is not None

    @pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda data: data + b"x"])
    def test_damaged_library_is_replaced(self, folder, damage):
        # Another process made it: shortening a library in use would end this very one.
        subprocess.run([sys.executable, "-c", BUILD], env=environment(folder), cwd=ROOT, check=True, timeout=120)
        (path,) = folder.iterdir()
        good = path.read_bytes()
        path.write_bytes(damage(good))
        assert build_kernel() is not None
        assert path.name not in os.listdir(folder) or path.read_bytes() == good

    def test_folder_others_can_write_to_is_not_trusted(self, folder):
        folder.mkdir()
        folder.chmod(0o777)
        assert build_kernel() is not None
        assert not list(folder.iterdir())

    def test_folder_that_cannot_be_made_is_done_without(self, folder):
        folder.write_text("a file is in the way")
        assert build_kernel() is not None

    def test_folder_that_cannot_be_written_is_done_without(self, folder, monkeypatch):
        folder.mkdir(mode=0o500)
        access = os.access  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
        assert build_kernel() is not None
        assert not list(folder.iterdir())

    def test_processes_at_once_are_fine(self, folder):
        command = [sys.executable, "-c", BUILD]
        started = [subprocess.Popen(command, env=environment(folder), cwd=ROOT) for _ in range(3)]
        assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
        assert [path.suffix for path in folder.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.parametrize(("vocab", "k"), [(6711, 50), (6711, 1), (6711, 256), (100, 100), (7, 7), (17, 3), (300, 299)])
def test_the_largest_are_those_of_pytorch(model, vocab, k):
    kernel = Int8Kernel(model, slots=1, threads=1)
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(k))
    logits[1] = logits[1].sort().values  # the worst order there is
    logits[2] = logits[2].sort(descending=True).values
    values, ids = kernel.top(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@needs_compiler
def test_the_largest_of_what_is_forbidden_or_no_number(model):
    kernel = Int8Kernel(model, slots=1, threads=1)
    logits = torch.full((3, 40), -torch.inf)
    logits[1] = torch.nan
    logits[2, [3, 30]] = 1.0
    values, ids = kernel.top(logits, 5)
    assert not torch.isfinite(values[:2]).any()
    assert values[2].tolist() == [1.0, 1.0, *[-torch.inf] * 3]
    assert ids[2, :2].tolist() == [3, 30]
