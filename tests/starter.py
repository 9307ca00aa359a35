"""A starter for an assignment: this repository with the bodies of some functions blanked, signature and docstring kept.

    python -m tests.starter FOLDER dpo.dpo_loss dpo.dpo_gradient

Blank pure functions only; the optimiser's step stays ours, so that no hand-in trains nothing without noticing.
"""
import ast
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def blank(source: str, name: str, module: str) -> str:
    """The source with one top-level function's body replaced by `raise NotImplementedError`. Raises KeyError if it is not there."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    body, lines = functions[name].body, source.splitlines()
    first = body[1] if ast.get_docstring(functions[name]) else body[0]
    hole = f'    raise NotImplementedError("{module}.{name} is yours to write")'
    return "\n".join(lines[:first.lineno - 1] + [hole] + lines[functions[name].end_lineno:]) + "\n"


def make(folder: pathlib.Path, names: list[str]) -> None:
    """Copies the repository to a new folder and blanks module.function for each name."""
    sources = {}    # a name that is not there must leave nothing behind
    for module, _, function in (name.partition(".") for name in names):
        sources[module] = blank(sources.get(module) or (ROOT / f"{module}.py").read_text(), function, module)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".*", "__pycache__"))
    for module, source in sources.items():
        (folder / f"{module}.py").write_text(source)


if __name__ == "__main__":
    if len(sys.argv) < 3 or pathlib.Path(sys.argv[1]).exists():
        sys.exit("usage: python -m tests.starter NEW_FOLDER module.function ...")
    try:
        make(pathlib.Path(sys.argv[1]), sys.argv[2:])
    except (KeyError, OSError) as error:
        sys.exit(f"there is no function {error} at the top level of its module; name it as module.function")
