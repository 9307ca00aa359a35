"""The benchmark runs, and says what it promises."""
import json
import pathlib
import subprocess
import sys

KEYS = {"sft_tokens_per_s", "sample_tokens_per_s", "dpo_sequences_per_s", "dpo_pairs_per_s", "ppo_episodes_per_s", "matmul_gflops",
        "peak_memory_mb"}


def test_the_last_line_of_the_benchmark_is_one_json_object_of_positive_numbers():
    """Its smallest sizes and one process: what is printed, never how much."""
    command = [sys.executable, "-m", "tests.benchmark", *"--seconds .001 --rounds 1 --workers 1 --rows 64".split()]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert set(line) == KEYS and all(x > 0 for x in line.values()), f"{line}, but the keys are {KEYS}"
