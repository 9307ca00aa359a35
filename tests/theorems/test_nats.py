"""Where the nats go: the KL by the role of the token, against sums over all listed responses.

The tokens of world.py have a role each: 0 is an aspect, 1 a verb, 2 "not", 3 an adjective.
Letters: X prompts, N listed responses, V(s) = E_{y ~ pi_ref | s}[exp(r / beta)] of a prefix s.
"""
import math
import re
from types import SimpleNamespace
from unittest import mock

import torch

import data
import dpo
import world
from plots import nats
from test_best_of_n import listed_index
from test_true_reward import encoding, reviews

BETA = .8
ROLE_OF_TOKEN = {0: "aspect", 1: "verb", 2: "negation", 3: "adjective", world.END: "end"}


class Tokenizer:
    """A tokenizer whose tokens 0 to 3 are a word each."""
    eot_token = world.END

    def decode_single_token_bytes(self, token):
        """The word of a token, as bytes."""
        return [b" plot", b" was", b" not", b" superb"][token]


def reward_of_tokens(ids, mask):
    """A reward of any text, not only of listed ones: (B, T), (B, T) -> (B,).

    Like the true reward, it reads all tokens from the prompt to the end of the response.
    """
    ends = mask.shape[1] - mask.int().flip(1).argmax(1)
    places = torch.arange(ids.shape[1])
    return (torch.sin(1. + ids * (places + 1)) * (places < ends[:, None])).sum(1) / 2


def listed_reward():
    """`reward_of_tokens` of every listed response, (X, N) float64."""
    return reward_of_tokens(*world.listed()).double().view(world.X, world.N)


def call(function, setup, *arguments):
    """function(setup, *arguments) with `reward_of_tokens` as the true reward."""
    def true_reward(encoding, ids, mask):
        return reward_of_tokens(ids, mask)

    with mock.patch.object(data, "true_reward", true_reward):
        return function(setup, *arguments)


def new_setup():
    """The fields of a Setup that the figure reads."""
    cfg = SimpleNamespace(seed=0, max_tokens=world.MAX_TOKENS)
    return SimpleNamespace(cfg=cfg, device="cpu", encoding=Tokenizer(), ref=world.gpt(seed=1))


def copies_of_prompts(copies):
    """The prompts of the world, each `copies` times in a row."""
    return tuple(x.repeat_interleave(copies, 0) for x in world.prompts())


# --------------------------------------------------------------------------------- roles of tokens
def words_of_roles():
    """Each role with all its words and signs, as the grammar of data.py has them."""
    both = {"opening": [data.DETERMINERS], "aspect": [], "adjective": []}
    for domain in data.SUBJECTS:
        both["opening"].append(" ".join(data.SUBJECTS[domain]).split())
        both["aspect"].append(data.ASPECTS[domain])
        both["adjective"].append(list(data.ADJECTIVES[domain]))
    words = {role: {word for group in groups for word in group} for role, groups in both.items()}
    words["opening"].remove("The")                   # it also begins a sentence: a connective
    return {**words, "verb": set(data.VERBS), "negation": {"not"},
            "intensifier": set(data.INTENSIFIERS),
            "connective": {"The", "the", "and", "but", ".", ",", ":"}}


def test_every_word_of_the_grammar_has_one_role():
    """All tokens of a word have the role of the word, and no word has two roles."""
    tokenizer = encoding()
    words = words_of_roles()
    total = sum(len(group) for group in words.values())
    assert len(set().union(*words.values())) == total, "a word of the grammar has two roles"
    for role, group in words.items():
        for word in group:
            for text in (word, " " + word):
                ids = tokenizer.encode(text)
                roles = {nats.ROLES[number] for number in nats.token_roles(tokenizer, ids)}
                assert roles == {role}, f"{text!r} must have the role {role!r}, not {roles}"


def test_every_token_of_a_review_has_the_role_of_its_word():
    """The roles of a review are those of its words in their order, then "end".

    The end token has the role "end" also as filler.
    """
    tokenizer = encoding()
    role_of = {word: role for role, group in words_of_roles().items() for word in group}
    for text in reviews(40, seed=5):
        expected, ids = [], []
        for piece in re.findall(r" ?\w+|[.,:]", text):
            role = role_of[piece.strip()] if ids else "opening"
            if piece == "The" and not ids:           # an opening of "The" counts as a connective
                role = "connective"
            tokens = tokenizer.encode(piece)
            ids += tokens
            expected += [role] * len(tokens)
        assert ids == tokenizer.encode(text), f"the words of {text!r} are not encoded one by one"
        roles = nats.token_roles(tokenizer, ids + [tokenizer.eot_token] * 2)
        assert [nats.ROLES[number] for number in roles] == expected + ["end"] * 2, \
            f"a token of {text!r} has the role of another word"


