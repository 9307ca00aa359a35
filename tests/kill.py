"""Faults of a run: after each, does the same command complete, make only what was unfinished, and find the results of a run left alone?

    python -m tests.kill [TIMES, default 20] [FLAGS of train.py]         half an hour on two cores: kill -9 strikes TIMES times at
random moments, every other fault a quarter as often. Prints a table; the exit code is 1 where anything did not survive.
"""
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

COMMAND = [sys.executable, "train.py", "--preset", "tiny", "--device", "cpu", "--workers", "2"]
GOES_ON = "the same command goes on"    # what Ctrl-C must say
ALL, FIRST = os.killpg, os.kill         # whom a signal hits: every process of the run, or the first alone


def start(out, flags):
    return subprocess.Popen([*COMMAND, *flags, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def results(out):
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def made(out):
    """The finished stages, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}


def completes(out, flags, expected, damaged=()) -> tuple[bool, bool, str]:
    """The same command once more -> whether it ends well and leaves what was finished alone, whether its results are equal, its output."""
    before = {name: when for name, when in made(out).items() if name not in damaged}
    process = start(out, flags)
    printed, _ = process.communicate()
    ended = process.returncode == 0
    return ended and before.items() <= made(out).items(), ended and results(out) == expected, printed


def kill(whom, out, flags, alone, r):
    """kill -9 at a random moment."""
    process = start(out, flags)
    time.sleep(r.uniform(0, alone["seconds"]))
    whom(process.pid, signal.SIGKILL)
    process.wait()
    survived, equal, _ = completes(out, flags, alone["rows"])
    return survived, equal


def interrupt(whom, out, flags, alone, r):
    """Ctrl-C at a random moment: over within two seconds, with one line that says how to go on."""
    process = start(out, flags)
    time.sleep(r.uniform(0, .9) * alone["seconds"])
    pressed = time.time()
    whom(process.pid, signal.SIGINT)
    _, said = process.communicate()
    took = time.time() - pressed
    polite = took < 2 and said.count("\n") == 1 and GOES_ON in said and process.returncode != 0
    print(f"Ctrl-C: over after {took:.1f} s, exit code {process.returncode}, it said {said[-200:]!r}\n" * (not polite), end="", flush=True)
    survived, equal, _ = completes(out, flags, alone["rows"])
    return polite and survived, equal


def two(out, flags, alone, r):
    """The same command twice at the same time in the same folder: both end well."""
    first = start(out, flags)
    time.sleep(r.uniform(0, 1) * alone["seconds"])
    second = start(out, flags)
    for process in (first, second):
        process.communicate()
    equal = (out / "results.jsonl").exists() and results(out) == alone["rows"]
    return first.returncode == second.returncode == 0, equal


def damage(harm, out, flags, alone, r):
    """A stage's file that is not what it was: it is named, and made again; every other is left alone."""
    shutil.copytree(alone["out"], out)
    victim = r.choice(sorted(path for path in out.glob("*.pt") if "validation" not in path.name))    # theirs is not read again
    whole, other = victim.read_bytes(), r.choice([path for path in sorted(out.glob("*.pt")) if path.read_bytes() != victim.read_bytes()])
    victim.write_bytes({"truncated": whole[:r.randrange(1, len(whole))], "empty": b"", "foreign": b"not a stage\n", "another's": other.read_bytes()}[harm])
    survived, equal, printed = completes(out, flags, alone["rows"], {victim.name})
    named = victim.name in printed
    print(f"{victim.name} was {harm}, and nothing said so\n" * (not named), end="")
    return survived and named, equal


def faults(times):
    """(fault, how often, what does it: (out, flags, alone, random) -> (survived, results equal))"""
    def with_first(do, first):
        return lambda *rest: do(first, *rest)

    few = max(times // 4, 1)
    kills = [(f"kill -9, {name}", max(times // 2, 1), with_first(kill, whom)) for name, whom in (("every process", ALL), ("the first", FIRST))]
    stops = [(f"Ctrl-C, {name}", few, with_first(interrupt, whom)) for name, whom in (("every process", ALL), ("the first", FIRST))]
    harms = [(f"a stage's file is {harm}", few, with_first(damage, harm)) for harm in ("truncated", "empty", "foreign", "another's")]
    return [*kills, *stops, ("two runs in one folder", few, two), *harms]


def main(times, flags):
    folder, r, wrong = pathlib.Path(tempfile.mkdtemp()), random.Random(0), 0
    began, process = time.time(), start(folder / "alone", flags)
    _, said = process.communicate()
    assert process.returncode == 0, said
    alone = {"out": folder / "alone", "rows": results(folder / "alone"), "seconds": time.time() - began}
    print(f"{'fault':<34}{'times tried':>12}{'survived':>10}{'results equal':>15}", flush=True)
    for name, count, strike in faults(times):
        found = []
        for _ in range(count):
            found.append(strike(folder / "struck", flags, alone, r))
            shutil.rmtree(folder / "struck", ignore_errors=True)
        survived, equal = map(sum, zip(*found))
        wrong += 2 * count - survived - equal
        print(f"{name:<34}{count:>12}{survived:>10}{equal:>15}", flush=True)
    shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    NUMBER = [int(x) for x in sys.argv[1:2] if x.isdigit()]
    sys.exit(bool(main(*(NUMBER or [20]), sys.argv[1 + len(NUMBER):])))
