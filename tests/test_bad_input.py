"""Bad input: every flag and file that a user can give, tried with what it cannot be. One sentence, exit code 2, nothing lost."""
import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import subprocess
import sys
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
            code = data.answer(train.main, dpo.LossError)
        except BaseException as error:    # SystemExit too: a file of the user's must not end the program
            code = f"traceback of {type(error).__name__}: {error}"
    return code, said.getvalue()


def refused(argv, *words, env={}) -> None:
    """The answer to a bad input is one sentence, which has these words, and exit code 2; never a traceback."""
    code, said = answer(argv, env)
    good = code == 2 and len(said.splitlines()) == 1 and said.startswith("train.py: ") and " None:" not in said
    assert good and all(word in said for word in words), f"{' '.join(argv)[-80:]!r}, {words}: exit code {code}, it said {said[:300]!r}"


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
    for text in bad_texts(f):
        flag = "--" + f.name.replace("_", "-")
        refused(["--preset=tiny", f"--out={tmp_path}/out", f"{flag}={text}"], flag)
    assert not list(tmp_path.iterdir())


FLAGS = {    # flags: a word that the sentence must have
    "--width=32 --heads=3": "--heads", "--prompts=1201": "--prompts", "--eval-prompts=151": "--eval-prompts", "--ppo-batch=18": "--ppo-batch",
    "--ppo-batch=16 --completions=3": "--completions", "--preset=huge": "--preset", "--preset=": "--preset", "--nothing=1": "--nothing",
    "--bet=1": "--bet", "stray": "stray", "--seed": "--seed", "-x": "-x", "--betas 1 2": "2", "--help=yes": "--help", "--seed=1 two\nlines": "two",
    "--seed=1 \udcff": "--help", **{f"--workers={x}": "--workers" for x in ("", "0", "-1", "257", "x", "1.5", "nan", "9" * 5000)},
    **{f"--device={x}": "--device" for x in ("", ":", "tpu", "CPU", "cuda:99", "cuda:x", "cuda:-1", "cuda:", "cpu:x", "cpu:", "cpu,cuda",
                                             "meta", "mps:9", "\u00e9")},
    # what fits into no machine must be refused before any work, not when memory runs out
    "--width=100000": "memory", "--width=100000 --vocab-size=100000": "memory", "--width=16384 --layers=100": "memory",
    "--reviews=1000000 --prompts=800000 --completions=64 --ppo-batch=64 --max-tokens=10000": "memory"}


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ascii(flags[:30]))
def test_flags_that_cannot_be_together_or_on_this_machine_are_refused(flags, tmp_path):
    refused(["--preset=tiny", f"--out={tmp_path}/out", *flags.split(" ")], FLAGS[flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trouble", [lambda *_: torch.empty(10**16), lambda *_: bytearray(2**62)], ids=["torch", "python"])
def test_memory_that_runs_out_later_is_said_in_one_sentence(trouble, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "experiment", trouble)
    refused([*SMALL, f"--out={tmp_path}/out"], "memory", env=WORKER)


def test_help_shows_every_flag_with_its_default():
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
    refused([*SMALL, f"--out={place}"], place[:40] or "--out", env=WORKER if place == "/proc" else {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "loop"] and pathlib.Path("file").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB: full when it is full, for root too."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("a small disk is mounted by root on Linux")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_or_read_only_disk_is_said_and_what_was_finished_is_kept(small_disk):
    """Corpus and tokenizer fit, pi_ref does not; the same command on a larger disk takes both as they are and comes further."""
    argv = [*SMALL, f"--out={small_disk}"]
    refused(argv, "disk", env=WORKER)
    kept = {path: path.stat().st_mtime_ns for path in small_disk.glob("*.pt")}
    subprocess.run(["mount", "-o", "remount,size=192k", small_disk], check=True)
    answer(argv, WORKER)
    assert len(kept) == 2 and {path: path.stat().st_mtime_ns for path in kept} == kept and list(small_disk.glob("sft.*.pt")), kept
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(argv, str(small_disk), env=WORKER)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")], ids=repr)
def test_a_stage_that_cannot_be_written_is_named(error, tmp_path, monkeypatch):
    """Both words that torch has for a full disk; neither names the file."""
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=error))
    refused([*SMALL, f"--out={tmp_path}"], "corpus.", env=WORKER)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_results_that_cannot_be_written_are_named_and_the_old_ones_kept(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_text("old")
    (tmp_path / f"results.{os.getpid()}.partial").symlink_to("/dev/full")    # what is written under this name meets a full disk
    monkeypatch.setattr(train, "experiment", lambda *_: results.write_lines(tmp_path / "results.jsonl", [{"method": "dpo"}]))
    refused([*SMALL, f"--out={tmp_path}"], "results", "No space left", env=WORKER)
    assert (tmp_path / "results.jsonl").read_text() == "old"


def test_whatever_stands_in_a_stages_file_is_made_again_or_what_was_written(tmp_path):
    """Empty, cut off at any byte, foreign, one bit flipped: either `load_stage` gives the value that was saved, or nothing."""
    path, r, value = tmp_path / "x.k.pt", data.rng("files"), torch.arange(40)
    torch.save({"key": path.name, "value": value, "seconds": 0.}, path)
    assert torch.equal(data.load_stage(path)["value"], value)
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << r.randrange(8)]) + whole[i + 1:] for i in r.sample(range(len(whole)), 300)]
    for content in [b"", b"\n", b"text", b"\x80\x04.", b"PK\x03\x04", *(whole[:n] for n in range(0, len(whole), 97)), *flipped]:
        path.write_bytes(content)
        found = data.load_stage(path)
        assert found is None or torch.equal(found["value"], value), f"{len(content)} bytes were taken for the stage, but hold another value"


