"""The loops that train the reward model and fit the values, and the learning rates of all loops.

Each loop has a trace and a fixed point. The trace repeats the loop without its code: one text after
another, one token after another, Adam by its formulas, learning rates worked out by hand. Loop and
trace must end at the same parameters. Batches differ in size, so that sums and means do not differ
by a constant factor. The fixed point is enumerated. test_loops_of_ppo.py has the loops of PPO.
"""
import copy
from statistics import fmean, stdev

import torch

import data
import model
import ppo
import world
from test_ppo_fixed_point import MASK, exact_values
from test_reward_model_and_ppo import values_of
from world import END, LENGTHS, MAX_TOKENS, N, RESPONSES, V, X, agree

# Number of steps -> the learning rate of each step, over the peak. It is (step + 1) / (.1 steps) in
# the first tenth of the steps. Later it is (steps left) / (.9 steps), but never above 1.
RATES = {
    4: [1., 5 / 6, 5 / 9, 5 / 18],
    5: [1., 8 / 9, 6 / 9, 4 / 9, 2 / 9],
    11: [10 / 11, 1., 90 / 99, 80 / 99, 70 / 99, 60 / 99, 50 / 99, 40 / 99, 30 / 99, 20 / 99,
         10 / 99],
}


class Adam:
    """Adam by its formulas (Kingma and Ba 2015, Algorithm 1), without weight decay.

    Set `lr` before each step.
    """
    def __init__(self, parameters, eps, beta2=.999):
        self.parameters = list(parameters)
        self.beta2 = beta2
        self.eps = eps
        self.lr = None
        self.t = 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    def step(self, loss):
        """Change the parameters in place: theta <- theta - lr m_hat / (sqrt(v_hat) + eps)."""
        self.t += 1
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for i, gradient in enumerate(gradients):
                self.m[i] = .9 * self.m[i] + .1 * gradient
                self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * gradient ** 2
                m_hat = self.m[i] / (1 - .9 ** self.t)
                v_hat = self.v[i] / (1 - self.beta2 ** self.t)
                self.parameters[i] -= self.lr * m_hat / (v_hat.sqrt() + self.eps)


def flat(state):
    """Return the parameters of a state dict as one vector, ordered by their names."""
    return torch.cat([state[name].flatten() for name in sorted(state)])


def listed_rows(count, seed):
    """Return the ids and the mask of `count` different rows of world.listed(), (count, T) each."""
    ids, mask = world.listed()
    rows = torch.randperm(X * N, generator=world.generator(seed))[:count]
    return ids[rows], mask[rows]


def text(ids, mask):
    """Return one row without its filler, and the positions of its response tokens, a list."""
    positions = [t for t, is_response in enumerate(mask.tolist()) if is_response]
    return ids[:positions[-1] + 1], positions


def score(ids, mask):
    """Return a number that depends on the whole response: (B, T), (B, T) -> (B,)."""
    weights = world.normal(world.T + 1, seed=8)[:ids.shape[1]]
    return (ids * mask * weights).sum(1)


def rewards_by_token(seed):
    """Return a reward table (X, N): a sum of numbers that depend on prompt, position and token.

    The third token counts half as much as the others.
    """
    weights = world.normal(X, MAX_TOKENS, V, seed=seed) * torch.tensor([[1.], [1.], [.5]])
    r = torch.zeros(X, N, dtype=torch.float64)
    for i, y in enumerate(RESPONSES):
        for t, token in enumerate(y):
            r[:, i] += weights[:, t, token]
    return r


def table_score(r):
    """Return score(ids, mask) -> (B,) that looks up the reward table r (X, N).

    A row is numbered by its ids as digits. Columns that were cut off held END.
    """
    digit = V ** torch.arange(world.T)
    ids, _ = world.listed()
    table = torch.zeros(V ** world.T, dtype=torch.float64)
    table[(ids * digit).sum(1)] = r.flatten()

    def score(ids, mask):
        width = ids.shape[1]
        return table[(ids * digit[:width]).sum(1) + END * digit[width:].sum()]

    return score


# ------------------------------------------------------------------------------- the learning rates
def test_the_learning_rate_has_its_hand_computed_values():
    """App. B: linear warm-up over the first tenth of the steps to the peak, then linearly to 0.

    With 4 steps the warm-up is shorter than one step. The rate does not exceed its peak there.
    """
    by_hand = {
        4: dict(enumerate([*RATES[4], 0.])),
        11: dict(enumerate([*RATES[11], 0.])),
        20: {0: 1 / 2, 1: 1., 2: 1., 3: 17 / 18, 10: 10 / 18, 19: 1 / 18, 20: 0.},
        1500: {0: 1 / 150, 149: 1., 150: 1., 750: 5 / 9, 1499: 1 / 1350, 1500: 0.},
    }
    peak = 3.
    for steps, expected in by_hand.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
        scheduler = model.lr_schedule(optimizer, steps)
        rates = []
        for _ in range(steps + 1):
            rates.append(optimizer.param_groups[0]["lr"] / peak)
            optimizer.step()
            scheduler.step()
        agree(torch.tensor([rates[step] for step in expected], dtype=torch.float64),
              torch.tensor(list(expected.values()), dtype=torch.float64),
              f"the learning rates of {steps} steps at steps {list(expected)}: is the warm-up not "
              "a tenth, the peak above the given one, or the last rate not near 0?")


