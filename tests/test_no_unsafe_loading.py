"""No module of this project can run a file it reads: each syntax tree is searched for loaders that would."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCANNED = ("app.py", "studytiny", "train", "lessons", "bench")

# Modules whose loaders build whatever objects a file asks for. (pickletools, which only takes pickles apart, is fine.)
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NAMES = {"eval", "exec", "compile", "__import__", "torch.load", "torch.serialization.load", "torch.hub.load"}
NAMES |= {"torch.jit.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "pd.read_pickle"}
ARGUMENTS = {"weights_only=False", "allow_pickle=True", "trust_remote_code=True"}


def dotted(node: ast.expr) -> str:
    """``torch.hub.load`` for that expression; what is neither name nor dot is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_loading(source: str) -> Iterator[str]:
    """Whatever in ``source`` names an unsafe loader, called or not."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.Attribute() | ast.Name():
                names = [dotted(node)]
            case ast.keyword(value=ast.Constant()):
                names = [f"{node.arg}={node.value.value}"]
        for name in names:
            if MODULES & set(name.split(".")) or name.removeprefix("builtins.") in NAMES or name in ARGUMENTS:
                yield f"line {node.lineno}: {name}"


def modules() -> list[Path]:
    """All but the tests: those write hostile files, to see them refused."""
    paths = [path for name in SCANNED for path in (ROOT / name, *(ROOT / name).rglob("*.py"))]
    return [path for path in paths if path.is_file()]


def test_no_module_can_run_what_it_reads() -> None:
    scanned = modules()
    assert ROOT / "studytiny" / "import_published.py" in scanned  # a scan of nothing would pass too
    found = {path.name: list(unsafe_loading(path.read_text(encoding="utf-8"))) for path in scanned}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as harmless",
        "import torch, _pickle",
        "import cPickle",
        "from pickle import loads",
        "def later():\n    import dill",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "read = torch.load",
        "from torch import load",
        "from torch.hub import load",
        "torch.serialization.pickle.loads(data)",
        "torch.serialization.load(path)",
        "read(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "yaml.load(text)",
        "from yaml import load",
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "run = eval",
        "list(map(eval, texts))",
        "builtins.eval(text)",
        "from builtins import exec as run",
    ],
)
def test_the_scan_finds_an_unsafe_loader(source: str) -> None:
    assert list(unsafe_loading(source))


@pytest.mark.parametrize(
    "source",
    [
        "import pickletools",
        "model.eval()",
        "torch.compile(model)",
        "re.compile('x')",
        "json.load(file)",
        "numpy.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "'import pickle; eval(1)'  # torch.load",
    ],
)
def test_the_scan_lets_safe_code_pass(source: str) -> None:
    assert list(unsafe_loading(source)) == []
