"""The page's own figures: ``python bench/page.py [--rounds 5] [--load 60]``.

The real ``app.py`` with the bundled model, out of ModelScope's reach, in a process of its own on 127.0.0.1:

- seconds from the command to the page,
- milliseconds from Enter to the first text on screen, in a real browser,
- share of a core at rest, with the page open in a browser,
- seconds to the first text of 16 visitors who ask at once,
- milliseconds until an oversized request is refused,
- under load for a while: 32 clients who chat without a break and one who floods; does a quiet visitor get an answer,
  what is refused, and how much memory is gained.

Memory and rest are read where the system has ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for ``python bench/page.py``

from studytiny.command import CommandParser, number, run_command  # noqa: E402
from tests.browser import ChatPage, command, offline_environment, running_browser, running_process  # noqa: E402

SAID = ("你好", "今天有点累", "你喜欢吃什么", "我叫小雨", "讲个笑话吧", "周末去哪儿玩好呢", "晚安", "谢谢你")
VISITORS = 16
CLIENTS = 32
FLOOD = 200  # questions that one client sends at once, again and again
REST_SECONDS = 20

# Real time from the key to the first character that is drawn, noted by the page itself.
_WATCH = """() => {
    const chat = document.querySelector('#chat'), bots = () => [...chat.querySelectorAll('[data-testid=bot]')];
    const before = bots().length;
    window.firstText = null;
    let pressed = null;
    addEventListener('keydown', () => { pressed = performance.now(); }, { capture: true, once: true });
    const look = () => {
        if (bots().length > before && bots().at(-1).innerText.trim()) window.firstText = performance.now() - pressed;
        else requestAnimationFrame(look);
    };
    look();
}"""


def status(address: str, body: bytes | None = None) -> int:
    """The status of a request; 0 if nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def processor_seconds(process: subprocess.Popen[Any]) -> float:
    """Time of all cores that the process has used so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def megabytes(process: subprocess.Popen[Any]) -> float:
    """Memory of the process itself."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def start_seconds(rounds: int, folder: Path) -> list[float]:
    """Seconds from the command to the page, each in a new process."""
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        with running_process(command(), offline_environment(folder), folder):
            found.append(time.perf_counter() - begun)
    return found


def first_text(page: ChatPage, rounds: int) -> list[float]:
    """Milliseconds from Enter to the first text of each answer."""
    found = []
    for turn in range(rounds * len(SAID)):
        page.box.fill(SAID[turn % len(SAID)])
        page.page.evaluate(_WATCH)
        page.box.press("Enter")
        page.page.wait_for_function("window.firstText !== null")
        found.append(page.page.evaluate("window.firstText"))
        page.reply()
    return found


def at_rest(process: subprocess.Popen[Any]) -> float:
    """Share of a core that the server uses while nobody writes."""
    before = processor_seconds(process)
    time.sleep(REST_SECONDS)
    return (processor_seconds(process) - before) / REST_SECONDS


def together(address: str, rounds: int) -> list[float]:
    """Seconds to the first text of VISITORS who ask at once, each through a connection of its own."""
    from gradio_client import Client

    clients = [Client(address, verbose=False) for _ in range(VISITORS)]
    found = []
    for turn in range(rounds):
        barrier = threading.Barrier(VISITORS)

        def ask(client: Any, said: str, barrier: threading.Barrier = barrier) -> float:
            barrier.wait()
            begun = time.perf_counter()
            job = client.submit(said, api_name="/chat")
            first = next(iter(job))
            seconds = time.perf_counter() - begun
            assert first
            job.result()
            return seconds

        said = [SAID[(turn + i) % len(SAID)] for i in range(VISITORS)]
        with ThreadPoolExecutor(VISITORS) as threads:
            found += threads.map(ask, clients, said)
    return found


