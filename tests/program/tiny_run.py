"""Runs of `python train.py --preset tiny` in a process, and what they leave in their folder."""
import json
import os
import pathlib
import subprocess
import sys

import harness

ROOT = pathlib.Path(harness.__file__).resolve().parent
RESTRICTED = ROOT / "tests" / "restricted"    # a hook: no network, nothing that only Unix has


def run(out, *flags):
    """Run `python train.py --preset tiny` in a process -> its exit code and all that it printed.

    The sitecustomize.py in the folder RESTRICTED is active in every process of the run.
    """
    environment = {**os.environ, "PYTHONPATH": str(RESTRICTED)}
    environment.pop("RANK", None)
    environment.pop("WORLD_SIZE", None)
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "tiny", "--device", "cpu",
               "--out", str(out), *map(str, flags)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                             timeout=180)
    return process.returncode, process.stdout + process.stderr


def read_rows(out):
    """The rows of results.jsonl without the columns that depend on the clock."""
    rows = harness.read_jsonl(out / "results.jsonl")
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]


def read_optimum(out):
    """The content of optimum.json."""
    return json.loads((out / "optimum.json").read_text("utf-8"))


def modification_times(out, pattern="*.pt"):
    """{file of a stage: when it was written}"""
    return {path: path.stat().st_mtime_ns for path in out.glob(pattern)}
