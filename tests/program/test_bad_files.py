"""Bad files: losses, preferences and stages that cannot be used, and texts with any character.

As in test_bad_input.py, the answer must be one sentence and exit code 2.
"""
import dataclasses
import json
import pathlib

import pytest
import torch

import data
import dpo
import harness
import train
from test_bad_input import FLAGS, PLACES, SMALL, WORKER, assert_refused, bad_texts


# ------------------------------------------------------------------------ files in the --out folder
def flip_a_bit(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1:]


def test_whatever_stands_in_a_stages_file_is_made_again_or_what_was_written(tmp_path):
    """`load_stage` gives the value that was saved, or none.

    The file is empty, foreign, cut off at any byte, or has one bit flipped.
    """
    path = tmp_path / "x.k.pt"
    r = data.named_rng("files")
    value = torch.arange(40)
    content = {"file": path.name, "inputs": {}, "value": value, "seconds": 0.}
    torch.save(content, path)
    stored = harness.load_stage(path)
    assert torch.equal(stored["value"], value)

    whole = path.read_bytes()
    contents = [b"", b"\n", b"text", b"\x80\x04.", b"PK\x03\x04"]
    contents += [whole[:length] for length in range(0, len(whole), 97)]
    for position in r.sample(range(len(whole)), 300):
        contents.append(flip_a_bit(whole, position, r.randrange(8)))
    for content in contents:
        path.write_bytes(content)
        stored = harness.load_stage(path)
        assert stored is None or torch.equal(stored["value"], value), \
            f"a file of {len(content)} bytes is taken for the stage, but holds another value"


def test_foreign_files_in_the_folder_are_no_runs(tmp_path, monkeypatch):
    """Only the last of these names is that of a run of seed 0: METHOD-SETTING-seed0.HASH.pt."""
    for name in ("dpo-mine-seed0.1.pt", "dpo--seed0.pt", "dpo-1-.pt", "dpo-.5.-seed0.1.pt",
                 "dpo-1.0-0.0123abcd.pt", "mine-3.0-seed0.0123abcd.pt",
                 "dpo-4.0-seed1.0123abcd.pt", "dpo-2.0-seed0.0123abcd.pt"):
        (tmp_path / f"train-policy-{name}").touch()

    monkeypatch.setattr(harness.Stage, "path", tmp_path)    # which exists, unlike that of its hash
    stages = harness.Stages(tmp_path, store=None)
    setup = train.Setup(train.Config(), 0, stages, "cpu", "", None, None, None)
    runs = [stage.arguments[0] for stage in train.find_baselines(setup)]
    assert runs == [train.Run("dpo", 2.)]


def test_baselines_of_other_settings_are_left_out_and_named(tmp_path, capsys):
    """The name of this file has another hash: its policy had, say, another learning rate."""
    (tmp_path / "train-policy-dpo-2.0-seed0.0123abcd.pt").touch()
    stages = harness.Stages(tmp_path, torch.distributed.HashStore())
    setup = train.Setup(train.Config(), 0, stages, "cpu", "", None, None, None)
    assert train.find_baselines(setup) == []
    assert "train-policy-dpo-2.0-seed0" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- --loss files
def bytes_of(text: str) -> bytes:
    """The text in UTF-8; "\\udcff" stands for the byte 0xff, which UTF-8 does not have."""
    return text.encode("utf-8", "surrogateescape")


FILES = {    # a word of the error: files that have no usable function f
    "no function f": ["", "f = 3", "f = None", "def g(pair, beta):\n    return pair.logp_w"],
    "null": ["\0"],
    "two": ["raise ValueError('two\\nlines')"],
    "line": ["\udcff", "(" * 999],
    "line 1": ["def f(pair, beta:\n    return 1", "import nothing_like_this",
               "from torch import no", "open('no')"],
    "line 2": ["def f(pair, beta):\nreturn 1"],
    "line 3": ["x = 1\n\nx.y"],
    "AssertionError": ["assert False"],
    "GeneratorExit": ["raise GeneratorExit"],
    "SystemExit": ["import sys\nsys.exit()", "raise SystemExit('bye')"],
    "Odd": ["class Odd(BaseException): 0\nraise Odd"],
    "TypeError": ["def f(): return 1", "def f(pair): return pair.logp_w",
                  "def f(pair, beta, x): return 1", "def f(*, pair, beta): return 1", "class f: 0",
                  "from math import sqrt as f"],
    "coroutine": ["async def f(pair, beta): return pair.logp_w"],
    "generator": ["def f(pair, beta): yield pair.logp_w"]}
