"""Responses that a policy begins and pi_ref ends, samples for the optimum (plots/frontier.py).

Letters: X prompts, N listed responses, T tokens of the longest row.
"""
from types import SimpleNamespace
from unittest import mock

import torch

import world
from model import response_token_logp
from plots import frontier
from test_best_of_n import listed_index
from test_loops_of_ppo import token_logps
from world import agree

HAND_OVER = .3    # instead of .05, so that both policies write much of a response


def token_chances(policy):
    """pi(y_t | x, y_<t) of each token t of each listed response: X * N lists."""
    rows = []
    for row, is_response in zip(*world.listed()):
        positions = is_response.nonzero().flatten().tolist()
        rows.append([logp.exp().item() for logp in token_logps(policy, row, positions)])
    return rows


def hand_over_table(policy, ref, hand_over=frontier.HAND_OVER):
    """log q(y|x) of every listed response, (X, N): who writes is followed token by token."""
    chances = []
    for by_policy, by_ref in zip(token_chances(policy), token_chances(ref)):
        policy_writes, ref_writes = 1., 0.
        for chance, ref_chance in zip(by_policy, by_ref):
            ref_writes = (ref_writes + hand_over * policy_writes) * ref_chance
            policy_writes = (1. - hand_over) * policy_writes * chance
        chances.append(policy_writes + ref_writes)
    return torch.tensor(chances, dtype=torch.float64).log().view(world.X, world.N)


def density(policy, ref):
    """log q(y|x) of every listed response by the code under test, (X, N)."""
    ids, mask = world.listed()
    token_logp, ref_token_logp = (response_token_logp(m, ids, mask).detach() for m in (policy, ref))
    return frontier.hand_over_logp(token_logp, ref_token_logp, mask).view(world.X, world.N)


@mock.patch.object(frontier, "HAND_OVER", HAND_OVER)
def test_the_density_of_handing_over_is_that_of_a_loop_over_tokens():
    """log q(y|x), the sum over the token at which pi_ref takes over, agrees for all responses.

    q sums to one. Where the policy is pi_ref, q is pi_ref, too.
    """
    ref, policy = world.gpt(seed=1), world.gpt(seed=5)
    agree(density(policy, ref), hand_over_table(policy, ref, HAND_OVER),
          "log q(y|x) must sum over all tokens at which pi_ref can take over, and over none")
    agree(density(policy, ref).exp().sum(1), torch.ones(world.X), "q(y|x) must sum to one")
    agree(density(ref, ref), world.table(ref).detach(), "pi_ref, ended by pi_ref, is pi_ref")


@mock.patch.object(frontier, "HAND_OVER", HAND_OVER)
def test_no_response_is_left_out_by_a_policy_that_hands_over():
    """pi_ref(y|x) / q(y|x) <= 1 / h, whatever the policy, because pi_ref may take over at once."""
    ref = world.gpt(seed=1)
    for spread in (1., 10., 100.):
        ratio = (world.table(ref) - density(world.gpt(seed=5, spread=spread), ref)).exp()
        assert ratio.max() <= 1 / HAND_OVER + 1e-9, f"a weight of {ratio.max().item():.3f}"


def sampled(ref, policy, samples, max_tokens=world.MAX_TOKENS):
    """ids and mask of `samples` responses to each prompt by the code under test."""
    setup = SimpleNamespace(cfg=SimpleNamespace(max_tokens=max_tokens),
                            encoding=SimpleNamespace(eot_token=world.END))
    return frontier.sample_and_hand_over(setup, ref, policy, world.prompts(), samples,
                                         world.generator(3))


def assert_only_end_follows(ids, mask):
    """After the last token of a response, a row of ids holds only END."""
    after = mask.int().cumsum(1) == mask.sum(1, keepdim=True)
    assert (ids[after & ~mask] == world.END).all(), "only END may follow a response"


@mock.patch.object(frontier, "HAND_OVER", HAND_OVER)
def test_responses_begun_by_a_policy_and_ended_by_pi_ref_follow_their_density():
    """20,000 responses to each prompt occur as often as q(y|x) says, within 5 standard errors.

    The responses to a prompt are consecutive rows, and hold only END after their last token.
    """
    n, ref, policy = 20_000, world.gpt(seed=1), world.gpt(seed=5)
    ids, mask = sampled(ref, policy, n)
    index = listed_index(ids, mask).view(world.X, n)
    assert torch.equal(index // world.N, torch.arange(world.X)[:, None].expand_as(index)), \
        "the responses to a prompt must be consecutive rows"
    assert_only_end_follows(ids, mask)
    q = hand_over_table(policy, ref, HAND_OVER).exp()
    found = torch.stack([torch.bincount(row % world.N, minlength=world.N) for row in index]) / n
    deviation = (found - q).abs() / (q * (1 - q) / n).sqrt().clamp(min=1 / n)
    assert deviation.max() < 5, \
        f"a response is {deviation.max().item():.1f} standard errors from its probability q(y|x)"


def test_handing_over_uses_its_generator_alone_and_needs_no_response_to_hand_over():
    """Few short responses: some or none are handed over, and rows are filled up with END."""
    ref, policy = world.gpt(seed=1), world.gpt(seed=5)
    for hand_over in (.5, 1e-9):
        with mock.patch.object(frontier, "HAND_OVER", hand_over):
            state = torch.get_rng_state()
            ids, mask = sampled(ref, policy, 2, max_tokens=4)
            again, _ = sampled(ref, policy, 2, max_tokens=4)
        assert torch.equal(ids, again) and torch.equal(state, torch.get_rng_state()), \
            "equal generators must give equal responses, and no other may be used"
        assert_only_end_follows(ids, mask)
