"""The loops of SFT and of losses on pairs: each step is the recipe's, and each ends where it must.

An exact trace compares the parameters after some steps with those of a slow copy of the recipe. A
fixed point is what the loop arrives at, whatever its steps are. With several rounds, the pairs of a
round come from the policy as it is then; the tokens are sentences there (fake_setup.py).
"""
import contextlib
import copy
import io
import math
import re
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
from world import END, MAX_TOKENS, N, RESPONSES, V, X, agree

TEXTS = [[0, 3, 1, 1, END], [2, 2, END], [1, 0, 2, 3, 0, END], [3, END], [0, 1, END]]


# --------------------------------------------------------------------------------------- the recipe
def descend(policy, losses, rates, betas, max_norm=math.inf):
    """AdamW (Kingma and Ba, Algorithm 1) without weight decay, one step for each loss and rate.

    The global norm of the gradient is clipped at `max_norm`. `losses` are functions without
    arguments. Returns the losses and the norms before clipping, as numbers.
    """
    parameters = list(policy.parameters())
    m = [torch.zeros_like(p) for p in parameters]
    v = [torch.zeros_like(p) for p in parameters]
    values, norms = [], []
    for t, (loss, rate) in enumerate(zip(losses, rates, strict=True), 1):
        value = loss()
        gradients = torch.autograd.grad(value, parameters)
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients))
        scale = min(1., max_norm / (norm + 1e-6))    # PyTorch adds 1e-6
        for i, p in enumerate(parameters):
            g = scale * gradients[i]
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g ** 2
            mean = m[i] / (1 - betas[0] ** t)
            variance = v[i] / (1 - betas[1] ** t)
            p.data -= rate * mean / (variance.sqrt() + 1e-8)
        values.append(value.item())
        norms.append(norm)
    return values, norms


def agree_in_parameters(policy, expected, claim):
    """Assert that two models have the same parameters, up to rounding."""
    agree(parameters_to_vector(policy.parameters()), parameters_to_vector(expected.parameters()),
          claim, 1e-9)


def logp_of(policy, tokens, start):
    """log p of tokens[start:], each given all tokens before it, nats: a loop over the tokens."""
    logp = policy(torch.tensor([tokens]))[0].log_softmax(-1)
    return sum(logp[t - 1, tokens[t]] for t in range(start, len(tokens)))


# ---------------------------------------------------------------------------------------------- SFT
def nats_a_token(policy, texts):
    """Negative log-likelihood of ragged texts over the number of predicted tokens."""
    total = sum(logp_of(policy, text, 1) for text in texts)
    return -total / sum(len(text) - 1 for text in texts)


