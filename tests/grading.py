"""The parts of a submission, each graded by a function: grade_X(job) -> results of tests.

A result has name, score, max_score and output, as Gradescope reads them. A part runs in a process
of its own, in a copy of the repository that is deleted afterwards (sandbox.py).
"""
import ast
import contextlib
import json
import pathlib
import secrets
import tempfile
from types import SimpleNamespace
from typing import NamedTuple

import sandbox
import screening
import starter

LONGEST_FILE = 200_000    # bytes


class Job(NamedTuple):
    """One submission, and what it is graded with."""
    submission: pathlib.Path
    snapshot: dict[str, bytes]              # the grader's repository, see sandbox.py
    settings: SimpleNamespace               # the names of points.py
    student: str = ""                       # draws the planted bug
    baseline: pathlib.Path | None = None    # folder with the baselines; None: train without them
    user: str | None = None                 # user of the machine who runs the student's code


class Refusal(Exception):
    """Why a part gets no points, in one sentence for the student."""


def result(name: str, score: float, max_score: float, output: str) -> dict:
    """A test as Gradescope reads it."""
    return {"name": name, "score": round(score, 2), "max_score": max_score, "output": output}


def read(job: Job, name: str) -> str:
    """A file of the submission. Raises Refusal."""
    path = job.submission / name
    if path.is_symlink() or path.stat().st_size > LONGEST_FILE:
        raise Refusal(f"{name} is a link, or longer than {LONGEST_FILE // 1000} kB")
    try:
        return path.read_text("utf-8-sig")
    except ValueError:
        raise Refusal(f"{name} is not UTF-8 text") from None


def read_tests(job: Job) -> str:
    """my_tests.py, if it is Python and does nothing that it may not. Raises Refusal."""
    text = read(job, "my_tests.py")
    tree, problem = screening.parse(text, "my_tests.py")
    problem = problem or screening.screen(tree, job.settings.ALLOWED_IMPORTS)
    if problem:
        raise Refusal(problem)
    return text


@contextlib.contextmanager
def copy_of_repository(job: Job, owner: str | None = None):
    """A copy of the grader's repository in a new folder, which `owner` may write."""
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as folder:
        copy = sandbox.write_copy(job.snapshot, pathlib.Path(folder).resolve() / "repository")
        sandbox.give_to(owner, copy)
        yield copy


def last_words(output: str) -> str:
    """What a program printed last, for a sentence."""
    words = sandbox.shorten(" ".join(output.split()), 120)
    return f"; it printed last: {words}" if words else ""


def ask_child(job: Job, copy: pathlib.Path, seconds: float, user: str | None,
              variables: dict[str, str], **request) -> dict:
    """The result of grade_child.py. Raises Refusal if there is none."""
    nonce = secrets.token_hex(16)
    text = json.dumps({"nonce": nonce, **request}) + "\n"
    variables = sandbox.environment(copy, **variables)
    finished = sandbox.run(["tests/grade_child.py"], copy, seconds, text, variables, user)
    lines = [line for line in finished.output.splitlines() if line.startswith(nonce)]
    if not lines:
        problem = finished.problem or "its process ended before the result was there"
        raise Refusal(f"{problem}{last_words(finished.output)}")
    found = json.loads(lines[-1].removeprefix(nonce))
    if "error" in found:
        raise Refusal(found["error"].removeprefix("LossError: "))
    return found


