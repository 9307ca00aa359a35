"""What a student's code may not contain where it runs in one process with what decides its points.

That is so for my_tests.py and for the functions of a starter. The check reads the code and does not
run it. It is a fence and not a wall: it stops a way around the assignment that is written in five
lines, and every refusal names its line.
"""
import ast

FORBIDDEN_NAMES = {
    "__import__", "breakpoint", "compile", "delattr", "dir", "eval", "exec", "exit", "getattr",
    "globals", "hasattr", "input", "locals", "memoryview", "open", "quit", "setattr", "vars",
}
FORBIDDEN_ATTRIBUTES = {
    "os", "sys", "builtins", "importlib", "inspect", "subprocess", "pathlib", "hub", "load", "save",
    "multiprocessing", "importorskip", "MonkeyPatch", "skip", "exit", "mock", "gc", "ctypeslib",
    "tofile", "fromfile", "f_back", "f_globals", "f_locals", "gi_frame", "tb_frame", "cr_frame",
    "format", "format_map", "testing", "runstring", "rundocs", "savetxt", "loadtxt", "genfromtxt",
    "memmap", "dump", "load_library", "cpp_extension",
}


NAMED_TUPLE = {"_replace", "_fields", "_asdict"}


def is_hidden(name: str) -> bool:
    """Whether a name is Python's own, such as __wrapped__, or a module's private name."""
    return name.startswith("_") and name.strip("_") != "" and name not in NAMED_TUPLE


def imported_modules(node: ast.AST) -> list[str]:
    """The top-level modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." if node.level else node.module.split(".")[0]]
    return []


def objection(node: ast.AST, allowed_imports: tuple[str, ...]) -> str:
    """Why a piece of code is not allowed; empty text if it is."""
    for module in imported_modules(node):
        if module not in allowed_imports:
            allowed = ", ".join(allowed_imports) or "nothing"
            return f"imports {module}; this part may import {allowed}"
    names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
    if isinstance(node, ast.Attribute):
        names.append(node.attr)
    for name in names:
        if is_hidden(name.split(".")[-1]) or name.split(".")[-1] in FORBIDDEN_ATTRIBUTES:
            return f"uses .{name}, which this part may not"
    if isinstance(node, ast.Name) and (node.id in FORBIDDEN_NAMES or node.id.startswith("__")):
        return f"uses {node.id}, which this part may not"
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        return "uses global or nonlocal, which this part may not"
    return ""


def screen(tree: ast.AST, allowed_imports: tuple[str, ...] = ()) -> str:
    """The first objection to some code, with its line; empty text if there is none."""
    for node in ast.walk(tree):
        reason = objection(node, allowed_imports)
        if reason:
            return f"line {node.lineno} {reason}"
    return ""


def parse(text: str, name: str) -> tuple[ast.Module | None, str]:
    """The syntax tree of a file, or None and the reason in one sentence."""
    try:
        return ast.parse(text), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or "?"
        return None, f"{name} is not Python: line {line}: {getattr(error, 'msg', error)}"
