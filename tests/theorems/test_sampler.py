"""The sampler against enumeration and a slow loop: its cache, temperature, rows and response mask.

Shapes: B sequences, P prompt columns, T tokens, V vocabulary; N listed responses (world.py).
"""
import torch
import torch.nn.functional as F

import model
import world
from test_log_probabilities import long_gpt
from world import END, MAX_TOKENS, N, V, agree


def ragged_prompts(count=20):
    """Prompts (count, 7) of 2 to 7 tokens without END, and their lengths (count,)."""
    lengths = torch.arange(count) % 6 + 2
    ids = torch.randint(0, END, (count, 7), generator=world.generator(5))
    return ids.masked_fill(torch.arange(7) >= lengths[:, None], END), lengths


def slow_token(logits, temperature, u):
    """The specification of `sample_token` for one row: logits (V,), u in [0, 1) -> a token.

    The first token whose cumulative probability exceeds u; at temperature 0 the argmax.
    """
    if temperature == 0:
        return int(logits.argmax())
    p = (logits / temperature).softmax(0).tolist()
    for token in range(V):
        if sum(p[:token + 1]) > u:
            return token
    return V - 1


def slow_sample(policy, prompts, lengths, max_tokens, temperature, generator):
    """The specification of `sample`: one loop over positions and rows -> ids (B, T).

    There is no cache, and no row leaves the batch. Like `sample`, it takes B uniform numbers for
    each position.
    """
    B, T = len(prompts), int(lengths.max()) + max_tokens
    lengths = lengths.tolist()
    rows = [prompt[:n].tolist() for prompt, n in zip(prompts, lengths)]
    ended = [False] * B
    for t in range(min(lengths), T):
        u = torch.rand(B, generator=generator).tolist()
        for b, row in enumerate(rows):
            in_prompt = len(row) > t
            if in_prompt or ended[b]:
                continue
            logits = policy(torch.tensor([row]))[0, -1]
            row.append(slow_token(logits, temperature, u[b]))
            ended[b] = row[-1] == END or len(row) == lengths[b] + max_tokens
    return torch.tensor([row + [END] * (T - len(row)) for row in rows])


# ---------------------------------------------------------------------------------------- the cache
def test_hidden_states_in_pieces_are_those_of_the_whole():
    """With a key/value cache, hidden states do not depend on how the tokens are cut into pieces.

    Here five tokens come first, then one at a time.
    """
    policy = long_gpt()
    ids = torch.randint(0, V, (3, 9), generator=world.generator(2))
    shape = 2, 3, 3, 9, 4                                    # keys and values, B, heads, T, D
    caches = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in policy.blocks]
    parts = [policy.hidden(ids[:, :5], caches, 0)]
    for t in range(5, 9):
        parts.append(policy.hidden(ids[:, t:t + 1], caches, t))
    agree(torch.cat(parts, 1), policy.hidden(ids),
          "the cache must not change the hidden states: are keys, values or positions off by one?")


def test_cached_sampling_equals_uncached_sampling():
    """`sample` returns the ids of a loop without cache that uses the same uniform numbers.

    Rows leave the batch of `sample` when they end; this has no influence on the result.
    """
    policy = long_gpt()
    prompts, lengths = ragged_prompts()
    ids = model.sample(policy, prompts, lengths, 13, END, .7, world.generator(8))
    expected = slow_sample(policy, prompts, lengths, 13, .7, world.generator(8))
    ends = (expected == END).int().argmax(1) - lengths
    assert len(set(ends.tolist())) > 5, "this test needs rows that end at different positions"
    missing = expected.shape[1] - ids.shape[1]               # `sample` stops with its last row
    agree(F.pad(ids, (0, missing), value=END), expected,
          "the sampler must agree with a loop without cache: is the cache position or the "
          "temperature wrong, or are rows mixed up when some of them leave?")


# ---------------------------------------------------------------------------------- the temperature
def test_temperature_zero_is_argmax():
    """At temperature 0 each token is the most probable one, and random numbers have no effect."""
    policy = long_gpt(seed=9)
    prompts, lengths = ragged_prompts(count=11)
    expected = slow_sample(policy, prompts, lengths, 8, 0, world.generator(1))
    agree(model.sample(policy, prompts, lengths, 8, END, 0, world.generator(2)), expected,
          "temperature 0 must be argmax")


def test_temperature_divides_the_logits():
    """Over a fine grid of u, the frequencies of tokens are softmax(logits / temperature).

    The tolerance is two steps of the grid.
    """
    steps, temperature = 4001, .6
    logits = world.normal(V, seed=3)
    u = (torch.arange(steps) + .5) / steps
    tokens = model.sample_token(logits.expand(steps, V), temperature, u)
    frequency = torch.bincount(tokens, minlength=V).double() / steps
    agree(frequency, (logits / temperature).softmax(0),
          "sample_token must invert the distribution function of softmax(logits / temperature)",
          tolerance=2 / steps)


