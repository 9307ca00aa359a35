"""Evaluations of a policy: what they measure, when a run makes them, and what its rows contain.

The evaluation's expectations are those of enumeration: all responses to each prompt are listed.
"""
import contextlib
import io
import math
from unittest import mock

import torch

import data
import dpo
import harness
import plots
import train
import world
from fake_setup import SEED, fake_setup, numbers, reviews, true_reward
from plots import tables
from test_log_probabilities import long_gpt
from test_loops_of_training import logp_of
from world import END, MAX_TOKENS, N, RESPONSES, agree


def mean_and_error(by_prompt):
    """The mean of the means of several lists, and its standard error."""
    means = [sum(values) / len(values) for values in by_prompt]
    mean = sum(means) / len(means)
    variance = sum((x - mean) ** 2 for x in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))


def token_kls(policy, ref, prompt, response):
    """The sum of KL(pi || pi_ref) of the next token before each token of a response, nats."""
    ids = torch.tensor([[*prompt, *response]])
    logp, ref_logp = policy(ids)[0].log_softmax(-1), ref(ids)[0].log_softmax(-1)
    total = 0.
    for t in range(len(prompt), len(prompt) + len(response)):
        total += world.kl(logp[t - 1], ref_logp[t - 1]).item()
    return total


def evaluation_setup(**fields):
    """A setup whose reviews give four different prompts of evaluation."""
    corpus = {"train": reviews(5, seed=1), "validation": reviews(5, seed=2),
              "test": reviews(5, seed=3)}
    return fake_setup(long_gpt(seed=1), corpus, eval_prompts=4, max_tokens=MAX_TOKENS, **fields)


def prompts_of(setup):
    """The prompts of evaluation as lists of tokens."""
    ids, lengths = train.evaluation_prompts(setup)
    return [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())]


# -------------------------------------------------------------------------------- what is evaluated
def test_evaluation_prompts_are_prefixes_of_the_first_reviews_of_their_split():
    """The prompts come from the held-out split of the configuration, one from each review."""
    for split in ("test", "validation"):
        setup = evaluation_setup(split=split)
        prompts = prompts_of(setup)
        assert len(prompts) == 4, f"{len(prompts)} prompts, not --eval-prompts 4"
        for prompt, text in zip(prompts, setup.corpus[split]):
            tokens = setup.encoding.encode(text)
            assert 2 <= len(prompt) <= 8 and prompt == tokens[:len(prompt)], \
                f"a prompt must be the start of its {split} review {tokens}, not {prompt}"


def test_an_evaluation_is_a_mean_over_responses_with_the_error_of_the_prompts_means():
    """Reward, KL and length of known responses: loops over prompts, responses and tokens.

    The standard errors are those of the means of the prompts.
    """
    setup, policy, samples = evaluation_setup(), long_gpt(seed=2), 5
    prompts = prompts_of(setup)
    choice = torch.randint(0, N, (4, samples), generator=world.generator(1)).tolist()
    responses = [[list(RESPONSES[i]) for i in row] for row in choice]
    calls = []

    def generate(*arguments):
        calls.append(arguments)
        rows = [x + y for x, ys in zip(prompts, responses) for y in ys]
        ids, end = data.pad(rows, END)
        columns = torch.arange(ids.shape[1])
        start = torch.tensor([len(x) for x in prompts]).repeat_interleave(samples)
        return ids, (columns >= start[:, None]) & (columns < end[:, None])

    with mock.patch.object(train.frontier, "generate", generate):
        result = train.evaluate(setup, policy, samples, "name", 7)
    reward = [[true_reward(x + y) for y in ys] for x, ys in zip(prompts, responses)]
    kl = [[token_kls(policy, setup.ref, x, y) for y in ys] for x, ys in zip(prompts, responses)]
    length = [[len(y) for y in ys] for ys in responses]
    expected = [*mean_and_error(reward), *mean_and_error(kl), mean_and_error(length)[0]]
    columns = ["reward", "reward_se", "kl", "kl_se", "length"]
    agree(numbers([result[name] for name in columns]), numbers(expected),
          "reward, its error, KL, its error and length must be means over prompts: is the error "
          "over responses, or does a response get another prompt's rows?", 1e-6)
    model, (ids, _), *sizes, generator = calls[0]
    assert model is policy and len(ids) == 4 and sizes == [samples, MAX_TOKENS, END], \
        "the responses must be those of the policy to the prompts of evaluation"
    seed = data.named_generator("evaluation", "name", 7, SEED).initial_seed()
    assert generator.initial_seed() == seed, \
        "the random numbers of an evaluation must depend on its names and the seed"


