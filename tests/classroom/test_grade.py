"""Submissions to the grader: each gets what it deserves, is told why, and harms nothing.

All of them are graded once, two at a time. The training of a loss is replaced by its result
(`fake_training`), because it takes a minute; all other parts run as they do for a class.
"""
import ast
import concurrent.futures
import json
import pathlib
from types import SimpleNamespace

import pytest
import torch

import dpo
import grade
import grading
import grading_loss
import points
import remote_loss
import sandbox
import score
import starter
import world
import zoo

ROOT = pathlib.Path(dpo.__file__).resolve().parent
GOOD_LOSS = '''
import torch.nn.functional as F

BETAS = .5, 2


def my_loss(pair, beta):
    return -F.logsigmoid(beta * ((pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)))
'''
GOOD_TESTS = '''
import torch

import dpo
import model
import world


def test_the_gradient_is_that_of_section_4():
    pair = world.random_pairs(5, 1)
    pair = pair._replace(logp_w=pair.logp_w.requires_grad_(), logp_l=pair.logp_l.requires_grad_())
    slopes = torch.autograd.grad(dpo.dpo_loss(pair, .3).sum(), (pair.logp_w, pair.logp_l))
    h = (pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)
    expected = (-.3 * torch.sigmoid(-.3 * h)).detach()
    assert torch.allclose(slopes[0], expected) and torch.allclose(slopes[1], -expected)


def test_the_probabilities_of_all_responses_sum_to_one():
    ids, _ = world.listed()
    lengths = world.prompts()[1].repeat_interleave(world.N)
    mask = model.response_mask(ids, lengths, world.MAX_TOKENS, world.END)
    logp = model.sequence_logp(world.gpt(seed=1)(ids), ids, mask)
    assert torch.allclose(logp.exp().view(world.X, world.N).sum(1), torch.ones(2).double())


def test_the_reference_is_frozen():
    ids, mask, _ = world.three_pairs()
    policy = world.gpt(seed=10)

    def logp(ids, mask):
        return model.response_token_logp(policy, ids, mask).sum(1)

    assert not model.map_batches(logp, ids, mask, batch=4).requires_grad
'''
READS_THE_CALLERS = '''
import sys


def my_loss(pair, beta):
    frame = sys._getframe()
    while frame:
        if "setup" in frame.f_locals:
            return -frame.f_locals["setup"].true_reward(pair)
        frame = frame.f_back
    raise LookupError("there is no setup")
'''
OVERWRITES_FILES = '''
import pathlib

import data
import train

data.true_reward = train.evaluate = None
for path in [*pathlib.Path().glob("*.md"), *pathlib.Path().glob("runs/*/*.pt")]:
    path.write_text("")
pathlib.Path("results.jsonl").write_text("{}")


def my_loss(pair, beta):
    return beta * (pair.logp_l - pair.logp_w)
'''
CONSTANT = "def my_loss(pair, beta):\n    return 1 + 0 * (pair.logp_w - pair.logp_l)\n"
SUBMISSIONS = {    # name -> files
    "perfect": {"my_loss.py": GOOD_LOSS, "my_tests.py": GOOD_TESTS,
                "ppo.py": (ROOT / "ppo.py").read_text("utf-8")},
    "empty": {},
    "reads the true reward": {"my_loss.py": READS_THE_CALLERS},
    "overwrites files": {"my_loss.py": OVERWRITES_FILES},
    "constant": {"my_loss.py": CONSTANT},
    "never ends": {"my_loss.py": "def my_loss(pair, beta):\n    while True:\n        pass\n",
                   "my_tests.py": "def test_nothing():\n    pass\n"},
    "exits": {"my_loss.py": "raise SystemExit(0)\ndef my_loss(pair, beta):\n    return 0\n",
              "my_tests.py": "def test_exit():\n    raise SystemExit(0)\n"},
    "huge output": {"my_tests.py": "while True:\n    print('x' * 100_000)\n"},
    "unfilled": {"ppo.py": starter.blank((ROOT / "ppo.py").read_text("utf-8"), "gae", "ppo")},
    "looks for the bug": {"my_tests.py": "import dpo\n\ndef test_it():\n"
                          "    assert not hasattr(dpo.dpo_loss, '__wrapped__')\n"},
    "damaged": {"my_loss.py": "def my_loss(pair, beta)\n", "diagnosis.json": "[1, 2"},
}
SETTINGS = SimpleNamespace(**{name: x for name, x in vars(points).items() if name.isupper()})
SETTINGS.HOLES = "ppo.gae",
SETTINGS.SECONDS = dict.fromkeys(points.SECONDS, 300)    # however busy this machine is