# ----------------------------------------------------------------------------- the KL of a policy
def sum_by_role(values, ids, mask):
    """The sum of values over the response tokens of each role, by a loop -> (B, roles) float64."""
    sums = torch.zeros(len(ids), len(nats.ROLES), dtype=torch.float64)
    for row in range(len(ids)):
        for t in range(ids.shape[1]):
            if mask[row, t]:
                role = nats.ROLES.index(ROLE_OF_TOKEN[int(ids[row, t])])
                sums[row, role] += values[row, t]
    return sums


def test_the_kl_of_a_response_is_the_sum_over_roles_of_its_tokens_kl():
    """By role and in total, the KL of each token counts once, and prompt and filler not at all."""
    setup = new_setup()
    ids, mask = world.listed()
    policy = world.gpt(seed=5)
    kl = nats.token_log_ratio(policy, setup.ref, ids, mask)
    by_role = nats.sum_by_role(setup, kl.masked_fill(~mask, torch.nan), ids, mask)
    world.agree(by_role, sum_by_role(kl, ids, mask), "the KL by role is a sum over its tokens")
    expected = (world.table(policy) - world.table(setup.ref)).flatten()
    world.agree(by_role.sum(1), expected, "the roles must sum to the log-ratio of the response")


def test_the_nats_of_a_policy_are_those_of_all_its_responses():
    """Mean KL by role, KL, reward and length of samples agree with sums over listed responses.

    They agree within 4 standard errors. The mean KL by role has the sum `kl`.
    """
    setup, policy, samples = new_setup(), world.gpt(seed=5), 400
    with mock.patch.object(nats, "SAMPLES", samples):
        row = call(nats.policy_nats, setup, policy, world.prompts(), "name")
    ids, mask = world.listed()
    kl = nats.token_log_ratio(policy, setup.ref, ids, mask).detach()
    columns = {"kl": kl.sum(1), "reward": listed_reward().flatten(), "length": mask.sum(1).double(),
               **dict(zip(nats.ROLES, sum_by_role(kl, ids, mask).T))}
    logp = world.table(policy).detach()
    for name, values in columns.items():
        values = values.view(world.X, world.N)
        exact = world.expectation(logp, values)
        variance = world.expectation(logp, (values - exact[:, None]) ** 2)
        error = (variance.sum() / samples).sqrt() / world.X
        assert abs(row[name] - exact.mean()) <= 4 * error + 1e-6, \
            f"{name} is {row[name]:.4f}, not {exact.mean():.4f} +- {error:.4f}"
    total = sum(row[role] for role in nats.ROLES)
    assert abs(total - row["kl"]) < 1e-9, f"the roles sum to {total}, not to {row['kl']}"


# ---------------------------------------------------------------------------- the KL of the optimum
def log_mass(logp, prefix):
    """log of the probability that a text begins with a prefix (prompt and response tokens).

    logp (X, N) of the listed responses.
    """
    masses = []
    for prompt, row in zip(world.PROMPTS, logp.tolist()):
        for response, value in zip(world.RESPONSES, row):
            if [*prompt, *response][:len(prefix)] == prefix and prompt == prefix[:len(prompt)]:
                masses.append(math.exp(value))
    return math.log(sum(masses))


def exact_log_value(setup, ids, lengths, beta, generator):
    """What `nats.log_value` estimates, from all listed responses."""
    ref = world.table(setup.ref).detach()
    values = []
    for row, length in zip(ids.tolist(), lengths.tolist()):
        prefix = row[:length]
        values.append(log_mass(ref + listed_reward() / beta, prefix) - log_mass(ref, prefix))
    return torch.tensor(values, dtype=torch.float64)


def two_responses_to_each_prompt():
    """ids and mask (2 X, T): responses of all lengths, one of them cut off without an end token."""
    rows = torch.tensor([3, 70, world.N, world.N + 40])
    ids, mask = world.listed()
    return ids[rows], mask[rows]


