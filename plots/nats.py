"""Where the nats go: KL(pi || pi_ref) by the role of the token, at equal KL.

The KL is the mean over y ~ pi of a sum over tokens of log pi/pi_ref, and each token has a role in
the grammar. The true reward depends on negation, intensifiers, adjectives, "but" and the number of
opinions. Nats on openings, aspects and verbs earn next to nothing; the optimum spends few there.
Nats on connectives earn in part: "but" matters, "and" does not. A role that a policy avoids, such
as "not", has a negative sum.

The optimum is not a network, so its KL by role is measured with samples. By Eq. 4, the log-ratio
log pi*/pi_ref of a token is log V(s, token) - log V(s), where V(s), the expectation of
exp(r / beta) under pi_ref given the prefix s, is a mean over rollouts.
"""
import math
import re
from functools import partial

import torch
from torch import Tensor

import data
from model import GPT, generate, last_response_token, map_batches, response_token_logp
from plots import mean_and_se
from plots.frontier import draw_from_optimum, sample_mixture

ROLES = ("opening", "aspect", "verb", "negation", "intensifier", "adjective", "connective", "end")
SAMPLES = 16      # responses of a policy to each prompt
ROLLOUTS = 64     # of pi_ref, from each prefix of a sample of the optimum
POOL = 128        # samples of each policy, among which those of the optimum are drawn


def words_of(groups) -> set[str]:
    """The single words in some groups of phrases."""
    return {word for group in groups for phrase in group for word in phrase.split()}


ROLE_OF = {    # word -> role; every other word or sign is a connective: and, but, the, punctuation
    **dict.fromkeys(words_of([data.DETERMINERS, *data.SUBJECTS.values()]), "opening"),
    **dict.fromkeys(words_of(data.ASPECTS.values()), "aspect"),
    **dict.fromkeys(data.VERBS, "verb"),
    "not": "negation",
    **dict.fromkeys(data.INTENSIFIERS, "intensifier"),
    **dict.fromkeys(words_of(data.ADJECTIVES.values()), "adjective"),
    "The": "connective",    # a determiner too, but it mostly begins a sentence
}


def token_roles(encoding, ids: list[int]) -> list[int]:
    """The role of each token of a text, as a number in ROLES; a part of a word has the word's."""
    pieces = [b"" if token == encoding.eot_token else encoding.decode_single_token_bytes(token)
              for token in ids]
    text = b"".join(pieces).decode("latin-1")    # one character a byte
    word_at = {}
    for match in re.finditer(r"\w+|[^\w\s]", text):
        word_at.update(dict.fromkeys(range(*match.span()), match[0]))
    roles, position = [], 0
    for token, piece in zip(ids, pieces):
        first = position + len(piece) - len(piece.lstrip())
        role = ROLE_OF.get(word_at.get(first), "connective")
        if token == encoding.eot_token:
            role = "end"
        roles.append(ROLES.index(role))
        position += len(piece)
    return roles


def sum_by_role(setup, values: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The sum of values (B, T) over the response tokens of each role -> (B, len(ROLES))."""
    roles = torch.tensor([token_roles(setup.encoding, row) for row in ids.tolist()])
    roles = roles.to(values.device)
    total = values.new_zeros(len(ids), len(ROLES))
    return total.scatter_add(1, roles, values.masked_fill(~mask, 0.))


def token_log_ratio(policy: GPT, ref: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi/pi_ref of each response token (B, T); the mean of its sum over y ~ pi is the KL."""
    return response_token_logp(policy, ids, mask) - response_token_logp(ref, ids, mask)


def policy_nats(setup, policy: GPT, prompts: tuple[Tensor, Tensor], *names) -> dict:
    """KL by role of a policy, length and reward on some prompts, with standard errors over them."""
    generator = data.named_generator("nats", setup.cfg.seed, *names, device=setup.device)
    ids, mask = generate(policy, prompts, SAMPLES, setup.cfg.max_tokens,
                         setup.encoding.eot_token, generator)
    kl = map_batches(partial(token_log_ratio, policy, setup.ref), ids, mask)
    by_role = sum_by_role(setup, kl, ids, mask)
    row = {"reward": data.true_reward(setup.encoding, ids, mask), "length": mask.sum(1),
           "kl": kl.sum(1), **dict(zip(ROLES, by_role.T))}
    return summarise(row, SAMPLES)


def summarise(columns: dict[str, Tensor], samples: int) -> dict[str, float]:
    """The mean of each column (X * samples,), and its standard error over prompts as NAME_se."""
    row = {}
    for name, x in columns.items():
        row[name], row[f"{name}_se"] = mean_and_se(x.view(-1, samples))
    return row


# ------------------------------------------------------------------------------------ the optimum
def sample_optimal_policy(setup, policies: list[GPT], prompts: tuple[Tensor, Tensor], beta: float,
                          generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two samples of pi* at a price beta for each prompt: ids and mask (2 X, T).

    They are drawn from `sample_mixture` of these policies, of which pi_ref is the first.
    """
    samples = sample_mixture(setup, policies, prompts, POOL, generator)
    return draw_from_optimum(samples, beta, 2, data.named_generator("picked", setup.cfg.seed))


def log_value(setup, ids: Tensor, lengths: Tensor, beta: float,
              generator: torch.Generator) -> Tensor:
    """log V of the prefixes of these lengths (B,) of ids (B, T), from rollouts -> (B,).

    The inputs and the result are on the CPU.
    """
    ids, lengths = ids.to(setup.device), lengths.to(setup.device)
    room = setup.ref.config.context - int(lengths.max())
    ids, mask = generate(setup.ref, (ids, lengths), ROLLOUTS, room, setup.encoding.eot_token,
                         generator)
    reward = data.true_reward(setup.encoding, ids, mask).view(-1, ROLLOUTS).cpu()
    return (reward.double() / beta).logsumexp(1) - math.log(ROLLOUTS)


def optimum_nats(setup, policies: list[GPT], prompts: tuple[Tensor, Tensor], beta: float) -> dict:
    """The KL by role of the optimum at a price beta, its length and reward, on some prompts."""
    generator = data.named_generator("nats of the optimum", setup.cfg.seed, device=setup.device)
    ids, mask = (x.cpu() for x in sample_optimal_policy(setup, policies, prompts, beta,
                                                          generator))
    reward = data.true_reward(setup.encoding, ids, mask)
    begin, stop = data.prompt_lengths(mask), last_response_token(mask) + 1
    log_ratio = torch.zeros(ids.shape, dtype=torch.float64)
    before = log_value(setup, ids, begin, beta, generator)
    for t in range(int(begin.min()), int(stop.max())):
        rows = ((begin <= t) & (t < stop - 1)).nonzero().squeeze(1)    # t is not the last token
        last = (t == stop - 1).nonzero().squeeze(1)
        after = before.clone()
        if len(rows):
            after[rows] = log_value(setup, ids[rows], torch.full_like(rows, t + 1), beta, generator)
        after[last] = reward[last].double() / beta                      # nothing follows the end
        log_ratio[:, t] = after - before
        before = after
    by_role = sum_by_role(setup, log_ratio, ids, mask)
    return summarise({"reward": reward, "length": mask.sum(1), "kl": log_ratio.sum(1),
                      **dict(zip(ROLES, by_role.T))}, samples=2)
