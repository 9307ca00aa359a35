"""A starter for an assignment: this repository without the bodies of some functions.

    python -m tests.starter NEW_FOLDER dpo.dpo_loss dpo.dpo_gradient

A function keeps its signature and its docstring; its body raises NotImplementedError. Choose pure
functions. With the optimiser's step blank, a solution could train nothing without an error.
"""
import ast
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_COPIED = "runs", ".*", "__pycache__"


def lines_of(source: str) -> list[str]:
    """The lines of a source as `ast` counts them: str.splitlines also splits at form feeds."""
    return source.removesuffix("\n").split("\n")


def blank(source: str, name: str, module: str) -> str:
    """The source with the body of one top-level function replaced by a NotImplementedError.

    Raises KeyError if there is no such function.
    """
    functions = {node.name: node for node in ast.parse(source).body
                 if isinstance(node, ast.FunctionDef)}
    function = functions[name]
    first_statement = function.body[0]
    if ast.get_docstring(function):
        first_statement = function.body[1]
    lines = lines_of(source)
    before = lines[:first_statement.lineno - 1]
    after = lines[function.end_lineno:]
    hole = f'    raise NotImplementedError("{module}.{name} is yours to write")'
    return "\n".join([*before, hole, *after]) + "\n"


def make(folder: pathlib.Path, names: list[str]) -> None:
    """Copy the repository to a new folder and blank the functions, each named MODULE.FUNCTION.

    Raises KeyError or OSError for a function that does not exist; then nothing is copied.
    """
    sources = {}    # module -> its source with holes
    for name in names:
        module, _, function = name.partition(".")
        if module not in sources:
            sources[module] = (ROOT / f"{module}.py").read_text("utf-8")
        sources[module] = blank(sources[module], function, module)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for module, source in sources.items():
        (folder / f"{module}.py").write_text(source, "utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3 or pathlib.Path(sys.argv[1]).exists():
        sys.exit("usage: python -m tests.starter NEW_FOLDER module.function ...")
    try:
        make(pathlib.Path(sys.argv[1]), sys.argv[2:])
    except (KeyError, OSError) as error:
        sys.exit(f"there is no function {error} at the top level of its module; name it as "
                 "module.function")
