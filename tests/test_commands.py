"""Every command of the README's two sections for students runs as it is written, on the tiny configuration."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import train

ROOT = pathlib.Path(train.__file__).parent
SECTIONS = re.findall(r"^## (?:Your loss on the frontier|In class)\n(.*?)(?=^## )", (ROOT / "README.md").read_text(), re.M | re.S)
COMMANDS = list(dict.fromkeys(command for section in SECTIONS for command in re.findall(r"`(python [^`]+)`", section)))
LOSS = "def {name}(pair, beta):\n    h = (pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)\n    return (h - 1 / (2 * beta)) ** 2\n"


def checkout(folder):
    """The repository as a student has it, with the files that the commands name."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__", ".pytest_cache", "*.png"))
    for path, name in (("my_loss.py", "ipo"), ("my_loss.py", "my_loss"), ("mine.py", "mine")):
        with open(folder / path, "a") as file:
            file.write(LOSS.format(name=name))
    (folder / "my_tests.py").write_text("def test_nothing():\n    pass\n")
    texts = ["I saw this film last night", ". The plot was superb.", ". The plot was not really dull."]
    (folder / "my_pairs.jsonl").write_text(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))) + "\n")
    return folder


def run(command, folder):
    """A command in a checkout; what trains is made tiny, and nothing else is changed."""
    words = command.replace("FOLDER", "folder").split()
    words += ["--preset", "tiny", "--device", "cpu"] if "train.py" in command else ["--device", "cpu"] if "tests.mutant" in command else []
    words += ["--workers", "2"] if "train.py" in command else []
    return subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=200,
                          env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PARENT")})


def test_the_sections_hold_commands():
    kinds = ("train.py --loss", "--pairs", "pytest --loss", "tests.mutant", "tests.score", "tests.starter")
    assert not [kind for kind in kinds if not any(kind in command for command in COMMANDS)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, commands):
    done = commands[command].result()
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