# ---------------------------------------------------------------------------- a filled-in starter
def find_function(tree: ast.Module, name: str) -> ast.FunctionDef:
    """A function at the top level of a module. Raises Refusal."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise Refusal(f"there is no function {name} at the top level of the file")


def fill_hole(original: str, submitted: str, hole: str) -> str:
    """The grader's module with one function of the student's in it. Raises Refusal."""
    module, _, name = hole.partition(".")
    tree, problem = screening.parse(submitted, f"{module}.py")
    if problem:
        raise Refusal(problem)
    function, old = find_function(tree, name), find_function(ast.parse(original), name)
    problem = screening.screen(function)
    if problem:
        raise Refusal(f"{module}.py, {problem}")
    names = [[x.arg for x in ast.walk(node.args) if isinstance(x, ast.arg)]
             for node in (function, old)]
    if names[0] != names[1]:
        raise Refusal(f"{hole} takes ({', '.join(names[0])}), not ({', '.join(names[1])}): keep "
                      "its signature")
    new_lines = starter.lines_of(submitted)[function.lineno - 1:function.end_lineno]
    lines = starter.lines_of(original)
    return "\n".join([*lines[:old.lineno - 1], *new_lines, *lines[old.end_lineno:]]) + "\n"


def find_theorem(snapshot: dict[str, bytes], name: str) -> list | None:
    """[module, name] of a theorem of the repository, for grade_child.py."""
    if not name.isidentifier():
        return None
    definition = f"def test_{name}(".encode()
    for path, content in snapshot.items():
        if path.startswith("tests/theorems/") and definition in content:
            return [pathlib.PurePosixPath(path).stem, name]
    return None


def theorems_of(job: Job, hole: str) -> list[list]:
    """The theorems that find the planted bugs of a function. Raises Refusal if there are none."""
    import mutants
    names = [name for bug in mutants.MUTANTS if bug.target == hole for name in bug.theorems]
    theorems = []
    for name in dict.fromkeys(names):
        is_module = f"tests/theorems/{name}.py" in job.snapshot
        theorems.append([name, None] if is_module else find_theorem(job.snapshot, name))
    theorems = [theorem for theorem in theorems if theorem]
    if not theorems:
        raise Refusal(f"no planted bug targets {hole}: the teacher should choose another hole")
    return theorems


def grade_hole(job: Job, hole: str, seconds: float) -> tuple[float, str]:
    """The share of a hole's points, and what to say."""
    module = hole.partition(".")[0]
    if not (job.submission / f"{module}.py").is_file():
        raise Refusal(f"the submission has no {module}.py")
    original = job.snapshot[f"{module}.py"].decode()
    filled = fill_hole(original, read(job, f"{module}.py"), hole)
    with copy_of_repository(job, job.user) as copy:
        (copy / f"{module}.py").write_text(filled, "utf-8")
        found = ask_child(job, copy, seconds, job.user, {}, part="theorems", hole=hole,
                          theorems=theorems_of(job, hole))
    errors = {name: found["errors"][name] for name in found["failing"]}    # those that call it
    wrong = {name: error for name, error in errors.items() if error}
    if not wrong:
        return 1., f"all {len(errors)} theorems hold"
    passed = len(errors) - len(wrong)
    name, error = next(iter(wrong.items()))
    output = (f"{passed} of {len(errors)} theorems hold; the first that does not: "
              f"{name.replace('_', ' ')}: {error}")
    return job.settings.PARTIAL * passed / len(errors), output


def grade_starter(job: Job) -> list[dict]:
    """The functions of the assignment, each with the theorems that belong to it."""
    holes, points = job.settings.HOLES, job.settings.POINTS["holes"]
    results = []
    for hole in holes:
        try:
            share, output = grade_hole(job, hole, job.settings.SECONDS["holes"] / len(holes))
        except Refusal as refusal:
            share, output = 0., str(refusal)
        results.append(result(f"starter: {hole}", share * points / len(holes),
                              round(points / len(holes), 2), output))
    return results


# ------------------------------------------------------------------------------------ my_tests.py
def grade_tests(job: Job) -> list[dict]:
    """my_tests.py: planted bugs found, minus false alarms."""
    text = read_tests(job)
    with copy_of_repository(job, job.user) as copy:
        path = copy / "my_tests.py"
        path.write_text(text, "utf-8")
        found = ask_child(job, copy, job.settings.SECONDS["tests"], job.user, {}, part="score",
                          path=str(path))
    bugs, alarms = len(found["found"]), found["false_alarms"]
    points = job.settings.POINTS["tests"]
    output = f"{bugs} of {found['bugs']} bugs found, {len(alarms)} false alarms"
    if alarms:
        output += f": {', '.join(alarms)[:300]} fail on the code as it is"
    return [result("my_tests.py", points * max(bugs - len(alarms), 0) / found["bugs"], points,
                   output)]