def test_foreign_files_in_the_folder_are_no_runs(tmp_path):
    for name in ("dpo-mine-seed0.1.pt", "dpo--seed0.pt", "dpo-1-seed.pt", "dpo-.5.-seed0.1.pt", "dpo-2-seed0.abc.pt"):
        (tmp_path / name).touch()
    assert results.trained(tmp_path, ["dpo"]) == {"dpo": [2.]}


# ------------------------------------------------------------------------------------------------------------------- files
F, W = "import torch, sys\ndef f(pair, beta):\n    ", "pair.logp_w"
FILES = {    # a word that the sentence must have: files that have no usable f
    "no function f": ["", "f = 3", "f = None", f"def g(pair, beta):\n    return {W}"], "null": ["\0"], "two": ["raise ValueError('two\\nlines')"],
    "line": ["\udcff", "(" * 999], "line 1": ["def f(pair, beta:\n    return 1", "import nothing_like_this", "from torch import no", "open('no')"],
    "line 2": ["def f(pair, beta):\nreturn 1"], "line 3": ["x = 1\n\nx.y"], "AssertionError": ["assert False"], "GeneratorExit": ["raise GeneratorExit"],
    "SystemExit": ["import sys\nsys.exit()", "raise SystemExit('bye')"], "Odd": ["class Odd(BaseException): 0\nraise Odd"],
    "TypeError": ["def f(): return 1", f"def f(pair): return {W}", "def f(pair, beta, x): return 1", "def f(*, pair, beta): return 1", "class f: 0",
                  "from math import sqrt as f"], "coroutine": [f"async def f(pair, beta): return {W}"], "generator": [f"def f(pair, beta): yield {W}"]}
