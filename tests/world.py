"""A world small enough to enumerate: every expectation is a finite sum, so the tests can compute
both sides of each theorem of the paper.

There are X = 2 prompts of different lengths and V = 5 tokens, one of which (END) ends a response.
A response has at most 3 tokens. All N = 85 responses are listed: END alone, the 4 of two tokens,
the 16 of three tokens that end, and the 64 that are cut off after three tokens.

pi_ref and pi are the real GPT in float64. A "tabular" policy is a row of N free numbers instead.
Shapes: X prompts, N responses, T tokens of the longest row, V vocabulary, B pairs.
Tables of log-probabilities (nats) and of rewards are (X, N).

    ids, mask = world.listed()               # each prompt with each response, (X * N, T)
    ref = world.table(world.gpt(seed=1))     # log pi_ref(y|x), (X, N), by model.sequence_logp
    r = world.rewards(seed=2)                # r(x, y), (X, N)
    world.expectation(logp, r)               # E_pi[r], (X,)
    world.kl(logp, ref)                      # KL(pi || pi_ref), (X,)
    world.total_variation(logp, ref)         # (X,)
    world.minimise(loss, [theta])            # L-BFGS until the gradient vanishes
    world.agree(actual, expected, "the claim, and the likely mistake")
"""
import torch

import dpo
import model

V = 5
END = 4
MAX_TOKENS = 3                  # of a response, the end token included
PROMPTS = [[2, 0], [0, 3, 1]]
X = len(PROMPTS)
T = 6                           # the longest prompt and the longest response


# -------------------------------------------------------------------------- prompts and responses
def all_responses():
    """List every response as a tuple of tokens: ended by END, or cut off at MAX_TOKENS."""
    ended = []
    unfinished = [()]
    for _ in range(MAX_TOKENS):
        extended = [y + (token,) for y in unfinished for token in range(V)]
        ended += [y for y in extended if y[-1] == END]
        unfinished = [y for y in extended if y[-1] != END]
    return ended + unfinished


RESPONSES = all_responses()
N = len(RESPONSES)
LENGTHS = torch.tensor([len(y) for y in RESPONSES])    # (N,) tokens, the end token included


def prompts():
    """Return the prompts in the sampler's format: ids (X, 3) filled up with END, lengths (X,)."""
    lengths = torch.tensor([len(x) for x in PROMPTS])
    longest = int(lengths.max())
    ids = torch.tensor([x + [END] * (longest - len(x)) for x in PROMPTS])
    return ids, lengths


def listed(x=None):
    """Return each response to prompt x as ids and a bool mask of response tokens, (N, T) each.

    Without x, all prompts follow one another: (X * N, T) each. The mask is built from the known
    lengths, not by the code under test.
    """
    selected = PROMPTS if x is None else [PROMPTS[x]]
    ids = []
    mask = []
    for prompt in selected:
        for y in RESPONSES:
            filler = T - len(prompt) - len(y)
            ids.append([*prompt, *y] + [END] * filler)
            mask.append([False] * len(prompt) + [True] * len(y) + [False] * filler)
    return torch.tensor(ids), torch.tensor(mask)


# -------------------------------------------------------------- random numbers, policies, rewards
def generator(seed):
    """Return a new torch generator with this seed."""
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, scale=1.):
    """Return `scale` times standard normal numbers in float64; equal seeds give equal numbers."""
    return scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gpt(seed, layers=2, heads=3, width=12, spread=10.):
    """Return a tiny GPT in float64 whose distribution is far from uniform.

    The matrices of its blocks are `spread` times the usual initialisation.
    """
    config = model.GPTConfig(V, T + 1, layers, heads, width)
    policy = model.GPT(config, generator(seed)).double()
    with torch.no_grad():
        for p in policy.blocks.parameters():
            if p.dim() == 2:
                p *= spread
    return policy


def table(policy, x=None):
    """Return log pi(y|x) of every listed response under a GPT: (X, N), or (N,) for prompt x alone.

    The result is differentiable in the parameters of the GPT.
    """
    ids, mask = listed(x)
    logp = model.sequence_logp(policy(ids), ids, mask)
    return logp.view(X, N) if x is None else logp


def tabular(logits):
    """Return log pi of the tabular policy with these free numbers: (..., N) -> (..., N)."""
    return torch.log_softmax(logits, -1)


def rewards(seed, scale=1.):
    """Return a reward table r(x, y), (X, N): normal numbers of standard deviation `scale`."""
    return normal(X, N, seed=seed, scale=scale)


def counted(seed, total):
    """Return a pi_ref and its perfect sample of `total` responses to each prompt.

    -> log pi_ref (X, N), and how often each response occurs, (X, N). Each count is at least 1, and
    pi_ref(y|x) = count / total exactly, so the frontier of this sample has no sampling error.
    """
    return counted_near(tabular(normal(X, N, seed=seed)), seed, total)


def counted_near(logp, seed, total):
    """Return, as `counted` does, a policy near the one of log pi (X, N), and its perfect sample."""
    sampled = torch.multinomial(logp.exp(), total - N, replacement=True, generator=generator(seed))
    count = torch.stack([torch.bincount(row, minlength=N) for row in sampled]) + 1
    return (count.double() / total).log(), count


