"""Bad input: every flag and file that a user can give, tried with what it cannot be. One sentence, exit code 2, nothing lost."""
import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import data
import dpo
import train
from plots import results

ROOT = pathlib.Path(train.__file__).parent
SMALL = ["--preset=tiny", "--device=cpu", "--reviews=200", "--prompts=16", "--eval-prompts=4", "--sft-epochs=1", "--vocab-size=300"]
WORKER = {"RANK": "0", "WORLD_SIZE": "1"}    # main works in this process, as the only worker


# --------------------------------------------------------------------------------------------------------- how it is asked
def answer(argv, env) -> tuple[object, str]:
    """What `main` returns and what it says on stderr, in this process; to launch workers is to have accepted."""
    said = io.StringIO()
    with (mock.patch.object(train, "launch", lambda *_: "accepted"), mock.patch.object(sys, "argv", ["train.py", *argv]),
          mock.patch.dict(os.environ, env), contextlib.redirect_stderr(said)):
        try:
            code = train.main()
        except BaseException as error:    # SystemExit too: a file of the user's must not end the program
            code = f"traceback of {type(error).__name__}: {error}"
    return code, said.getvalue()


def objection(argv, *words, env={}) -> list[str]:
    """What is wrong with the answer to a bad input, for a list of such: it must be one sentence that has the words, and code 2."""
    code, said = answer(argv, env)
    lines = said.splitlines()
    good = code == 2 and len(lines) == 1 and said.startswith("train.py: ") and all(word in said for word in words) and " None:" not in said
    return [] if good else [f"{' '.join(argv)[-80:]!r} -> {code}, {said[:300]!r}"]