BODIES = {    # a word of the error: bodies that make f unusable
    "RecursionError": ["return f(pair, beta)"],
    "SystemExit": ["sys.exit()"],
    "GeneratorExit": ["raise GeneratorExit"],
    "two": ["raise ValueError('two\\nlines')"],
    "line 3": ["1 / 0", "return pair.logq_w", "return pair.logp_w[7]",
               "return pair.logp_w @ torch.ones(4, 4)", "return pair.logp_w.add_(1)",
               "pair.logp_w = 1"],
    "NoneType": ["return None", "pass"],
    "int": ["return 1"],
    "float": ["return 1."],
    "list": ["return [pair.logp_w]", "return pair.logp_w.tolist()"],
    "ndarray": ["return pair.logp_w.detach().numpy()"],
    "Pair": ["return pair"],
    "complex": ["return pair.logp_w * 1j", "return torch.complex(pair.logp_w, pair.logp_l)"],
    "shape": ["return pair.logp_w.mean()", "return pair.logp_w[:, None]",
              "return pair.logp_w[None]", "return pair.logp_w[:4]", "return pair.logp_w[:0]",
              "return pair.logp_w[:, None] * pair.logp_l"],
    "not finite": ["return pair.logp_w * float('nan')", "return pair.logp_w / 0",
                   "return (-pair.logp_w).exp() ** 99"],
    "gradient": ["return pair.ref_w", "return pair.len_w", "return torch.ones(5)",
                 "return torch.ones(5, requires_grad=True)",
                 "return (pair.logp_w - pair.logp_w).sqrt()", "return pair.logp_w.detach()",
                 "return pair.logp_w.long()", "return pair.logp_w > 0"]}
HEAD = "import torch, sys\ndef f(pair, beta):\n    "    # the body begins in line 3
LOSSES = [(code, word) for word, codes in FILES.items() for code in codes]
LOSSES += [(HEAD + body, word) for word, bodies in BODIES.items() for body in bodies]


@pytest.mark.parametrize("code, word", LOSSES,
                         ids=lambda text: ascii(text.removeprefix(HEAD))[1:41])
def test_a_loss_that_cannot_be_used_is_refused(code, word, tmp_path):
    """The loss is refused before the folder of the run is made; the error names the file."""
    (tmp_path / "bad.py").write_bytes(bytes_of(code + "\n"))
    argv = ["--preset=tiny", f"--out={tmp_path}/out", f"--loss={tmp_path}/bad.py:f"]
    assert_refused(argv, "bad.py", word)
    assert not (tmp_path / "out").exists()


LATE_RESULTS = ["torch.ones(5, requires_grad=True)", "pair.logp_w.mean()", "None", "sys.exit()",
                "pair.logp_w * 1j", "torch.zeros(7)", "pair.logp_w.detach()"]


@pytest.mark.parametrize("result", LATE_RESULTS)
def test_a_loss_that_changes_its_mind_after_the_trial_is_an_error_of_the_loss(result, tmp_path):
    """A loss that is good on the five pairs of the trial, but not on seven, is not averaged."""
    code = f"{HEAD}return pair.logp_w if len(pair.logp_w) == 5 else {result}\n"
    (tmp_path / "late.py").write_text(code)
    loss = harness.UserLoss(f"{tmp_path}/late.py:f")
    x = torch.zeros(7, requires_grad=True)
    with pytest.raises(harness.LossError, match="late.py"):
        loss(dpo.Pair(x, x, x, x, x, x), .5)


@pytest.mark.parametrize("need", ["torch.empty(10**16)", "bytearray(2**62)"])
def test_memory_that_runs_out_in_a_loss_is_no_error_of_the_loss(need, tmp_path):
    """It would be kept as a failed run, but with fewer workers the same loss may succeed."""
    code = f"{HEAD}return pair.logp_w if len(pair.logp_w) == 5 else {need}\n"
    (tmp_path / "large.py").write_text(code)
    loss = harness.UserLoss(f"{tmp_path}/large.py:f")
    x = torch.zeros(7, requires_grad=True)
    with pytest.raises((RuntimeError, MemoryError)) as error:
        loss(dpo.Pair(x, x, x, x, x, x), .5)
    assert not isinstance(error.value, harness.LossError) and harness.is_out_of_memory(error.value)


BAD_LOSS_NAMES = [
    "", ":", ":f", "f", "good.py", "good.py:", "good.py:nothing", "good.py:f:g", "good.py: f",
    "good.py:dpo", "good.py:sft", "good.py:best_of_n", "good.py:" + "x" * 300, "nothing.py:f",
    "folder:f", "folder/:f", "good.py/x:f", "~/good.py:f", "loop:f", "/dev/null:f", "\u00e9.py:f",
    "\udcff.py:f", "two\nlines.py:f", "x" * 5000 + ".py:f"]
BAD_PAIRS_NAMES = ["", "nothing.jsonl", ".", "folder", "loop", "/dev/null", "/dev/null/x",
                   "\u00e9", "\udcff", "two\nlines", "x" * 5000]
NOWHERE = [(f"--loss={name}",) for name in BAD_LOSS_NAMES]
NOWHERE += [("--loss=good.py:f", "--loss=good.py:f")]
NOWHERE += [(f"--pairs={name}",) for name in BAD_PAIRS_NAMES]


