"""Grade a folder that a student hands in.

    python -m tests.grade SUBMISSION                   prints a table, writes SUBMISSION/graded/
    python -m tests.grade SUBMISSION --out results.json        in the format that Gradescope reads
    python -m tests.grade --prepare                    trains the baselines once
    python -m tests.grade --pack FOLDER                writes autograder.zip for Gradescope

A submission holds any of: my_loss.py, my_tests.py, diagnosis.json, and the files of a filled-in
starter (dpo.py, ppo.py, ...). points.py has points, time limits and settings. Whatever a part does,
it costs the points of that part and is said in one sentence. grading.py and grading_loss.py say how
each part is graded, sandbox.py what protects the grader.
"""
import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Callable

TESTS = pathlib.Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent):
    sys.path.insert(0, str(folder))

import grading  # noqa: E402
import grading_loss  # noqa: E402
import points  # noqa: E402
import sandbox  # noqa: E402

RUNS = sandbox.ROOT / "runs"


# --------------------------------------------------------------------------------- the baselines
def prepare_baseline(settings) -> pathlib.Path:
    """The folder of the baselines of points.py; they are trained if they are not there."""
    folder = RUNS / f"graded-{settings.PRESET}"
    if not (folder / "optimum.json").exists():
        print(f"training the baselines once, into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "train.py", "--preset", settings.PRESET, *settings.FLAGS,
                        "--device", "cpu", "--out", str(folder)], cwd=sandbox.ROOT,
                       stdout=sys.stderr)
        if not (folder / "optimum.json").exists():
            sys.exit(f"the baselines could not be trained; {folder} has what is finished")
    return folder


# -------------------------------------------------------------------------------- one submission
def parts_of(job: grading.Job) -> list[str]:
    """The parts that a submission holds."""
    names = ["my_loss.py", "my_tests.py", "diagnosis.json"]
    parts = [name for name in names if (job.submission / name).is_file()]
    modules = {hole.partition(".")[0] for hole in job.settings.HOLES}
    if any((job.submission / f"{module}.py").is_file() for module in modules):
        parts.append("starter")
    return parts


def points_of(part: str, settings) -> float:
    """All points of a part."""
    names = {"my_loss.py": ("contract", "training"), "my_tests.py": ("tests",),
             "diagnosis.json": ("number", "where", "named test"), "starter": ("holes",)}
    return sum(settings.POINTS[name] for name in names[part])


def grade_part(job: grading.Job, part: str) -> tuple[list[dict], list[dict], dict]:
    """The results of a part; for my_loss.py also the rows of its policies and the optimum."""
    if part == "my_loss.py":
        return grading_loss.grade_loss(job)
    functions = {"my_tests.py": grading.grade_tests, "diagnosis.json": grading.grade_diagnosis,
                 "starter": grading.grade_starter}
    return functions[part](job), [], {}


def grade_safely(job: grading.Job, part: str) -> tuple[list[dict], list[dict], dict]:
    """`grade_part`; a part that cannot be graded gets no points, and the others are graded."""
    try:
        return grade_part(job, part)
    except grading.Refusal as refusal:
        said = str(refusal)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        said = f"the grader failed on this part ({type(error).__name__}): tell your teacher"
    return [grading.result(part, 0., points_of(part, job.settings), said)], [], {}


def leaderboard(rows: list[dict], kl: float) -> list[dict]:
    """The share of the optimal gain at a KL, between two policies; - if both are on one side."""
    if not rows:
        return []
    from plots import tables
    shares = [share for share, _ in tables.shares_at(rows, "my_loss", kl, max_ratio=math.inf)]
    value = round(100 * shares[0], 1) if shares else "-"
    return [{"name": f"share of the optimal gain at KL {kl:g}, %", "value": value}]