def test_the_log_ratio_of_the_optimum_is_that_of_its_values():
    """Eq. 4: log pi*/pi_ref of a token is log V(s, token) - log V(s), by role and in total.

    Here V is exact. The expected log-ratios are those of the listed pi*, token by token, and their
    sum over a response is r / beta - log Z(x).
    """
    setup = new_setup()
    ids, mask = two_responses_to_each_prompt()
    ref = world.table(setup.ref).detach()
    star = dpo.optimal_policy(ref, listed_reward(), BETA)
    log_ratio = torch.zeros(ids.shape, dtype=torch.float64)
    for row, t in mask.nonzero().tolist():
        prefix = ids[row, :t + 1].tolist()
        log_ratio[row, t] = (log_mass(star, prefix) - log_mass(star, prefix[:-1])
                             - log_mass(ref, prefix) + log_mass(ref, prefix[:-1]))
    with (mock.patch.object(nats, "log_value", exact_log_value),
          mock.patch.object(nats, "sample_optimal_policy", lambda *_: (ids, mask))):
        row = call(nats.optimum_nats, setup, [setup.ref], world.prompts(), BETA)
    by_role = sum_by_role(log_ratio, ids, mask).mean(0)
    world.agree(torch.tensor([row[role] for role in nats.ROLES], dtype=torch.float64), by_role,
                "the log-ratio of the optimum by role", 1e-6)
    log_z = dpo.log_partition(ref, listed_reward(), BETA).repeat_interleave(2)
    expected = (reward_of_tokens(ids, mask) / BETA - log_z).mean().item()
    assert abs(row["kl"] - expected) < 1e-6, \
        f"the log-ratios sum to {row['kl']:.6f}, not to r / beta - log Z = {expected:.6f}"


def test_estimated_log_ratios_sum_to_the_reward_over_beta_minus_the_estimate_of_log_z():
    """Whatever the estimates of V on the way are, they cancel from the sum over a response.

    Only the first, that of log Z(x), and r / beta at the end remain.
    """
    setup = new_setup()
    ids, mask = two_responses_to_each_prompt()
    log_values, estimate = [], nats.log_value

    def recorded(*arguments):
        log_values.append(estimate(*arguments))
        return log_values[-1]

    with (mock.patch.object(nats, "log_value", recorded),
          mock.patch.object(nats, "sample_optimal_policy", lambda *_: (ids, mask))):
        row = call(nats.optimum_nats, setup, [setup.ref], world.prompts(), BETA)
    expected = (reward_of_tokens(ids, mask).double() / BETA - log_values[0]).mean().item()
    assert abs(row["kl"] - expected) < 1e-9, \
        f"the log-ratios sum to {row['kl']:.6f}, not to r / beta - log Z_hat = {expected:.6f}"
    total = sum(row[role] for role in nats.ROLES)
    assert abs(total - row["kl"]) < 1e-9, f"the roles sum to {total}, not to {row['kl']}"


def test_the_value_of_a_prefix_is_the_mean_over_rollouts_of_pi_ref():
    """E[V_hat(s)] = V(s) = E_{y ~ pi_ref | s}[exp(r / beta)], within 4 standard errors.

    The prefixes are the second prompt, alone and with one and two response tokens.
    """
    setup, copies = new_setup(), 100
    setup.ref.config.context = len(world.PROMPTS[1]) + world.MAX_TOKENS    # rollouts end there
    for response in ([], [1], [1, 3]):
        prefix = torch.tensor([world.PROMPTS[1] + response])
        length = torch.tensor([prefix.shape[1]])
        exact = exact_log_value(setup, prefix, length, BETA, None).exp().item()
        ids = torch.nn.functional.pad(prefix, (0, 3 - len(response)), value=0)
        log_value = call(nats.log_value, setup, ids.repeat(copies, 1), length.repeat(copies), BETA,
                         world.generator(4))
        values = log_value.exp()
        error = values.std().item() / copies ** .5
        assert abs(values.mean().item() - exact) < 4 * error, \
            f"after {response} V is {values.mean():.4f}, not {exact:.4f} +- {error:.4f}"


def test_samples_of_the_optimum_are_distributed_as_equation_4():
    """Eq. 4: two samples of pi* for each prompt, from samples of pi_ref and of another policy.

    Over 100 copies of each prompt their mean reward is E_pi*[r], within 4 standard errors.
    """
    copies = 100
    setup = new_setup()
    with mock.patch.object(nats, "POOL", 48):
        ids, mask = call(nats.sample_optimal_policy, setup, [setup.ref, world.gpt(seed=5)],
                         copies_of_prompts(copies), BETA, world.generator(6))
    index = listed_index(ids, mask).view(world.X, 2 * copies)
    assert torch.equal(index // world.N, torch.arange(world.X)[:, None].expand_as(index)), \
        "a sample of pi* answers another prompt"
    r = listed_reward()
    ref = world.table(setup.ref).detach()
    star = dpo.optimal_policy(ref, r, BETA)
    exact = world.expectation(star, r)
    variance = world.expectation(star, (r - exact[:, None]) ** 2)
    error = (variance / index.shape[1]).sqrt()
    mean = r.flatten()[index].mean(1)
    assert ((exact - world.expectation(ref, r)).abs() > 8 * error).all(), \
        "this test cannot tell pi* from pi_ref"
    assert ((mean - exact).abs() < 4 * error).all(), \
        f"samples of pi* have mean reward {mean.tolist()}, not {exact.tolist()}"
