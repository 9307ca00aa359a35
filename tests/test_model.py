"""The model: its probabilities, its KL and its sampler, against enumeration and slow loops."""
import torch

import model
import world
from world import END, MAX_TOKENS, N, V, X, agree


def long_gpt(seed=3):
    """A GPT with room for responses of many tokens; END is rare enough that they end at different places."""
    policy = model.GPT(model.GPTConfig(V, 31, 2, 3, 12), world.generator(seed)).double()
    with torch.no_grad():
        for p in policy.blocks.parameters():
            p *= 8. if p.dim() == 2 else 1.
    return policy


def ragged_prompts(count=20):
    """Prompts (B, 7) of 2 to 7 tokens, none of them END, and their lengths (B,)."""
    lengths = torch.arange(count) % 6 + 2
    ids = torch.randint(0, END, (count, 7), generator=world.generator(5))
    return ids.masked_fill(torch.arange(7) >= lengths[:, None], END), lengths


def slow_sample(policy, prompts, lengths, max_tokens, temperature, generator):
    """The specification of `sample`: no cache, no row leaves, a loop over rows, the distribution function a running sum."""
    T, B = int(lengths.max()) + max_tokens, len(prompts)
    rows = [prompts[b, :n].tolist() for b, n in enumerate(lengths.tolist())]
    open_rows = set(range(B))
    for t in range(int(lengths.min()), T):
        u = torch.rand(B, generator=generator).tolist()
        for b in [b for b in sorted(open_rows) if len(rows[b]) == t]:
            logits = policy(torch.tensor([rows[b]]))[0, -1]
            p = (torch.eye(V)[logits.argmax()] if temperature == 0 else (logits / temperature).softmax(0)).tolist()
            token = next((v for v in range(V) if sum(p[:v + 1]) > u[b]), V - 1)
            rows[b].append(token)
            if token == END or len(rows[b]) == lengths[b] + max_tokens:
                open_rows.remove(b)
    return torch.tensor([row + [END] * (T - len(row)) for row in rows])


# ----------------------------------------------------------------------------------------------------- log-probabilities
def test_probabilities_of_all_responses_sum_to_one():
    """sum over y of pi(y|x) = 1, where pi(y|x) is the product of the probabilities of the response tokens, END included."""
    ids, _ = world.listed()
    mask = model.response_mask(ids, world.prompts()[1].repeat_interleave(N), MAX_TOKENS, END)
    total = model.sequence_logp(world.gpt(seed=1)(ids), ids, mask).exp().view(X, N).sum(1)
    agree(total, torch.ones(X),
          "sum over y of pi(y|x) must be 1: are the labels shifted by one, does the mask count padding or the "
          "prompt or drop the first or the last response token, is it a mean for a sum, is the softmax over another axis?")


def test_token_logp_is_read_one_position_before_the_token():
    """token_logp[b, t-1] = log softmax(logits[b, t-1])[ids[b, t]], a loop over every entry."""
    B, T = 3, 4
    logits, ids = world.normal(B, T, V, seed=1, scale=4.), torch.tensor([[0, 1, 2, 3], [4, 4, 0, 2], [3, 1, 1, 0]])
    slow = torch.empty(B, T - 1, dtype=torch.float64)
    for b in range(B):
        for t in range(1, T):
            weights = [logits[b, t - 1, v].exp() for v in range(V)]
            slow[b, t - 1] = (weights[ids[b, t]] / sum(weights)).log()
    agree(model.token_logp(logits, ids), slow,
          "entry t-1 must be log pi(ids[t] | ids[<t]): labels not shifted, or softmax over time?")


def test_sequence_logp_is_the_sum_over_response_tokens_alone():
    """log pi(y|x) = sum over response tokens of log pi(token | what came before): a sum, not a mean, and no prompt in it."""
    policy, (ids, mask) = world.gpt(seed=2), world.listed()
    logp = model.token_logp(policy(ids), ids)
    slow = [sum(logp[b, t - 1] for t in range(ids.shape[1]) if mask[b, t]) for b in range(len(ids))]
    agree(model.sequence_logp(policy(ids), ids, mask), torch.stack(slow),
          "log pi(y|x) must sum over exactly the response tokens: prompt or padding scored, a token dropped, or a mean?")