# --------------------------------------------------------------------------------- the reward model
def reward_of_row(scalar, pairs, row):
    """Return r_phi(x, y) of one row: the output at its last token."""
    tokens, _ = text(pairs.ids[row], pairs.mask[row])
    return scalar(tokens[None])[0, -1]


def batch_losses(scalar, pairs, prompts):
    """Return -log sigma(r_w - r_l) of each pair of these prompts: a list of scalar tensors."""
    losses = []
    for winner, loser in zip(pairs.winner.tolist(), pairs.loser.tolist()):
        if winner // pairs.k in prompts:
            margin = reward_of_row(scalar, pairs, winner) - reward_of_row(scalar, pairs, loser)
            losses.append(torch.log(1 + torch.exp(-margin)))
    return losses


def trace_of_reward_model(ref, pairs, held_out, epochs, peak):
    """Return for each epoch: held-out accuracy, held-out rewards (a list), and parameters."""
    scalar = ppo.ScalarModel(ref)
    adam = Adam(scalar.parameters(), eps=1e-8)
    rates = iter(RATES[sum(len(epoch) for epoch in epochs)])
    history = []
    for epoch in epochs:
        for prompts in epoch:
            losses = batch_losses(scalar, pairs, prompts.tolist())
            adam.lr = peak * next(rates)
            adam.step(sum(losses) / len(losses))
        r = [reward_of_row(scalar, held_out, row).item() for row in range(len(held_out.ids))]
        pair_rows = zip(held_out.winner.tolist(), held_out.loser.tolist())
        correct = [r[winner] > r[loser] for winner, loser in pair_rows]
        history.append((fmean(correct), r, copy.deepcopy(scalar.state_dict())))
    return history


def preferences(winner, loser, k, prompts, seed):
    """Return data.Preferences of these pairs among k responses to each of some prompts."""
    ids, mask = listed_rows(k * prompts, seed)
    return data.Preferences(ids, mask, torch.zeros(len(ids)), torch.tensor(winner),
                            torch.tensor(loser), k)


def test_the_reward_model_follows_the_trace_of_equation_2():
    """Adam on the mean of -log sigma(r_w - r_l) over the pairs of a batch, 11 batches in 4 epochs.

    The parameters are those after the epoch with the best held-out accuracy, the first of equals.
    """
    pairs = preferences([0, 2, 5, 4, 8, 6, 10, 13, 12], [1, 0, 4, 3, 7, 8, 9, 14, 13], 3, 5, seed=7)
    held_out = preferences([0, 1, 5, 3, 8], [2, 0, 4, 5, 6], 3, 3, seed=8)
    epochs = []
    for epoch in ([[4, 0], [1]], [[2, 3, 0], [4], [1]], [[3], [1, 2], [0, 4]], [[0], [1, 4], [3]]):
        epochs.append([torch.tensor(prompts) for prompts in epoch])
    ref = world.gpt(seed=1)
    history = trace_of_reward_model(ref, pairs, held_out, epochs, .02)
    accuracies = [accuracy for accuracy, _, _ in history]
    best = accuracies.index(max(accuracies))
    assert 0 < best < 3 and accuracies.count(max(accuracies)) > 1, \
        f"this test needs a best epoch between others, and a later one as good: {accuracies}"
    accuracy, r, parameters = history[best]
    fitted = ppo.train_reward_model(ref, pairs, held_out, epochs, .02, "cpu")
    agree(fitted["accuracy"], accuracy,
          "the accuracy must be the share of held-out pairs in the right order, in the best epoch",
          tolerance=1e-6)
    agree(torch.tensor([fitted["mean"], fitted["std"]]).double(),
          torch.tensor([fmean(r), stdev(r)]).double(),
          "mean and deviation must be those of all held-out rewards, after the best epoch")
    agree(flat(fitted["state_dict"]), flat(parameters),
          "the reward model left the trace of its recipe: a sum for a mean, another learning rate, "
          "weight decay, gradients of an earlier batch, or another epoch than the first best?",
          tolerance=1e-9)


