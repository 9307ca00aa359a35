"""The benchmark runs and prints the numbers that it promises."""
import importlib.util
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEYS = {"sft_tokens_per_s", "sample_tokens_per_s", "dpo_sequences_per_s", "dpo_pairs_per_s",
        "ppo_episodes_per_s", "matmul_gflops", "peak_memory_mb"}
SMALLEST = ["--seconds", ".001", "--rounds", "1", "--workers", "1", "--rows", "64"]


def test_the_last_line_of_the_benchmark_is_one_json_object_of_positive_numbers():
    """At its smallest sizes and in one process: the names of the numbers, not their sizes."""
    process = subprocess.run([sys.executable, "-m", "tests.benchmark", *SMALLEST], cwd=ROOT,
                             capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    numbers = json.loads(process.stdout.splitlines()[-1])
    assert set(numbers) == KEYS, f"the keys are {set(numbers)}, not {KEYS}"
    if importlib.util.find_spec("resource") is None:
        del numbers["peak_memory_mb"]    # unknown on Windows
    assert all(x > 0 for x in numbers.values()), numbers