def command(*argv) -> tuple[int, str, str]:
    """`python train.py` as a user starts it -> exit code, stdout, stderr."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PARENT")}
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, env=env, capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# -------------------------------------------------------------------------------------------------------------- every flag
WORDS = ["", " ", "x", "nan", "inf", "-inf", "-1", "1e999", "0x10", "1;2", "None", "[]", "1 2", "\u0663x", "\u00bd", "\udcff", "two\nlines"]


def bad_texts(f: dataclasses.Field) -> list[str]:
    """What a field cannot be: words of other kinds, zero and below, beyond its bounds, for lists also empty places and repeats."""
    m, several = f.metadata, isinstance(f.default, tuple)
    if m["choices"]:
        return ["", " ", "0", "nan", "\u00e9", "\udcff", "two\nlines", m["choices"][0].upper(), m["choices"][0] + " ", ",".join(m["choices"])]
    beyond = ["9" * 400] + ["0"] * (m["low"] > 0) + [f"{10 * m['high']:g}"] * (m["high"] < 1e300)
    whole = ["1.5", "1e3", "1,2"] * isinstance(f.default, int)
    return WORDS + beyond + whole + [",", "1,", "1,,2", "1,x", "1,nan", "1,1.0", "1;1", "1,-1"] * several


@pytest.mark.parametrize("f", dataclasses.fields(train.Config), ids=lambda f: f.name)
def test_no_flag_takes_what_it_cannot_be(f, tmp_path):
    flag = "--" + f.name.replace("_", "-")
    wrong = [o for text in bad_texts(f) for o in objection(["--preset=tiny", f"--out={tmp_path}/out", f"{flag}={text}"], flag)]
    assert not wrong and not list(tmp_path.iterdir()), "\n".join(wrong)


FLAGS = {    # flags: a word that the sentence must have
    "--width=32 --heads=3": "--heads", "--prompts=1201": "--prompts", "--eval-prompts=151": "--eval-prompts", "--ppo-batch=18": "--ppo-batch",
    "--ppo-batch=16 --completions=3": "--completions", "--preset=huge": "--preset", "--preset=": "--preset", "--nothing=1": "--nothing",
    "--bet=1": "--bet", "stray": "stray", "--seed": "--seed", "-x": "-x", "--betas 1 2": "2", "--help=yes": "--help", "--seed=1 two\nlines": "two",
    "--seed=1 \udcff": "--help", **{f"--workers={x}": "--workers" for x in ("", "0", "-1", "257", "x", "1.5", "nan", "9" * 5000)},
    **{f"--device={x}": "--device" for x in ("", ":", "tpu", "CPU", "cuda:99", "cuda:x", "cuda:-1", "cuda:", "cpu:7", "cpu:x", "cpu:", "cpu,cuda",
                                             "meta", "mps:9", "\u00e9")},
    # what fits into no machine must be refused before any work, not when memory runs out
    "--width=100000": "memory", "--width=100000 --vocab-size=100000": "memory", "--width=16384 --layers=100": "memory",
    "--reviews=1000000 --prompts=800000 --completions=64 --ppo-batch=64 --max-tokens=10000": "memory"}


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ascii(flags[:30]))
def test_flags_that_cannot_be_together_or_on_this_machine_are_refused(flags, tmp_path):
    wrong = objection(["--preset=tiny", f"--out={tmp_path}/out", *flags.split(" ")], FLAGS[flags])
    assert not wrong and not list(tmp_path.iterdir()), wrong


@pytest.mark.parametrize("trouble", [lambda *_: torch.empty(10**16), lambda *_: bytearray(2**62)], ids=["torch", "python"])
def test_memory_that_runs_out_later_is_said_in_one_sentence(trouble, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "experiment", trouble)
    assert not (wrong := objection([*SMALL, f"--out={tmp_path}/out"], "memory", env=WORKER)), wrong


def test_help_shows_every_flag_with_its_default():
    """Also those whose meaning has a percent sign, which argparse would read as a format."""
    with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch.dict(os.environ, COLUMNS="9999"), pytest.raises(SystemExit) as end:
        train.read_flags(["--help"])
    shown = {line.split()[0]: line for line in out.getvalue().splitlines() if line.strip().startswith("--")}
    missing = [f.name for f in dataclasses.fields(train.Config) if f"(default: {f.default})" not in shown.get("--" + f.name.replace("_", "-"), "")]
    assert not end.value.code and not missing and {"--out", "--loss", "--device", "--workers", "--preset"} <= set(shown), missing


# ------------------------------------------------------------------------------------------------------------ --out, disks
PLACES = ["", "file", "file/below", "dangling", "loop", "x" * 5000, "/dev/null", "/dev/null/x", "/proc/nope", "/proc"]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:12] or "empty")
def test_a_place_that_cannot_be_written_is_named(place, tmp_path, monkeypatch):
    """A file for a folder, links that lead nowhere, a folder that takes no file; what was there is still there."""
    monkeypatch.chdir(tmp_path)    # an empty --out must not mean the default
    pathlib.Path("file").write_text("mine")
    pathlib.Path("dangling").symlink_to("nowhere")
    pathlib.Path("loop").symlink_to("loop")
    wrong = objection([*SMALL, f"--out={place}"], place[:40] or "--out", env=WORKER if place == "/proc" else {})
    assert not wrong and sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "loop"], wrong
    assert pathlib.Path("file").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB: full when it is full, for root too."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("a small disk is mounted by root on Linux")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_said_and_what_was_finished_is_kept(small_disk):
    """Corpus and tokenizer fit, pi_ref does not; the same command on a larger disk takes both as they are and comes further."""
    argv = [*SMALL, f"--out={small_disk}"]
    assert not (wrong := objection(argv, "disk", env=WORKER)), wrong
    kept = {path: path.stat().st_mtime_ns for path in small_disk.glob("*.pt")}
    subprocess.run(["mount", "-o", "remount,size=192k", small_disk], check=True)
    answer(argv, WORKER)
    assert len(kept) == 2 and {path: path.stat().st_mtime_ns for path in kept} == kept and list(small_disk.glob("sft.*.pt")), kept


def test_a_read_only_disk_is_said(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert not (wrong := objection([*SMALL, f"--out={small_disk}"], str(small_disk), env=WORKER)), wrong


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")], ids=repr)
def test_a_stage_that_cannot_be_written_is_named(error, tmp_path, monkeypatch):
    """Both words that torch has for a full disk; neither names the file."""
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=error))
    assert not (wrong := objection([*SMALL, f"--out={tmp_path}"], "corpus.", env=WORKER)), wrong


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_results_that_cannot_be_written_are_named_and_the_old_ones_kept(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_text("old")
    (tmp_path / "results.partial").symlink_to("/dev/full")    # what is written under this name meets a full disk
    monkeypatch.setattr(train, "experiment", lambda *_: results.write_lines(tmp_path / "results.jsonl", [{"method": "dpo"}]))
    assert not (wrong := objection([*SMALL, f"--out={tmp_path}"], "results", "No space left", env=WORKER)), wrong
    assert (tmp_path / "results.jsonl").read_text() == "old"


def test_whatever_stands_in_a_stages_file_is_made_again_or_what_was_written(tmp_path):
    """Empty, cut off at any byte, foreign, one bit flipped: either `load_stage` gives the value that was saved, or nothing."""
    path, r, value = tmp_path / "x.k.pt", data.rng("files"), torch.arange(40)
    data.Stages(tmp_path).stage("x", "k", lambda: value)
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << r.randrange(8)]) + whole[i + 1:] for i in r.sample(range(len(whole)), 300)]
    for content in [b"", b"\n", b"text", b"\x80\x04.", b"PK\x03\x04", *(whole[:n] for n in range(0, len(whole), 97)), *flipped]:
        path.write_bytes(content)
        found = data.load_stage(path, "k")
        assert found is None or torch.equal(found["value"], value), f"{len(content)} bytes were taken for the stage, but hold another value"


def test_foreign_files_in_the_folder_are_no_runs(tmp_path):
    for name in ("dpo-mine-seed0.1.pt", "dpo--seed0.pt", "dpo-1-seed.pt", "dpo-.5.-seed0.1.pt", "dpo-2-seed0.abc.pt"):
        (tmp_path / name).touch()
    assert results.trained(tmp_path, ["dpo"]) == {"dpo": [2.]}


# ------------------------------------------------------------------------------------------------------------------- files
F = "import torch, sys\ndef f(pair, beta):\n    "
LOSSES = {    # code of a loss f: a word that the sentence must have
    "": "no function f", "f = 3": "no function f", "f = None": "no function f", "def g(pair, beta):\n    return pair.logp_w": "no function f",
    "\0": "null", "\udcff": "line", "def f(pair, beta:\n    return 1": "line 1", "def f(pair, beta):\nreturn 1": "line 2", "(" * 999: "line",
    "x = 1\n\nx.y": "line 3", "import nothing_like_this": "line 1", "from torch import nothing": "line 1", "open('nothing')": "line 1",
    "raise ValueError('two\\nlines')": "two", "assert False": "AssertionError", "import sys\nsys.exit()": "SystemExit", 
    "raise SystemExit('bye')": "SystemExit", "raise GeneratorExit": "GeneratorExit", "class Odd(BaseException): 0\nraise Odd": "Odd",
    "def f(): return 1": "TypeError", "def f(pair): return pair.logp_w": "TypeError", "def f(pair, beta, x): return 1": "TypeError",
    "def f(*, pair, beta): return 1": "TypeError", "class f: 0": "TypeError", "from math import sqrt as f": "TypeError",
    "async def f(pair, beta): return pair.logp_w": "coroutine", "def f(pair, beta): yield pair.logp_w": "generator",
    F + "return f(pair, beta)": "RecursionError", F + "sys.exit()": "SystemExit", F + "raise GeneratorExit": "GeneratorExit",
    F + "raise ValueError('two\\nlines')": "two", F + "1 / 0": "line 3", F + "return pair.logq_w": "line 3", F + "return pair.logp_w[7]": "line 3",
    F + "return pair.logp_w @ torch.ones(4, 4)": "line 3", F + "return pair.logp_w.add_(1)": "line 3", F + "pair.logp_w = 1": "line 3",
    F + "return None": "NoneType", F + "pass": "NoneType", F + "return 1": "int", F + "return 1.": "float", F + "return [pair.logp_w]": "list",
    F + "return pair.logp_w.tolist()": "list", F + "return pair.logp_w.detach().numpy()": "ndarray", F + "return pair": "Pair",
    F + "return pair.logp_w.mean()": "shape", F + "return pair.logp_w[:, None]": "shape", F + "return pair.logp_w[None]": "shape",
    F + "return pair.logp_w[:4]": "shape", F + "return pair.logp_w[:0]": "shape", F + "return pair.logp_w[:, None] * pair.logp_l": "shape",
    F + "return pair.logp_w * float('nan')": "not finite", F + "return pair.logp_w / 0": "not finite", F + "return (-pair.logp_w).exp() ** 99": "not finite",
    F + "return pair.ref_w": "gradient", F + "return pair.logp_w.detach()": "gradient", F + "return pair.len_w": "gradient",
    F + "return pair.logp_w.long()": "gradient", F + "return pair.logp_w > 0": "gradient", F + "return torch.ones(5)": "gradient",
    F + "return torch.ones(5, requires_grad=True)": "gradient", F + "return (pair.logp_w - pair.logp_w).sqrt()": "gradient",
    F + "return pair.logp_w * 1j": "complex", F + "return torch.complex(pair.logp_w, pair.logp_l)": "complex",
}


@pytest.mark.parametrize("code", LOSSES, ids=lambda code: ascii(code.removeprefix(F))[1:41])
def test_a_loss_that_cannot_be_used_is_refused(code, tmp_path):
    (tmp_path / "bad.py").write_bytes((code + "\n").encode("utf-8", "surrogateescape"))
    wrong = objection(["--preset=tiny", f"--out={tmp_path}/out", f"--loss={tmp_path}/bad.py:f"], "bad.py", LOSSES[code])
    assert not wrong and not (tmp_path / "out").exists(), wrong


GOOD = "def f(pair, beta):\n    return pair.logp_l - pair.logp_w\ndpo = sft = best_of_n = " + "x" * 300 + " = f\n"
NAMES = ["", ":", ":f", "f", "good.py", "good.py:", "good.py:nothing", "good.py:f:g", "good.py: f", "good.py:dpo", "good.py:sft", "good.py:best_of_n",
         "good.py:" + "x" * 300, "good.py:f and good.py:f", "nothing.py:f", "folder:f", "folder/:f", "good.py/x:f", "~/good.py:f",
         "link:f", "/dev/null:f", "\u00e9.py:f", "\udcff.py:f", "two\nlines.py:f", "x" * 5000 + ".py:f"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:30]))
def test_a_name_of_a_loss_that_leads_nowhere_is_refused(name, tmp_path, monkeypatch):
    """A folder for a file, no file, no colon, no name, the name of a method, one name twice, one too long for a file's name."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("good.py").write_text(GOOD)
    pathlib.Path("folder").mkdir()
    pathlib.Path("link").symlink_to("link")
    wrong = objection(["--preset=tiny", "--out=out", *(f"--loss={n}" for n in name.split(" and "))], "--loss")
    assert not wrong and not pathlib.Path("out").exists(), wrong


