"""The GPT's log-probabilities and KL against enumeration and slow loops; its start and its SFT.

Shapes: B sequences, T tokens, V vocabulary; X prompts with N listed responses each (world.py).
"""
import cmath

import torch
import torch.nn.functional as F

import model
import train
import world
from world import END, MAX_TOKENS, N, V, X, agree


def long_gpt(seed=3):
    """A float64 GPT with a context of 31 tokens, for responses of many tokens.

    Its matrices are 8 times larger than usual. So END is rare enough for responses to end at
    different lengths.
    """
    policy = model.GPT(model.GPTConfig(V, 31, 2, 3, 12), world.generator(seed)).double()
    with torch.no_grad():
        for p in policy.blocks.parameters():
            if p.dim() == 2:
                p *= 8.
    return policy


def used_logits(mask):
    """Where the logits predict a response token: mask (B, T) -> bool (B, T, 1).

    Computed here, not by the code under test.
    """
    last = torch.zeros(len(mask), 1, dtype=torch.bool)
    return torch.cat([mask[:, 1:], last], 1)[..., None]


# -------------------------------------------------------------------------------- log-probabilities
def test_probabilities_of_all_responses_sum_to_one():
    """sum over y of pi(y|x) = 1.

    pi(y|x) is the product of the probabilities of the response tokens, END included.
    """
    ids, _ = world.listed()
    lengths = world.prompts()[1].repeat_interleave(N)
    mask = model.response_mask(ids, lengths, MAX_TOKENS, END)
    logp = model.sequence_logp(world.gpt(seed=1)(ids), ids, mask)
    total = logp.exp().view(X, N).sum(1)
    agree(total, torch.ones(X),
          "sum over y of pi(y|x) must be 1: are the labels not shifted by one, does the mask count "
          "padding or the prompt, does it drop the first or the last response token, is log pi a "
          "mean instead of a sum, or is the softmax over another axis?")


def test_token_logp_is_read_one_position_before_the_token():
    """token_logp[b, t-1] = log softmax(logits[b, t-1])[ids[b, t]]: a loop over every entry."""
    B, T = 3, 4
    logits = world.normal(B, T, V, seed=1, scale=4.)
    ids = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 2], [3, 1, 1, 0]])
    expected = torch.empty(B, T - 1, dtype=torch.float64)
    for b in range(B):
        for t in range(1, T):
            weights = [logits[b, t - 1, v].exp() for v in range(V)]
            expected[b, t - 1] = (weights[ids[b, t]] / sum(weights)).log()
    agree(model.token_logp(logits, ids), expected,
          "entry t-1 must be log pi(ids[t] | ids[<t]): are the labels not shifted, or is the "
          "softmax over time?")


def test_sequence_logp_is_the_sum_over_response_tokens_alone():
    """log pi(y|x) = sum over response tokens of log pi(token | tokens before it).

    It is a sum, not a mean, and the prompt is not part of it.
    """
    policy = world.gpt(seed=2)
    ids, mask = world.listed()
    logp = model.token_logp(policy(ids), ids)
    expected = []
    for b in range(len(ids)):
        expected.append(sum(logp[b, t - 1] for t in range(ids.shape[1]) if mask[b, t]))
    agree(model.sequence_logp(policy(ids), ids, mask), torch.stack(expected),
          "log pi(y|x) must be the sum over exactly the response tokens: is the prompt or the "
          "padding scored, is a token dropped, or is it a mean?")


def test_masked_entries_are_never_read():
    """Entries outside the mask change neither log pi(y|x) nor its gradient.

    Here they are NaN logits and ids out of range.
    """
    ids, mask = world.listed(x=1)
    logits = world.normal(N, world.T, V, seed=4)
    corrupted = logits.masked_fill(~used_logits(mask), torch.nan).requires_grad_()
    result = model.sequence_logp(corrupted, ids.masked_fill(~mask, -100), mask)
    gradient, = torch.autograd.grad(result.sum(), corrupted)
    assert torch.isfinite(gradient).all(), \
        "the gradient of log pi(y|x) must be finite although masked logits are NaN: 0 x NaN is NaN"
    agree(result, model.sequence_logp(logits, ids, mask),
          "log pi(y|x) must not depend on entries outside the mask: are they multiplied by 0 "
          "instead of filled?")