def run_sft(policy, texts, batches, lr, filler=2):
    """Run `train.sft` on texts that are padded with `filler`; returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.sft(policy, *data.pad(texts, filler), batches, lr)
    return printed.getvalue()


def test_sft_is_adamw_on_the_mean_nats_a_token_with_clipped_gradients():
    """Every step of SFT is that of the recipe: a loop over the tokens of each text.

    The loss is the mean over the tokens of the batch. AdamW has betas .9 and .98 and no weight
    decay. The norm of the gradient is at most 1. The learning rate rises over the first tenth of
    the 15 steps, then falls; it never exceeds its peak.
    """
    batches = [[0, 1], [2, 3, 4], [0, 1, 2, 3, 4]] * 5
    rates = [.01 * n / 27 for n in (18, 27, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2)]
    policy = world.gpt(seed=1, spread=1.)
    expected = copy.deepcopy(policy)
    losses = [partial(nats_a_token, expected, [TEXTS[i] for i in rows]) for rows in batches]
    values, norms = descend(expected, losses, rates, betas=(.9, .98), max_norm=1.)
    assert min(norms) < .9 and max(norms) > 1.1, \
        f"this test needs steps with clipping and without; the norms are {norms}"
    printed = run_sft(policy, TEXTS, batches, lr=.01)
    agree_in_parameters(
        policy, expected,
        "the parameters after 15 steps of SFT must be those of the recipe: does the mask reach "
        "past the end, is the loss no mean over the tokens of the batch, is there weight decay, "
        "or are the learning rates or the clipping others?")
    lines = re.findall(r"step (\d+)/(\d+): ([\d.]+)", printed)
    assert lines and lines[-1][:2] == ("15", "15"), f"SFT must print its last step: {printed!r}"
    for step, _, loss in lines:
        assert abs(float(loss) - values[int(step) - 1]) < 6e-4, \
            f"step {step} had a loss of {values[int(step) - 1]:.4f} nats a token, not {loss}"


def conditional_frequencies(texts):
    """{prefix: the shares of the tokens that follow it in the texts, (V,)}"""
    counts = {}
    for text in texts:
        for t in range(1, len(text)):
            count = counts.setdefault(tuple(text[:t]), torch.zeros(V, dtype=torch.float64))
            count[text[t]] += 1
    return {prefix: count / count.sum() for prefix, count in counts.items()}


def test_sft_ends_at_the_conditional_frequencies_of_the_corpus():
    """After SFT, p(token | prefix) is the share of this token after this prefix in the corpus.

    This holds at every prefix of the corpus and for END too.
    """
    corpus = [[0, 1, END]] * 3 + [[0, 1, 2, 2, 0, END]] * 2 + [[0, 3, 1, END]] * 2
    corpus += [[0, END], [2, 0, END], [2, 0, 1, END]]
    policy = world.gpt(seed=2, spread=1.)
    all_rows = list(range(len(corpus)))
    run_sft(policy, corpus, [all_rows] * 200, lr=2e-2)
    frequencies = conditional_frequencies(corpus)
    learned = [policy(torch.tensor([prefix]))[0, -1].softmax(-1) for prefix in frequencies]
    agree(torch.stack(learned), torch.stack(list(frequencies.values())),
          "SFT must end at the frequencies of the corpus: do the tokens of short texts count more, "
          "is END never learned, or is filler learned?", 1e-2)


def test_what_follows_the_end_of_a_text_has_no_influence_on_sft():
    """SFT gives exactly the same parameters, whatever ids stand after END."""
    trained = []
    for filler in (0, 3, END):
        policy = world.gpt(seed=3)
        run_sft(policy, TEXTS, [[0, 1, 2], [3, 4]] * 3, lr=.02, filler=filler)
        trained.append(parameters_to_vector(policy.parameters()))
    for vector in trained[1:]:
        assert torch.equal(vector, trained[0]), \
            "other filler gives other parameters: does the mask reach past the end of a text?"


# --------------------------------------------------------------------- each step of a loss on pairs
def as_lists(ids, mask):
    """The (prompt, response) of each row, as lists of tokens."""
    texts = []
    for row, is_response in zip(ids.tolist(), mask.tolist()):
        start = is_response.index(True)
        end = start + sum(is_response)
        texts.append((row[:start], row[start:end]))
    return texts


K = 3
COMPLETIONS = [[0, 1, END], [END], [2, END], [3, 3, 1], [1, END], [2, 0, END], [0, 2, END],
               [2, 1, 3], [3, END], [END], [0, 3, 2], [2, 2, END], [3, 2, END], [1, 0, 1], [0, END]]
PAIRS = [(0, 1), (2, 0), (2, 1), (4, 3), (5, 4), (6, 7), (8, 7), (12, 13), (14, 12), (14, 14)]


def listed_preferences(ref):
    """COMPLETIONS and PAIRS as preferences: five prompts, those of world.py in turn.

    The prompt of rows 9 to 11 has no pair, and the last pair is a tie.
    """
    ids = torch.full((len(COMPLETIONS), world.T), 1)
    mask = torch.zeros(len(COMPLETIONS), world.T, dtype=torch.bool)
    logp = []
    for row, response in enumerate(COMPLETIONS):
        prompt = world.PROMPTS[row // K % X]
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt):end] = True
        logp.append(logp_of(ref, prompt + response, len(prompt)).detach())
    winner, loser = torch.tensor(PAIRS).T
    return data.Preferences(ids, mask, torch.stack(logp), winner, loser, K)


def equation_7(policy, pairs, ref_logp, beta, prompts, statistics):
    """Eq. 7, averaged over the pairs of some prompts: a loop over completions and over pairs.

    Appends what a step reports to the list `statistics`.
    """
    logp = {}
    tokens = 0
    for row, (prompt, response) in enumerate(as_lists(pairs.ids, pairs.mask)):
        if row // pairs.k in prompts:
            logp[row] = logp_of(policy, prompt + response, len(prompt))
            tokens += len(response)
    listed_pairs = zip(pairs.winner.tolist(), pairs.loser.tolist())
    pairs = [(w, l) for w, l in listed_pairs if w in logp]
    margins = [(logp[w] - ref_logp[w]) - (logp[l] - ref_logp[l]) for w, l in pairs]
    losses = [(1 + (-beta * margin).exp()).log() for margin in margins]
    columns = {"loss": [loss.item() for loss in losses],
               "logp_w": [logp[w].item() for w, _ in pairs],
               "logp_l": [logp[l].item() for _, l in pairs],
               "margin": [margin.item() for margin in margins],
               "accuracy": [1. if margin > 0 else 0. for margin in margins],
               "weight": [1 / (1 + (beta * margin).exp().item()) for margin in margins],
               "trained_tokens": [tokens]}
    statistics.append({name: sum(x) / len(x) for name, x in columns.items()})
    return sum(losses) / len(pairs)


def agree_in_statistics(reported, expected):
    """Assert that each step has reported its statistics."""
    assert len(reported) == len(expected), f"{len(reported)} steps were made, not {len(expected)}"
    for step in range(len(expected)):
        assert reported[step].keys() == expected[step].keys()
        for name, wanted in expected[step].items():
            agree(reported[step][name], wanted,
                  f"{name} of step {step} must be its mean over the pairs before the step", 1e-6)


def test_every_step_on_pairs_is_adamw_on_the_mean_loss_of_its_pairs():
    """Two epochs of DPO are those of the recipe: a loop over prompts, completions and pairs.

    AdamW has betas .9 and .999 and no weight decay, and nothing is clipped. The learning rate is
    at its peak in the first of 4 steps, then falls. A step reports means over its pairs, before it
    changes the policy; a tie is not ranked right. The tokens are those of all completions.
    """
    beta, lr, ref = .7, .02, world.gpt(seed=4)
    policy = world.gpt(seed=5)
    expected = copy.deepcopy(policy)
    pairs = listed_preferences(ref)
    setup = fake_setup(ref, preferences=pairs, epochs=2, batch_prompts=3, lr=lr)
    steps, progress = train.train_on_pairs(setup, policy, train.Run("dpo", beta), dpo.dpo_loss)
    reported = list(progress)

    batches = []
    for epoch in range(2):
        generator = data.named_generator("order", "dpo", beta, SEED, 0, epoch)
        batches += data.shuffled_batches(pairs, 3, generator)
    statistics = []
    losses = [partial(equation_7, expected, pairs, pairs.ref_logp, beta, batch.tolist(), statistics)
              for batch in batches]
    descend(expected, losses, [lr, lr * 15 / 18, lr * 10 / 18, lr * 5 / 18], betas=(.9, .999))
    assert steps == 4, f"2 epochs over 4 prompts with pairs are 4 steps of 3 prompts, not {steps}"
    agree_in_statistics(reported, statistics)
    agree_in_parameters(
        policy, expected,
        "the parameters after two epochs must be those of the recipe: is the loss not the mean "
        "over pairs, is there weight decay, or is the order of an epoch not its own?")


def lengths_of_pairs(prompt):
    """The lengths of the winners and then of the losers of a prompt, which differ by prompt."""
    pairs = [(w, l) for w, l in PAIRS if w // K == prompt]
    winners = [len(COMPLETIONS[w]) for w, _ in pairs]
    losers = [len(COMPLETIONS[l]) for _, l in pairs]
    return winners, losers


def test_every_epoch_on_pairs_has_an_order_of_its_own():
    """An epoch shows each prompt once to the loss, in an order of its own.

    So do another beta and another method.
    A prompt is recognised by the lengths of its winners and losers, which the loss receives.
    """
    ref = world.gpt(seed=4)
    setup = fake_setup(ref, preferences=listed_preferences(ref), epochs=2, batch_prompts=1)
    lengths = []

    def recording_loss(pair, beta):
        lengths.append((pair.len_w.tolist(), pair.len_l.tolist()))
        return dpo.dpo_loss(pair, beta)

    for run in (train.Run("dpo", .5), train.Run("dpo", 1.), train.Run("ipo", 1.)):
        _, progress = train.train_on_pairs(setup, world.gpt(seed=5), run, recording_loss)
        list(progress)
    prompts = [0, 1, 2, 4]
    orders = [lengths[i:i + 4] for i in range(0, 24, 4)]
    for order in orders:
        assert sorted(order) == sorted(map(lengths_of_pairs, prompts)), \
            f"an epoch must hold the pairs of prompts {prompts} once, not of lengths {order}"
    for i in range(6):
        assert orders[i] not in orders[:i], "epochs and runs must have orders of their own"


# ------------------------------------------------------------------ the fixed point of Eq. 7's loop
def bradley_terry_preferences(ref, rows, strength):
    """Preferences among listed responses to each prompt, exactly as often as Eq. 1 says.

    rows (X, K) are responses of world.py, strength (X, K) = exp(r / tau) whole numbers. Of n + m
    comparisons of responses of strength n and m, the first wins n.
    """
    ids, mask = world.listed()
    flat_rows = (rows + N * torch.arange(X)[:, None]).flatten()
    k = rows.shape[1]
    winner, loser = [], []
    for x in range(X):
        i, j = torch.ones(k, k).fill_diagonal_(0).nonzero().T
        wins = strength[x, i]
        winner.append(k * x + i.repeat_interleave(wins))
        loser.append(k * x + j.repeat_interleave(wins))
    ref_logp = world.table(ref).detach().flatten()[flat_rows]
    return data.Preferences(ids[flat_rows], mask[flat_rows], ref_logp, torch.cat(winner),
                            torch.cat(loser), k)


def distance_to_equation_4(rows, seed, beta=.5, tau=.4):
    """Train pi_ref by DPO on Bradley-Terry preferences among `rows` (X, K) of the responses.

    Returns the total variation (X,), among these responses, between the trained policy and
    pi_ref exp(r / (tau beta)) / Z, and that of pi_ref.
    """
    ref = world.gpt(seed=1)
    strength = torch.randint(1, 4, rows.shape, generator=world.generator(seed))
    r = tau * strength.double().log()
    setup = fake_setup(ref, preferences=bradley_terry_preferences(ref, rows, strength),
                       epochs=200, batch_prompts=X, lr=.02)
    policy = copy.deepcopy(ref)
    _, progress = train.train_on_pairs(setup, policy, train.Run("dpo", beta), dpo.dpo_loss)
    list(progress)
    logp = world.table(policy).detach().gather(1, rows).log_softmax(1)
    ref_logp = world.table(ref).detach().gather(1, rows).log_softmax(1)
    star = (ref_logp + r / (tau * beta)).log_softmax(1)
    return world.total_variation(logp, star), world.total_variation(ref_logp, star)


def test_training_on_bradley_terry_pairs_arrives_at_equation_4():
    """Trained on all pairs of responses, the policy is pi_ref exp(r / (tau beta)) / Z.

    The pairs have the frequencies of Eq. 1 at rewards r / tau.
    """
    distance, from_ref = distance_to_equation_4(torch.arange(N).expand(X, N), seed=9)
    assert (from_ref > .1).all(), "this test needs an optimum far from pi_ref"
    assert (distance < .005).all(), \
        f"DPO ended at total variation {distance.tolist()} from Eq. 4: is a pair, the reference " \
        "or beta wrong?"


def test_training_on_pairs_of_a_few_responses_gives_them_the_ratios_of_equation_4():
    """Among the responses that are compared, the policy is Eq. 4 restricted to them.

    Eq. 7 sees ratios of compared responses alone, so it does not determine how much probability
    they have together.
    """
    rows = torch.stack([torch.randperm(N, generator=world.generator(x))[:12] for x in range(X)])
    distance, from_ref = distance_to_equation_4(rows, seed=10)
    assert (from_ref > .1).all(), "this test needs an optimum far from pi_ref"
    assert (distance < .001).all(), \
        f"DPO ended at total variation {distance.tolist()} from Eq. 4 on the compared " \
        "responses: does a batch mix up its rows?"


# ------------------------------------------------------------- rounds: pairs from the policy itself
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
    ids, lengths = train.make_prompts(setup, "train", setup.cfg.prompts)
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
    descend(expected, losses_of_rounds(setup, expected, statistics), rates, betas=(.9, .999))
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
    pairs = train.training_pairs(setup)
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