def test_masked_entries_are_never_read():
    """NaN logits and ids out of range change nothing where they predict or are no response token, not even the gradient."""
    ids, mask = world.listed(x=1)
    logits = world.normal(N, world.T, V, seed=4)
    read = torch.cat([mask[:, 1:], torch.zeros(N, 1, dtype=torch.bool)], 1)[..., None]
    spoilt = logits.masked_fill(~read, torch.nan).requires_grad_()
    result = model.sequence_logp(spoilt, ids.masked_fill(~mask, -100), mask)
    gradient, = torch.autograd.grad(result.sum(), spoilt)
    assert torch.isfinite(gradient).all(), \
        "the gradient of log pi(y|x) must be finite although masked logits are NaN: 0 x NaN is NaN"
    agree(result, model.sequence_logp(logits, ids, mask),
          "log pi(y|x) depends on entries outside the mask: multiplied, not filled?")


def test_padding_changes_nothing():
    """log pi(y|x) is the same with three more columns of filler on the right."""
    policy, (ids, mask) = long_gpt(), world.listed()
    wide, wide_mask = torch.nn.functional.pad(ids, (0, 3), value=1), torch.nn.functional.pad(mask, (0, 3))
    agree(model.sequence_logp(policy(wide), wide, wide_mask), model.sequence_logp(policy(ids), ids, mask),
          "padding on the right changed log pi(y|x): is it scored, or seen by the tokens before it?")


def test_a_batch_of_one_equals_a_batch_of_many():
    """Rows of a batch do not see each other: log pi(y|x) of a row alone is its log pi(y|x) among others."""
    policy, (ids, mask) = world.gpt(seed=3), world.listed()
    rows = range(0, len(ids), 7)
    alone = torch.cat([model.sequence_logp(policy(ids[b:b + 1]), ids[b:b + 1], mask[b:b + 1]) for b in rows])
    agree(model.sequence_logp(policy(ids), ids, mask)[::7], alone, "a row's log pi(y|x) depends on the other rows of its batch")


def test_later_tokens_change_nothing_earlier():
    """Causality: the logits at position t depend on ids[<= t] alone; a sampler could not use them otherwise."""
    policy, t = long_gpt(), 6
    ids = torch.randint(0, V, (3, 11), generator=world.generator(1))
    other = torch.cat([ids[:, :t + 1], (ids[:, t + 1:] + 1) % V], 1)
    agree(policy(other)[:, :t + 1], policy(ids)[:, :t + 1],
          "logits at a position changed with a later token: is the attention causal?")


def test_attention_sees_distances_not_positions():
    """Rotary positions: the product of a query turned at s and a key turned at t is a function of s - t, and not a constant one."""
    turn = model.rotations(12, 5).double()
    q, k = (model.rotate(x.expand(1, 12, 1, 5), turn)[:, :, 0] for x in world.normal(2, 5, seed=5))
    product = (q @ k.transpose(-1, -2))[0]
    agree(product[1:, 1:], product[:-1, :-1], "two tokens at the same distance, one position later, see each other otherwise: is a side not turned?",
          tolerance=1e-6)
    assert (product[0] - product[0, 0]).abs().max() > .1, "the product does not depend on the distance"
    agree(q.norm(dim=-1), q.norm(dim=-1).mean().expand(1, 12), "a rotation keeps lengths", tolerance=1e-6)


def test_half_precision_is_promoted_before_the_softmax():
    """bfloat16 logits give the float32 log-probabilities of those logits, not sums rounded at every step."""
    (ids, mask), logits = world.listed(x=0), world.normal(N, world.T, V, seed=6, scale=8.).bfloat16()
    exact = model.sequence_logp(logits.double(), ids, mask)
    result = model.sequence_logp(logits, ids, mask)
    assert result.dtype == torch.float32, f"the log-softmax of bfloat16 logits must be float32, not {result.dtype}"
    agree(result, exact, "log pi(y|x) of half-precision logits was rounded: promote before the log-softmax", tolerance=1e-5)


def test_float64_stays_float64():
    """Nothing narrows a float64 model on the way from its logits to log pi(y|x), nor to the sequence KL."""
    policy, (ids, mask) = world.gpt(seed=1), world.listed(x=0)
    types = {model.sequence_logp(policy(ids), ids, mask).dtype, model.response_logp(policy, ids, mask).dtype,
             model.response_kl(policy, world.gpt(seed=2), ids, mask).dtype}
    assert types == {torch.float64}, f"float64 in, {types} out"


def test_response_logp_stands_where_its_token_stands():
    """response_logp[b, t] is log pi(ids[b, t] | ids[b, <t]) on response tokens and 0 elsewhere, whatever filler is there."""
    policy, (ids, mask) = world.gpt(seed=4), world.listed()
    slow = torch.zeros(mask.shape, dtype=torch.float64)
    slow[:, 1:] = model.token_logp(policy(ids), ids)
    agree(model.response_logp(policy, ids, mask), slow * mask, "response_logp: an entry stands at another token's place")