def test_padding_changes_nothing():
    """log pi(y|x) stays the same with three more columns of filler on the right."""
    policy = long_gpt()
    ids, mask = world.listed()
    wide_ids = F.pad(ids, (0, 3), value=1)
    wide_mask = F.pad(mask, (0, 3))
    agree(model.sequence_logp(policy(wide_ids), wide_ids, wide_mask),
          model.sequence_logp(policy(ids), ids, mask),
          "padding on the right must not change log pi(y|x): is it scored, or do earlier tokens "
          "see it?")


def test_a_batch_of_one_equals_a_batch_of_many():
    """log pi(y|x) of a row is the same alone and in a batch: rows do not see each other."""
    policy = world.gpt(seed=3)
    ids, mask = world.listed()
    alone = []
    for b in range(0, len(ids), 7):
        row, row_mask = ids[b:b + 1], mask[b:b + 1]
        alone.append(model.sequence_logp(policy(row), row, row_mask))
    agree(model.sequence_logp(policy(ids), ids, mask)[::7], torch.cat(alone),
          "log pi(y|x) of a row must not depend on the other rows of its batch")


def test_later_tokens_change_nothing_earlier():
    """Causality: the logits at position t depend only on ids[<= t].

    A sampler needs this, because it does not know the later tokens.
    """
    policy = long_gpt()
    t = 6
    ids = torch.randint(0, V, (3, 11), generator=world.generator(1))
    later_tokens = (ids[:, t + 1:] + 1) % V
    changed = torch.cat([ids[:, :t + 1], later_tokens], 1)
    agree(policy(changed)[:, :t + 1], policy(ids)[:, :t + 1],
          "logits at a position must not change with a later token: is the attention causal?")


def test_attention_sees_distances_not_positions():
    """Rotary positions: the product of a query at s and a key at t is a function of s - t.

    This function is not constant, and a rotation keeps lengths.
    """
    table = model.rotary_table(12, 5).double()
    query, key = world.normal(2, 5, seed=5)
    q = model.apply_rotary(query.expand(1, 12, 1, 5), table)[0, :, 0]        # (12, 5)
    k = model.apply_rotary(key.expand(1, 12, 1, 5), table)[0, :, 0]
    product = q @ k.T                                                        # (12, 12)
    agree(product[1:, 1:], product[:-1, :-1],
          "the product of a query and a key must not change if both move by one position: is one "
          "of the two not rotated?", tolerance=1e-6)
    assert (product[0] - product[0, 0]).abs().max() > .1, \
        "the product of a query and a key must depend on their distance"
    length = q.norm(dim=-1)
    agree(length, length.mean().expand(12), "a rotation must keep lengths", tolerance=1e-6)


def test_each_pair_of_coordinates_turns_at_its_own_frequency():
    """Rotary positions: pair i of n turns by t * 1000^(-i / n) radians at position t.

    The pair (i, i + n) is a complex number here, and turning is a product. An odd last coordinate
    stays as it is.
    """
    n, positions = 3, 9
    x = world.normal(positions, 2 * n + 1, seed=8)
    table = model.rotary_table(positions, 2 * n + 1).double()
    turned = model.apply_rotary(x[None, :, None], table)[0, :, 0]
    expected = x.clone()
    for t in range(positions):
        for i in range(n):
            z = complex(x[t, i], x[t, i + n]) * cmath.exp(1j * t * 1000 ** (-i / n))
            expected[t, i], expected[t, i + n] = z.real, z.imag
    agree(turned, expected, "is the frequency of a pair wrong, or are other coordinates paired?",
          tolerance=1e-6)


def test_half_precision_is_promoted_before_the_softmax():
    """bfloat16 logits give the float32 log-probabilities of these logits, without rounding."""
    ids, mask = world.listed(x=0)
    logits = world.normal(N, world.T, V, seed=6, scale=8.).bfloat16()
    exact = model.sequence_logp(logits.double(), ids, mask)
    result = model.sequence_logp(logits, ids, mask)
    assert result.dtype == torch.float32, \
        f"the log-softmax of bfloat16 logits must be float32, not {result.dtype}"
    agree(result, exact,
          "log pi(y|x) of half-precision logits must not be rounded: upcast_half them before the "
          "log-softmax", tolerance=1e-5)


def test_float64_stays_float64():
    """log pi(y|x) and the sequence KL of float64 models are float64."""
    policy = world.gpt(seed=1)
    ids, mask = world.listed(x=0)
    logp = model.sequence_logp(policy(ids), ids, mask)
    token_logp = model.response_token_logp(policy, ids, mask)
    kl = model.response_kl(policy, world.gpt(seed=2), ids, mask)
    types = {logp.dtype, token_logp.dtype, kl.dtype}
    assert types == {torch.float64}, f"the model is float64, but its results are {types}"


