"""Bad input: each flag, tried with values that it cannot have; disks that are full or read-only.

The answer must be one sentence and exit code 2, and no file may be lost. The files that a user
gives are in test_bad_files.py.
"""
import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import harness
import train

ROOT = pathlib.Path(train.__file__).parent
SMALL = ["--preset=tiny", "--device=cpu", "--reviews=200", "--prompts=16", "--eval-prompts=4",
         "--sft-epochs=1", "--vocab-size=300"]
WORKER = {"RANK": "0", "WORLD_SIZE": "1"}    # this process is the only worker


# ------------------------------------------------------------------------------ running the program
def start_no_worker(*_, **__) -> None:
    """Replaces `torch.multiprocessing.spawn`; input that reaches it has been accepted."""


def run_in_this_process(argv: list[str], env: dict[str, str]) -> tuple[object, str]:
    """Run `python train.py ARGV` in this process -> exit code (or the exception), stderr.

    No other process is started: with the environment WORKER the work is done in this process,
    otherwise it is not done.
    """
    stderr = io.StringIO()
    with (mock.patch.object(torch.multiprocessing, "spawn", start_no_worker),
          mock.patch.object(sys, "argv", ["train.py", *argv]),
          mock.patch.dict(os.environ, env), contextlib.redirect_stderr(stderr)):
        try:
            code = harness.run_program(train.main)
        except BaseException as error:    # also SystemExit: a user's file must not end the program
            code = f"traceback of {type(error).__name__}: {error}"
    return code, stderr.getvalue()


def assert_refused(argv: list[str], *words: str, env: dict[str, str] = {}) -> None:
    """Assert exit code 2 and one sentence on stderr that has these words, without a traceback."""
    code, stderr = run_in_this_process(argv, env)
    is_sentence = stderr.startswith("train.py: ") and len(stderr.splitlines()) == 1
    has_words = all(word in stderr for word in words) and " None:" not in stderr
    assert code == 2 and is_sentence and has_words, (
        f"{' '.join(argv)[-80:]!r} must be refused in one sentence with {words}, but the exit code "
        f"is {code}, and stderr is {stderr[:300]!r}")


def run_command(*argv: str) -> tuple[int, str, str]:
    """Run `python train.py ARGV` in processes of its own -> exit code, stdout, stderr."""
    env = {name: x for name, x in os.environ.items() if name not in WORKER}
    finished = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, env=env,
                              capture_output=True, timeout=120)
    return finished.returncode, finished.stdout.decode(), finished.stderr.decode()


# ---------------------------------------------------------------------------------- fields as flags
BAD_NUMBERS = ["", " ", "x", "nan", "inf", "-inf", "-1", "1e999", "0x10", "1;2", "None", "[]",
               "1 2", "\u0663x", "\u00bd", "\udcff", "two\nlines", "9" * 400]
BAD_WHOLE_NUMBERS = ["1.5", "1e3", "1,2"]
BAD_LISTS = [",", "1,", "1,,2", "1,x", "1,nan", "1,1.0", "1;1", "1,-1"]
BAD_CHOICES = ["", " ", "0", "nan", "\u00e9", "\udcff", "two\nlines"]


def bad_texts(field: dataclasses.Field) -> list[str]:
    """Texts that are no value of a field: of another type, out of bounds, lists with repeats."""
    choices, low, high = (field.metadata[name] for name in ("choices", "low", "high"))
    if choices:
        return BAD_CHOICES + [choices[0].upper(), choices[0] + " ", ",".join(choices)]
    texts = list(BAD_NUMBERS)
    if low > 0:
        texts.append("0")
    if high < 1e300:
        texts.append(f"{10 * high:g}")
    if isinstance(field.default, int):
        texts += BAD_WHOLE_NUMBERS
    if isinstance(field.default, tuple):
        texts += BAD_LISTS
    return texts


