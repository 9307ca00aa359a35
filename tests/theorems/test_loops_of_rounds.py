"""The loop of losses on pairs in several rounds: each round's pairs come from the policy itself.

As in test_loops_of_training.py, an exact trace compares the parameters with those of a slow copy of
the recipe, and a fixed point is enumerated. The tokens are sentences (fake_setup.py).
"""
import copy
import math
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn.utils import parameters_to_vector

import data
import dpo
import harness
import model
import train
import world
from fake_setup import SEED, Tokenizer, fake_setup, numbers, reviews, true_reward
from test_log_probabilities import long_gpt
from test_loops_of_training import (K, agree_in_parameters, agree_in_statistics, as_lists, descend,
                                    equation_7, logp_of)
from world import END, MAX_TOKENS, N, RESPONSES, agree

ROUND_RUN = train.Run("dpo", .7)


def table_of(policy, prompts):
    """log pi(y|x) of every listed response to these prompts, lists of tokens: (X, N)."""
    ids, end = data.pad([[*x, *y] for x in prompts for y in RESPONSES], END)
    start = torch.tensor([len(x) for x in prompts]).repeat_interleave(N)
    columns = torch.arange(ids.shape[1])
    mask = (columns >= start[:, None]) & (columns < end[:, None])
    return model.sequence_logp(policy(ids), ids, mask).detach().view(len(prompts), N)


def setup_of_rounds(prompts, rounds, **fields):
    """A setup of this many train prompts and rounds, with 3 completions of each prompt."""
    return fake_setup(long_gpt(seed=4), {"train": reviews(prompts, seed=2)}, prompts=prompts,
                      rounds=rounds, completions=K, max_tokens=MAX_TOKENS, **fields)


def prompts_as_lists(setup):
    """All train prompts of a setup, as lists of tokens."""
    ids, lengths = train.prompts_of_split(setup, "train", setup.cfg.prompts)
    return [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())]


def parts_of(items, count):
    """`count` consecutive parts of a list; the first ones have one item more if need be."""
    smaller, larger_parts = divmod(len(items), count)
    parts, start = [], 0
    for number in range(count):
        end = start + smaller + (1 if number < larger_parts else 0)
        parts.append(items[start:end])
        start = end
    return parts


