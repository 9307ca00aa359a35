"""What a run needs before it begins: pi_ref's reviews, completions, labels, scores and the optimum.

The tokens are sentences (fake_setup.py), so that the true reward of each text is known.
"""
import itertools
import math
from unittest import mock

import pytest
import torch

import data
import dpo
import harness
import ppo
import train
import world
from fake_setup import FakePolicy, Tokenizer, fake_setup, numbers, reviews, true_reward
from plots import frontier
from test_log_probabilities import long_gpt
from test_loops_of_rounds import table_of
from test_loops_of_training import as_lists, logp_of
from world import END, MAX_TOKENS, RESPONSES, V, agree

K = 4    # completions a prompt


def setup_of(train_reviews=9, **fields):
    """A setup with so many train reviews, all for prompts, and 5 for validation and for test."""
    corpus = {"train": reviews(train_reviews, seed=1), "validation": reviews(5, seed=2),
              "test": reviews(5, seed=3)}
    return fake_setup(long_gpt(seed=1), corpus, completions=K, max_tokens=MAX_TOKENS,
                      prompts=train_reviews, **fields)


def completions_of(setup, split="train", count=9):
    """The completions of some prompts by pi_ref, and their (prompt, response), lists of tokens."""
    completions = train.reference_completions(setup, split, count)
    return completions, as_lists(completions["ids"], completions["mask"])


# ------------------------------------------------------------------------------------------- pi_ref
def sft_inputs(setup):
    """What `train.train_reference` gives to SFT, and the parameters that it returns.

    The corpus of the setup has reviews of films and, as `restaurant`, of restaurants.
    -> context of the model, ids, lengths, batches, learning rate; state dict
    """
    corpora = {"film": setup.corpus, "restaurant": {"train": setup.corpus["restaurant"]}}
    calls = []

    def sft(model, *arguments):
        calls.append((model.config.context, *arguments))
        model.token.weight.data.fill_(7.)

    with (mock.patch.object(train, "make_corpus", lambda setup, domain: corpora[domain]),
          mock.patch.object(train, "learn_tokenizer", lambda setup: None),
          mock.patch.object(data, "make_encoding", lambda ranks: Tokenizer()),
          mock.patch.object(train, "sft", sft)):
        state = train.train_reference(setup)
    return calls[0], state


def test_pi_ref_is_trained_on_every_review_once_an_epoch_in_an_order_of_its_own():
    """SFT gets each train review with its END, cut to the context, and shuffled in each epoch.

    The reviews are those of films and of restaurants. Batches are consecutive parts of the epochs.
    The stage returns the trained parameters.
    """
    corpus = {"train": reviews(5, seed=1), "restaurant": reviews(2, seed=4)}
    setup = fake_setup(corpus=corpus, vocab_size=V, width=4, heads=1, layers=1, max_tokens=2,
                       sft_epochs=3, sft_batch=4, sft_lr=.25)
    (context, ids, lengths, batches, lr), state = sft_inputs(setup)
    texts = corpus["train"] + corpus["restaurant"]
    rows = [setup.encoding.encode(text) + [END] for text in texts]
    assert context == 10 and max(map(len, rows)) == 11, "this test needs a review that is cut"
    given = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())]
    assert given == [row[:10] for row in rows], \
        "SFT must get the tokens of each review, then END, cut to the context"
    order = [row for batch in batches for row in batch]
    epochs = [order[i:i + 7] for i in (0, 7, 14)]
    assert list(map(sorted, epochs)) == [list(range(7))] * 3, "an epoch must hold each review once"
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0], "each epoch must have its own order"
    assert (list(map(len, batches)), lr) == ([4, 4, 4, 4, 4, 1], .25), \
        "batches must have --sft-batch reviews, and steps the rate --sft-lr"
    assert (state["token.weight"] == 7.).all(), "pi_ref must be the model after SFT"


