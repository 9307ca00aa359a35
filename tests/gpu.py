"""Everything that has to be seen on a GPU, in one command; prints one table.

    python -m tests.gpu [--out FOLDER] [STEP ...]      steps: see STEPS below; default: all

The whole takes about an hour on one GPU. Each step is a command of its own, with its exit code, its
wall time and the peak memory of the GPU. Its output goes to FOLDER/STEP.log, its results to
FOLDER/STEP. Without a GPU the steps run on the CPU, and the memory is not known.

The last lines compare the results with the published ones (plots/results.jsonl), and two equal runs
with each other: training on CUDA need not be deterministic.
"""
import math
import pathlib
import subprocess
import sys
import threading
import time

import harness

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = "train.py"
STEPS = {    # step -> arguments of python; FOLDER stands for the folder of the step
    "tests": "-m pytest -q",
    "tiny": f"{TRAIN} --preset tiny --out FOLDER",
    "tiny-again": f"{TRAIN} --preset tiny --out FOLDER",
    "default": f"{TRAIN} --out FOLDER",
    "workers-1": f"{TRAIN} --workers 1 --out FOLDER",
    "workers-2": f"{TRAIN} --workers 2 --out FOLDER",
    "workers-8": f"{TRAIN} --workers 8 --out FOLDER",
    "paper": f"{TRAIN} --preset paper --seeds 3 --out FOLDER",
    "benchmark": "-m tests.benchmark --scale",
}
QUERY = "nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"


def used_memory() -> float:
    """MiB in use on all GPUs; nan if there is none."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, check=True)
        return float(sum(int(line) for line in answer.stdout.split()))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return math.nan


def run_step(step: str, out: pathlib.Path) -> dict:
    """Run a step -> step, exit code, seconds, and the peak memory of the GPU in MiB."""
    words = STEPS[step].replace("FOLDER", str(out / step)).split()
    peak, done = [used_memory()], threading.Event()

    def watch_memory() -> None:
        while not done.wait(.5):
            peak.append(used_memory())

    watcher = threading.Thread(target=watch_memory)
    watcher.start()
    start = time.perf_counter()
    with open(out / f"{step}.log", "w", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=log,
                              stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"step": step, "exit code": code, "seconds": seconds, "memory": max(peak)}


def read_results(path: pathlib.Path) -> list[dict]:
    """The rows of a results.jsonl, without the times; none if there is no file."""
    return [{name: x for name, x in row.items() if "seconds" not in name}
            for row in harness.read_jsonl(path)]


def compare(rows: list[dict], published: list[dict]) -> list[str]:
    """A line for each finished policy that both runs have: KL and reward, and their distance."""
    def key(row: dict) -> tuple:
        return row["method"], row["setting"], row["seed"]

    others = {key(row): row for row in published if row["final"]}
    lines = []
    for row in rows:
        if not row["final"] or key(row) not in others:
            continue
        other = others[key(row)]
        error = math.hypot(row["reward_se"], other["reward_se"])
        distance = abs(row["reward"] - other["reward"]) / max(error, 1e-9)
        lines.append("{method:<14}{setting:>6g}{seed:>3}".format(**row)
                     + f"  KL {row['kl']:7.2f} published {other['kl']:7.2f}"
                     + f"  reward {row['reward']:.3f} published {other['reward']:.3f}"
                     + f", {distance:.1f} standard errors apart")
    return lines


def main(words: list[str]) -> int:
    """Run the steps that the command line names; returns 1 if one failed."""
    out = ROOT / "runs" / "gpu"
    if words[:1] == ["--out"] and len(words) > 1:
        out, words = pathlib.Path(words[1]).resolve(), words[2:]
    unknown = set(words) - set(STEPS)
    if unknown:
        sys.exit(f"there is no step {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    out.mkdir(parents=True, exist_ok=True)
    table = []
    print(f"{'step':<12}{'exit code':>10}{'seconds':>10}{'MiB of GPU':>12}", flush=True)
    for step in words or STEPS:
        row = run_step(step, out)
        table.append(row)
        print("{step:<12}{exit code:>10}{seconds:>10.0f}{memory:>12.0f}".format(**row), flush=True)
    tiny, again = (read_results(out / name / "results.jsonl") for name in ("tiny", "tiny-again"))
    if tiny and again:
        print("two equal runs have", "equal" if tiny == again else "DIFFERENT", "results")
    published = read_results(ROOT / "plots" / "results.jsonl")
    print(*compare(read_results(out / "paper" / "results.jsonl"), published), sep="\n")
    return int(any(row["exit code"] for row in table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
