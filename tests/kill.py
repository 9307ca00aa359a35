"""Faults of a run: kill -9, Ctrl-C, two runs in one folder, damaged files.

    python -m tests.kill [TIMES, default 20] [FLAGS of train.py]        half an hour on two cores

After each fault the same command must complete, compute only what was unfinished, and find the
results of a run without faults. kill -9 happens TIMES times at random moments, every other fault a
quarter as often. The program prints a table; its exit code is 1 if a run did not survive. It needs
the signals of Unix (Linux or macOS).
"""
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Callable, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "train.py", "--preset", "tiny", "--device", "cpu", "--workers", "2"]
MESSAGE = "the same command continues"    # Ctrl-C must print it
NOT_READ_AGAIN = (    # by the command after a whole run
    "prompts-of-split-train", "make-corpus-restaurant", "sample-completions-part-validation")
DAMAGES = "truncated", "empty", "foreign", "another's"


class Reference(NamedTuple):
    """A run without faults."""
    out: pathlib.Path
    flags: list[str]
    rows: list[dict]
    seconds: float


# ------------------------------------------------------------------------------------------- runs
def start(out: pathlib.Path, flags: list[str]) -> subprocess.Popen:
    """Start the command in a process group of its own."""
    return subprocess.Popen([*COMMAND, *flags, "--out", str(out)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def read_rows(out: pathlib.Path) -> list[dict]:
    """The rows of results.jsonl without the columns that depend on the clock."""
    lines = (out / "results.jsonl").read_text("utf-8").splitlines()
    return [{name: x for name, x in json.loads(line).items() if "second" not in name}
            for line in lines]


def finished_stages(out: pathlib.Path) -> dict[str, int]:
    """{name of a stage's file: when it was written}"""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}


def run_again(out: pathlib.Path, reference: Reference,
              damaged: tuple[str, ...] = ()) -> tuple[bool, bool, str]:
    """Run the command after a fault -> (survived, results are equal, what it printed).

    It survived if it ends with exit code 0 and writes no finished stage again but the damaged ones.
    """
    before = {name: written for name, written in finished_stages(out).items()
              if name not in damaged}
    process = start(out, reference.flags)
    printed, _ = process.communicate()
    completed = process.returncode == 0
    survived = completed and before.items() <= finished_stages(out).items()
    return survived, completed and read_rows(out) == reference.rows, printed


def send(number: int, process: subprocess.Popen, to_all: bool) -> None:
    """Send a signal to every process of a run, or to its first process only."""
    if to_all:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)


# ----------------------------------------------------------------------------------------- faults
# Each function causes one fault and runs the command again -> (survived, results are equal).
def kill(out: pathlib.Path, reference: Reference, r: random.Random,
         to_all: bool) -> tuple[bool, bool]:
    """kill -9 at a random moment."""
    process = start(out, reference.flags)
    time.sleep(r.uniform(0, reference.seconds))
    send(signal.SIGKILL, process, to_all)
    process.wait()
    survived, equal, _ = run_again(out, reference)
    return survived, equal


def interrupt(out: pathlib.Path, reference: Reference, r: random.Random,
              to_all: bool) -> tuple[bool, bool]:
    """Ctrl-C at a random moment: the run ends within two seconds and prints one line, MESSAGE."""
    process = start(out, reference.flags)
    time.sleep(r.uniform(0, .9) * reference.seconds)
    pressed = time.time()
    send(signal.SIGINT, process, to_all)
    _, message = process.communicate()
    seconds = time.time() - pressed
    one_line = message.count("\n") == 1 and MESSAGE in message
    clean = seconds < 2 and one_line and process.returncode != 0
    if not clean:
        print(f"Ctrl-C: the run ended after {seconds:.1f} s with exit code {process.returncode} "
              f"and printed {message[-200:]!r}", flush=True)
    survived, equal, _ = run_again(out, reference)
    return clean and survived, equal


def start_twice(out: pathlib.Path, reference: Reference, r: random.Random) -> tuple[bool, bool]:
    """The same command twice at the same time in the same folder: both complete."""
    processes = [start(out, reference.flags)]
    time.sleep(r.uniform(0, 1) * reference.seconds)
    processes.append(start(out, reference.flags))
    for process in processes:
        process.communicate()
    survived = all(process.returncode == 0 for process in processes)
    equal = (out / "results.jsonl").exists() and read_rows(out) == reference.rows
    return survived, equal


def damage(out: pathlib.Path, reference: Reference, r: random.Random,
           kind: str) -> tuple[bool, bool]:
    """A stage's file is damaged: the run names it and computes it again, and no other."""
    shutil.copytree(reference.out, out)
    stages = sorted(out.glob("*.pt"))
    path = r.choice([path for path in stages if not path.name.startswith(NOT_READ_AGAIN)])
    content = path.read_bytes()
    another = r.choice([stage for stage in stages if stage.read_bytes() != content])
    damaged_contents = {
        "truncated": content[:r.randrange(1, len(content))],
        "empty": b"",
        "foreign": b"not a stage\n",
        "another's": another.read_bytes(),
    }
    path.write_bytes(damaged_contents[kind])
    survived, equal, printed = run_again(out, reference, damaged=(path.name,))
    named = path.name in printed
    if not named:
        print(f"{path.name} was {kind}, and the run did not name it", flush=True)
    return survived and named, equal


def faults(times: int) -> list[tuple[str, int, Callable]]:
    """All faults: (name, how often, function(out, reference, r))."""
    half = max(times // 2, 1)
    quarter = max(times // 4, 1)
    return [
        ("kill -9, every process", half, functools.partial(kill, to_all=True)),
        ("kill -9, the first", half, functools.partial(kill, to_all=False)),
        ("Ctrl-C, every process", quarter, functools.partial(interrupt, to_all=True)),
        ("Ctrl-C, the first", quarter, functools.partial(interrupt, to_all=False)),
        ("two runs in one folder", quarter, start_twice),
        *((f"a stage's file is {kind}", quarter, functools.partial(damage, kind=kind))
          for kind in DAMAGES),
    ]


# -------------------------------------------------------------------------------------- the table
def main(times: int, flags: list[str]) -> int:
    """Cause all faults and print the table; returns the number of results that are wrong."""
    folder = pathlib.Path(tempfile.mkdtemp())
    r = random.Random(0)
    began = time.time()
    process = start(folder / "reference", flags)
    _, message = process.communicate()
    assert process.returncode == 0, message
    reference = Reference(folder / "reference", flags, read_rows(folder / "reference"),
                          time.time() - began)
    print(f"{'fault':<34}{'times tried':>12}{'survived':>10}{'results equal':>15}", flush=True)
    wrong = 0
    for name, count, cause in faults(times):
        found = []
        for _ in range(count):
            found.append(cause(folder / "faulty", reference, r))
            shutil.rmtree(folder / "faulty", ignore_errors=True)
        survived, equal = (sum(column) for column in zip(*found))
        wrong += 2 * count - survived - equal
        print(f"{name:<34}{count:>12}{survived:>10}{equal:>15}", flush=True)
    shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    arguments = sys.argv[1:]
    times = 20
    if arguments and arguments[0].isdigit():
        times = int(arguments.pop(0))
    sys.exit(1 if main(times, arguments) else 0)