def refusal(address: str) -> dict[str, float]:
    """Milliseconds until what is too large is answered: a body, a history, a message."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": "好"} for i in range(10_000)]
    found = {}
    begun = time.perf_counter()
    assert status(f"{address}gradio_api/queue/join", b"x" * 1_000_001) == 413
    found["1 MB"] = 1000 * (time.perf_counter() - begun)
    for name, asked in (
        ("10,000 句", {"message": "你好", "history": turns}),
        ("10,000 字", {"message": "长" * 10_000}),
    ):
        begun = time.perf_counter()
        with contextlib.suppress(AppError):
            client.predict(**asked, max_new_tokens=1, api_name="/chat")
        found[name] = 1000 * (time.perf_counter() - begun)
    return found


def under_load(address: str, process: subprocess.Popen[Any], seconds: float) -> dict[str, Any]:
    """What becomes of a quiet visitor while CLIENTS chat without a break and one floods."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    clients = [Client(address, verbose=False) for _ in range(CLIENTS)]
    flooding, quiet = Client(address, verbose=False), Client(address, verbose=False)
    answered: Counter[str] = Counter()
    end = time.monotonic() + seconds
    memory: list[float] = []

    def chat(client: Any) -> None:
        turn = 0
        while time.monotonic() < end:
            try:
                client.predict(SAID[turn % len(SAID)], api_name="/chat")
                answered["client: ok"] += 1
            except AppError as error:
                answered[f"client: {str(error)[:40]}"] += 1
            except Exception as error:  # what it was is the finding
                answered[f"client: {type(error).__name__}"] += 1
            turn += 1

    def flood() -> None:
        while time.monotonic() < end:
            jobs = [flooding.submit("你好", api_name="/chat") for _ in range(FLOOD)]
            for job in jobs:
                try:
                    job.result(timeout=120)
                    answered["flood: ok"] += 1
                except Exception as error:
                    answered[f"flood: {type(error).__name__}"] += 1

    waits: list[float] = []

    def visit() -> None:
        while time.monotonic() < end:
            begun = time.perf_counter()
            try:
                first = next(iter(quiet.submit("你好", api_name="/chat")))
                waits.append(time.perf_counter() - begun)
                answered["quiet: ok" if first else "quiet: empty"] += 1
            except Exception as error:
                answered[f"quiet: {type(error).__name__}"] += 1
            time.sleep(1)

    threads = [threading.Thread(target=chat, args=(client,)) for client in clients]
    threads += [threading.Thread(target=flood), threading.Thread(target=visit)]
    for thread in threads:
        thread.start()
    time.sleep(min(15.0, seconds / 3))  # buffers have their size by then
    memory.append(megabytes(process))
    for thread in threads:
        thread.join()
    memory.append(megabytes(process))
    return {"answers": dict(answered), "waits": waits, "memory": memory}


def row(name: str, values: list[float], unit: str, goal: str) -> str:
    ordered = sorted(values)
    return f"| {name} | {statistics.median(ordered):.2f} {unit} | {ordered[-1]:.2f} {unit} | {goal} |"


def main() -> None:
    parser = CommandParser("python bench/page.py", "网页自己的数：多久打开，多久见到第一个字，闲着时占多少。")
    parser.add_argument("--rounds", type=number(int), default=5, metavar="次", help="每样测几次（默认 5）")
    parser.add_argument("--load", type=number(float), default=60, metavar="秒", help="压着测多久（默认 60；0 不测）")
    arguments = parser.parse_args()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1"
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        print("| | 中位数 | 最久 | 目标 |\n|---|---|---|---|", flush=True)
        print(row("从命令到网页", start_seconds(arguments.rounds, folder), "秒", "6"), flush=True)
        running = running_process(command(), offline_environment(folder), folder)
        with running as (address, process), running_browser() as browser:
            page = ChatPage(browser, address)
            page.send("你好")
            print(row("按回车到第一个字", first_text(page, arguments.rounds), "毫秒", "300"), flush=True)
            print(row("闲着时占一个核", [100 * at_rest(process)], "%", "5"), flush=True)
            page.close()
            print(row("16 人同时问，第一个字", together(address, arguments.rounds), "秒", "1"), flush=True)
            for name, milliseconds in refusal(address).items():
                print(row(f"太大：{name}", [milliseconds], "毫秒", "100"), flush=True)
            print(row("内存", [megabytes(process)], "MB", "700"), flush=True)
            if arguments.load:
                found = under_load(address, process, arguments.load)
                print(row("32 人不停地聊、1 人刷屏：旁人的第一个字", found["waits"], "秒", "有人答"))
                before, after = found["memory"]
                print(f"\n内存：{before:.0f} → {after:.0f} MB（目标：多不到 50）；回答：")
                for name, count in sorted(found["answers"].items()):
                    print(f"  {name} × {count}")


if __name__ == "__main__":
    run_command(main)