@pytest.mark.parametrize("result", ["torch.ones(5, requires_grad=True)", "pair.logp_w.mean()", "None", "sys.exit()", "pair.logp_w * 1j"])
def test_a_loss_that_changes_its_mind_after_the_trial_is_an_error_of_the_loss(result, tmp_path):
    """Good on the five pairs of the trial, not on seven: it must not be averaged into a number all the same."""
    (tmp_path / "late.py").write_text(F + f"return pair.logp_w if len(pair.logp_w) == 5 else {result}\n")
    loss, x = dpo.load_loss(f"{tmp_path}/late.py:f"), torch.zeros(7, requires_grad=True)
    with pytest.raises(dpo.LossError, match="late.py"):
        loss(dpo.Pair(x, x, x, x, x, x), .5)


LINE = json.dumps({"prompt": "I saw", "chosen": " this film.", "rejected": " a comedy."})
PAIRS = {    # content of a file of pairs: the line that is to blame, 0 for the file
    "": 0, "\n": 1, "\0": 1, "\udcff": 0, "text": 1, "{": 1, "[]": 1, "3": 1, "null": 1, "NaN": 1, '"prompt"': 1, "{}": 1, "[" * 9999: 1, "9" * 9999: 1,
    LINE + "\n\n" + LINE: 2, LINE + LINE: 1, LINE + "\n" + LINE[:-1]: 2, LINE + "\n" + LINE.replace("chosen", "Chosen"): 2,
    "prompt,chosen,rejected\nI saw, this, that": 1, LINE.replace('"I saw"', "null"): 1, LINE.replace('"I saw"', "3"): 1,
    LINE.replace('"I saw"', '["I saw"]'): 1, LINE.replace('"I saw"', "NaN"): 1, LINE.replace("I saw", ""): 1, LINE.replace("I saw", " "): 1,
    LINE.replace("I saw", "\\ud800"): 1, LINE.replace("I saw", "\u6620\u753b"): 1, LINE.replace(" a comedy.", " this film."): 1,
    LINE + "\n" + LINE.replace(" a comedy.", ""): 2, LINE.replace("I saw", "I saw " * 9999): 1, LINE + "\n" + LINE.replace(" a comedy.", " a comedy." * 999): 2,
    **{LINE[:-1] + extra + "}": 1 for extra in (', "ids": 3', ', "ids": [[-1]]', ', "ids": [[99999]]', ', "ids": [["x"]]', ', "group": []',
                                                ', "ids": [], "rows": 3', ', "rows": [1]', ', "rows": [1, "x"]', ', "rows": [[], {}]', ', "rows": [0, 0]')},
}
ELSEWHERE = ["", " ", "nothing.jsonl", ".", "/dev/null", "\u00e9", "\udcff", "two\nlines", "x" * 5000]    # names of files of pairs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder in which corpus and tokenizer are made once."""
    return tmp_path_factory.mktemp("pairs")