def labelled_by_the_true_reward(ids, mask, ref):
    """Sampled completions as preferences: log pi_ref by a loop over tokens, labels by a loop."""
    texts = as_lists(ids, mask)
    ref_logp = torch.stack([logp_of(ref, x + y, len(x)).detach() for x, y in texts])
    reward = [true_reward(x + y) for x, y in texts]
    pairs = [(w, l) for w in range(len(texts)) for l in range(len(texts))
             if w // K == l // K and reward[w] > reward[l] + 1e-6]
    winner, loser = torch.tensor(pairs).T
    return data.Preferences(ids, mask, ref_logp, winner, loser, K)


def losses_of_rounds(setup, policy, statistics):
    """Yield the loss of each step of ROUND_RUN. Each round samples from the policy as it is then.

    Appends what the steps report to `statistics`.
    """
    cfg = setup.cfg
    for number, part in enumerate(parts_of(prompts_as_lists(setup), cfg.rounds)):
        generator = data.named_generator("round", *ROUND_RUN, SEED, number)
        ids, mask = model.generate(policy, data.pad(part, END, 8), K, MAX_TOKENS, END, generator)
        pairs = labelled_by_the_true_reward(ids, mask, setup.ref)
        for epoch in range(cfg.epochs):
            generator = data.named_generator("order", *ROUND_RUN, SEED, number, epoch)
            for batch in data.shuffled_batches(pairs, cfg.batch_prompts, generator):
                yield partial(equation_7, policy, pairs, pairs.ref_logp, ROUND_RUN.setting,
                              batch.tolist(), statistics)


def test_every_step_of_every_round_is_that_of_the_recipe():
    """On-policy DPO: a round's pairs are completions of the policy as it is when the round begins.

    The reference of the loss stays pi_ref, the labels are those of the true reward, the optimizer
    and its schedule go on from round to round. 3 rounds of 2 epochs share 7 prompts: 3, 2 and 2.
    """
    setup = setup_of_rounds(7, rounds=3, epochs=2, batch_prompts=3, lr=.01)
    policy = long_gpt(seed=6)
    expected = copy.deepcopy(policy)
    steps, progress = train.train_on_pairs(setup, policy, ROUND_RUN, dpo.dpo_loss)
    reported = list(progress)
    statistics = []
    rates = [.01 * rate for rate in (1., 50 / 54, 40 / 54, 30 / 54, 20 / 54, 10 / 54)]
    descend(expected, losses_of_rounds(setup, expected, statistics), rates,
            betas=(.9, setup.cfg.adam_beta2))
    assert steps == 6, f"3 rounds of 2 epochs of one batch are 6 steps, not {steps}"
    agree_in_statistics(reported, statistics)
    agree_in_parameters(
        policy, expected,
        "the parameters after 3 rounds must be those of the recipe: does pi_ref sample, is the "
        "sampling policy the reference, does a round begin with a new optimizer, or do rounds "
        "share their prompts or random numbers?")


def generated_for(setup, policy):
    """Train with --rounds: what is sampled, and from which policy.

    -> for each round its prompts, as lists, the seed of its generator, and a copy of the policy;
    and the policy's parameters at the beginning and after each step.
    """
    rounds, generate = [], train.generate

    def recorded(given, prompts, count, max_tokens, end, generator):
        assert given is policy, "the completions must be the policy's"
        assert (count, max_tokens, end) == (K, MAX_TOKENS, END)
        texts = [row[:n] for row, n in zip(prompts[0].tolist(), prompts[1].tolist())]
        rounds.append((texts, generator.initial_seed(), parameters_to_vector(policy.parameters())))
        return generate(given, prompts, count, max_tokens, end, generator)

    history = [parameters_to_vector(policy.parameters()).detach()]
    with mock.patch.object(train, "generate", recorded):
        _, progress = train.train_on_pairs(setup, policy, ROUND_RUN, dpo.dpo_loss)
        for _ in progress:
            history.append(parameters_to_vector(policy.parameters()).detach())
    return rounds, history


def test_rounds_use_each_prompt_once_in_order_and_the_policy_as_it_is_then():
    """Round i of R samples K completions for the i-th of R parts of the prompts, in their order.

    It samples from the policy after the last step of the round before, with a generator of its own.
    Bradley-Terry labels have no ties, so every prompt is used.
    """
    for prompts, rounds, steps_of_rounds in ((6, 2, (2, 2)), (7, 3, (2, 1, 1)), (4, 4, (1,) * 4)):
        setup = setup_of_rounds(prompts, rounds, batch_prompts=2, labels="bt")
        calls, history = generated_for(setup, long_gpt(seed=5))
        sampled = [texts for texts, _, _ in calls]
        assert sampled == parts_of(prompts_as_lists(setup), rounds), \
            f"{rounds} rounds must share the {prompts} prompts in their order, not use {sampled}"
        assert len({seed for _, seed, _ in calls}) == rounds, \
            "rounds must have random numbers of their own"
        done = 0
        for (_, _, policy), steps in zip(calls, steps_of_rounds, strict=True):
            assert torch.equal(policy, history[done]), \
                f"after {done} steps a round samples from the policy of another step"
            done += steps
        assert len(history) == 1 + done, f"{done} steps were expected, {len(history) - 1} made"


def test_the_pairs_of_a_round_are_the_policys_and_the_reference_is_pi_refs():
    """`sample_round`: completions that the policy gives, log pi_ref of them, and true labels.

    The policy is far from pi_ref: it mostly repeats one token, which pi_ref hardly ever does.
    """
    setup = setup_of_rounds(12, rounds=2)
    policy = long_gpt(seed=5)
    with torch.no_grad():
        policy.norm.bias += 14 * policy.token.weight[1] / policy.token.weight[1].norm()
        policy.norm.weight.zero_()
    pairs = train.sample_round(setup, policy, ROUND_RUN, 1)
    of_pi_ref = train.reference_completions(setup, "train", 12)
    share, share_of_ref = ((x[mask] == 1).float().mean().item() for x, mask in
                           ((pairs.ids, pairs.mask), (of_pi_ref["ids"], of_pi_ref["mask"])))
    assert len(pairs.ids) == 6 * K and share > .7 and share_of_ref < .2, \
        f"a share of {share:.2f} of the tokens of a round is the one that the policy repeats; of " \
        f"pi_ref's tokens {share_of_ref:.2f}: does pi_ref sample?"
    expected = labelled_by_the_true_reward(pairs.ids, pairs.mask, setup.ref)
    agree(pairs.ref_logp, expected.ref_logp, "ref_logp must be log pi_ref, not the policy's")
    labels = [set(zip(x.winner.tolist(), x.loser.tolist())) for x in (pairs, expected)]
    assert labels[0] == labels[1], "the completion with the higher true reward must win"


def test_one_round_trains_on_the_pairs_of_pi_ref():
    """With --rounds 1 nothing is sampled from the policy: the pairs are those of pi_ref.

    Training on the same pairs from a user's file gives exactly the same policy.
    """
    setup = setup_of_rounds(9, rounds=1, batch_prompts=4)
    pairs = train.training_preferences(setup)
    from_file = fake_setup(setup.ref, preferences=pairs, batch_prompts=4)
    trained = []
    for each_setup in (setup, from_file):
        policy = long_gpt(seed=5)
        with mock.patch.object(train, "sample_round", side_effect=AssertionError("no round")):
            _, progress = train.train_on_pairs(each_setup, policy, ROUND_RUN, dpo.dpo_loss)
            list(progress)
        trained.append(parameters_to_vector(policy.parameters()))
    assert not torch.equal(trained[0], parameters_to_vector(long_gpt(seed=5).parameters()))
    assert torch.equal(*trained), "one round must train on pi_ref's labelled pairs"
    ref = [logp_of(setup.ref, x + y, len(x)).item() for x, y in as_lists(pairs.ids, pairs.mask)]
    agree(pairs.ref_logp, numbers(ref), "ref_logp must be log pi_ref of each completion")


def steps_of_rounds(prompts, rounds, epochs, batch):
    """The steps that are announced, the steps that are made, and the sum over the rounds.

    Bradley-Terry labels have no ties, so every prompt has pairs and every step is taken.
    """
    setup = setup_of_rounds(prompts, rounds, epochs=epochs, batch_prompts=batch, labels="bt")
    planned, progress = train.train_on_pairs(setup, long_gpt(seed=5), ROUND_RUN, dpo.dpo_loss)
    expected = sum(epochs * math.ceil(len(part) / batch)
                   for part in parts_of(list(range(prompts)), rounds))
    return planned, len(list(progress)), expected


def test_the_announced_steps_are_the_sum_over_the_rounds():
    """A round has ceil(its prompts / batch) steps in each epoch, and as many are announced."""
    for sizes in ((8, 1, 1, 3), (8, 2, 1, 4), (8, 2, 3, 3), (7, 2, 1, 2), (9, 4, 2, 5),
                  (5, 5, 1, 2), (9, 2, 1, 4), (5, 2, 2, 2)):
        planned, made, expected = steps_of_rounds(*sizes)
        assert planned == made == expected, \
            f"{sizes} prompts, rounds, epochs and prompts a step are {expected} steps; {planned} " \
            f"were announced and {made} made"


def test_a_round_of_ties_has_no_step_and_a_run_of_ties_says_so():
    """Rounds whose completions all have the same reward are passed over."""
    def no_opinion(encoding, ids, mask):
        return torch.full((len(ids),), .5)

    setup = setup_of_rounds(4, 2)
    with mock.patch.object(data, "true_reward", no_opinion):
        planned, progress = train.train_on_pairs(setup, long_gpt(seed=5), ROUND_RUN, dpo.dpo_loss)
        assert list(progress) == [], "a round without pairs has no step"
        with pytest.raises(harness.UserError, match="no pair to learn from"):
            result = {"step": 0, "rows": [], "checkpoints": []}
            train.run_steps(setup, long_gpt(seed=5), ROUND_RUN, planned, iter([]), result)


def test_rounds_on_bradley_terry_labels_arrive_at_equation_4():
    """On-policy DPO ends where off-policy DPO does: at pi_ref exp(r / (tau beta)) / Z, enumerated.

    Eq. 7 compares responses, whoever sampled them, so its minimiser does not depend on the sampling
    policy. 50 rounds have 24 prompts each, which are three texts of two sentences. If the sampling
    policy were the reference, it would go far beyond.
    """
    beta, tau, prompts = 1.5, .1, [[3, 3], [1, 3], [3, 2]]
    ref = long_gpt(seed=2)
    corpus = {"train": [Tokenizer().decode(prompt) for prompt in prompts] * 400}
    setup = fake_setup(ref, corpus, prompts=1200, rounds=50, batch_prompts=12, completions=8,
                       max_tokens=MAX_TOKENS, labels="bt", tau=tau, lr=.02)
    policy = copy.deepcopy(ref)
    steps, progress = train.train_on_pairs(setup, policy, train.Run("dpo", beta), dpo.dpo_loss)
    assert len(list(progress)) == steps == 100
    logp, ref_logp = (table_of(gpt, prompts) for gpt in (policy, ref))
    r = numbers([[true_reward([*x, *y]) for y in RESPONSES] for x in prompts])
    star = dpo.optimal_policy(ref_logp, r, tau * beta)
    distance = world.total_variation(logp, star)
    from_ref = world.total_variation(ref_logp, star)
    assert (from_ref > .25).all(), "this test needs an optimum far from pi_ref"
    assert (distance < from_ref / 3).all(), \
        f"on-policy DPO ended at total variation {distance.tolist()} from Eq. 4; pi_ref is at " \
        f"{from_ref.tolist()}: is the reference the sampling policy, or are labels wrong?"
    best, reached, at_ref = (dpo.objective(x, ref_logp, r, tau * beta).mean()
                             for x in (star, logp, ref_logp))
    share = ((reached - at_ref) / (best - at_ref)).item()
    assert share > .85, f"on-policy DPO gained {share:.0%} of what Eq. 3 can gain"