def optimum():
    """An optimal frontier with F(KL) = .5 + .2 KL up to 4 nats."""
    kl = [.5 * i for i in range(9)]
    curve = {"beta": [.2] * 9, "kl": kl, "reward": [.5 + .2 * x for x in kl], "ess": [1e3] * 9,
             "se": [.01] * 9, "ref_reward": .5}
    return {**curve, "seeds": {"0": curve}}


def policy(beta=.5, kl=2., share=.9, **columns):
    """A row of results of a finished policy."""
    return {"method": "my_loss", "setting": beta, "seed": 0, "final": True, "step": 9, "kl": kl,
            "kl_se": .01, "reward": .5 + .2 * kl * share, "reward_se": .01, "share": share,
            "share_se": 0., "optimal_reward": .5 + .2 * kl, **columns}


def fake_training(job, name, betas):
    """The result of a training that reaches 90% of the optimal gain at KL 1.5 and 2.5."""
    return [policy(beta, kl) for beta, kl in zip(betas, (2.5, 1.5))], [], optimum()


def submit(folder, files):
    """Write the files of a submission -> its job."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    settings = SimpleNamespace(**vars(SETTINGS))
    if folder.name == "never ends":
        settings.SECONDS = {**settings.SECONDS, "contract": 6}
    return grading.Job(folder, sandbox.take_snapshot(), settings, student=folder.name)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Name of a submission -> its results, in Gradescope's format."""
    root = tmp_path_factory.mktemp("submissions")
    saved = []    # what a service would keep if it stopped the grading
    jobs = {name: submit(root / name, files) for name, files in SUBMISSIONS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading_loss, "train", fake_training)
        with concurrent.futures.ThreadPoolExecutor(max_workers=2) as executor:
            results = executor.map(grade.grade, jobs.values(), [saved.append] * len(jobs))
            found = {name: found for name, (found, *_) in zip(jobs, results)}
    parts = sum(len(grade.parts_of(job)) for job in jobs.values())
    assert len(saved) == parts, "the results so far are saved after each part"
    return found


def result_of(results, name):
    """The result of the test of this name."""
    [found] = [test for test in results["tests"] if test["name"] == name]
    return found


# ---------------------------------------------------------------------------------- submissions
def test_a_perfect_submission_gets_all_points(graded):
    """Contract, training, the hole and the file of tests get their maximum."""
    results = graded["perfect"]
    missing = [test for test in results["tests"] if test["score"] != test["max_score"]]
    assert not missing and results["score"] == 25, missing
    assert results["leaderboard"][0]["value"] == 90, results["leaderboard"]


def test_an_empty_submission_gets_nothing_and_is_told_what_is_missing(graded):
    """Score 0, and the names of the files that count."""
    results = graded["empty"]
    assert results["score"] == 0 and not results["tests"]
    assert "nothing to grade" in results["output"]


def test_a_loss_that_looks_for_the_true_reward_finds_nothing(graded):
    """Its process has no setup and no policy, so its own error is its result."""
    contract = result_of(graded["reads the true reward"], "my_loss.py: contract")
    assert contract["score"] == 0 and "there is no setup" in contract["output"]


def test_a_loss_that_overwrites_files_changes_its_own_copy_alone(graded):
    """It is graded as the loss that it is; the documents of the repository are as before."""
    results = graded["overwrites files"]
    assert result_of(results, "my_loss.py: contract")["score"] > 0, results
    assert ".md" not in results["output"], results["output"]