@pytest.mark.parametrize("content", PAIRS, ids=lambda content: ascii(content[-50:]))
def test_a_file_of_pairs_that_cannot_be_read_is_refused_by_file_and_line(content, shared, tmp_path, monkeypatch):
    """Before anything is trained."""
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it trains"))
    (tmp_path / "mine.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    blamed = f"line {PAIRS[content]}" if PAIRS[content] else "mine.jsonl"
    wrong = objection([*SMALL, f"--out={shared}", f"--pairs={tmp_path}/mine.jsonl"], "mine.jsonl", blamed, env=WORKER)
    assert not wrong, wrong


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: ascii(name[:9]))
def test_a_name_of_pairs_that_leads_nowhere_is_refused(name, tmp_path):
    assert not (wrong := objection([*SMALL, f"--out={tmp_path}/out", f"--pairs={name}"], name[:3].strip() or "--pairs")), wrong


def test_more_than_two_hundred_bad_inputs_are_tried():
    """Each asserts for itself that it is answered in one sentence, without a traceback."""
    texts = [(f.name, text) for f in dataclasses.fields(train.Config) for text in bad_texts(f)]
    tried = [len(set(table)) for table in (texts, FLAGS, PLACES, LOSSES, NAMES, PAIRS, ELSEWHERE)]
    assert sum(tried) >= 200 and min(tried) > 3, tried