@pytest.mark.parametrize("flags", NOWHERE, ids=lambda flags: ascii(" ".join(flags)[:30]))
def test_a_name_that_leads_nowhere_is_refused(flags, tmp_path, monkeypatch):
    """--loss and --pairs must name a file that can be read, and --loss a function in it.

    The function may not have the name of a method, a name that occurs twice, or a long name.
    """
    monkeypatch.chdir(tmp_path)
    pathlib.Path("good.py").write_text("def f(pair, beta):\n    return pair.logp_w\n"
                                       f"dpo = sft = best_of_n = {'x' * 300} = f\n")
    pathlib.Path("folder").mkdir()
    pathlib.Path("loop").symlink_to("loop")
    assert_refused(["--preset=tiny", "--out=out", *flags], flags[0][2:6])
    assert not pathlib.Path("out").exists()


# ------------------------------------------------------------------------------------ --pairs files
PROMPT = '"This western"'
CHOSEN = ": the plot was fine."
REJECTED = ": the plot was dull."
LINE = json.dumps({"prompt": "This western", "chosen": CHOSEN, "rejected": REJECTED})


def with_prompt(prompt: str) -> str:
    """A good line with another prompt, which is JSON."""
    return LINE.replace(PROMPT, prompt)


def with_columns(columns: str) -> str:
    """A good line with more columns, which are JSON."""
    return LINE[:-1] + f", {columns}}}"


BAD_FIRST_LINES = [
    "\0", "text", "{", "[]", "3", "null", "NaN", '"prompt"', "{}", "[" * 9999, "9" * 9999,
    LINE + LINE,
    "prompt,chosen,rejected\nThis western,a,b",
    with_prompt("null"),
    with_prompt("3"),
    with_prompt('["This western"]'),
    with_prompt("NaN"),
    with_prompt('""'),
    with_prompt('" "'),
    with_prompt('"\\ud800"'),
    with_prompt('"\u6620\u753b"'),
    with_prompt(f'"{"This western " * 99}"'),
    LINE.replace(REJECTED, CHOSEN),
    with_prompt('"", "prompt_ids": {"": [1]}, "response_ids": {}'),
    with_columns('"response_ids": 3'),
    with_columns('"group": []'),
    with_columns(f'"prompt_ids": {{{PROMPT}: [-1]}}'),
    with_columns(f'"prompt_ids": {{{PROMPT}: [99999]}}'),
    with_columns(f'"prompt_ids": {{{PROMPT}: "x"}}')]
BAD_SECOND_LINES = [
    "\n" + LINE, LINE[:-1], LINE.replace("chosen", "Chosen"), LINE.replace(REJECTED, ""),
    LINE.replace(REJECTED, REJECTED * 999)]
PAIRS = [("", ""), ("\n", ""), ("\udcff", "")]    # content of the file, a word of the error
PAIRS += [(line, "line 1") for line in BAD_FIRST_LINES]
PAIRS += [(f"{LINE}\n{line}\n", "line 2") for line in BAD_SECOND_LINES]


@pytest.fixture
def folder_of_pairs(tmp_path_factory):
    """One folder for all tests of pairs: corpus and tokenizer are made once."""
    return tmp_path_factory.getbasetemp() / "pairs"


@pytest.mark.parametrize("content, line", PAIRS, ids=lambda text: ascii(text[-50:]))
def test_a_file_of_pairs_that_cannot_be_read_is_refused_by_file_and_line(
        content, line, tmp_path, folder_of_pairs, monkeypatch):
    """The error names file and line, and comes before anything is trained."""
    monkeypatch.setattr(train, "sft", lambda *_: pytest.fail("it trains"))
    path = tmp_path / "mine.jsonl"
    path.write_bytes(bytes_of(content))
    argv = [*SMALL, f"--out={folder_of_pairs}", f"--pairs={path}"]
    assert_refused(argv, "mine.jsonl", line, env=WORKER)


def test_more_than_two_hundred_bad_inputs_are_tried():
    """The tables of bad input have 200 cases or more; each is tried by one of the tests."""
    texts = [(field.name, text) for field in dataclasses.fields(train.Config)
             for text in bad_texts(field)]
    sizes = [len(set(table)) for table in (texts, FLAGS, PLACES, LOSSES, NOWHERE, PAIRS)]
    assert sum(sizes) >= 200 and min(sizes) > 3, sizes


# -------------------------------------------------------------------------------- texts of a policy
CODE_POINTS = [*range(0x300), *range(0x2000, 0x2070), *range(0xd7f0, 0xe010),
               *range(0xfe00, 0x10010), 0x10ffff]


def test_any_character_may_stand_in_a_text():
    """`sentiment` takes halves of surrogate pairs too, alone and inside a clause.

    Its other inputs, and its time, are in test_true_reward.py.
    """
    for c in map(chr, CODE_POINTS):
        for text in (c * 99, f"The acting was{c}superb.", f"The acting was superb{c}",
                     f"The acting was superb.{c}The plot was dull."):
            assert 0 <= data.sentiment(text) <= 1, ascii(text)
