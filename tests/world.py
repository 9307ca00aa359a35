"""A world small enough to list, so that every expectation is a sum and every theorem of the paper can be computed.

X = 2 prompts of different lengths; V = 5 tokens, one of which ends a response; responses of at most 3 tokens. All N = 85 of
them are listed: y = END, the 4 of two tokens, the 16 of three that end, and the 64 that are cut off at three. pi_ref and pi are
the real GPT in float64; a "tabular" policy is a row of N free numbers. Tables of log-probabilities and rewards are (X, N).

    ids, mask = world.listed()                     every prompt with every response, X * N rows of T = 6 tokens
    ref = world.table(world.gpt(seed=1))           log pi_ref(y|x), (X, N), through model.sequence_logp
    r = world.rewards(seed=2)                      r(x, y), (X, N)
    world.expectation(logp, r), world.kl(logp, ref), world.total_variation(logp, other)        each (X,)
    world.minimise(loss, [theta])                  LBFGS to the bottom
    world.agree(actual, expected, "what was claimed, and what is likely to be wrong")
"""
import torch

import dpo
import model

V, END, MAX_TOKENS = 5, 4, 3
PROMPTS = [[2, 0], [0, 3, 1]]
X, T = len(PROMPTS), 6    # T: the longest prompt and the longest response


def all_responses():
    """Every y as a tuple of tokens: stopped by END, or cut off at MAX_TOKENS."""
    ended, growing = [], [()]
    for _ in range(MAX_TOKENS):
        longer = [y + (token,) for y in growing for token in range(V)]
        ended += [y for y in longer if y[-1] == END]
        growing = [y for y in longer if y[-1] != END]
    return ended + growing


RESPONSES = all_responses()
N = len(RESPONSES)
LENGTHS = torch.tensor([len(y) for y in RESPONSES])    # (N,) response tokens, the end token included


def prompts():
    """The prompts as the sampler takes them: ids (X, 3) filled with END, lengths (X,)."""
    lengths = torch.tensor([len(x) for x in PROMPTS])
    return torch.tensor([x + [END] * (int(lengths.max()) - len(x)) for x in PROMPTS]), lengths


def listed(x=None):
    """Every response to prompt x (or to all, prompt by prompt) -> ids, bool mask, each (N, T) or (X * N, T).

    The mask is written down here and not computed by the code under test.
    """
    ids, mask = [], []
    for prompt in PROMPTS if x is None else [PROMPTS[x]]:
        for y in RESPONSES:
            filler = T - len(prompt) - len(y)
            ids.append([*prompt, *y] + [END] * filler)
            mask.append([False] * len(prompt) + [True] * len(y) + [False] * filler)
    return torch.tensor(ids), torch.tensor(mask)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, scale=1.):
    """Normal numbers in float64, the same for the same seed."""
    return scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gpt(seed, layers=2, heads=3, width=12, spread=10.):
    """The real GPT, tiny, float64; its blocks' matrices `spread` times the usual start, so that it is far from uniform."""
    policy = model.GPT(model.GPTConfig(V, T + 1, layers, heads, width), generator(seed)).double()
    with torch.no_grad():
        for p in policy.blocks.parameters():
            if p.dim() == 2:
                p *= spread
    return policy


def table(policy, x=None):
    """log pi(y|x) of every listed response under a GPT -> (X, N), or (N,) for prompt x alone; differentiable."""
    ids, mask = listed(x)
    logp = model.sequence_logp(policy(ids), ids, mask)
    return logp.view(X, N) if x is None else logp


def tabular(logits):
    """The policy over listed responses with these free numbers (..., N) -> log pi."""
    return torch.log_softmax(logits, -1)


def rewards(seed, scale=1.):
    """A reward table r(x, y), (X, N): arbitrary numbers, of standard deviation `scale`."""
    return normal(X, N, seed=seed, scale=scale)


def expectation(logp, f):
    """E_{y ~ pi}[f(x, y)]: (..., N), (..., N) -> (...)"""
    return (logp.exp() * f).sum(-1)


def kl(logp, other):
    """KL(pi || other) in nats: (..., N), (..., N) -> (...)"""
    return expectation(logp, logp - other)


