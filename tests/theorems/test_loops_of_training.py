"""The loops of SFT and of losses on pairs: each step is the recipe's, and each ends where it must.

An exact trace compares the parameters after some steps with those of a slow copy of the recipe. A
fixed point is what the loop arrives at, whatever its steps are. test_loops_of_rounds.py has the
loop on pairs from the policy itself.
"""
import contextlib
import copy
import io
import math
import re
from functools import partial

import torch
from torch.nn.utils import parameters_to_vector

import data
import dpo
import train
import world
from fake_setup import SEED, fake_setup
from world import END, N, V, X, agree

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

    AdamW has beta1 .9, the beta2 of the configuration and no weight decay, and nothing is
    clipped. The learning rate is at its peak in the first of 4 steps, then falls. A step reports
    means over its pairs, before it changes the policy; a tie is not ranked right. The tokens are
    those of all completions.
    """
    beta, lr, ref = .7, .02, world.gpt(seed=4)
    policy = world.gpt(seed=5)
    expected = copy.deepcopy(policy)
    pairs = listed_preferences(ref)
    setup = fake_setup(ref, preferences=pairs, epochs=2, batch_prompts=3, lr=lr, adam_beta2=.7)
    steps, progress = train.train_on_pairs(setup, policy, train.Run("dpo", beta), dpo.dpo_loss)
    reported = list(progress)

    batches = []
    for epoch in range(2):
        generator = data.named_generator("order", "dpo", beta, SEED, 0, epoch)
        batches += data.shuffled_batches(pairs, 3, generator)
    statistics = []
    losses = [partial(equation_7, expected, pairs, pairs.ref_logp, beta, batch.tolist(), statistics)
              for batch in batches]
    descend(expected, losses, [lr, lr * 15 / 18, lr * 10 / 18, lr * 5 / 18], betas=(.9, .7))
    assert steps == 4, f"2 epochs over 4 prompts with pairs are 4 steps of 3 prompts, not {steps}"
    agree_in_statistics(reported, statistics)
    agree_in_parameters(
        policy, expected,
        "the parameters after two epochs must be those of the recipe: is the loss not the mean "
        "over pairs, is there weight decay, or is the order of an epoch not its own?")


def test_a_lone_gradient_moves_a_parameter_by_32_learning_rates_unless_beta2_is_smaller():
    """The comment in `train_on_pairs`: at beta2 .999 by 32 lr, at .95 by 6 lr, of any gradient.

    The gradient comes late in training, and all others are 0: so it is with a rare token.
    """
    for beta2, learning_rates in ((.999, 32), (.95, 6)):
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([x], lr=1e-3, betas=(.9, beta2), weight_decay=0., eps=1e-12)
        for step in range(10_000):
            x.grad = torch.full_like(x, 1e-3 * (step == 9_900))
            optimizer.step()
        assert round(-x.item() / 1e-3) == learning_rates


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
