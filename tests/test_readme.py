"""What the READMEs tell people to type and click exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README_en.md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_both_commands_do_all_the_setup(name):
    for command in ("python app.py", "python -m pytest"):
        assert f"\npip install -r requirements.txt && {command}\n" in read(name)


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", read(name)) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_both_readmes_show_the_same_commands():
    def commands(name):
        blocks = re.findall(r"```bash\n(.*?)```", read(name), re.DOTALL)
        return [[word for word in line.split() if word.isascii()] for line in "".join(blocks).splitlines()]

    chinese = commands("README.md")
    assert chinese
    assert chinese == commands("README_en.md")


COMMANDS = [
    "studytiny.chat",
    "studytiny.export",
    "studytiny.hosting",
    "studytiny.import_published",
    "train",
    "train.corpus",
    "train.evaluate",
    "train.report",
    "train.demo",
]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_chinese_help(module):
    result = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, timeout=120)
    assert result.returncode == 0
    assert re.search("[一-鿿]{2}", result.stdout.decode("utf-8"))


def test_every_requirement_has_a_reason():
    requirements = [line for line in read("requirements.txt").splitlines() if line and not line.startswith("#")]
    assert requirements
    assert all("  # " in line for line in requirements)