def test_a_constant_with_a_gradient_breaks_the_contract(graded):
    """1 + 0 (log pi(y_w) - log pi(y_l)) has a gradient, and it is 0."""
    contract = result_of(graded["constant"], "my_loss.py: contract")
    assert contract["score"] < contract["max_score"] and "no gradient" in contract["output"]


def test_a_loss_that_never_ends_costs_its_own_part_alone(graded):
    """It is stopped at its time limit, and the next part is graded."""
    results = graded["never ends"]
    assert "did not end within 6 seconds" in result_of(results, "my_loss.py: contract")["output"]
    assert "0 of 13 bugs found" in result_of(results, "my_tests.py")["output"]


def test_an_exit_is_an_error_of_the_submission(graded):
    """sys.exit at the import of a loss, and in a test: neither ends the grader."""
    results = graded["exits"]
    assert "SystemExit" in result_of(results, "my_loss.py: contract")["output"]
    assert "1 false alarms" in result_of(results, "my_tests.py")["output"]
    assert results["score"] == 0


def test_a_huge_output_is_stopped(graded):
    """What is said about it is short."""
    said = result_of(graded["huge output"], "my_tests.py")["output"]
    assert "printed more than" in said and len(said) < 500


def test_a_hole_that_was_left_empty_gets_no_points(graded):
    """Theorems that hold without the function do not count."""
    result = result_of(graded["unfilled"], "starter: ppo.gae")
    assert result["score"] == 0 and "0 of " in result["output"], result


def test_a_test_that_looks_for_the_bug_itself_is_refused(graded):
    """The fence names the line."""
    result = result_of(graded["looks for the bug"], "my_tests.py")
    assert result["score"] == 0 and "line 4 uses hasattr" in result["output"]


def test_damaged_files_are_said_in_one_sentence(graded):
    """A syntax error and half a JSON object."""
    said = [test["output"] for test in graded["damaged"]["tests"]]
    assert graded["damaged"]["score"] == 0
    assert "my_loss.py is not Python: line 1" in said[0] and "not an object" in said[-1], said


def test_results_are_what_gradescope_reads(graded):
    """Every test has name, score, max_score and output, and no score is above its maximum."""
    for name, results in graded.items():
        json.dumps(results)
        for test in results["tests"]:
            assert set(test) == {"name", "score", "max_score", "output"}, name
            assert 0 <= test["score"] <= test["max_score"] and test["output"], (name, test)


# ------------------------------------------------------------------------------ odd submissions
def test_a_part_that_the_grader_cannot_grade_costs_its_own_points_alone(monkeypatch, tmp_path):
    """An exception of the grader itself is said in one sentence, and the other parts are graded."""
    job = submit(tmp_path / "odd", {"my_tests.py": GOOD_TESTS, "diagnosis.json": "{}"})

    def fail(job):
        raise ValueError("a bug of the grader")

    monkeypatch.setattr(grading, "grade_tests", fail)
    results, *_ = grade.grade(job, lambda results: None)
    said = [test["output"] for test in results["tests"]]
    assert "the grader failed on this part (ValueError)" in said[0] and "drew another" in said[1]


def test_odd_numbers_and_names_are_refused():
    """A beta of 401 digits; the name of a test that cannot be encoded."""
    with pytest.raises(grading.Refusal, match="BETAS"):
        grading_loss.find_betas(ast.parse(f"BETAS = (1{'0' * 400},)"), (1., 2.))
    assert grading.find_theorem({"tests/theorems/test_a.py": b"def test_b("}, "\ud83d") is None


def test_lines_are_counted_as_python_counts_them():
    """A form feed ends no line: the function of the student is taken whole."""
    source = (ROOT / "ppo.py").read_text("utf-8")
    submitted = source.replace("def gae(", "# a form feed \x0c in a comment\ndef gae(")
    assert grading.fill_hole(source, submitted, "ppo.gae") == source