# -------------------------------------------------------------------------------------- completions
def test_completions_are_responses_of_pi_ref_to_the_first_prompts_in_order():
    """K responses to each prompt, with log pi_ref and the true reward: loops over the tokens.

    Prompt n is the start of review n. The parts of the stage are put together in order.
    """
    for count in (9, 3, 1):
        setup = setup_of(12)
        completions, texts = completions_of(setup, "train", count)
        assert len(texts) == count * K, f"{count} prompts have {len(texts)} completions"
        for row, (prompt, response) in enumerate(texts):
            tokens = setup.encoding.encode(setup.corpus["train"][row // K])
            assert 2 <= len(prompt) <= 8 and prompt == tokens[:len(prompt)], \
                f"row {row} must begin with a prompt from review {row // K}"
            assert prompt == texts[row // K * K][0], "a prompt's completions must have one prompt"
            assert END not in response[:-1] and (response[-1] == END or len(response) == 3), \
                f"a response must end with END or be {MAX_TOKENS} tokens long, not {response}"
        ref = [logp_of(setup.ref, x + y, len(x)).item() for x, y in texts]
        agree(completions["ref_logp"], numbers(ref), "ref_logp must be log pi_ref of each")
        reward = [true_reward(x + y) for x, y in texts]
        agree(completions["reward"], numbers(reward),
              "`reward` must be the true reward of each completion", 1e-6)


# ------------------------------------------------------------------------------------------- labels
def labelled_pairs(**fields):
    """Label 9 prompts -> true rewards of the completions, [(winner, loser)], preferences."""
    pairs = train.training_preferences(setup_of(9, **fields))
    reward = [true_reward(x + y) for x, y in as_lists(pairs.ids, pairs.mask)]
    return reward, list(zip(pairs.winner.tolist(), pairs.loser.tolist())), pairs


def test_the_labels_of_a_prompt_compare_its_completions_by_the_true_reward():
    """Deterministic: of every pair of completions of a prompt, the one with more reward wins.

    Ties are dropped. The preferences hold the completions themselves.
    """
    reward, labels, pairs = labelled_pairs(labels="deterministic")
    expected = [(w, l) for w, l in itertools.permutations(range(9 * K), 2)
                if w // K == l // K and reward[w] > reward[l] + 1e-6]
    assert 0 < len(expected) < 9 * K * (K - 1) / 2, "this test needs pairs and ties"
    assert sorted(labels) == sorted(expected), "the pairs must be those of unequal true rewards"
    completions, _ = completions_of(setup_of(9))
    for name in ("ids", "mask", "ref_logp"):
        assert torch.equal(getattr(pairs, name), completions[name]), f"other {name} than completed"
    assert pairs.k == K, f"K must be {K}, not {pairs.k}"


def test_labels_are_drawn_at_the_temperature_of_the_configuration():
    """Bradley-Terry labels: at a low tau the higher reward always wins, at a high tau it does not.

    No pair is dropped.
    """
    for tau, always in ((1e-5, True), (1e5, False)):
        reward, labels, _ = labelled_pairs(labels="bt", tau=tau)
        right = all(reward[w] > reward[l] - 1e-6 for w, l in labels)
        assert len(labels) == 9 * K * (K - 1) / 2, "Bradley-Terry labels have no ties"
        assert right == always, f"at tau {tau} the higher reward must win always: {always}"


def test_completions_that_all_tie_are_no_preferences():
    """If no pair is left, the error says so, for train and for held-out prompts."""
    completions = {"ids": None, "mask": None, "ref_logp": None, "reward": torch.ones(2 * K)}
    with mock.patch.object(train, "reference_completions", lambda *arguments: completions):
        for split in ("train", "validation"):
            with pytest.raises(harness.UserError, match="no pair to learn from"):
                train.reference_preferences(setup_of(2), split, 2)


# ------------------------------------------------------------------------ rewards and values of PPO
def stage_of(setup, value):
    """A fake stage of this setup, whose value is `value`."""
    def stage(given, *arguments):
        assert given is setup, "a stage must get the setup of its caller"
        return value

    return stage


def reward_model_inputs(setup):
    """The arguments of `ppo.train_reward_model` in the stage of the reward model.

    -> pi_ref, pairs, held-out pairs, epochs, learning rate, device
    """
    with mock.patch.object(ppo, "train_reward_model") as train_reward_model:
        train.fit_reward_model(setup)
    return train_reward_model.call_args.args


def test_the_reward_model_learns_all_pairs_and_is_tested_on_held_out_ones():
    """Each epoch holds every prompt with pairs once, in an order of its own.

    Held-out pairs are those of an eighth as many validation prompts, rounded up, as there are train
    prompts; of all, if there are fewer.
    """
    setup = setup_of(17, rm_epochs=3, batch_prompts=4, rm_lr=.125)
    ref, pairs, held_out, epochs, lr, _ = reward_model_inputs(setup)
    assert ref is setup.ref and len(pairs.ids) == 17 * K and len(held_out.ids) == 3 * K, \
        f"17 prompts need 3 held-out prompts, not {len(held_out.ids) / K}"
    for row, (prompt, _) in enumerate(as_lists(held_out.ids, held_out.mask)):
        review = setup.encoding.encode(setup.corpus["validation"][row // K])
        assert prompt == review[:len(prompt)], "held-out prompts must be those of validation"
    with_pairs = sorted(set((pairs.winner // K).tolist()))
    orders = [torch.cat(epoch).tolist() for epoch in epochs]
    assert list(map(sorted, orders)) == [with_pairs] * 3, "an epoch must hold each prompt once"
    assert orders[0] != orders[1] != orders[2] != orders[0], "each epoch must have its own order"
    assert max(map(len, epochs[0])) == 4, "batches must have --batch-prompts prompts"
    assert lr == .125, f"the learning rate must be --rm-lr .125, not {lr}"
    _, _, held_out, *_ = reward_model_inputs(setup_of(42))
    assert len(held_out.ids) == 5 * K, "of 42 prompts an eighth is more than all 5 held-out ones"


def test_preferences_of_a_user_replace_those_of_pi_ref():
    """--pairs: the reward model learns the user's pairs, and is tested on held-out ones."""
    user_pairs = train.training_preferences(setup_of(9))
    _, pairs, held_out, *_ = reward_model_inputs(setup_of(9, preferences=user_pairs))
    assert pairs is user_pairs, "the reward model must learn the pairs of the user"
    assert len(held_out.ids) == 2 * K, "held-out pairs must be those of pi_ref"


def test_the_true_reward_of_ppo_is_normalised_on_responses_of_pi_ref():
    """PPO-GT: the true reward less its mean, over its standard deviation, on the completions."""
    setup = setup_of(9)
    completions, texts = completions_of(setup)
    reward = [true_reward(x + y) for x, y in texts]
    mean = sum(reward) / len(reward)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in reward) / (len(reward) - 1))
    score = train.make_true_score(setup)(completions["ids"][:7], completions["mask"][:7])
    agree(score, numbers([(r - mean) / deviation for r in reward[:7]]),
          "the score of PPO-GT must be the true reward with mean 0 and deviation 1 on all "
          "completions: is it normalised on each batch instead?", 1e-5)


def test_the_learned_reward_of_ppo_is_normalised_by_its_mean_and_deviation():
    """PPO: the output of the reward model, less its mean, over its standard deviation."""
    setup = setup_of(3)
    model = ppo.ScalarModel(long_gpt(seed=5))
    torch.nn.init.normal_(model.head.weight, generator=world.generator(6))
    fitted = {"state_dict": model.state_dict(), "mean": .3, "std": 2.5}
    completions, texts = completions_of(setup, "train", 3)
    with mock.patch.object(train, "fit_reward_model", stage_of(setup, fitted)):
        score = train.make_learned_score(setup)(completions["ids"], completions["mask"])
    output = [model(torch.tensor([x + y]))[0, -1].item() for x, y in texts]
    agree(score, numbers([(r - .3) / 2.5 for r in output]),
          "the score of PPO must be the learned reward with mean 0 and deviation 1")


def test_the_values_of_ppo_are_fitted_to_its_scores_of_all_completions():
    """A step has as many completions as a step of DPO with four completions to a prompt."""
    setup = setup_of(9, batch_prompts=5, rm_lr=.125)
    with mock.patch.object(ppo, "pretrain_critic") as pretrain_critic:
        train.initial_critic(setup, "ppo", stage_of(setup, "score"))
    ref, ids, mask, score, batch, lr, _ = pretrain_critic.call_args.args
    completions, _ = completions_of(setup)
    assert torch.equal(ids, completions["ids"]) and torch.equal(mask, completions["mask"])
    assert ref is setup.ref and score == "score", "values must be those of the score of this PPO"
    assert (batch, lr) == (20, .125), f"a step of {batch} completions at learning rate {lr}"


def test_ppo_gets_the_train_prompts_its_score_and_its_target():
    """PPO is announced with its number of steps. Every run has random numbers of its own."""
    setup, seeds = setup_of(9, ppo_steps=6), set()
    train_reviews = [setup.encoding.encode(text) for text in setup.corpus["train"]]
    score = stage_of(setup, "score")
    for target in (1., 2.):
        run = train.Run("ppo", target)
        with (mock.patch.object(ppo, "train_ppo") as train_ppo,
              mock.patch.object(train, "initial_critic") as initial_critic):
            steps, progress = train.train_with_ppo(setup, "policy", run, score)
        cfg, policy, ref, prompts, *inputs, generator, values = train_ppo.call_args.args
        given, method, score_of_values = initial_critic.call_args.args
        assert steps == 6 and progress is train_ppo.return_value, "--ppo-steps steps of PPO"
        assert (cfg, policy, ref) == (setup.cfg, "policy", setup.ref)
        assert inputs == ["score", target, END], f"score, target and END must not be {inputs}"
        assert values is initial_critic.return_value, "PPO must start from its initial values"
        assert (given, method, score_of_values) == (setup, "ppo", score)
        for review, ids, n in zip(train_reviews, *prompts, strict=True):
            assert ids[:n].tolist() == review[:n], "the prompts must be those of train reviews"
        seeds.add(generator.initial_seed())
    assert len(seeds) == 2, "runs must have random numbers of their own"


# -------------------------------------------------------------------------------------- the optimum
def listed_rewards(setup):
    """log pi_ref (X, N) and r (X, N) of all responses to the prompts of evaluation."""
    prompts = [ids[:n].tolist() for ids, n in zip(*train.evaluation_prompts(setup))]
    reward = [[true_reward([*x, *y]) for y in RESPONSES] for x in prompts]
    return table_of(setup.ref, prompts), numbers(reward)


def assert_optimum_is_enumerated(setup, optimum):
    """Compare F with the reward of the enumerated pi* (Eq. 4) at the same KL, at several betas.

    The tolerance is 4 standard errors.
    """
    logp, reward = listed_rewards(setup)
    for beta in (2., .3, .1, .03):
        star = dpo.optimal_policy(logp, reward, beta)
        height, _, error = dpo.optimal_reward(world.kl(star, logp).mean().item(), optimum)
        deviation = (height - world.expectation(star, reward).mean().item()) / error
        assert abs(deviation) < 4, \
            f"at beta {beta}, F is {deviation:.1f} standard errors from the reward of pi*"


def sampled_optimum(setup, policies):
    """The rewards and log weights of the samples for the optimum, (X, N) each, in float64."""
    proposals = frontier.choose_proposals(setup, policies)
    samples = [frontier.sample_proposals(setup, part, proposals)
               for part in harness.part_indices(setup.cfg.eval_prompts)]
    return (torch.cat(x).double() for x in zip(*samples))


def test_the_optimum_of_the_evaluation_is_that_of_all_responses():
    """F of pi_ref's sampled responses is the reward of the enumerated pi* (Eq. 4) at the same KL.

    The curve reaches from pi_ref to the best responses. The samples of prompt i have the
    enumerated mean reward of prompt i. All weights are 1.
    """
    setup = setup_of(2, eval_prompts=4, optimum_samples=3000)
    optimum = frontier.estimate_optimum(setup, ())
    assert_optimum_is_enumerated(setup, optimum)
    logp, reward = listed_rewards(setup)
    mean = world.expectation(logp, reward)
    error = (world.expectation(logp, reward ** 2) - mean ** 2).sqrt() / 3000 ** .5
    samples, log_weight = sampled_optimum(setup, [])
    assert samples.shape == (4, 3000), "there must be --optimum-samples responses to each prompt"
    agree(log_weight, torch.zeros(4, 3000), "samples of pi_ref alone have the weight 1")
    deviation = (samples.mean(1) - mean) / error
    assert (deviation.abs() < 4).all(), \
        f"mean rewards of pi_ref are {deviation.tolist()} standard errors from those of the prompts"
    agree(optimum["ref_reward"], samples.mean(), "`ref_reward` is pi_ref's mean", 1e-6)
    best = samples.max(1).values.mean().item()
    assert min(optimum["kl"]) < 1e-3 and max(optimum["reward"]) > best - 1e-3, \
        "the curve must reach from pi_ref to the best responses"


def test_the_optimum_is_the_same_with_trained_policies_among_the_samplers():
    """With two proposals, F is still the reward of pi*: the samples are weighted for pi_ref.

    The proposals are the finished policies of their runs, the last checkpoints; an earlier one
    holds no parameters, so loading it would fail. The weighted mean
    reward of prompt i is pi_ref's enumerated one. No weight is above the number of policies.
    """
    setup = setup_of(2, eval_prompts=4, optimum_samples=1000)
    policies = [FakePolicy("ppo_gt", 1., state=long_gpt(seed=10).state_dict()),
                FakePolicy("dpo", .7, state=long_gpt(seed=11).state_dict())]
    optimum = frontier.estimate_optimum(setup, frontier.choose_proposals(setup, policies))
    reward, log_weight = sampled_optimum(setup, policies)
    assert_optimum_is_enumerated(setup, optimum)
    assert reward.shape == (4, 3000), "each policy must give --optimum-samples responses"
    assert log_weight.max() <= math.log(3) + 1e-6, "pi_ref must be one of the three samplers"
    assert log_weight.std() > .3, "this test needs proposals that differ from pi_ref"
    logp, listed = listed_rewards(setup)
    mean = world.expectation(logp, listed)
    weighted = log_weight.exp() * reward
    error = weighted.std(1) / 3000 ** .5
    deviation = (weighted.mean(1) - mean) / error
    assert (deviation.abs() < 4).all(), \
        f"weighted mean rewards are {deviation.tolist()} standard errors from pi_ref's: does a " \
        "policy sample with the weights of another, or are prompts mixed up?"
    error = (error ** 2).sum().sqrt() / 4
    assert abs(optimum["ref_reward"] - mean.mean()) < 4 * error, "`ref_reward` is pi_ref's mean"