def test_a_constant_reward_ranks_no_pair():
    """With learning rate 0 the reward stays 0. Its accuracy is 0, because a tie is not an order.

    A reward model is returned even then.
    """
    pairs = preferences([0, 2], [1, 3], 2, 2, seed=3)
    fitted = ppo.train_reward_model(world.gpt(seed=1), pairs, pairs, [[torch.tensor([0, 1])]], 0.,
                                    "cpu")
    agree(torch.tensor([fitted["accuracy"], fitted["mean"], fitted["std"]]), torch.zeros(3),
          "a reward that is 0 everywhere must have accuracy, mean and deviation 0")
    assert "state_dict" in fitted, "an epoch with accuracy 0 must be kept if there is no better one"


def test_the_reward_model_ends_at_reward_over_tau_up_to_a_constant_of_the_prompt():
    """Trained on Bradley-Terry frequencies at temperature tau, r_phi(x, y) = r(x, y) / tau + f(x).

    a = exp(r / tau) are integers. Of a_i + a_j comparisons of two responses, the first wins a_i:
    the frequencies of Eq. 1 are exact.
    """
    tau = .5
    odds = torch.tensor([[1, 4, 2, 7], [3, 1, 6, 2], [2, 9, 3, 5]])
    r = tau * odds.double().log()
    winner, loser = [], []
    for x, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4)).tolist():
        if i != j:
            winner += [4 * x + i] * int(odds[x, i])
            loser += [4 * x + j] * int(odds[x, i])
    pairs = preferences(winner, loser, 4, 3, seed=4)
    ref = world.gpt(seed=2)
    fitted = ppo.train_reward_model(ref, pairs, pairs, [[torch.arange(3)] * 250], 1e-2, "cpu")
    scalar = ppo.ScalarModel(ref)
    scalar.load_state_dict(fitted["state_dict"])
    learned = ppo.predict_reward(scalar, pairs.ids, pairs.mask).view(3, 4)
    agree(learned - learned.mean(1, keepdim=True), (r - r.mean(1, keepdim=True)) / tau,
          "the reward model must end at r / tau + f(x): are winner and loser swapped, or has Eq. 2 "
          "another factor?", tolerance=1e-2)


# --------------------------------------------------------------------------------------- the values
def test_fitted_values_follow_the_trace_of_a_regression():
    """Adam on the mean of (V - score)^2 over the response tokens of a batch, one epoch.

    5 batches hold 18 rows in random order: 4, 4, 4, 4, 2.
    """
    ref = world.gpt(seed=4)
    ids, mask = listed_rows(18, seed=5)
    targets = score(ids, mask).tolist()
    order = torch.randperm(18, generator=world.generator(6)).tolist()
    critic = ppo.ScalarModel(ref)
    adam = Adam(critic.parameters(), eps=1e-8)
    for step, rate in enumerate(RATES[5]):
        errors = []
        for row in order[4 * step:4 * step + 4]:
            tokens, positions = text(ids[row], mask[row])
            output = critic(tokens[None])[0]
            errors += [(output[t - 1] - targets[row]) ** 2 for t in positions]
        adam.lr = .03 * rate
        adam.step(sum(errors) / len(errors))
    fitted = ppo.pretrain_critic(ref, ids, mask, score, 4, .03, world.generator(6))
    agree(flat(fitted), flat(critic.state_dict()),
          "the fitted values left the trace of their recipe: is the loss no mean over the tokens "
          "of a batch, is a value read after its token, or is there weight decay?", tolerance=1e-9)


def test_fitted_values_are_expected_scores_at_every_prefix():
    """V(x, y_<t) = E[score | x, y_<t] at all 21 prefixes of both prompts, before every token.

    The samples are 120 copies of a perfect sample: each response occurs in proportion to pi_ref.
    pi_ref is a table here. The network starts from a GPT with another distribution.
    """
    ref_logp, count = world.counted(seed=169, total=200)
    r = rewards_by_token(seed=11)
    ids, mask = world.listed()
    rows = torch.arange(X * N).repeat_interleave(count.flatten()).repeat(120)
    network = world.gpt(seed=3)
    critic = ppo.ScalarModel(network)
    critic.load_state_dict(ppo.pretrain_critic(network, ids[rows], mask[rows], table_score(r), 160,
                                          1.4e-2, world.generator(5)))
    expected = []
    for x in range(X):
        score_on_last_token = torch.zeros(N, MAX_TOKENS, dtype=torch.float64)
        score_on_last_token[torch.arange(N), LENGTHS - 1] = r[x]
        expected.append(exact_values(ref_logp[x].exp(), score_on_last_token)[MASK])
    expected = torch.cat(expected)
    assert expected.std() > .8, "the values must differ for this test to tell them apart"
    agree(values_of(critic, ids, mask)[mask], expected,
          "fitted values must be the expected scores at every prefix: is a score given to another "
          "row, or to one token of a response alone?", tolerance=.25)