def test_evaluations_agree_with_enumeration():
    """The expected reward, KL and length are those of all responses to each prompt.

    500 responses to each prompt are sampled. The tolerance is 4 standard errors, which are
    enumerated too.
    """
    setup, policy, samples = evaluation_setup(), long_gpt(seed=2), 500
    means, variances = [], []
    for prompt in prompts_of(setup):
        probability = [logp_of(policy, [*prompt, *y], len(prompt)).exp() for y in RESPONSES]
        values = [[true_reward([*prompt, *y]), token_kls(policy, setup.ref, prompt, y), len(y)]
                  for y in RESPONSES]
        p, values = torch.stack(probability).detach(), numbers(values)    # (N,), (N, 3)
        means.append(p @ values)
        variances.append(p @ values ** 2 - means[-1] ** 2)
    error = (torch.stack(variances).sum(0) / samples).sqrt() / len(means)
    result = train.evaluate(setup, policy, samples, "enumeration")
    result = numbers([result[name] for name in ("reward", "kl", "length")])
    deviation = (result - torch.stack(means).mean(0)) / error
    assert (deviation.abs() < 4).all(), \
        f"reward, KL and length are {deviation.tolist()} standard errors from their enumerated " \
        "values"
    row = train.reference_row(setup)
    agree(row["kl"], 0., "the KL of pi_ref to itself must be 0")
    names = ("method", "setting", "seed", "step", "final", "seconds")
    assert [row[name] for name in names] == ["sft", 0., SEED, 0, True, 0.], \
        "pi_ref is the policy at step 0, before any second of training"


# ----------------------------------------------------------------------- when a policy is evaluated
class Clock:
    """A clock that stands still unless a fake moves it."""
    now = 0.

    def perf_counter(self):
        """The time, seconds."""
        return self.now


def run_policy(steps, evaluations, last_kl=1., planned=None):
    """Run `train.train_policy` on a fake: `steps` holds the statistics of each step, or an error.

    `planned` steps are announced, by default as many as there are. A step takes a second and sets
    the weight of the policy to its number. An evaluation takes 100 seconds; the KL of the last is
    `last_kl`. Returns the result of the run, and of each evaluation the samples, the names and the
    weight of the policy.
    """
    clock, evaluated = Clock(), []
    setup = fake_setup(torch.nn.Linear(1, 1).requires_grad_(False), evaluations=evaluations,
                       eval_samples=10)

    def progress(policy):
        for step, statistics in enumerate(steps, 1):
            if isinstance(statistics, Exception):
                raise statistics
            clock.now += 1
            policy.weight.data.fill_(step)
            yield statistics

    def train_fake(*arguments):
        assert (arguments[0], *arguments[2:]) == (setup, run, "trained on")
        assert arguments[1].weight.requires_grad, "the policy must be trainable"
        return planned or len(steps), progress(arguments[1])

    def evaluate(setup, policy, samples, *names):
        clock.now += 100
        evaluated.append((samples, names, policy.weight.item()))
        kl = last_kl if names[-1] == len(steps) else 1.
        return {"reward": .5, "reward_se": .1, "kl": kl, "kl_se": .2}

    run, ref_weight = train.Run("dpo", .5), setup.ref.weight.item()
    with (mock.patch.object(train, "evaluate", evaluate),
          mock.patch.object(train, "time", clock),
          contextlib.redirect_stdout(io.StringIO())):
        result = train.train_policy(setup, run, train_fake, "trained on")
    assert setup.ref.weight.item() == ref_weight, "training must not change pi_ref"
    assert setup.stages.watched == result["rows"], "each row must be shown once, as it is made"
    return result, evaluated