def flag_of(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


@pytest.mark.parametrize("field", dataclasses.fields(train.Config), ids=lambda field: field.name)
def test_no_flag_takes_what_it_cannot_be(field, tmp_path):
    """Each bad text of each field is refused, the flag is named, and nothing is written."""
    flag = flag_of(field)
    for text in bad_texts(field):
        assert_refused(["--preset=tiny", f"--out={tmp_path}/out", f"{flag}={text}"], flag)
    assert not list(tmp_path.iterdir())


def test_help_shows_every_flag_with_its_default():
    """--help has a line for each field, with its default, and for each other flag."""
    stdout = io.StringIO()
    one_line_each = mock.patch.dict(os.environ, COLUMNS="9999")
    with one_line_each, contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as end:
        harness.read_flags(["--help"], train.Config, train.PRESETS, "the experiment")
    lines = [line for line in stdout.getvalue().splitlines() if line.strip().startswith("--")]
    line_of = {line.split()[0]: line for line in lines}
    missing = [field.name for field in dataclasses.fields(train.Config)
               if f"(default: {field.default})" not in line_of.get(flag_of(field), "")]
    assert not end.value.code, "--help is not an error"
    assert not missing, f"--help lacks {missing}, or their defaults"
    assert {"--out", "--loss", "--device", "--workers", "--preset"} <= set(line_of)


# ---------------------------------------------------------------------------- combinations of flags
BAD_WORKERS = ["", "0", "-1", "257", "x", "1.5", "nan", "9" * 5000]
BAD_DEVICES = ["", ":", "tpu", "CPU", "cuda:99", "cuda:x", "cuda:-1", "cuda:", "cpu:x", "cpu:",
               "cpu,cuda", "meta", "mps:9", "\u00e9"]
FLAGS = {    # flags: a word of the error
    "--width=32 --heads=3": "--heads",
    "--prompts=1201": "--prompts",
    "--eval-prompts=151": "--eval-prompts",
    "--rounds=65": "--rounds",
    "--ppo-batch=18": "--ppo-batch",
    "--ppo-batch=16 --completions=3": "--completions",
    "--study --prompts=7": "--rounds 8",    # of a variant of the study
    "--preset=huge": "--preset",
    "--preset=": "--preset",
    "--nothing=1": "--nothing",
    "--bet=1": "--bet",
    "stray": "stray",
    "--seed": "--seed",
    "-x": "-x",
    "--betas 1 2": "2",
    "--help=yes": "--help",
    "--seed=1 two\nlines": "two",
    "--seed=1 \udcff": "--help",
    **{f"--workers={text}": "--workers" for text in BAD_WORKERS},
    **{f"--device={text}": "--device" for text in BAD_DEVICES},
    # sizes that fit into no machine are refused before any work
    "--width=100000": "memory",
    "--width=100000 --vocab-size=100000": "memory",
    "--width=16384 --layers=100": "memory",
    "--reviews=1000000 --prompts=800000 --completions=64 --ppo-batch=64 --max-tokens=10000":
        "memory"}


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ascii(flags[:30]))
def test_flags_that_cannot_be_together_or_on_this_machine_are_refused(flags, tmp_path):
    """A flag is refused if it is unknown, contradicts another, or needs what the machine lacks."""
    argv = ["--preset=tiny", f"--out={tmp_path}/out", *flags.split(" ")]
    assert_refused(argv, FLAGS[flags])
    assert not list(tmp_path.iterdir())


def use_up_memory_of_torch(*_):
    return torch.empty(10**16)


def use_up_memory_of_python(*_):
    return bytearray(2**62)


@pytest.mark.parametrize("experiment", [use_up_memory_of_torch, use_up_memory_of_python],
                         ids=["torch", "python"])
def test_memory_that_runs_out_later_is_said_in_one_sentence(experiment, tmp_path, monkeypatch):
    """The sentence is the same for the RuntimeError of torch and the MemoryError of Python."""
    monkeypatch.setattr(train, "experiment", experiment)
    assert_refused([*SMALL, f"--out={tmp_path}/out"], "memory", env=WORKER)


def test_pairs_of_ones_own_cannot_come_in_rounds(tmp_path):
    """With --rounds, pairs come from the policy itself: a file of pairs would not be read."""
    pair = {"prompt": "This western", "chosen": ": the plot was superb.",
            "rejected": ": the plot was dull."}
    harness.write_jsonl(tmp_path / "pairs.jsonl", [pair])
    argv = [*SMALL, f"--out={tmp_path}/out", f"--pairs={tmp_path}/pairs.jsonl", "--rounds=2"]
    assert_refused(argv, "--rounds", "--pairs", env=WORKER)
    assert not (tmp_path / "out").exists()


def test_exported_pairs_cannot_be_used_by_several_seeds(tmp_path):
    """Each seed has its own tokenizer, and an export has the tokens of one."""
    pair = {"prompt": "This", "chosen": " a", "rejected": " b", "response_ids": {}}
    harness.write_jsonl(tmp_path / "pairs.jsonl", [pair])
    argv = [*SMALL, f"--out={tmp_path}/out", f"--pairs={tmp_path}/pairs.jsonl", "--seeds=2"]
    assert_refused(argv, "--seeds", "--pairs", env=WORKER)
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_the_reviews_have_words_for_are_refused(tmp_path):
    """--vocab-size is within its bounds, but 50 reviews cannot fill it."""
    argv = [*SMALL, f"--out={tmp_path}", "--reviews=50", "--vocab-size=2000"]
    assert_refused(argv, "--vocab-size", env=WORKER)