def test_response_logp_sums_to_sequence_logp():
    """sum over t of response_logp = sequence_logp of the model's logits: the cheap way and the plain way are one number."""
    policy, (ids, mask) = world.gpt(seed=5), world.listed()
    agree(model.response_logp(policy, ids, mask).sum(1), model.sequence_logp(policy(ids), ids, mask),
          "response_logp(...).sum(1) must be sequence_logp(...)")


# ------------------------------------------------------------------------------------------------------------------- KL
def test_mean_of_the_sampled_log_ratio_is_the_kl():
    """E_{y~pi}[log pi(y|x) - log pi_ref(y|x)] = KL(pi || pi_ref), where KL is the chain of the tokens' own KL divergences."""
    policy, ref, (ids, mask) = world.gpt(seed=1), world.gpt(seed=2), world.listed()
    logp = model.sequence_logp(policy(ids), ids, mask).view(X, N)
    log_ratio = logp - model.sequence_logp(ref(ids), ids, mask).view(X, N)
    chain = []
    for x in world.PROMPTS:
        live = [(tuple(x), 1.)]
        total = 0.
        for _ in range(MAX_TOKENS):
            p = {s: policy(torch.tensor([s]))[0, -1].softmax(0) for s, _ in live}
            q = {s: ref(torch.tensor([s]))[0, -1].softmax(0) for s, _ in live}
            total += sum(m * (p[s] * (p[s] / q[s]).log()).sum() for s, m in live)
            live = [(s + (v,), m * p[s][v]) for s, m in live for v in range(V) if v != END]
        chain.append(total)
    agree(world.expectation(logp, log_ratio), torch.stack(chain), "E_pi[log pi/pi_ref] must be KL(pi || pi_ref): sign or order?")


def test_mean_of_sequence_kl_is_the_kl():
    """E_{y~pi}[sequence_kl] = KL(pi || pi_ref) (footnote 3); its twins, KL(pi_ref || pi) and -KL, are other numbers."""
    policy, ref, (ids, mask) = world.gpt(seed=1), world.gpt(seed=2), world.listed()
    estimate = model.sequence_kl(policy(ids), ref(ids), mask).view(X, N)
    logp, ref_logp = world.table(policy), world.table(ref)
    assert ((world.kl(logp, ref_logp) - world.kl(ref_logp, logp)).abs() > .01).all(), \
        "the two KLs must differ for this test to tell"
    agree(world.expectation(logp, estimate), world.kl(logp, ref_logp),
          "E_pi[sequence_kl] must be KL(pi || pi_ref): other direction, "
          "other sign, a mean over tokens, or the wrong positions?")


def test_token_kl_sums_over_the_whole_vocabulary():
    """KL of the next token = sum over v of pi(v) log(pi(v) / pi_ref(v)), a loop; never negative."""
    logits, ref_logits = world.normal(3, 2, V, seed=1, scale=2.), world.normal(3, 2, V, seed=2, scale=2.)
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    slow = sum(p[..., v] * (p[..., v].log() - q[..., v].log()) for v in range(V))
    agree(model.token_kl(logits, ref_logits), slow, "token_kl must be sum_v pi(v) log(pi(v)/pi_ref(v)), weighted by pi")


def test_sequence_kl_ignores_what_is_masked():
    """NaN in logits that predict no response token changes no sequence KL."""
    ids, mask = world.listed(x=0)
    logits, ref_logits = (world.normal(N, world.T, V, seed=s) for s in (1, 2))
    read = torch.cat([mask[:, 1:], torch.zeros(N, 1, dtype=torch.bool)], 1)[..., None]
    spoilt = [a.masked_fill(~read, torch.nan) for a in (logits, ref_logits)]
    slow = sum(model.token_kl(logits[:, t - 1], ref_logits[:, t - 1]) * mask[:, t] for t in range(1, world.T))
    agree(model.sequence_kl(*spoilt, mask), slow,
          "sequence_kl must sum over positions that predict a response token, and no others")


def test_response_kl_is_the_sequence_kl():
    """response_kl of two models is sequence_kl of their logits, and 0 between a model and itself."""
    policy, ref, (ids, mask) = world.gpt(seed=3), world.gpt(seed=4), world.listed()
    both = torch.stack([model.response_kl(policy, ref, ids, mask), model.response_kl(policy, policy, ids, mask)])
    slow = model.sequence_kl(policy(ids), ref(ids), mask)
    agree(both, torch.stack([slow, torch.zeros_like(slow)]), "response_kl must be sequence_kl, policy first")


