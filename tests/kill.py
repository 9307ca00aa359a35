"""kill -9 at random moments of the tiny experiment, then the same command: are the results those of a run left alone?

    python -m tests.kill [KILLS, default 20]         some minutes; every second kill hits the first process alone, not its workers
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

COMMAND = [sys.executable, "train.py", "--preset", "tiny", "--device", "cpu", "--workers", "2", "--out"]


def start(out):
    return subprocess.Popen([*COMMAND, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def results(out):
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def main(kills):
    folder, r = pathlib.Path(tempfile.mkdtemp()), random.Random(0)
    began = time.time()
    assert start(folder / "alone").wait() == 0
    took, expected, wrong = time.time() - began, results(folder / "alone"), 0
    for n in range(1, kills + 1):
        process, moment = start(folder / "killed"), r.uniform(0, took)
        time.sleep(moment)
        (os.killpg if n % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        left = len(list((folder / "killed").glob("*.pt"))) if (folder / "killed").exists() else 0
        print(f"kill {n} after {moment:.1f} s, {'all processes' if n % 2 else 'the first process'}: {left} stages kept", end="", flush=True)
        if n % 4 == 0 or n == kills:    # let it finish, compare, begin anew
            equal = start(folder / "killed").wait() == 0 and results(folder / "killed") == expected
            wrong += not equal
            print(f"; finished, results {'equal' if equal else 'DIFFER'}", end="", flush=True)
            shutil.rmtree(folder / "killed")
        print(flush=True)
    shutil.rmtree(folder)
    print(f"{kills} kills, {wrong} results that differ")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)))