def grade(job: grading.Job, save: Callable[[dict], None]) -> tuple[dict, list[dict], dict]:
    """The results of a submission in Gradescope's format, the rows of its policies, the optimum.

    save(results) is called after each part, so that a time limit of the service keeps them.
    """
    start, tests, rows, optimum = time.monotonic(), [], [], {}
    parts, warnings = parts_of(job), []
    stages = grading_loss.file_digests(job.baseline) if job.baseline else {}
    for part in job.settings.REQUIRED:
        if part not in parts:
            most = points_of(part, job.settings)
            tests.append(grading.result(part, 0., most, "it was not handed in"))
    for part in parts:
        results, found_rows, found_optimum = grade_safely(job, part)
        tests += results
        rows, optimum = rows + found_rows, found_optimum or optimum
        save({"score": round(sum(test["score"] for test in tests), 2), "tests": tests,
              "output": "The grading was stopped after these parts."})
    changed = sandbox.changed_files(job.snapshot)
    if job.baseline and grading_loss.file_digests(job.baseline) != stages:
        changed.append(str(job.baseline))
    if changed:    # later parts did not read them: their copies come from memory
        warnings.append(f"While this ran, files of the grader changed: {', '.join(changed)}. If "
                        "you did not edit them, read the submission and restore them.")
    if not parts:
        warnings.append("The folder holds nothing to grade: none of my_loss.py, my_tests.py, "
                        "diagnosis.json, and no file of the starter.")
    results = {"score": round(sum(test["score"] for test in tests), 2),
               "execution_time": round(time.monotonic() - start), "output": " ".join(warnings),
               "tests": tests, "leaderboard": leaderboard(rows, job.settings.LEADERBOARD_KL)}
    return results, rows, optimum


# ----------------------------------------------------------------------------------------- output
def table(results: dict) -> str:
    """The results as text."""
    lines = []
    for test in results["tests"]:
        lines.append(f"{test['score']:>6g} of {test['max_score']:<5g} {test['name']:<32} "
                     f"{test['output']}")
    most = sum(test["max_score"] for test in results["tests"])
    lines.append(f"{results['score']:>6g} of {most:<5g} in all, in {results['execution_time']} s")
    lines += [f"{entry['name']}: {entry['value']}" for entry in results["leaderboard"]]
    return "\n".join(lines + [results["output"]] * bool(results["output"]))


def write(folder: pathlib.Path, job: grading.Job, results: dict, rows: list, optimum: dict) -> None:
    """Write what `python -m plots class` reads: the results, and the curve if there is one.

    What the student handed in under these names is overwritten.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"results.json": json.dumps({**results, "student": job.student}, indent=1)}
    content["results.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    content["optimum.json"] = json.dumps(optimum) + "\n"
    for name, text in content.items():
        (folder / name).unlink(missing_ok=True)    # it may be a link
        (folder / name).write_text(text, "utf-8")


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.grade", description="Grade a folder "
                                     "that a student hands in; see points.py.")
    parser.add_argument("submission", nargs="?", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="results.json for Gradescope (default: "
                        "SUBMISSION/graded/results.json)")
    parser.add_argument("--student", help="name that drew the planted bug (default: the name in "
                        "--metadata, or of the folder)")
    parser.add_argument("--metadata", type=pathlib.Path, help="Gradescope's "
                        "submission_metadata.json")
    parser.add_argument("--baseline", type=pathlib.Path, help="folder with the baselines, of the "
                        "preset in points.py (default: runs/graded-PRESET, trained once)")
    parser.add_argument("--user", help="run the student's code as this user (Linux and macOS, "
                        "started as root)")
    parser.add_argument("--prepare", action="store_true", help="train the baselines and end")
    parser.add_argument("--pack", type=pathlib.Path, metavar="FOLDER", help="write autograder.zip")
    args = parser.parse_args(arguments)
    if not (args.prepare or args.pack) and not (args.submission and args.submission.is_dir()):
        parser.error("name the folder of a submission")
    return args


def student_name(args: argparse.Namespace) -> str:
    """The name that drew the planted bug."""
    if args.student:
        return args.student
    if args.metadata and args.metadata.exists():
        users = json.loads(args.metadata.read_text("utf-8"))["users"]
        if users:
            return users[0]["name"]
    return args.submission.resolve().name


def main(arguments: list[str]) -> int:
    args = read_arguments(arguments)
    settings = SimpleNamespace(**{name: x for name, x in vars(points).items() if name.isupper()})
    settings.BUGS = os.environ.get("DPO_BUGS") or settings.BUGS
    if args.pack:
        import packing
        print(f"written: {packing.pack(args.pack, settings.BUGS)}")
        return 0
    if args.prepare:
        prepare_baseline(settings)
        return 0
    problem = sandbox.problem_of_user(args.user)
    if problem:
        sys.exit(problem)
    job = grading.Job(args.submission.resolve(), sandbox.take_snapshot(), settings,
                      student_name(args), user=args.user)
    if "my_loss.py" in parts_of(job):
        job = job._replace(baseline=args.baseline or prepare_baseline(settings))

    def save(results: dict) -> None:
        if args.out:
            args.out.write_text(json.dumps(results, indent=1), "utf-8")

    results, rows, optimum = grade(job, save)
    write(args.submission / "graded", job, results, rows, optimum)
    save(results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