def test_response_logp_stands_where_its_token_stands():
    """response_token_logp[b, t] = log pi(ids[b, t] | ids[b, <t]) on response tokens, 0 elsewhere.

    The filler of a row has no influence.
    """
    policy = world.gpt(seed=4)
    ids, mask = world.listed()
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    expected[:, 1:] = model.token_logp(policy(ids), ids)
    agree(model.response_token_logp(policy, ids, mask), expected * mask,
          "each log-probability must be at the position of its own token: is it one place early?")


def test_response_logp_sums_to_sequence_logp():
    """sum over t of response_token_logp = sequence_logp: both routes give the same number."""
    policy = world.gpt(seed=5)
    ids, mask = world.listed()
    agree(model.response_token_logp(policy, ids, mask).sum(1),
          model.sequence_logp(policy(ids), ids, mask),
          "response_token_logp(...).sum(1) must equal sequence_logp(...)")


# ----------------------------------------------------------------------------------------------- KL
def enumerated_kl(policy, ref, prompt):
    """KL(pi || pi_ref) of the responses to a prompt, nats, by the chain rule over all prefixes.

    Each prefix adds its probability times the KL of the two next-token distributions after it.
    """
    not_end = [token for token in range(V) if token != END]
    prefixes = {tuple(prompt): 1.}                           # prefix -> its probability under pi
    total = 0.
    for _ in range(MAX_TOKENS):
        longer = {}
        for prefix, probability in prefixes.items():
            p = policy(torch.tensor([prefix]))[0, -1].softmax(0)             # (V,)
            q = ref(torch.tensor([prefix]))[0, -1].softmax(0)
            total += probability * (p * (p / q).log()).sum()
            for token in not_end:
                longer[(*prefix, token)] = probability * p[token]
        prefixes = longer
    return total


def test_mean_of_the_sampled_log_ratio_is_the_kl():
    """E_{y~pi}[log pi(y|x) - log pi_ref(y|x)] = KL(pi || pi_ref).

    The KL on the right is the sum of the tokens' own KL divergences (chain rule).
    """
    policy, ref = world.gpt(seed=1), world.gpt(seed=2)
    ids, mask = world.listed()
    logp = model.sequence_logp(policy(ids), ids, mask).view(X, N)
    ref_logp = model.sequence_logp(ref(ids), ids, mask).view(X, N)
    expected = [enumerated_kl(policy, ref, prompt) for prompt in world.PROMPTS]
    agree(world.expectation(logp, logp - ref_logp), torch.stack(expected),
          "E_pi[log pi/pi_ref] must be KL(pi || pi_ref): is the sign or the order wrong?")


def test_mean_of_sequence_kl_is_the_kl():
    """E_{y~pi}[sequence_kl] = KL(pi || pi_ref) (footnote 3).

    KL(pi_ref || pi) and -KL(pi || pi_ref) are other numbers.
    """
    policy, ref = world.gpt(seed=1), world.gpt(seed=2)
    ids, mask = world.listed()
    estimate = model.sequence_kl(policy(ids), ref(ids), mask).view(X, N)
    logp, ref_logp = world.table(policy), world.table(ref)
    forward, reverse = world.kl(logp, ref_logp), world.kl(ref_logp, logp)
    assert ((forward - reverse).abs() > .01).all(), \
        "this test needs two models whose KL differs between the two directions"
    agree(world.expectation(logp, estimate), forward,
          "E_pi[sequence_kl] must be KL(pi || pi_ref): is it the other direction, the other sign, "
          "a mean over tokens, or read at the wrong positions?")


def test_token_kl_sums_over_the_whole_vocabulary():
    """KL of the next token = sum over v of pi(v) log(pi(v) / pi_ref(v)): a loop over v."""
    logits = world.normal(3, 2, V, seed=1, scale=2.)
    ref_logits = world.normal(3, 2, V, seed=2, scale=2.)
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    expected = sum(p[..., v] * (p[..., v].log() - q[..., v].log()) for v in range(V))
    agree(model.token_kl(logits, ref_logits), expected,
          "token_kl must be sum_v pi(v) log(pi(v)/pi_ref(v)): are the weights those of pi?")