def test_a_run_is_evaluated_at_equal_intervals_and_at_its_end():
    """At the multiples of ceil(steps / evaluations), and at the last step.

    The finished policy gets `eval_samples` responses to each prompt, an earlier one a quarter of
    them, rounded up. The random numbers depend on the run and the step.
    """
    for count, evaluations in ((10, 4), (7, 8), (8, 4), (5, 1), (9, 2)):
        result, evaluated = run_policy([{"loss": 1.}] * count, evaluations)
        interval = math.ceil(count / evaluations)
        steps = [step for step in range(1, count + 1) if step % interval == 0 or step == count]
        expected = [(10 if step == count else 3, ("dpo", .5, step), step) for step in steps]
        assert evaluated == expected, \
            f"of {count} steps with {evaluations} evaluations, (samples, names, policy of step) " \
            f"must be {expected}, not {evaluated}"
        for row, step in zip(result["rows"], steps, strict=True):
            wanted = {"method": "dpo", "setting": .5, "seed": SEED, "step": step,
                      "final": step == count, "reward": .5, "reward_se": .1, "kl": 1., "kl_se": .2}
            assert wanted.items() <= row.items(), f"the row of step {step} is {row}"
        assert result["step"] == count and result["failure"] is None, f"the run ended as {result}"


def test_a_row_holds_the_means_of_the_steps_since_the_last_row_and_the_seconds_of_training():
    """Statistics are means over the steps since the previous evaluation, with their errors.

    The seconds are those of all steps so far, without the evaluations.
    """
    losses = [5., 1., 3., 4., 4., 7., 0., 2.]
    result, _ = run_policy([{"loss": loss, "weight": -loss} for loss in losses], evaluations=3)
    parts = [losses[:3], losses[3:6], losses[6:]]
    for row, part in zip(result["rows"], parts, strict=True):
        mean, error = mean_and_error([[loss] for loss in part])
        row_numbers = [row[name] for name in ("loss", "loss_se", "weight", "weight_se")]
        agree(numbers(row_numbers), numbers([mean, error, -mean, error]),
              f"the row of step {row['step']} must hold means over the steps {part}")
        assert row["seconds"] == row["step"], \
            f"{row['step']} steps of one second took {row['seconds']} seconds: are evaluations " \
            "counted?"


def test_checkpoints_are_the_policies_that_were_evaluated():
    """A run keeps a copy of the policy of each row; the last one is the finished policy."""
    for count, evaluations in ((5, 3), (8, 4), (4, 1)):
        result, evaluated = run_policy([{"loss": 1.}] * count, evaluations)
        weights = [state["weight"].item() for state in result["checkpoints"]]
        assert weights == [row["step"] for row in result["rows"]], \
            f"there must be the policy of each row, in order, not those of the steps {weights}"
        assert weights == [weight for _, _, weight in evaluated], \
            "a checkpoint must be the policy that was evaluated"
        assert weights[-1] == count, "the last checkpoint must be the finished policy"


def test_a_run_that_ends_early_is_evaluated_where_it_ends():
    """If fewer steps are made than planned, the policy after the last of them is the finished one.

    Ties can make a round of DPO shorter. Until then, the evaluations are at the multiples of
    ceil(planned steps / evaluations); the finished policy has a row and checkpoint of its own, also
    if it has just been evaluated on the way.
    """
    for planned, made, evaluations in ((10, 7, 4), (10, 8, 5), (9, 2, 2), (20, 1, 4), (10, 6, 5)):
        result, evaluated = run_policy([{"loss": 2.}] * made, evaluations, planned=planned)
        interval = math.ceil(planned / evaluations)
        on_the_way = [step for step in range(1, made + 1) if step % interval == 0]
        expected = [(3, step) for step in on_the_way] + [(10, made)]
        assert [(samples, weight) for samples, _, weight in evaluated] == expected, \
            f"of {planned} planned steps {made} were made: (samples, policy of step) must be " \
            f"{expected}"
        rows = [(row["step"], row["final"], row["loss"]) for row in result["rows"]]
        assert rows == [(step, False, 2.) for step in on_the_way] + [(made, True, 2.)], \
            f"only the last row is of the finished policy, and each has its statistics: {rows}"
        weights = [state["weight"].item() for state in result["checkpoints"]]
        assert weights == [*on_the_way, made], f"the checkpoints are of steps {weights}"
        assert result["step"] == made and result["failure"] is None, "it is no failure"