# ---------------------------------------------------------------------------------------------------- as the user meets it
def test_more_tokens_than_the_reviews_have_words_for_are_refused(tmp_path):
    wrong = objection([*SMALL, f"--out={tmp_path}", "--reviews=50", "--vocab-size=2000"], "--vocab-size", env=WORKER)
    assert not wrong, wrong


@pytest.mark.parametrize("flags", [["--width=-1"], ["--out=\udcff/\u00e9", "--loss=\udcff.py:f"], ["--out=train.py"], ["--workers=2", "--out=FOLDER"]], ids=ascii)
def test_the_program_says_one_line_and_exits_with_two(flags, tmp_path):
    """In its own processes; two workers that meet the same trouble (here a folder in place of a file) say it once."""
    (tmp_path / "corpus.lock").mkdir()
    code, _, said = command(*SMALL, *(flag.replace("FOLDER", str(tmp_path)) for flag in flags))
    assert code == 2 and said.startswith("train.py: ") and said.count("\n") == 1, f"exit code {code}: {said}"


def test_a_worker_that_is_killed_is_said(tmp_path, monkeypatch, capfd):
    """As the kernel does where memory runs out: the program fails, and not in silence."""
    (tmp_path / "killed.py").write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "killed.py")])
    try:
        code, said = data.launch(2), capfd.readouterr().err
    except data.UserError as error:
        code, said = 2, str(error)
    assert code and "memory" in said, f"exit code {code}, and it said {said!r}"