# ----------------------------------------------------------------------------------------------------------- fine-tuning
def test_tokens_start_apart():
    """No two embeddings start nearer to each other than 1, as large as SFT makes them: it has no reason to part words of one role."""
    policy = model.GPT(model.GPTConfig(97, 20, 2, 2, 64), world.generator(1))
    distance = torch.pdist(policy.token.weight).min().item()
    assert distance > 1, f"two tokens start {distance:.2f} apart: what is learned after SFT could hardly tell them from each other"


def test_the_learning_rate_warms_up_and_comes_down():
    """Linear from 0 over the first tenth of the steps, never above the peak, then linear down; a loop over 40 steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.)
    schedule, rates = model.schedule(optimizer, 40), []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    slow = [3. * (s + 1) / 4 if s < 4 else 3. * (40 - s) / 36 for s in range(40)]
    agree(torch.tensor(rates, dtype=torch.float64), torch.tensor(slow, dtype=torch.float64),
          "warm-up over a tenth, then down to 0")


def test_fine_tuning_learns_the_texts_and_no_filler():
    """SFT on two texts that part at their second token ends at log 2 for that choice and 0 for the rest; filler is never
    learned."""
    ids, lengths = torch.tensor([[1, 2, 0, 4, 3, 3], [1, 3, 4, 3, 3, 3]]), torch.tensor([4, 3])
    policy = model.fit(world.gpt(seed=1, spread=1.), ids, lengths, [[0, 1]] * 150, 2e-2)
    mask = (torch.arange(6) < lengths[:, None]) & (torch.arange(6) > 0)
    logp, filler = model.sequence_logp(policy(ids), ids, mask).exp(), policy(ids)[1, 3].softmax(0)[3]
    assert filler < .9, f"after END the model writes filler with probability {filler:.2f}: SFT must not score padding"
    agree(logp, torch.full((2,), .5), "SFT must learn the texts' own frequencies, token by token", tolerance=2e-2)


# ------------------------------------------------------------------------------------------------------------ the sampler
def test_hidden_states_in_pieces_are_those_of_the_whole():
    """With a key/value cache, five tokens and then one at a time give the hidden states of all of them at once."""
    policy, ids = long_gpt(), torch.randint(0, V, (3, 9), generator=world.generator(2))
    caches = [torch.full((2, 3, 3, 9, 4), torch.nan, dtype=torch.float64) for _ in policy.blocks]
    parts = [policy.hidden(ids[:, :5], caches, 0)] + [policy.hidden(ids[:, t:t + 1], caches, t) for t in range(5, 9)]
    agree(torch.cat(parts, 1), policy.hidden(ids), "the cache gives other hidden states: keys, values or positions off by one?")


def test_cached_sampling_equals_uncached_sampling():
    """`sample` writes what a loop without a cache writes with the same uniforms, though rows leave its batch as they end."""
    policy, (prompts, lengths) = long_gpt(), ragged_prompts()
    ids = model.sample(policy, prompts, lengths, 13, END, .7, world.generator(8))
    slow = slow_sample(policy, prompts, lengths, 13, .7, world.generator(8))
    ended = (slow == END).int().argmax(1) - lengths
    assert len(set(ended.tolist())) > 5, "rows must end at different places for this test to tell"
    ids = torch.nn.functional.pad(ids, (0, slow.shape[1] - ids.shape[1]), value=END)    # it stops when the last row has
    agree(ids, slow, "the sampler disagrees with a loop without cache: cache position, temperature, or rows mixed as some leave?")


def test_temperature_zero_is_argmax():
    """At temperature 0 each token is the most probable one, and no random number is used."""
    policy, (prompts, lengths) = long_gpt(seed=9), ragged_prompts(count=11)
    slow = slow_sample(policy, prompts, lengths, 8, 0, world.generator(1))
    agree(model.sample(policy, prompts, lengths, 8, END, 0, world.generator(2)), slow, "temperature 0 must be argmax")


def test_temperature_divides_the_logits():
    """Over a fine grid of u, `draw` gives each token in proportion to softmax(logits / temperature), off by a grid step at
    most."""
    steps, temperature, logits = 4001, .6, world.normal(V, seed=3)
    tokens = model.draw(logits.expand(steps, V), temperature, (torch.arange(steps) + .5) / steps)
    frequency = torch.bincount(tokens, minlength=V).double() / steps
    agree(frequency, (logits / temperature).softmax(0),
          "draw must invert the distribution function of softmax(logits / temperature)",
          tolerance=2 / steps)


def test_sampled_responses_follow_the_enumerated_distribution():
    """20,000 responses to a prompt fit pi(y|x): chi-square within 6 standard deviations (the rarest tenth taken together)."""
    policy, count = world.gpt(seed=1), 20_000
    ids = model.sample(policy, torch.tensor([world.PROMPTS[1]]).expand(count, 3), torch.full((count,), 3), MAX_TOKENS, END,
                       generator=world.generator(4))
    expected = count * world.table(policy)[1].detach().exp()
    key = {(y + (END,) * MAX_TOKENS)[:MAX_TOKENS]: n for n, y in enumerate(world.RESPONSES)}
    observed = torch.bincount(torch.tensor([key[tuple(row)] for row in ids[:, 3:].tolist()]), minlength=N).double()
    often = expected > expected.quantile(.1)
    e, o = (torch.cat([a[often], a[~often].sum()[None]]) for a in (expected, observed))
    chi, freedom = ((o - e) ** 2 / e).sum().item(), len(e) - 1
    assert abs(chi - freedom) < 6 * (2 * freedom) ** .5, \
        f"samples do not follow pi(y|x): chi-square {chi:.0f} on {freedom} degrees"


def test_a_row_is_its_prompt_then_its_response_then_end():
    """Row b of `sample`: the prompt from 0, right after it at most max_tokens up to the first END, nothing but END from there."""
    policy, (prompts, lengths), most = long_gpt(), ragged_prompts(), 9
    rows = model.sample(policy, prompts, lengths, most, END, generator=world.generator(3)).tolist()
    for row, prompt, n in zip(rows, prompts.tolist(), lengths.tolist()):
        response = row[n:n + most]
        stop = response.index(END) if END in response else most
        assert row[:n] == prompt[:n], f"the prompt {prompt[:n]} is not at the start of {row}"
        assert set(row[n + stop:]) <= {END}, f"after its response, {row} (prompt of {n}) must hold END alone: END must stop a row"
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) == 7 + most, f"{len(rows[0])} columns, not {7 + most}"


def test_response_mask_ends_with_the_first_end_token():
    """The response: at most max_tokens from the end of the prompt, up to the first END, that included; a loop over entries."""
    ids = torch.randint(0, V, (23, 12), generator=world.generator(7)) * (torch.arange(12) != 4)    # END may be in a prompt too
    lengths, most = torch.arange(23) % 4 + 2, 5
    slow = torch.zeros(ids.shape, dtype=torch.bool)
    for b, n in enumerate(lengths.tolist()):
        for t in range(n, n + most):
            slow[b, t] = END not in ids[b, n:t].tolist()
    agree(model.response_mask(ids, lengths, most, END), slow,
          "response_mask must run from the prompt through the first END: is the "
          "prompt, the padding or a token past max_tokens in it, or the first or the end token out?")


def test_responses_to_a_prompt_stand_together():
    """`respond` gives `count` rows a prompt, prompt by prompt, the same width from every batch, and the mask of its own rows."""
    policy, (prompts, lengths), most = long_gpt(), ragged_prompts(count=5), 6
    ids, mask = model.respond(policy, (prompts[:, :6], lengths), 3, most, END, world.generator(1), batch=4)
    for n, row in enumerate(ids):
        a = int(lengths[n // 3])
        assert row[:a].tolist() == prompts[n // 3, :a].tolist(), f"row {n} must answer prompt {n // 3}: {row.tolist()}"
    agree(mask, model.response_mask(ids, lengths.repeat_interleave(3), most, END), "respond's mask must be that of its own rows")


def test_scoring_in_batches_is_scoring_at_once():
    """score_batches cuts rows into batches and columns to what the mask needs; log pi(y|x) does not notice."""
    policy, (ids, mask) = world.gpt(seed=6), world.listed()
    result = model.score_batches(lambda a, b: model.sequence_logp(policy(a), a, b), ids, mask, batch=11)
    agree(result, model.sequence_logp(policy(ids), ids, mask), "score_batches lost, cut or moved a row: is a response token cut off?")


def test_scoring_tokens_in_batches_keeps_their_places():
    """What has a number for each token comes back as wide as it was, each number at its token, whatever lengths were batched together."""
    policy, (ids, mask) = world.gpt(seed=6), world.listed()
    result = model.score_batches(lambda a, b: model.response_logp(policy, a, b), ids, mask, batch=11)
    agree(result, model.response_logp(policy, ids, mask), "score_batches lost or moved a token")
