"""The experiment, end to end, in its tiny preset: what it writes, that it resumes, that it says what is wrong."""
import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import train
from plots import cost, load_lines

ROOT = pathlib.Path(train.__file__).parent
NO_NETWORK = ROOT / "tests" / "no_network"    # a hook that ends any process that touches a socket
COLUMNS = {"method", "setting", "seed", "step", "final", "reward", "reward_se", "kl", "kl_se", "optimal_reward", "share", "share_se",
           "seconds", "config"}


def run(out, *flags):
    """`python train.py --preset tiny` as a user starts it, network switched off -> its exit code and what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PARENT")} | {"PYTHONPATH": str(NO_NETWORK)}
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "tiny", "--device", "cpu", "--out", str(out), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    return done.returncode, done.stdout + done.stderr


def rows(out):
    """results.jsonl without what depends on the clock."""
    read = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in read]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "run"
    code, printed = run(out, "--workers", 2)
    assert code == 0, printed
    return out, printed


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny[0], tmp_path / "run")


def test_a_run_writes_results_optimum_preferences_figure_and_table(tiny):
    """One row per evaluation with the columns that others rely on; one `sft` row; every run ends in a final row."""
    out, printed = tiny
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert all(COLUMNS <= set(row) for row in found), f"columns missing: {COLUMNS - set(found[0])}"
    assert [(r["step"], r["kl"], r["final"]) for r in found if r["method"] == "sft"] == [(0, 0., True)]
    assert {(r["method"], r["setting"]) for r in found} == {(r["method"], r["setting"]) for r in found if r["final"]}
    assert all(f"\n{method} " in printed for method in {r["method"] for r in found}), "the table lacks a method"
    figures = [path for path in out.glob("*.png") if path.read_bytes()[1:4] == b"PNG"]
    assert {path.stem for path in figures} >= {"frontier", "inside", "best_of_n", "degeneration", "winrate", "domains", "judges", "cost"}
    assert {"prompt", "chosen", "rejected"} <= set(json.loads((out / "preferences-seed0.jsonl").read_text().splitlines()[0]))


def test_no_test_here_needs_a_network():
    """All runs of this file, the whole experiment among them, are under a hook that ends who opens a socket: it does end them."""
    control = subprocess.run([sys.executable, "-c", "import socket; socket.socket()"], env={"PYTHONPATH": str(NO_NETWORK)}, capture_output=True)
    assert control.returncode == 99 and b"socket.__new__" in control.stderr


def test_the_optimum_reaches_far_and_its_lists_belong_together(tiny):
    optimum = json.loads((tiny[0] / "optimum.json").read_text())
    lengths = {len(optimum[name]) for name in ("beta", "kl", "reward", "ess")}
    assert len(lengths) == 1 and max(optimum["kl"]) >= 6, f"{lengths} entries, KL up to {max(optimum['kl']):.2f}: not 6"


def test_a_finished_run_is_not_made_again(copy):
    """Every stage is loaded, and the results are the same to the last digit."""
    before, files = rows(copy), {path: path.stat().st_mtime_ns for path in copy.glob("*.pt")}
    code, printed = run(copy)
    assert code == 0 and rows(copy) == before, printed
    assert {path: path.stat().st_mtime_ns for path in copy.glob("*.pt")} == files, "a stage that was there was written again"
    charged = [row for row in load_lines(copy / "measured.jsonl") if (row["figure"], row.get("method")) == ("cost", "ppo")]
    assert charged and all(row[f"{part}_seconds"] > 0 for row in charged for part in cost.CHARGED), f"a part of PPO's pipeline is not charged: {charged}"


def test_results_do_not_depend_on_the_number_of_workers(copy):
    """All runs of two workers, made again by one, from the same pi_ref: what a run draws depends on its own name alone."""
    before = rows(copy)
    for path in [*copy.glob("*-seed0.*.pt"), *copy.glob("completions*.pt")]:
        path.unlink()
    code, printed = run(copy, "--workers", 1)
    assert code == 0 and rows(copy) == before, printed


def test_an_unreadable_stage_is_named_and_made_again(copy):
    before, victim = rows(copy), next(copy.glob("dpo-2-*.pt"))
    victim.write_bytes(victim.read_bytes()[:1000])
    code, printed = run(copy, "--workers", 1)
    assert code == 0 and victim.name in printed and rows(copy) == before, printed


def test_a_loss_of_ones_own_gets_its_curve_beside_the_baselines(copy, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(pair, beta):\n    return (pair.logp_w - pair.logp_l - 1 / beta) ** 2\n")
    costs = lambda: [line for line in (copy / "measured.jsonl").read_text().splitlines() if '"figure": "cost"' in line]
    before, charged = rows(copy), costs()
    code, printed = run(copy, "--loss", f"{tmp_path}/mine.py:mine", "--betas", ".3")
    after = rows(copy)
    without = lambda found: sorted(str({k: v for k, v in r.items() if k != "config"}) for r in found if r["method"] != "mine")
    assert code == 0 and without(after) == without(before), printed
    assert {r["setting"] for r in after if r["method"] == "mine" and r["final"]} == {.3}
    assert charged and costs() == charged, "the baselines' cost is not what it was: are stages that this command does not need left out?"


def test_a_loss_that_fails_late_ends_its_own_run_alone(copy, tmp_path):
    """NaN at beta .5, an exception at beta 2: the other rows are kept, the failures are written down, and the exit code is 1."""
    (tmp_path / "late.py").write_text("calls = []\ndef late(pair, beta):\n    calls.append(0)\n"
                                      "    if beta > 1 and len(calls) > 3:\n        raise ValueError('tired')\n"
                                      "    return pair.logp_w * (float('nan') if beta == .5 and len(calls) > 3 else -1.)\n")
    code, printed = run(copy, "--loss", f"{tmp_path}/late.py:late", "--betas", ".5,1,2", "--workers", 2)
    failures = [json.loads(line) for line in (copy / "failures.jsonl").read_text().splitlines()]
    assert code == 1 and sorted(f["setting"] for f in failures) == [.5, 2.] and "tired" in printed, printed
    assert any(r["method"] == "late" and r["setting"] == 1. and r["final"] for r in rows(copy))


def test_every_field_of_the_configuration_is_read():
    """A flag that nothing reads would lie."""
    code = "".join((ROOT / name).read_text() for name in ("train.py", "ppo.py", "plots/frontier.py"))
    unread = [name for name in train.Config.__dataclass_fields__ if not re.search(rf"cfg\.{name}\b", code)]
    assert not unread, f"nothing reads {unread}"


def test_the_presets_are_valid():
    for name in train.PRESETS:
        cfg, _ = train.read_flags(["--preset", name])
        assert cfg.prompts > 0


def test_the_study_changes_one_thing_at_a_time_and_names_what_failed(monkeypatch):
    """Every variant of the decomposition is drawn, differs from the experiment in what it says, and a diverged run is not lost."""
    default, asked = train.Config(), []

    def prepare(cfg, *_):
        asked.append(dataclasses.asdict(cfg))
        return argparse.Namespace(cfg=cfg, stages=argparse.Namespace(share=lambda runs, report: runs))

    def sweep(lab, settings):
        row = {"reward": .6, "reward_se": .01, "kl": 1., "kl_se": .1, "final": True}
        diverged = lab.cfg.lr > default.lr
        return [{"rows": [row] * (not diverged), "failure": {"method": m, "reason": "loss not finite"} if diverged else None} for m in settings]

    for name, stub in (("prepare", prepare), ("sweep", sweep)):
        monkeypatch.setattr(train, name, stub)
    monkeypatch.setattr(train.frontier, "optimum", lambda lab, key: {})
    monkeypatch.setattr(train.results, "add_shares", lambda rows, optimum: None)
    rows, failed = train.study(default, None, "cpu")
    changed = [{name for name, x in cfg.items() if x != getattr(default, name)} for cfg in asked]
    assert changed == [set(), {"prompts", "epochs"}, {"epochs"}, {"prompts"}, {"labels"}, {"width"}, {"ppo_steps"}, *[{"lr", "ppo_lr"}] * 2]
    assert {row["variant"] for row in rows} == set(train.gap.variants(default)) - {"learning rate x 3.2"} >= set(train.gap.LINES)
    assert [run["failure"]["reason"] for run in failed] == ["learning rate x 3.2: loss not finite"] * 3 and failed[0]["rows"] == []