# ------------------------------------------------------------------------------------- --out, disks
PLACES = ["", "file", "file/below", "dangling", "loop", "x" * 5000, "/dev/null", "/dev/null/x",
          "/proc/nope", "/proc"]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:12] or "empty")
def test_a_place_that_cannot_be_written_is_named(place, tmp_path, monkeypatch):
    """--out is a file, a link that leads nowhere, or a folder that takes no file.

    The error names it, and the files that are there are kept.
    """
    monkeypatch.chdir(tmp_path)                         # an empty --out must not mean the default
    pathlib.Path("file").write_text("mine")
    pathlib.Path("dangling").symlink_to("nowhere")
    pathlib.Path("loop").symlink_to("loop")
    env = WORKER if place == "/proc" else {}            # /proc exists: only writing fails
    assert_refused([*SMALL, f"--out={place}"], place[:40] or "--out", env=env)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop"]
    assert pathlib.Path("file").read_text() == "mine"


FILES_BEFORE_REFERENCE = ["learn-tokenizer", "make-corpus-film", "make-corpus-restaurant"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB, which is full for root too."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root on Linux can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_or_read_only_disk_is_said_and_what_was_finished_is_kept(small_disk):
    """Both corpora and the tokenizer fit on the disk, pi_ref does not.

    On a larger disk the same command reuses these files and comes further.
    """
    argv = [*SMALL, f"--out={small_disk}"]
    assert_refused(argv, "disk", env=WORKER)
    written = {path: path.stat().st_mtime_ns for path in small_disk.glob("*.pt")}
    names = sorted(path.name.partition("-seed0.")[0] for path in written)
    assert names == FILES_BEFORE_REFERENCE, f"the finished files are {names}"

    subprocess.run(["mount", "-o", "remount,size=192k", small_disk], check=True)
    run_in_this_process(argv, WORKER)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a file was not reused"
    assert list(small_disk.glob("train-reference-seed0.*.pt"))

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_refused(argv, str(small_disk), env=WORKER)


FULL_DISK = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")]


@pytest.mark.parametrize("error", FULL_DISK, ids=repr)
def test_a_stage_that_cannot_be_written_is_named(error, tmp_path, monkeypatch):
    """torch raises either error for a full disk; neither names the file, but the program does."""
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=error))
    assert_refused([*SMALL, f"--out={tmp_path}"], "make-corpus-film-seed0.", env=WORKER)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_results_that_cannot_be_written_are_named_and_the_old_ones_kept(tmp_path, monkeypatch):
    """The old results are kept when their temporary file meets a full disk."""
    results = tmp_path / "results.jsonl"
    results.write_text("old")
    (tmp_path / f"results.{os.getpid()}.partial").symlink_to("/dev/full")

    def experiment(*_):
        harness.write_jsonl(results, [{"method": "dpo"}])

    monkeypatch.setattr(train, "experiment", experiment)
    assert_refused([*SMALL, f"--out={tmp_path}"], "results", "No space left", env=WORKER)
    assert results.read_text() == "old"


# ------------------------------------------------------------------------ in processes of their own
@pytest.mark.parametrize("flags", [["--width=-1"], ["--out=\udcff/\u00e9", "--loss=\udcff.py:f"],
                                   ["--out=train.py"], ["--workers=2", "--out=/proc"]], ids=ascii)
def test_the_program_says_one_line_and_exits_with_two(flags):
    """A bad number, names that are not UTF-8, and folders that cannot be used are one line each."""
    code, _, stderr = run_command(*SMALL, *flags)
    is_line = stderr.startswith("train.py: ") and stderr.count("\n") == 1
    assert code == 2 and is_line, f"exit code {code}: {stderr}"


def fail_together(rank, store, device):
    """A worker that waits for the other one, so that both meet the same error."""
    store.add("ready", 1)
    while store.add("ready", 0) < 2:
        time.sleep(.01)
    raise harness.UserError("both fail")


def test_workers_that_meet_the_same_error_say_it_once(capfd):
    """Two workers fail at the same time, and the program prints one line."""
    with mock.patch.dict(os.environ):
        code = harness.launch(fail_together, 2, "cpu")
    stderr = capfd.readouterr().err
    assert (code, stderr) == (2, "train.py: both fail\n")


def kill_this_process(*_):
    """A worker that the kernel kills, as it does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_said():
    """If a worker is killed, the error says so, and that memory may have run out."""
    with mock.patch.dict(os.environ), pytest.raises(harness.UserError, match="memory"):
        harness.launch(kill_this_process, 2, "cpu")
