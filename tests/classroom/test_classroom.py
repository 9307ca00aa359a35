"""The tools for a class: starters are generated, and files of tests get their score."""
import pathlib
import subprocess
import sys

import pytest

import score
import starter

ROOT = pathlib.Path(score.__file__).resolve().parent.parent
THIS_FILE = "tests/classroom/test_classroom.py"
USUAL_TESTS = '''
import torch

import dpo
import model


def new_policy():
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(7, 6, 1, 1, 8))


def compute_loss(policy, reference):
    ids = torch.tensor([[1, 2, 3, 6, 6], [1, 4, 5, 2, 6]])
    mask = model.response_mask(ids, torch.tensor([1, 1]), 4, 6)
    logp = model.sequence_logp(policy(ids), ids, mask)
    ref = model.sequence_logp(reference(ids), ids, mask).detach()
    length = mask.sum(1)
    pair = dpo.Pair(logp[:1], logp[1:], ref[:1], ref[1:], length[:1], length[1:])
    return dpo.dpo_loss(pair, .3).mean()


def test_it_runs():
    assert compute_loss(new_policy(), new_policy()).isfinite()


def test_the_loss_falls():
    policy = new_policy()
    reference = new_policy()
    optimizer = torch.optim.Adam(policy.parameters(), .01)
    losses = []
    for _ in range(20):
        loss = compute_loss(policy, reference)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < losses[0]
'''
THREE_THEOREMS = '''
from test_dpo_gradient import (
    test_the_gradient_in_log_probabilities_is_the_slope_of_the_loss,
    test_the_reference_receives_no_gradient)
from test_log_probabilities import test_probabilities_of_all_responses_sum_to_one
'''


# ------------------------------------------------------------------------- the score of a student
def test_that_it_runs_and_that_the_loss_falls_find_no_planted_bug(tmp_path):
    """The two usual tests of a pipeline find none of the thirteen bugs."""
    (tmp_path / "usual.py").write_text(USUAL_TESTS)
    assert score.score(tmp_path / "usual.py") == ([], [])


def test_three_theorems_find_what_the_usual_tests_miss(tmp_path):
    """Three theorems find all thirteen bugs, without a false alarm.

    They are: the sum over y of pi(y|x) is 1, the gradient by hand, the frozen reference.
    """
    (tmp_path / "three.py").write_text(THREE_THEOREMS)
    found, false_alarms = score.score(tmp_path / "three.py")
    assert len(found) == len(score.BUGS), f"{len(found)} of {len(score.BUGS)} bugs are found"
    assert not false_alarms, f"theorems that fail on the code as it is: {false_alarms}"


def test_a_false_alarm_is_counted(tmp_path):
    """A test that fails on the code as it is finds nothing and is named."""
    (tmp_path / "wrong.py").write_text("def test_wrong():\n    assert False\n")
    assert score.score(tmp_path / "wrong.py") == ([], ["test_wrong"])


# -------------------------------------------------------------------------------------- starters
@pytest.mark.parametrize("name, theorem", [
    ("dpo.dpo_loss", "dpo_loss_agrees_with_extended_precision"),
    ("ppo.gae", "gae_is_the_discounted_sum_of_errors"),
    ("model.token_logp", "token_logp_is_read_one_position_before_the_token"),
])
def test_a_starter_fails_with_its_hole_alone(name, theorem, tmp_path):
    """On the starter, the theorem of the assignment fails with the hole's NotImplementedError.

    On this repository the same theorem passes, in its own file.
    """
    starter.make(tmp_path / "start", [name])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", theorem, f"--ignore={THIS_FILE}"]
    process = subprocess.run(command, cwd=tmp_path / "start", capture_output=True, text=True)
    assert process.returncode == 1, process.stdout[-2000:]
    assert f"NotImplementedError: {name} is yours to write" in process.stdout, \
        process.stdout[-2000:]


def test_every_hole_keeps_its_docstring():
    """The docstring with the equation stays, the code that computes it is gone."""
    source = (ROOT / "dpo.py").read_text("utf-8")
    blanked = starter.blank(source, "dpo_loss", "dpo")
    assert "Eq. 7 -> (B,)" in source and "-F.logsigmoid(rhat_w - rhat_l)" in source
    assert "Eq. 7 -> (B,)" in blanked and "-F.logsigmoid(rhat_w - rhat_l)" not in blanked
