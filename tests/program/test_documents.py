"""The documents are true: their commands run, their snippet works, their map points to code.

The documents are README.md, plots/README.md and tests/README.md.
"""
import ast
import inspect
import json
import os
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
import torch

import dpo
import harness

ROOT = pathlib.Path(dpo.__file__).resolve().parent
README = (ROOT / "README.md").read_text("utf-8")
FINDINGS = (ROOT / "plots" / "README.md").read_text("utf-8")
GUIDE_TO_TESTS = (ROOT / "tests" / "README.md").read_text("utf-8")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`]+)`")


# ----------------------------------------------------------------------- commands of the documents
NOT_RUN = {    # command -> the reason why no test runs it
    "python -m pytest": "it is this run of the tests, with this test in it",
    "python -m tests.kill": "half an hour",
    "python -m tests.benchmark": "test_benchmark.py runs it",
    "python train.py --preset paper --seeds 3": "two hours: the published run",
    "torchrun --nnodes 2 --nproc-per-node 4 train.py --out SHARED": "it needs two machines",
}
SMALL = {    # word of a command -> flags that are added, to make it small
    "train.py": "--preset tiny --device cpu --workers 1",
    "--study": "--ppo-steps 2",
    "tests/theorems": "--collect-only",    # these tests take minutes, and are in this run anyway
    "tests/classroom/test_planted_bugs.py": "--collect-only",
    "equation_4": "--collect-only",
    "tests.mutant": "--device cpu",
}
KINDS = ("train.py --loss", "--pairs", "pytest --loss", "tests.mutant", "tests.score",
         "tests.starter", "-m plots")
USER_LOSS = """
def {name}(pair, beta):
    h = (pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)
    return (h - 1 / (2 * beta)) ** 2
"""
USER_PAIR = {
    "prompt": "This western",
    "chosen": ": the plot was superb.",
    "rejected": ": the plot was not really dull.",
}


def find_commands(text):
    """The commands of a document that start with `python` or `torchrun`, in order."""
    lines = []
    for block in FENCE.findall(text):
        lines += block.splitlines()
    for span in INLINE_CODE.findall(FENCE.sub("", text)):
        lines.append(" ".join(span.split()))    # a span may continue in the next line
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("python ", "torchrun "))]


def small(command):
    """The words of a command, made small by the flags of SMALL, each flag once."""
    words = command.replace("FOLDER", "folder").split()
    for word, flags in SMALL.items():
        if word in words:
            words += flags.split()
    return words


FOUND = [*find_commands(README), *find_commands(FINDINGS), *find_commands(GUIDE_TO_TESTS)]
DIFFERENT = {frozenset(small(command)): command for command in FOUND if command not in NOT_RUN}
COMMANDS = list(DIFFERENT.values())    # of commands that are equal when small, one


def checkout(folder):
    """Copy the repository, and add the files that the commands name, as a user has them."""
    ignored = shutil.ignore_patterns("runs", ".git", "__pycache__", ".pytest_cache", "*.png")
    shutil.copytree(ROOT, folder, ignore=ignored)
    losses = [USER_LOSS.format(name=name) for name in ("ipo", "my_loss")]
    (folder / "my_loss.py").write_text("".join(losses))
    (folder / "my_tests.py").write_text("def test_nothing():\n    pass\n")
    (folder / "my_pairs.jsonl").write_text(json.dumps(USER_PAIR) + "\n")
    (folder / "runs" / "default").mkdir(parents=True)
    for name in ("results.jsonl", "measured.jsonl", "optimum.json"):    # for `python -m plots`
        shutil.copy(folder / "plots" / name, folder / "runs" / "default")
    return folder


def run(command, folder):
    """Run a command in a checkout, made small by the flags of SMALL; returns the process."""
    words = small(command)
    environment = {**os.environ}
    environment.pop("RANK", None)
    environment.pop("WORLD_SIZE", None)
    return subprocess.run([sys.executable, *words[1:]], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=200)