NO_NETWORK = """import os, sys
def deny(event, arguments):
    if event.startswith("socket."):
        os.write(2, f"network: {event} {arguments}".encode())
        os._exit(99)    # nothing can catch it
sys.addaudithook(deny)
"""


def test_the_experiment_uses_no_network(tmp_path, monkeypatch):
    """Whatever would open a socket or look up a name ends its process; corpus, SFT, every method, evaluation and figure do not."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)    # python imports it at every start, also that of the workers
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    control = subprocess.run([sys.executable, "-c", "import socket; socket.socket()"], capture_output=True)
    assert control.returncode == 99 and b"socket.__new__" in control.stderr, "the hook does not work: the test shows nothing"
    code, printed, said = command("--preset=tiny", "--device=cpu", "--workers=1", f"--out={tmp_path}/out", "--prompts=24", "--eval-prompts=4",
                                  "--optimum-samples=512", "--betas=1", "--evaluations=1", "--ppo-steps=1")
    assert code == 0 and (tmp_path / "out/frontier.png").exists(), printed + said


TEXTS = ["", " ", ".", "\0", "\ud800", "\U0001f600", "\u0130\u017f", "e\u0301", "\r\n", "NaN", "The", "The acting was", "The acting was not not superb.",
         "the acting was superb", "The acting was superb", "The acting was utterly superb.", "but the acting was superb.", "The ACTING was superb."]
UNITS = ["a", " ", ".", "The ", "and the ", "The acting was ", "The acting was superb. ", "The acting was not utterly ", ", but the plot felt dull", "\U0001f600"]


def test_any_string_has_a_sentiment_between_0_and_1():
    r = data.rng("texts")
    letters = [*UNITS, *TEXTS, *map(chr, (*range(0x80), 0xa0, 0x2028, 0xd800, 0xfeff, 0x10ffff)), *data.ADJECTIVES, *data.INTENSIFIERS, *data.VERBS]
    for text in TEXTS + ["".join(r.choices(letters, k=r.randrange(60))) for _ in range(2000)]:
        assert isinstance(data.sentiment(text), float) and 0 <= data.sentiment(text) <= 1, ascii(text)


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_sentiment_takes_linear_time(unit):
    """Eight times the text in at most 8 x 3 times the time of the processor (the least of three); quadratic would be 64."""
    def seconds(text: str) -> float:
        start = time.process_time()
        data.sentiment(text)
        return time.process_time() - start

    short, long = (min(seconds(unit * n) for _ in range(3)) for n in (100_000 // len(unit), 800_000 // len(unit)))
    assert long < 24 * max(short, .001), f"{short:.4f} s, then {long:.4f} s for eight times the text"