BODIES = {    # the same for what may stand in f
    "RecursionError": ["return f(pair, beta)"], "SystemExit": ["sys.exit()"], "GeneratorExit": ["raise GeneratorExit"],
    "two": ["raise ValueError('two\\nlines')"], "line 3": ["1 / 0", "return pair.logq_w", f"return {W}[7]", f"return {W} @ torch.ones(4, 4)",
                                                          f"return {W}.add_(1)", f"{W} = 1"],
    "NoneType": ["return None", "pass"], "int": ["return 1"], "float": ["return 1."], "list": [f"return [{W}]", f"return {W}.tolist()"],
    "ndarray": [f"return {W}.detach().numpy()"], "Pair": ["return pair"], "complex": [f"return {W} * 1j", f"return torch.complex({W}, pair.logp_l)"],
    "shape": [f"return {W}{x}" for x in (".mean()", "[:, None]", "[None]", "[:4]", "[:0]", "[:, None] * pair.logp_l")],
    "not finite": [f"return {W} * float('nan')", f"return {W} / 0", f"return (-{W}).exp() ** 99"],
    "gradient": ["return pair.ref_w", "return pair.len_w", "return torch.ones(5)", "return torch.ones(5, requires_grad=True)",
                 f"return ({W} - {W}).sqrt()", *(f"return {W}{x}" for x in (".detach()", ".long()", " > 0"))]}
LOSSES = [*((code, word) for word in FILES for code in FILES[word]), *((F + body, word) for word in BODIES for body in BODIES[word])]


@pytest.mark.parametrize("code, word", LOSSES, ids=lambda text: ascii(text.removeprefix(F))[1:41])
def test_a_loss_that_cannot_be_used_is_refused(code, word, tmp_path):
    (tmp_path / "bad.py").write_bytes((code + "\n").encode("utf-8", "surrogateescape"))
    refused(["--preset=tiny", f"--out={tmp_path}/out", f"--loss={tmp_path}/bad.py:f"], "bad.py", word)
    assert not (tmp_path / "out").exists()


NOWHERE = [*(f"--loss={name}" for name in (
    "", ":", ":f", "f", "good.py", "good.py:", "good.py:nothing", "good.py:f:g", "good.py: f", "good.py:dpo", "good.py:sft", "good.py:best_of_n",
    "good.py:" + "x" * 300, "good.py:f --loss=good.py:f", "nothing.py:f", "folder:f", "folder/:f", "good.py/x:f", "~/good.py:f", "loop:f", "/dev/null:f",
    "\u00e9.py:f", "\udcff.py:f", "two\nlines.py:f", "x" * 5000 + ".py:f")), *(f"--pairs={name}" for name in (
        "", "nothing.jsonl", ".", "folder", "loop", "/dev/null", "/dev/null/x", "\u00e9", "\udcff", "two\nlines", "x" * 5000))]


