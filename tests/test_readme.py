"""The README's map from the paper to the code is true, and so are its snippets."""
import importlib
import inspect
import pathlib
import re

import torch

import dpo
import test_mutants

TESTS = set(re.findall(r"^def test_(\w+)", "\n".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py")), re.M))
README = (pathlib.Path(dpo.__file__).parent / "README.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in README.split("| Paper | Statement | Code | Test |")[1].split("\n\n")[0].splitlines()[2:]]


def test_every_function_and_test_of_the_map_exists():
    """Column Code names functions or modules, column Test names theorems."""
    for paper, _, code, test in ROWS:
        for name in re.findall(r"`([\w.]+)`", code):
            module, _, function = name.partition(".")
            found = importlib.import_module(name) if module == "plots" else getattr(importlib.import_module(module), function, None)
            assert found, f"README, row {paper}: there is no {name}"
        for name in re.findall(r"`(\w+)`", test):
            assert name in TESTS, f"README, row {paper}: there is no theorem {name}"


def test_every_equation_of_the_map_is_named_where_the_map_points():
    """The equation's number stands in the docstring of its function, or in that of the theorem (for derivations)."""
    for paper, _, code, test in ROWS:
        functions = [getattr(importlib.import_module(n.split(".")[0]), n.split(".")[1]) for n in re.findall(r"`((?!plots)\w+\.\w+)`", code)]
        docs = " ".join(inspect.getdoc(f) for f in functions)
        docs += " ".join(inspect.getdoc(test_mutants.THEOREMS[name]) for name in re.findall(r"`(\w+)`", test) if name in test_mutants.THEOREMS)
        for number in re.findall(r"\d+", paper) if paper.startswith("Eq.") else []:
            assert re.search(rf"\b{number}\b", docs), f"README, row {paper}: neither {code} nor {test} says {number}"


def test_the_map_covers_every_equation():
    """Eq. 1 to 22, the lemmas, the theorem and the proposition."""
    named = {int(n) for paper, *_ in ROWS for part in re.findall(r"Eq\. ([\d-]+)", paper)
             for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)}
    assert named == set(range(1, 23)), f"missing: {set(range(1, 23)) - named}"
    assert {"Lemma 1", "Lemma 2", "Theorem 1", "Proposition 1", "App. B"} <= {paper for paper, *_ in ROWS}


def test_the_loss_of_the_readme_can_be_used(tmp_path):
    """The five lines that the README shows are a loss, least at its margin h = 1 / (2 beta)."""
    (tmp_path / "my_loss.py").write_text(re.search(r"```python\n(def ipo.*?)```", README, re.S)[1])
    ipo, beta, zero = dpo.load_loss(f"{tmp_path}/my_loss.py:ipo"), .3, torch.zeros(3)
    h = torch.tensor([1 / (2 * beta), 1., 3.])
    loss = ipo(dpo.Pair(h - 20., zero - 20., zero - 20., zero - 20., zero, zero), beta)
    assert loss[0] < 1e-10 and (loss[1:] > .01).all(), f"{loss.tolist()} is not 0 at h = 1 / (2 beta) alone"