def total_variation(logp, other):
    """Half the sum over y of |pi(y|x) - other(y|x)|: (..., N), (..., N) -> (...)"""
    return .5 * (logp.exp() - other.exp()).abs().sum(-1)


def make_pair(logp, ref, winner, loser):
    """A dpo.Pair of listed responses: logp and ref (N,), or flat tables (X * N,); indices (B,) into them."""
    return dpo.Pair(logp[winner], logp[loser], ref[winner], ref[loser], LENGTHS[winner % N], LENGTHS[loser % N])


def counted(seed, total):
    """A pi_ref of rational probabilities, and its perfect sample: log pi_ref (X, N), how often each response occurs (X, N).

    `total` draws a prompt, every response at least once: the frontier of such a sample is exact.
    """
    share = tabular(normal(X, N, seed=seed)).exp()
    drawn = torch.multinomial(share, total - N, replacement=True, generator=generator(seed))
    count = torch.stack([torch.bincount(row, minlength=N) for row in drawn]) + 1
    return (count.double() / total).log(), count


def three_pairs():
    """Three pairs of listed responses, of both prompts and all lengths: ids, mask (6, T), winners first; a pi_ref's logp (6,)."""
    rows = torch.tensor([3, 120, 40, 30, 85, 10])
    ids, mask = listed()
    return ids[rows], mask[rows], table(gpt(seed=7)).detach().flatten()[rows]


def halves(logp, ref, mask):
    """A dpo.Pair of rows laid out as in `three_pairs`, the winners in the first half: logp, ref (2B,), mask (2B, T)."""
    return dpo.Pair(*logp.chunk(2), *ref.chunk(2), *mask.sum(1).chunk(2))


def random_pairs(count, seed):
    """A dpo.Pair of `count` unrelated pairs: log-probabilities below 0, lengths 1, 2, 3."""
    logps = [-normal(count, seed=10 * seed + i, scale=3.).abs() for i in range(4)]
    lengths = [torch.randint(1, MAX_TOKENS + 1, (count,), generator=generator(10 * seed + i)) for i in (4, 5)]
    return dpo.Pair(*logps, *lengths)


def population_loss(loss, logp, ref, preference, weight):
    """The expected loss over pairs of listed responses, of one prompt: sum_ij weight_ij preference_ij loss(y_i beats y_j).

    logp, ref (N,); weight (N, N) how often {i, j} is compared; preference (N, N) = p(y_i beats y_j); loss(pair) -> (B,).
    """
    i, j = torch.ones(N, N).fill_diagonal_(0).nonzero().T
    return (weight[i, j] * preference[i, j] * loss(make_pair(logp, ref, i, j))).sum()


def pair_weights(seed):
    """A distribution (N, N) over pairs that compares every two responses, some far more often than others; symmetric."""
    weight = torch.rand(N, N, generator=generator(seed), dtype=torch.float64) ** 3 + 1e-3
    return (weight + weight.T).fill_diagonal_(0) / (weight + weight.T).fill_diagonal_(0).sum()


def minimise(loss, parameters, steps=1000):
    """LBFGS until the gradient vanishes: `loss()` is a scalar function of the tensors in `parameters`, changed in place."""
    parameters = list(parameters)
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, history_size=50, tolerance_grad=1e-11, tolerance_change=0.,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def slope(f, x, step=1e-5):
    """The gradient of the number f() in the tensor x by central differences, an entry at a time; x is left as it was."""
    gradient, flat = torch.zeros_like(x), x.detach().view(-1)
    for n in range(flat.numel()):
        kept = flat[n].item()
        flat[n] = kept + step
        up = float(f())
        flat[n] = kept - step
        gradient.view(-1)[n] = (up - float(f())) / (2 * step)
        flat[n] = kept
    return gradient


def agree(actual, expected, claim, tolerance=1e-10):
    """Assert that two tensors have one shape and are equal to `tolerance` (relative above 1, absolute below); else say why."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{claim}\n  shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp(min=1.)
    worst = int(error.nan_to_num(torch.inf).argmax()) if error.numel() else 0
    assert error.numel() and (error <= tolerance).all(), \
        f"{claim}\n  got {actual.flatten()[worst].item():.10g}, not {expected.flatten()[worst].item():.10g} (entry {worst})"
