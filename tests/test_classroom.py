"""Assignments: starters are generated, tests of students are scored, planted bugs can be run."""
import pathlib
import subprocess
import sys

import pytest

import score
import starter

ROOT = pathlib.Path(score.__file__).parent.parent
USUAL = '''
import torch, dpo, model
def policy():
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(7, 6, 1, 1, 8))
def step(gpt, ref):
    ids = torch.tensor([[1, 2, 3, 6, 6], [1, 4, 5, 2, 6]])
    mask = model.response_mask(ids, torch.tensor([1, 1]), 4, 6)
    logp = [model.sequence_logp(m(ids), ids, mask) for m in (gpt, ref)]
    length = mask.sum(1)
    return dpo.dpo_loss(dpo.Pair(logp[0][:1], logp[0][1:], logp[1][:1].detach(), logp[1][1:].detach(), length[:1], length[1:]), .3).mean()
def test_it_runs():
    assert step(policy(), policy()).isfinite()
def test_the_loss_falls():
    gpt, ref = policy(), policy()
    optimizer, losses = torch.optim.Adam(gpt.parameters(), .01), []
    for _ in range(20):
        losses.append(step(gpt, ref)); optimizer.zero_grad(); losses[-1].backward(); optimizer.step()
    assert losses[-1] < losses[0]
'''


def test_that_it_runs_and_that_the_loss_falls_find_no_planted_bug(tmp_path):
    (tmp_path / "usual.py").write_text(USUAL)
    assert score.score(tmp_path / "usual.py") == ([], [])


def test_three_theorems_find_what_the_usual_tests_miss(tmp_path):
    """Sum over y of pi(y|x) = 1, the gradient by hand, the frozen reference: most of the thirteen, and no false alarm."""
    (tmp_path / "three.py").write_text(
        "from test_model import test_probabilities_of_all_responses_sum_to_one\n"
        "from test_section4 import test_the_gradient_in_log_probabilities_is_the_slope_of_the_loss, test_the_reference_receives_no_gradient\n")
    found, alarms = score.score(tmp_path / "three.py")
    assert len(found) == len(score.BUGS) and not alarms, f"{len(found)} of {len(score.BUGS)} found, false alarms {alarms}"


def test_a_false_alarm_is_counted(tmp_path):
    (tmp_path / "wrong.py").write_text("def test_wrong():\n    assert False\n")
    assert score.score(tmp_path / "wrong.py") == ([], ["test_wrong"])


@pytest.mark.parametrize("name, theorem", [("dpo.dpo_loss", "dpo_loss_agrees_with_extended_precision"),
                                           ("ppo.gae", "gae_is_the_discounted_sum_of_errors"),
                                           ("model.token_logp", "token_logp_is_read_one_position_before_the_token")])
def test_a_starter_fails_with_its_hole_alone(name, theorem, tmp_path):
    """On the starter, the assignment's theorem fails with that NotImplementedError (on the repository it passes, in its own file)."""
    starter.make(tmp_path / "start", [name])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-k", theorem, "--ignore=tests/test_classroom.py"],
                          cwd=tmp_path / "start", capture_output=True, text=True)
    assert done.returncode == 1 and f"NotImplementedError: {name} is yours to write" in done.stdout, done.stdout[-2000:]


def test_every_hole_keeps_its_docstring():
    source = (ROOT / "dpo.py").read_text()
    blanked = starter.blank(source, "dpo_loss", "dpo")
    assert "Eq. 7 -> (B,)" in blanked and "-F.logsigmoid(rhat_w - rhat_l)" not in blanked