@pytest.mark.parametrize("flags", NOWHERE, ids=lambda flags: ascii(flags[:30]))
def test_a_name_that_leads_nowhere_is_refused(flags, tmp_path, monkeypatch):
    """A folder for a file, no file, no colon, no name, the name of a method, one name twice, one too long for a file's name."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("good.py").write_text(f"def f(pair, beta):\n    return {W}\ndpo = sft = best_of_n = {'x' * 300} = f\n")
    pathlib.Path("folder").mkdir()
    pathlib.Path("loop").symlink_to("loop")
    refused(["--preset=tiny", "--out=out", *flags.replace(" --", "\0--").split("\0")], flags[2:6])
    assert not pathlib.Path("out").exists()


@pytest.mark.parametrize("result", ["torch.ones(5, requires_grad=True)", "pair.logp_w.mean()", "None", "sys.exit()", "pair.logp_w * 1j",
                                    "torch.zeros(7)", "pair.logp_w.detach()"])
def test_a_loss_that_changes_its_mind_after_the_trial_is_an_error_of_the_loss(result, tmp_path):
    """Good on the five pairs of the trial, not on seven: it must not be averaged into a number all the same."""
    (tmp_path / "late.py").write_text(F + f"return pair.logp_w if len(pair.logp_w) == 5 else {result}\n")
    loss, x = dpo.load_loss(f"{tmp_path}/late.py:f"), torch.zeros(7, requires_grad=True)
    with pytest.raises(dpo.LossError, match="late.py"):
        loss(dpo.Pair(x, x, x, x, x, x), .5)


LINE = json.dumps({"prompt": "I saw", "chosen": " this film.", "rejected": " a comedy."})
FIRST = ["\0", "text", "{", "[]", "3", "null", "NaN", '"prompt"', "{}", "[" * 9999, "9" * 9999, LINE + LINE, "prompt,chosen,rejected\nI saw,a,b",
         *(LINE.replace('"I saw"', x) for x in ("null", "3", '["I saw"]', "NaN", '""', '" "', '"\\ud800"', '"\u6620\u753b"', f'"{"I saw " * 99}"')),
         LINE.replace(" a comedy.", " this film."), LINE.replace('"I saw"', '"", "ids": [[], [1], [2]], "rows": [0, 1]'), *(LINE[:-1] + f", {x}}}" for x in (
             '"ids": 3', '"group": []', '"ids": [[-1], [1], [2]], "rows": [0, 1]', '"ids": [[99999], [1], [2]], "rows": [0, 1]', '"ids": [[1], [2], [3]], "rows": [1, "x"]'))]
SECOND = ["\n" + LINE, LINE[:-1], LINE.replace("chosen", "Chosen"), LINE.replace(" a comedy.", ""), LINE.replace(" a comedy.", " a comedy." * 999)]
PAIRS = [("", ""), ("\n", ""), ("\udcff", ""), *((content, "line 1") for content in FIRST), *((f"{LINE}\n{x}\n", "line 2") for x in SECOND)]


@pytest.mark.parametrize("content, line", PAIRS, ids=lambda text: ascii(text[-50:]))
def test_a_file_of_pairs_that_cannot_be_read_is_refused_by_file_and_line(content, line, tmp_path, tmp_path_factory, monkeypatch):
    """Before anything is trained; corpus and tokenizer are made once, in a folder that all these share."""
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it trains"))
    (tmp_path / "mine.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused([*SMALL, f"--out={tmp_path_factory.getbasetemp()}/pairs", f"--pairs={tmp_path}/mine.jsonl"], "mine.jsonl", line, env=WORKER)


def test_more_than_two_hundred_bad_inputs_are_tried():
    """Each asserts for itself that it is answered in one sentence, without a traceback."""
    texts = [(f.name, text) for f in dataclasses.fields(train.Config) for text in bad_texts(f)]
    tried = [len(set(table)) for table in (texts, FLAGS, PLACES, LOSSES, NOWHERE, PAIRS)]
    assert sum(tried) >= 200 and min(tried) > 3, tried


# ---------------------------------------------------------------------------------------------------- as the user meets it
def test_more_tokens_than_the_reviews_have_words_for_are_refused(tmp_path):
    refused([*SMALL, f"--out={tmp_path}", "--reviews=50", "--vocab-size=2000"], "--vocab-size", env=WORKER)


@pytest.mark.parametrize("flags", [["--width=-1"], ["--out=\udcff/\u00e9", "--loss=\udcff.py:f"], ["--out=train.py"], ["--workers=2", "--out=/proc"]], ids=ascii)
def test_the_program_says_one_line_and_exits_with_two(flags):
    """In its own processes; two workers that meet the same trouble (a folder that takes no file) say it once."""
    code, _, said = command(*SMALL, *flags)
    assert code == 2 and said.startswith("train.py: ") and said.count("\n") == 1, f"exit code {code}: {said}"


def test_a_worker_that_is_killed_is_said(tmp_path, monkeypatch, capfd):
    """As the kernel does where memory runs out: the program fails, and not in silence."""
    (tmp_path / "killed.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "killed.py")])
    with contextlib.suppress(data.UserError):    # main says it, and returns 2
        code, said = data.launch(2), capfd.readouterr().err
        assert code and "memory" in said, f"exit code {code}, and it said {said!r}"


def test_any_character_may_stand_in_a_text():
    """Halves of surrogate pairs too, alone and inside a clause; what else `sentiment` takes, and its time, is in test_data.py."""
    for c in map(chr, (*range(0x300), *range(0x2000, 0x2070), *range(0xd7f0, 0xe010), *range(0xfe00, 0x10010), 0x10ffff)):
        for text in (c * 99, f"The acting was{c}superb.", f"The acting was superb{c}", f"The acting was superb.{c}The plot was dull."):
            assert 0 <= data.sentiment(text) <= 1, ascii(text)