def test_the_documents_hold_commands():
    """Commands of every kind are found, and every command of NOT_RUN is in a document."""
    missing = [kind for kind in KINDS if not any(kind in command for command in COMMANDS)]
    assert not missing, f"the documents have no command with {missing}"
    outdated = [command for command in NOT_RUN if command not in FOUND]
    assert not outdated, f"NOT_RUN lists commands that are in no document: {outdated}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documents_runs(command, commands):
    """The command ends with exit code 0; the fixture `commands` runs it."""
    process = commands[command].result()
    assert process.returncode == 0, process.stdout[-1500:] + process.stderr[-1500:]


# ---------------------------------------------------------------------- the snippet of the README
def test_the_loss_of_the_readme_can_be_used(tmp_path):
    """The five lines of the README are a loss; its minimum, 0, is at h = 1 / (2 beta)."""
    snippet = re.search(r"```python\n(def ipo.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my_loss.py").write_text(snippet)
    ipo = harness.UserLoss(f"{tmp_path}/my_loss.py:ipo")
    beta = .3
    h = torch.tensor([1 / (2 * beta), 1., 3.])
    zero = torch.zeros(3)
    logp = zero - 20.
    loss = ipo(dpo.Pair(h + logp, logp, logp, logp, zero, zero), beta)
    assert loss[0] < 1e-10 and (loss[1:] > .01).all(), \
        f"{loss.tolist()} is not 0 at h = 1 / (2 beta) alone"


# --------------------------------------------------------------- the map from the paper to the code
def read_map():
    """The rows of the table in tests/README.md: (paper, statement, code, test) each."""
    table = GUIDE_TO_TESTS.split("| Paper | Statement | Code | Test |")[1].split("\n\n")[0]
    lines = table.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def read_theorems():
    """{name without `test_`: docstring} of all test functions of this repository."""
    theorems = {}
    for path in (ROOT / "tests").glob("**/test_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                theorems[node.name.removeprefix("test_")] = ast.get_docstring(node) or ""
    return theorems


ROWS = read_map()
THEOREMS = read_theorems()


def exists(name):
    """Whether `name` is a module, or MODULE.NAME of something in a module."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_function_and_test_of_the_map_exists():
    """Column Code names functions or modules, column Test names theorems."""
    for paper, _, code, test in ROWS:
        for name in INLINE_CODE.findall(code):
            assert exists(name), f"tests/README.md, row {paper}: there is no {name}"
        for name in INLINE_CODE.findall(test):
            assert name in THEOREMS, f"tests/README.md, row {paper}: there is no theorem {name}"


def test_every_equation_of_the_map_is_named_where_the_map_points():
    """The docstring of the function or of the theorem contains the number of the equation."""
    for paper, _, code, test in ROWS:
        objects = [pkgutil.resolve_name(name) for name in INLINE_CODE.findall(code)]
        docs = [inspect.getdoc(x) for x in objects if not inspect.ismodule(x)]
        docs += [THEOREMS[name] for name in INLINE_CODE.findall(test)]
        numbers = re.findall(r"\d+", paper) if paper.startswith("Eq.") else []
        for number in numbers:
            assert re.search(rf"\b{number}\b", " ".join(docs)), \
                f"tests/README.md, row {paper}: neither {code} nor {test} names Eq. {number}"


def test_the_map_covers_every_equation():
    """Eq. 1 to 22, the lemmas, the theorem and the proposition have a row."""
    equations = set()
    for paper, *_ in ROWS:
        for numbers in re.findall(r"Eq\. ([\d-]+)", paper):
            low, _, high = numbers.partition("-")
            equations.update(range(int(low), int(high or low) + 1))
    assert equations == set(range(1, 23)), f"missing: {set(range(1, 23)) - equations}"
    statements = {"Lemma 1", "Lemma 2", "Theorem 1", "Proposition 1", "App. B"}
    assert statements <= {paper for paper, *_ in ROWS}