def test_a_test_that_looks_for_a_replaced_function_is_a_false_alarm(tmp_path):
    """It fails where a function is replaced by one that does the same."""
    path = tmp_path / "my_tests.py"
    path.write_text("import dpo\n\ndef test_it():\n"
                    "    assert not hasattr(dpo.dpo_loss, '__wrapped__')\n")
    assert score.find_false_alarms(path) == ["test_it"]


def test_files_of_the_teacher_are_no_part_of_the_repository(tmp_path):
    """A my_loss.py at the top of the repository, or a text with solutions, is not handed out."""
    for name in ("dpo.py", "my_loss.py", "my_tests.py", "solutions.txt", "requirements.txt"):
        (tmp_path / name).write_text("")
    assert set(sandbox.take_snapshot(tmp_path)) == {"dpo.py", "requirements.txt"}


def test_a_user_who_cannot_run_python_is_refused_before_the_grading():
    """The sentence says why; without a user there is nothing to say."""
    assert "cannot" in sandbox.problem_of_user("no-such-user") and not sandbox.problem_of_user(None)


# ----------------------------------------------------------------------------- points of a loss
@pytest.mark.parametrize("row, expected", [
    (policy(share=.9), 1.),
    (policy(share=(SETTINGS.SHARE_OF_NO_POINTS + SETTINGS.SHARE_OF_ALL_POINTS) / 2), .5),
    (policy(share=.1), 0.),
    (policy(share=-2.), 0.),
    (policy(share=.9, kl=.01), 0.),                   # pi_ref itself
    (policy(kl=300.) | {"share": None}, 0.),           # beyond the curve
])
def test_points_grow_with_the_share_of_the_optimal_gain(row, expected):
    """Linear between two shares; none for a policy that hardly moved or left the curve."""
    share, said = grading_loss.points_of_policy(SETTINGS, row)
    assert abs(share - expected) < 1e-9, said


def test_a_policy_above_the_optimum_gets_no_points():
    """By Eq. 4 no policy can be there, so a human must look."""
    job = grading.Job(ROOT, {}, SETTINGS)
    share, said = grading_loss.grade_policy(job, [policy(share=1.5)], [], optimum(), .5)
    assert share == 0 and "above the optimum" in said


def test_a_baseline_that_changed_during_the_training_costs_its_points(tmp_path, monkeypatch):
    """The files of the stages are compared with those before."""
    (tmp_path / "train-policy.pt").write_bytes(b"a policy")
    job = submit(tmp_path / "vandal", {"my_loss.py": GOOD_LOSS})._replace(baseline=tmp_path)

    def overwrite(command, folder, *arguments):
        (folder / grading_loss.RESULTS / "train-policy.pt").write_bytes(b"another")
        return sandbox.Finished("", "", 0.)

    monkeypatch.setattr(sandbox, "run", overwrite)
    results, rows, _ = grading_loss.grade_training(job, "my_loss", (.5, 2.))
    assert not rows and all(x["score"] == 0 and "changed" in x["output"] for x in results)
    assert (tmp_path / "train-policy.pt").read_bytes() == b"a policy", "the original was changed"


def test_a_loss_in_another_process_has_the_same_values_and_slopes(tmp_path):
    """RemoteLoss gives the numbers of the loss itself, in float64, up to rounding."""
    copy = sandbox.write_copy(sandbox.take_snapshot(), tmp_path)
    remote = remote_loss.RemoteLoss(copy / "tests" / "zoo.py", "kto", copy)
    found = []
    for loss in (remote, zoo.kto):
        pair = world.random_pairs(5, seed=2)
        pair.logp_w.requires_grad_()
        pair.logp_l.requires_grad_()
        value = loss(pair, .3)
        slopes = torch.autograd.grad(value.mean(), (pair.logp_w, pair.logp_l))
        found.append(torch.stack([value.detach(), *slopes]))
    remote.process.kill()
    world.agree(found[0], found[1], "a remote loss must have the loss's own numbers",
                tolerance=1e-15)
