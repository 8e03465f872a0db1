"""The picture of a run: curve.png, drawn with matplotlib from what the run logged."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from studytiny.errors import UserError
from studytiny.files import write_atomically
from train.run_log import read_metrics

CURVE_FILE = "curve.png"
RAW, SMOOTH, HELD_OUT = "#9db7d5", "#1f5fa8", "#c8501e"
# A label in Chinese, and in English for a machine without a Chinese font.
LABELS = {
    "loss": ("训练损失（奈特/字，越低越好）", "Training loss (nats per character, lower is better)"),
    "bits": ("留出对话（比特/字，越低越好）", "Held-out (bits per character, lower is better)"),
    "rate": ("学习率", "Learning rate"),
    "speed": ("速度（字/秒）", "Speed (characters per second)"),
    "raw": ("每次记录", "as logged"),
    "smooth": ("平滑后", "smoothed"),
    "none": ("还没有测过", "not measured yet"),
    "steps": ("训练步数", "training steps"),
}
# Windows, macOS, Linux. Of a collection matplotlib may list only the first face, often the Japanese one: it will do.
CHINESE_FONTS = (
    "Microsoft YaHei", "DengXian", "SimHei", "PingFang SC", "PingFang HK", "Hiragino Sans GB", "Heiti SC", "Heiti TC",
    "STHeiti", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Arial Unicode MS", "Droid Sans Fallback", "SimSun", "Songti SC",
    "Noto Serif CJK SC", "Noto Serif CJK JP", "AR PL UMing CN", "AR PL UKai CN",
)  # fmt: skip


def smooth(values: Sequence[float]) -> list[float]:
    """Means over about a twentieth of the values, centred, so that they do not lag; narrower where the run begins,
    since the loss falls fastest there."""
    widest = len(values) // 40
    windows = (values[i - min(widest, i) : i + min(widest, i) + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def chinese_font() -> str | None:
    """The file of a font that has every character of LABELS, or None."""
    from matplotlib import font_manager

    needed = {ord(character) for chinese, _ in LABELS.values() for character in chinese}
    for name in CHINESE_FONTS:
        entries = [entry for entry in font_manager.fontManager.ttflist if entry.name == name]
        for entry in sorted(entries, key=lambda entry: str(entry.weight) not in ("400", "normal", "regular")):
            try:
                if needed <= font_manager.get_font(entry.fname).get_charmap().keys():
                    return entry.fname
            except (OSError, RuntimeError):  # matplotlib's list is a cache: the file may be gone
                continue
    return None


def plot(folder: str | Path) -> Path:
    """Draws curve.png: training loss, held-out bits per character, learning rate and speed over the steps.

    Raises:
        UserError: nothing has been logged yet.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    training, measurements = read_metrics(folder)
    if not training:
        raise UserError(f"{folder} 里还没有训练记录，画不出曲线；请等训练开始一会儿再试。")
    font_file = chinese_font()
    words = {name: pair[0 if font_file else 1] for name, pair in LABELS.items()}

    def font(size: float) -> FontProperties:
        return FontProperties(fname=font_file, size=size) if font_file else FontProperties(size=size)

    # pyplot keeps its figures in a global and picks a window system; a figure of one's own needs neither.
    figure = Figure(figsize=(9.6, 6.2), dpi=150, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
    canvas = FigureCanvasAgg(figure)
    axes = dict(zip(("loss", "bits", "rate", "speed"), figure.subplots(2, 2, height_ratios=(3, 2)).flat, strict=True))
    last_step = max(line["step"] for line in training + measurements)
    for name, ax in axes.items():
        ax.set_title(words[name], loc="left", fontproperties=font(12.5 if font_file else 11), color="#222222", pad=9)
        ax.grid(color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#b0b0b0")
        ax.tick_params(colors="#555555", labelsize=10, length=0)
        ax.set_xlim(0, last_step * 1.03)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for name in ("rate", "speed"):
        axes[name].set_xlabel(words["steps"], fontproperties=font(11), color="#555555")
    axes["speed"].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes["rate"].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.8f}".rstrip("0").rstrip(".")))

    steps = [line["step"] for line in training]
    few = len(steps) < 40  # then smoothing does nothing, and single points should be seen
    dot = {"marker": "o", "markersize": 4} if few else {}
    for name, key in (("loss", "loss"), ("speed", "tokens_per_second")):
        values = [line[key] for line in training]
        if not few:
            axes[name].plot(steps, values, color=RAW, linewidth=1, alpha=0.7, label=words["raw"])
        axes[name].plot(steps, smooth(values), color=SMOOTH, linewidth=2, label=words["smooth"], **dot)
    axes["rate"].plot(steps, [line["learning_rate"] for line in training], color=SMOOTH, linewidth=2, **dot)
    if not few:
        axes["loss"].legend(prop=font(11), frameon=False, loc="upper right", labelcolor="#444444")
    if measurements:
        points = [(line["step"], line["bits_per_char"]) for line in measurements]
        axes["bits"].plot(*zip(*points, strict=True), color=HELD_OUT, linewidth=2, marker="o", markersize=5)
        label = {"textcoords": "offset points", "xytext": (0, 9), "ha": "right", "fontsize": 11, "color": HELD_OUT}
        axes["bits"].annotate(f"{points[-1][1]:.3f}", points[-1], **label)
    else:
        axes["bits"].set(xticks=[], yticks=[])
        centre = {"transform": axes["bits"].transAxes, "ha": "center", "va": "center", "color": "#888888"}
        axes["bits"].text(0.5, 0.5, words["none"], fontproperties=font(12), **centre)
    for ax in axes.values():
        ax.set_ylim(bottom=0, top=ax.get_ylim()[1] * 1.04)  # from zero: a small wobble must not look like a cliff

    content = io.BytesIO()
    canvas.print_png(content)
    path = Path(folder) / CURVE_FILE
    write_atomically(path, content.getvalue())
    return path