# --------------------------------------------------------------------------------- the distribution
def merge_rare(counts, common):
    """The counts of common responses, then the sum of all others: (N,), bool (N,) -> (M + 1,)."""
    return torch.cat([counts[common], counts[~common].sum()[None]])


def test_sampled_responses_follow_the_enumerated_distribution():
    """20,000 responses to a prompt fit pi(y|x): chi-square within 6 standard deviations.

    The rarest tenth of the responses counts as one.
    """
    policy = world.gpt(seed=1)
    count = 20_000
    prompts = torch.tensor([world.PROMPTS[1]]).expand(count, 3)
    lengths = torch.full((count,), 3)
    ids = model.sample(policy, prompts, lengths, MAX_TOKENS, END, generator=world.generator(4))
    number_of = {}                                           # response with its filler -> 0..N-1
    for n, y in enumerate(world.RESPONSES):
        filled = y + (END,) * (MAX_TOKENS - len(y))
        number_of[filled] = n
    sampled = torch.tensor([number_of[tuple(y)] for y in ids[:, 3:].tolist()])
    observed = torch.bincount(sampled, minlength=N).double()
    expected = count * world.table(policy)[1].detach().exp()
    common = expected > expected.quantile(.1)
    observed, expected = merge_rare(observed, common), merge_rare(expected, common)
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    degrees = len(expected) - 1
    assert abs(chi_square - degrees) < 6 * (2 * degrees) ** .5, \
        f"samples must follow pi(y|x): chi-square {chi_square:.0f} on {degrees} degrees of freedom"


# ------------------------------------------------------------------------------ rows and their mask
def test_a_row_is_its_prompt_then_its_response_then_end():
    """Row b of `sample` holds its prompt from position 0, its response right after it, then END.

    A response has at most max_tokens tokens and stops at its first END.
    """
    policy = long_gpt()
    prompts, lengths = ragged_prompts()
    max_tokens = 9
    ids = model.sample(policy, prompts, lengths, max_tokens, END, generator=world.generator(3))
    rows = ids.tolist()
    for row, prompt, n in zip(rows, prompts.tolist(), lengths.tolist()):
        response = row[n:n + max_tokens]
        stop = response.index(END) if END in response else max_tokens
        assert row[:n] == prompt[:n], f"{row} must start with its prompt {prompt[:n]}"
        assert set(row[n + stop:]) <= {END}, \
            f"{row}, with a prompt of {n} tokens, must hold only END after its response: " \
            "does END stop a row?"
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) == 7 + max_tokens, \
        f"all rows must have {7 + max_tokens} columns, not {len(rows[0])}"


def test_each_row_may_have_a_limit_of_its_own():
    """With max_tokens (B,) a row is the one without a limit, cut after its own number of tokens."""
    policy = long_gpt()
    prompts, lengths = ragged_prompts()
    limits = torch.arange(len(prompts)) % 9 + 1
    rows, whole_rows = (model.sample(policy, prompts, lengths, max_tokens, END,
                                     generator=world.generator(3)).tolist()
                        for max_tokens in (limits, 9))
    for row, whole, n, limit in zip(rows, whole_rows, lengths.tolist(), limits.tolist()):
        row, whole = (x + [END] * (n + 9 - len(x)) for x in (row, whole))     # of equal length
        assert row[:n + limit] == whole[:n + limit], f"{row} changed with its limit, {limit}"
        assert set(row[n + limit:]) <= {END}, f"{row} has more than {limit} response tokens"


def test_response_mask_ends_with_the_first_end_token():
    """The response starts after the prompt and ends with its first END or after max_tokens.

    This END belongs to it: a loop over entries. Prompts may contain END too.
    """
    ids = torch.randint(0, V, (23, 12), generator=world.generator(7))
    ids[:, 4] = 0                                            # no END in this column
    lengths = torch.arange(23) % 4 + 2
    max_tokens = 5
    expected = torch.zeros(ids.shape, dtype=torch.bool)
    for b, n in enumerate(lengths.tolist()):
        for t in range(n, n + max_tokens):
            expected[b, t] = END not in ids[b, n:t].tolist()
    agree(model.response_mask(ids, lengths, max_tokens, END), expected,
          "response_mask must run from the end of the prompt through the first END: does it hold "
          "the prompt, the padding or a token past max_tokens, or does it drop the first or the "
          "end token?")


def test_responses_to_a_prompt_stand_together():
    """`generate` returns `count` rows for each prompt, prompt by prompt, and their mask.

    The rows of all batches have the same width.
    """
    policy = long_gpt()
    prompts, lengths = ragged_prompts(count=5)
    max_tokens = 6
    ids, mask = model.generate(policy, (prompts[:, :6], lengths), 3, max_tokens, END,
                               world.generator(1), batch=4)
    for n, row in enumerate(ids.tolist()):
        prompt = prompts[n // 3, :lengths[n // 3]].tolist()
        assert row[:len(prompt)] == prompt, f"row {n} must answer prompt {n // 3}: {row}"
    expected = model.response_mask(ids, lengths.repeat_interleave(3), max_tokens, END)
    agree(mask, expected, "the mask of `generate` must be the response mask of its own rows")