# ---------------------------------------------------------- exact expectations over all responses
def expectation(logp, f):
    """E_{y ~ pi}[f(x, y)]: logp (..., N), f (..., N) -> (...)."""
    return (logp.exp() * f).sum(-1)


def kl(logp, logq):
    """KL(pi || q) = E_{y ~ pi}[log pi - log q], nats: (..., N), (..., N) -> (...)."""
    return expectation(logp, logp - logq)


def total_variation(logp, logq):
    """Half of sum_y |pi(y|x) - q(y|x)|: (..., N), (..., N) -> (...)."""
    return .5 * (logp.exp() - logq.exp()).abs().sum(-1)


# ------------------------------------------------------------------------------------------ pairs
def make_pair(logp, ref, winner, loser):
    """Return a dpo.Pair of listed responses, given by their indices (B,).

    logp and ref are (N,) for one prompt, or tables flattened to (X * N,).
    """
    return dpo.Pair(logp[winner], logp[loser], ref[winner], ref[loser],
                    LENGTHS[winner % N], LENGTHS[loser % N])


def three_pairs():
    """Return ids (6, T), mask (6, T) and log pi_ref (6,) of three pairs, the winners first.

    They are listed responses to both prompts and of all lengths.
    """
    rows = torch.tensor([3, 120, 40, 30, 85, 10])
    ids, mask = listed()
    ref = table(gpt(seed=7)).detach().flatten()
    return ids[rows], mask[rows], ref[rows]


def halves(logp, ref, mask):
    """Return the dpo.Pair of rows laid out as in `three_pairs`, the winners in the first half.

    logp (2B,), ref (2B,), mask (2B, T).
    """
    logp_w, logp_l = logp.chunk(2)
    ref_w, ref_l = ref.chunk(2)
    len_w, len_l = mask.sum(1).chunk(2)
    return dpo.Pair(logp_w, logp_l, ref_w, ref_l, len_w, len_l)


def random_pairs(count, seed):
    """Return a dpo.Pair of `count` unrelated pairs: log-probabilities below 0, 1 to 3 tokens."""
    logps = []
    for i in range(4):
        logps.append(-normal(count, seed=10 * seed + i, scale=3.).abs())
    lengths = []
    for i in (4, 5):
        g = generator(10 * seed + i)
        lengths.append(torch.randint(1, MAX_TOKENS + 1, (count,), generator=g))
    return dpo.Pair(*logps, *lengths)


def ordered_pairs():
    """Return the indices i, j of all ordered pairs of different responses, (N * (N - 1),) each."""
    i, j = torch.ones(N, N).fill_diagonal_(0).nonzero().T
    return i, j


def pair_weights(seed):
    """Return how often each pair is compared: a symmetric distribution (N, N), 0 on its diagonal.

    Every pair occurs, some far more often than others.
    """
    weight = torch.rand(N, N, generator=generator(seed), dtype=torch.float64) ** 3 + 1e-3
    symmetric = (weight + weight.T).fill_diagonal_(0)
    return symmetric / symmetric.sum()


def population_loss(loss, logp, ref, preference, weight):
    """The expected loss over all pairs: sum_ij weight_ij preference_ij loss(y_i beats y_j).

    All responses answer one prompt: logp (N,), ref (N,). weight (N, N) says how often {i, j} is
    compared, preference (N, N) is p(y_i beats y_j), and loss(pair) returns (B,).
    """
    i, j = ordered_pairs()
    return (weight[i, j] * preference[i, j] * loss(make_pair(logp, ref, i, j))).sum()


# ---------------------------------------------------------- optimisation, differences, comparison
def minimise(loss, parameters, steps=1000):
    """Minimise the scalar loss() by L-BFGS until its gradient vanishes.

    The tensors in `parameters` are changed in place.
    """
    parameters = list(parameters)
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, history_size=50, tolerance_grad=1e-11,
                                  tolerance_change=0., line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def slope(f, x, step=1e-5):
    """Return the gradient of the number f() in the tensor x, by central differences.

    One entry of x at a time is changed in place and then restored.
    """
    gradient = torch.zeros_like(x)
    flat = x.detach().view(-1)
    for n in range(flat.numel()):
        original = flat[n].item()
        flat[n] = original + step
        above = float(f())
        flat[n] = original - step
        below = float(f())
        flat[n] = original
        gradient.view(-1)[n] = (above - below) / (2 * step)
    return gradient


def agree(actual, expected, claim, tolerance=1e-10):
    """Assert that two tensors are equal in shape and, up to `tolerance`, in every entry.

    The error of an entry is relative where |expected| is above 1 and absolute below. The message
    is the claim and the entry that is furthest off.
    """
    actual = torch.as_tensor(actual)
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape, \
        f"{claim}\n  got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert expected.numel() > 0, f"{claim}\n  got an empty tensor: nothing was compared"
    scale = expected.double().abs().clamp(min=1.)
    error = (actual.double() - expected.double()).abs() / scale
    worst = int(error.nan_to_num(torch.inf).argmax())
    got = actual.flatten()[worst].item()
    wanted = expected.flatten()[worst].item()
    assert (error <= tolerance).all(), \
        f"{claim}\n  got {got:.10g}, expected {wanted:.10g} (entry {worst})"