# --------------------------------------------------------------------------------- diagnosis.json
def read_diagnosis(job: Job) -> dict:
    """{"bug": N, "where": "module.name", "test": "..."}. Raises Refusal."""
    try:
        diagnosis = json.loads(read(job, "diagnosis.json"))
        assert isinstance(diagnosis, dict)
    except (ValueError, AssertionError, RecursionError):
        raise Refusal('diagnosis.json is not an object {"bug": N, "where": "module.name", "test": '
                      '"name of a test"}') from None
    return diagnosis


def grade_place(where: str, target: str) -> tuple[float, str]:
    """The share of the points for where the bug is."""
    where = where.strip().removesuffix("()").replace(".py:", ".").replace("/", ".")
    name = target.partition(".")[2]    # of train.frontier.optimum_from_samples, which is in plots
    if where in (target, name, f"plots.{name}"):
        return 1., "that is the function"
    if where.split(".")[0].removesuffix(".py") == target.split(".")[0]:
        return .5, "the module is right, the function is not"
    return 0., "the bug is elsewhere"


def run_named_test(job: Job, name: str, number: int, bugs: str) -> str:
    """Whether a test finds a bug: empty text, or why it does not. Raises Refusal."""
    name = name.split("::")[-1].removeprefix("test_")
    with copy_of_repository(job, job.user) as copy:
        theorem = find_theorem(job.snapshot, name)
        if theorem is None and (job.submission / "my_tests.py").is_file():
            text = read_tests(job)
            if f"def test_{name}(" in text:
                (copy / "my_tests.py").write_text(text, "utf-8")
                theorem = [str(copy / "my_tests.py"), name]
        if theorem is None:
            raise Refusal(f"there is no theorem, and no test in my_tests.py, named {name[:100]!r}")
        found = ask_child(job, copy, job.settings.SECONDS["diagnosis"], job.user, {},
                          part="theorems", theorems=[theorem], bug=number, bugs=bugs)
    if found["errors"][name]:
        return f"it fails on the code as it is: {found['errors'][name]}"
    return "" if name in found["failing"] else "it passes on the code with the bug"


def drawn_bug(job: Job) -> tuple[int, object, str]:
    """Number of the bug that the student drew, the bug, and the file of private bugs."""
    import drawing
    import mutant
    import mutants
    bugs = job.settings.BUGS
    numbers = list(drawing.load_bugs(bugs)) if bugs else drawing.visible_bugs(mutant)
    number = drawing.draw(job.student, numbers, job.settings.ROSTER)
    return number, mutants.MUTANTS[number - 1], bugs


def grade_diagnosis(job: Job) -> list[dict]:
    """diagnosis.json: the student's own bug, where it is, and a test that names it."""
    diagnosis, points = read_diagnosis(job), job.settings.POINTS
    number, bug, bugs = drawn_bug(job)
    if str(diagnosis.get("bug")) != str(number):
        raise Refusal(f"{job.student!r} drew another bug than {str(diagnosis.get('bug'))[:20]!r}: "
                      "python -m tests.mutant --student NAME runs it")
    share, output = grade_place(str(diagnosis.get("where", "")), bug.target)
    results = [result("diagnosis.json: number", points["number"], points["number"],
                      "that is the bug that was drawn"),
               result("diagnosis.json: where", share * points["where"], points["where"], output)]
    try:
        problem = run_named_test(job, str(diagnosis.get("test", "")), number, bugs)
    except Refusal as refusal:
        problem = str(refusal)
    score = 0 if problem else points["named test"]
    results.append(result("diagnosis.json: test", score, points["named test"],
                          problem or "it passes on the code as it is and fails on the bug"))
    return results