def test_sequence_kl_ignores_what_is_masked():
    """NaN in logits that predict no response token changes no sequence KL."""
    ids, mask = world.listed(x=0)
    logits = world.normal(N, world.T, V, seed=1)
    ref_logits = world.normal(N, world.T, V, seed=2)
    unused = ~used_logits(mask)
    corrupted = logits.masked_fill(unused, torch.nan)
    corrupted_ref = ref_logits.masked_fill(unused, torch.nan)
    expected = 0.
    for t in range(1, world.T):
        expected += model.token_kl(logits[:, t - 1], ref_logits[:, t - 1]) * mask[:, t]
    agree(model.sequence_kl(corrupted, corrupted_ref, mask), expected,
          "sequence_kl must be the sum over exactly the positions that predict a response token")


def test_response_kl_is_the_sequence_kl():
    """response_kl of two models = sequence_kl of their logits; of a model and itself, it is 0."""
    policy, ref = world.gpt(seed=3), world.gpt(seed=4)
    ids, mask = world.listed()
    result = torch.stack([model.response_kl(policy, ref, ids, mask),
                          model.response_kl(policy, policy, ids, mask)])
    kl = model.sequence_kl(policy(ids), ref(ids), mask)
    agree(result, torch.stack([kl, torch.zeros_like(kl)]),
          "response_kl must be sequence_kl: are policy and reference swapped?")


# ------------------------------------------------------------------------------- scoring in batches
def test_scoring_in_batches_is_scoring_at_once():
    """map_batches cuts rows into batches and drops filler columns; log pi(y|x) stays the same."""
    policy = world.gpt(seed=6)
    ids, mask = world.listed()

    def logp(ids, mask):
        return model.sequence_logp(policy(ids), ids, mask)

    agree(model.map_batches(logp, ids, mask, batch=11), logp(ids, mask),
          "map_batches must neither lose nor move a row: is a response token cut off?")


def test_scoring_tokens_in_batches_keeps_their_places():
    """map_batches keeps the width of per-token results, and each number at its own token.

    The rows have different lengths.
    """
    policy = world.gpt(seed=6)
    ids, mask = world.listed()

    def token_logp(ids, mask):
        return model.response_token_logp(policy, ids, mask)

    agree(model.map_batches(token_logp, ids, mask, batch=11), token_logp(ids, mask),
          "map_batches must neither lose nor move a token")


# -------------------------------------------------------------------------------- the start and SFT
def test_tokens_start_apart():
    """At the start, any two token embeddings are at least 1 apart.

    SFT gives words of one role no reason to separate, so they must start apart.
    """
    policy = model.GPT(model.GPTConfig(97, 20, 2, 2, 64), world.generator(1))
    distance = torch.pdist(policy.token.weight).min().item()
    assert distance > 1, \
        f"two tokens start only {distance:.2f} apart: training after SFT can hardly separate them"


def test_the_learning_rate_warms_up_and_comes_down():
    """The learning rate rises linearly over the first tenth of the steps, then falls linearly.

    It never exceeds the peak: a loop over 40 steps.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.)
    scheduler = model.lr_schedule(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    warm_up = [3. * (step + 1) / 4 for step in range(4)]
    decay = [3. * (40 - step) / 36 for step in range(4, 40)]
    agree(torch.tensor(rates, dtype=torch.float64),
          torch.tensor(warm_up + decay, dtype=torch.float64),
          "the learning rate must warm up over a tenth of the steps, then fall to 0")


def test_fine_tuning_learns_the_texts_and_no_filler():
    """SFT on two texts that differ from their second token on gives each probability 1/2.

    SFT never learns filler.
    """
    ids = torch.tensor([[1, 2, 0, 4, 3, 3], [1, 3, 4, 3, 3, 3]])
    lengths = torch.tensor([4, 3])
    policy = world.gpt(seed=1, spread=1.)
    train.sft(policy, ids, lengths, [[0, 1]] * 150, 2e-2)
    columns = torch.arange(6)
    mask = (columns < lengths[:, None]) & (columns > 0)
    probability = model.sequence_logp(policy(ids), ids, mask).exp()
    filler = policy(ids)[1, 3].softmax(0)[3]
    assert filler < .9, \
        f"after END the model writes filler with probability {filler:.2f}: SFT must not score it"
    agree(probability, torch.full((2,), .5),
          "SFT must learn the frequencies of the texts, token by token", tolerance=2e-2)