def test_a_number_that_is_not_finite_or_a_failing_loss_ends_a_run_by_name():
    """A run ends at the step with the NaN; its rows and checkpoints so far are kept.

    The failure names the step and the statistic, or holds the message of the loss.
    """
    good = {"loss": 1., "margin": 2.}
    nan = {"loss": 1., "margin": math.nan}
    bad_loss = harness.LossError("line 7: tired")
    cases = [([good] * 4 + [nan] + [good] * 3, 1., 5, "margin not finite", [2, 4]),
             ([good] * 4 + [bad_loss] + [good] * 3, 1., 4, "line 7: tired", [2, 4]),
             ([bad_loss] + [good] * 7, 1., 0, "line 7: tired", []),
             ([good] * 8, math.inf, 8, "kl not finite", [2, 4, 6])]
    for steps, last_kl, step, reason, rows in cases:
        result, _ = run_policy(steps, evaluations=4, last_kl=last_kl)
        expected = {"method": "dpo", "setting": .5, "seed": SEED, "step": step, "reason": reason}
        assert result["failure"] == expected, \
            f"the failure must be {expected}, not {result['failure']}"
        steps_of_rows = [row["step"] for row in result["rows"]]
        steps_of_checkpoints = [state["weight"].item() for state in result["checkpoints"]]
        assert steps_of_rows == steps_of_checkpoints == rows, \
            f"the rows and checkpoints of steps {rows} must be kept"
        assert not any(row["final"] for row in result["rows"]), \
            "a failed run has no finished policy"


# ----------------------------------------------------------------------- statistics and the optimum
def test_the_error_of_a_mean_is_that_of_the_prompts_means():
    """`mean_and_se`: samples of one prompt are not independent, so each prompt counts once."""
    x = world.normal(5, 7, seed=1) + world.normal(5, 1, seed=2)
    agree(numbers(plots.mean_and_se(x)), numbers(mean_and_error(x.tolist())),
          "the mean must have the standard error of the prompts' means: is it that of all samples?")


OPTIMUM = {"beta": [4., 1., .4, .1], "kl": [0., .5, 1.5, 3.], "reward": [.2, .9, 1.5, 1.8],
           "ess": [900., 300., 50., 49.], "se": [.01, .02, .03, .05], "ref_reward": .15}
HIGHER = {**OPTIMUM, "kl": [0., .5, 1.5, 2.], "reward": [.5, 1.2, 1.8, 2.1], "ref_reward": .45}
OPTIMA = {**HIGHER, "seeds": {str(SEED): OPTIMUM, str(SEED + 1): HIGHER}}


def height(kl):
    """F at this KL: the lowest tangent."""
    return min(OPTIMUM["reward"][i] + OPTIMUM["beta"][i] * (kl - OPTIMUM["kl"][i])
               for i in range(4))


def test_the_share_of_the_optimal_gain_and_its_error():
    """The share is (E_pi[r] - E_ref[r]) / (F(KL) - E_ref[r]).

    Its error is that of reward and KL, each times the slope of the share: central differences.
    """
    reward, reward_se, kl, kl_se = .8, .03, .9, .07
    ref_reward = OPTIMUM["ref_reward"]

    def share(reward, kl):
        return (reward - ref_reward) / (height(kl) - ref_reward)

    by_reward = (share(reward + 1e-5, kl) - share(reward - 1e-5, kl)) / 2e-5
    by_kl = (share(reward, kl + 1e-5) - share(reward, kl - 1e-5)) / 2e-5
    error = math.sqrt((by_reward * reward_se) ** 2 + (by_kl * kl_se) ** 2)
    agree(numbers(dpo.share_of_optimal_gain(reward, reward_se, kl, kl_se, OPTIMUM)),
          numbers([height(kl), share(reward, kl), error]),
          "the share is the policy's gain over the optimal gain at its KL, and its error combines "
          "those of reward and KL", 1e-8)


def row_at(kl, reward, seed=SEED):
    """A row of results at this KL and reward, with the errors of both and with its share."""
    row = {"seed": seed, "kl": kl, "kl_se": .03, "reward": reward, "reward_se": .02}
    tables.add_shares([row], OPTIMA)
    return row


def test_rows_above_the_optimum_by_more_than_four_standard_errors_are_found():
    """By Eq. 4 no policy is above the optimum.

    The standard error combines those of the reward, of the KL times the slope, and of the curve.
    Beyond the KL at which the curve has 50 effective samples, nothing is known.
    """
    for kl, slope, se in ((.6, 1., .02), (1.4, .4, .03), (1.5, .4, .03)):
        noise = math.sqrt(.02 ** 2 + (slope * .03) ** 2 + se ** 2)
        above, below = (row_at(kl, height(kl) + n * noise) for n in (4.01, 3.99))
        assert tables.above_optimum([above, below], OPTIMA) == [above], \
            f"at KL {kl}, exactly the row that is 4.01 standard errors above F must be found"
    exact = {"seeds": {str(SEED): {**OPTIMUM, "se": [0.] * 4}}}
    star = {**row_at(1.5, 1.5), "kl_se": 0., "reward_se": 0.}
    assert tables.above_optimum([star], exact) == [], "pi* is on the optimum, not above it"
    unknown = [row_at(kl, 5.) for kl in (0., 1.51, 3.01)]
    assert tables.above_optimum(unknown, OPTIMA) == [], \
        "nothing can be said of SFT, and of rows beyond the reliable part of the curve"


def test_a_row_has_a_share_where_the_optimal_gain_is_known_and_not_zero():
    """`add_shares` leaves out SFT, whose KL is 0, and rows beyond the end of the curve."""
    for kl, has_share in ((0., False), (1e-7, False), (1e-6, True), (3., True), (3.01, False)):
        row = row_at(kl, .5)
        optimal, share, error = dpo.share_of_optimal_gain(.5, .02, kl, .03, OPTIMUM)
        expected = [optimal, share, error] if has_share else [None] * 3
        assert [row["optimal_reward"], row["share"], row["share_se"]] == expected, \
            f"at KL {kl} the row must have the share {expected[1]}, not {row['share']}"


def test_each_row_is_compared_with_the_optimum_of_its_own_seed():
    """Seeds have other prompts and another pi_ref: F and the share are those of the row's seed.

    Here F of the second seed is .3 higher, and its curve ends at KL 2. A row that is above the
    optimum of the first seed may be below that of the second.
    """
    rows = [row_at(1., height(1.) + .25, seed) for seed in (SEED, SEED + 1)]
    for row, curve in zip(rows, (OPTIMUM, HIGHER)):
        optimal, share, error = dpo.share_of_optimal_gain(row["reward"], .02, 1., .03, curve)
        agree(numbers([row["optimal_reward"], row["share"], row["share_se"]]),
              numbers([optimal, share, error]),
              f"the row of seed {row['seed']} must be compared with the optimum of its seed")
    assert tables.above_optimum(rows, OPTIMA) == rows[:1], "only the first is above its optimum"
    assert row_at(2.5, .5)["share"] is not None, "the curve of the first seed reaches KL 3"
    assert row_at(2.5, .5, SEED + 1)["share"] is None, "the curve of the second seed ends at KL 2"
