"""Section 5, Theoretical Analysis, and App. A.5, A.6: equivalent rewards, the reparameterisation,
the actor-critic objective (Eq. 8-10).

Two rewards are equivalent if they differ by a function f(x) of the prompt.
Shapes: X prompts, N listed responses, B pairs; see world.py.
"""
import torch

import data
import dpo
import ppo
import world

BETA = .3


def rewards_and_reference():
    """Return r (X, N) and log pi_ref (X, N), where pi_ref is a GPT."""
    r = world.rewards(seed=1)
    ref = world.table(world.gpt(seed=2)).detach()
    return r, ref


def prompt_shift():
    """Return f(x), (X, 1): one number for each prompt, as large as the rewards."""
    return torch.tensor([[2.5], [-.7]], dtype=torch.float64)


def policy_logp():
    """Return log pi (X, N), where pi is a GPT other than pi_ref."""
    return world.table(world.gpt(seed=6)).detach()


def projection(r, ref):
    """f(r; pi_ref, beta) = r - beta log Z (Eq. 8): r (X, N), ref (X, N) -> (X, N)."""
    return r - BETA * dpo.log_partition(ref, r, BETA)[:, None]


# -------------------------------------------- 5.1, Your Language Model Is Secretly a Reward Model
def test_rewards_that_differ_by_a_function_of_the_prompt_give_the_same_preferences():
    """Lemma 1, Bradley-Terry: r and r + f(x) give the same preferences (Eq. 1) and loss (Eq. 2)."""
    r, _ = rewards_and_reference()
    shifted = r + prompt_shift()
    i, j = torch.triu_indices(world.N, world.N, 1)
    claim = "Lemma 1: r + f(x) has the preferences of r (Eq. 1, 2): only differences may count"
    world.agree(data.bradley_terry(shifted[:, i], shifted[:, j]),
                data.bradley_terry(r[:, i], r[:, j]), claim)
    world.agree(ppo.reward_model_loss(shifted[:, i], shifted[:, j]),
                ppo.reward_model_loss(r[:, i], r[:, j]), claim)


def test_rewards_that_differ_by_a_function_of_the_prompt_give_the_same_rankings():
    """Lemma 1, Plackett-Luce (Eq. 18): r and r + f(x) give each ranking the same probability.

    Seven rankings of K = 4 responses to the second prompt are compared.
    """
    r, ref = rewards_and_reference()
    ranked = torch.randint(world.N, (7, 4), generator=world.generator(3))

    def ranking_loss(reward):
        logp = ref + reward / BETA                              # its implicit reward is `reward`
        return dpo.plackett_luce_loss(logp[1][ranked], ref[1][ranked], BETA)

    world.agree(ranking_loss(r + prompt_shift()), ranking_loss(r),
                "Lemma 1, Eq. 18: r + f(x) ranks as r does; is each factor a softmax over the "
                "remaining responses?")


def test_rewards_that_differ_by_a_function_of_the_prompt_have_the_same_optimal_policy():
    """Lemma 2: r and r + f(x) have the same optimal policy (Eq. 4), because Z(x) absorbs f(x)."""
    r, ref = rewards_and_reference()
    world.agree(dpo.optimal_policy(ref, r + prompt_shift(), BETA), dpo.optimal_policy(ref, r, BETA),
                "Lemma 2: f(x) must not change the optimum of Eq. 4; is Z(x) one number for each "
                "prompt?")


def test_dpo_is_blind_to_a_shift_common_to_both_responses():
    """Lemma 1 in Eq. 7: adding f(x) to log pi_ref of both responses changes nothing.

    This is why DPO never needs Z(x).
    """
    pair = world.random_pairs(7, seed=4)
    f = world.normal(7, seed=5, scale=2.)
    shifted = pair._replace(ref_w=pair.ref_w + f, ref_l=pair.ref_l + f)
    world.agree(dpo.dpo_loss(shifted, BETA), dpo.dpo_loss(pair, BETA),
                "Eq. 7: beta log Z(x) must cancel between y_w and y_l; is the reference subtracted "
                "once from each?")


def pairs_of_all_prompts(logp, ref):
    """Every pair of different responses to the same prompt, as one dpo.Pair: (X, N) each."""
    i, j = world.ordered_pairs()
    rows = world.N * torch.arange(world.X)[:, None]                             # (X, 1)
    winner, loser = (rows + i).flatten(), (rows + j).flatten()
    return world.make_pair(logp.flatten(), ref.flatten(), winner, loser)


def test_z_differs_between_prompts_and_cancels_in_every_pair():
    """Eq. 6: log Z(x) differs from prompt to prompt, and no pair of the batch depends on it.

    At pi*, the loss of a pair is -log sigma(r_w - r_l) whatever its prompt is. Raising the rewards
    of one prompt by f raises its log Z(x) by f / beta, and leaves pi* and all losses as they are.
    """
    r, ref = rewards_and_reference()
    raised = r + torch.tensor([[3.], [0.]], dtype=torch.float64)
    log_z, raised_log_z = (dpo.log_partition(ref, x, BETA) for x in (r, raised))
    assert (log_z[0] - log_z[1]).abs() > .1, f"log Z must differ between prompts: {log_z.tolist()}"
    world.agree(raised_log_z - log_z, torch.tensor([3. / BETA, 0.], dtype=torch.float64),
                "r + f(x) must raise log Z(x) by f(x) / beta, at its own prompt only")
    i, j = world.ordered_pairs()
    expected = -torch.log(torch.sigmoid(r[:, i] - r[:, j])).flatten()
    for reward in (r, raised):
        star = dpo.optimal_policy(ref, reward, BETA)
        world.agree(dpo.dpo_loss(pairs_of_all_prompts(star, ref), BETA), expected,
                    "Eq. 6: Z(x) must cancel in each pair, also if prompts have different Z(x)")


def test_dpo_finds_the_optimum_of_each_prompt_although_their_z_differ():
    """Eq. 7 on the pairs of both prompts at once has its minimum at Eq. 4 of each prompt.

    At the minimum r - rhat = beta log Z(x), a number of its own for each prompt, which the loss
    never used.
    """
    r, ref = rewards_and_reference()
    preference = data.bradley_terry(r[:, :, None], r[:, None])                    # (X, N, N)
    weight = world.pair_weights(8)
    theta = torch.zeros_like(r, requires_grad=True)

    def loss():
        logp = world.tabular(theta)
        return sum(world.population_loss(lambda pair: dpo.dpo_loss(pair, BETA), logp[x], ref[x],
                                         preference[x], weight) for x in range(world.X))

    world.minimise(loss, [theta])
    rhat = dpo.implicit_reward(world.tabular(theta).detach(), ref, BETA)
    normaliser = BETA * dpo.log_partition(ref, r, BETA)[:, None]                  # (X, 1)
    world.agree(r - rhat, normaliser.expand_as(r),
                "the minimum of Eq. 7 must be Eq. 4 at every prompt, each with its own log Z(x)",
                1e-5)


def test_the_projection_of_a_reward_is_the_implicit_reward_of_its_optimal_policy():
    """Eq. 8: f(r; pi_ref, beta) = r - beta log Z = beta log(pi_r / pi_ref)."""
    r, ref = rewards_and_reference()
    star = dpo.optimal_policy(ref, r, BETA)
    world.agree(dpo.implicit_reward(star, ref, BETA), projection(r, ref),
                "Eq. 8: beta log(pi_r / pi_ref) = r - beta log Z(x)")


def test_the_projection_sends_a_whole_class_to_one_member_and_leaves_it_there():
    """Eq. 8: r, r + f(x) and the projection of r have the same projection."""
    r, ref = rewards_and_reference()
    projected = projection(r, ref)
    world.agree(projection(r + prompt_shift(), ref), projected,
                "Eq. 8: r - beta log Z(x) must depend only on the class of r, not on f(x)")
    world.agree(projection(projected, ref), projected,
                "Eq. 8: projecting r - beta log Z(x) again must change nothing")


def test_every_implicit_reward_is_normalised():
    """Eq. 9: sum_y pi_ref(y|x) exp(rhat / beta) = sum_y pi(y|x) = 1, for any GPT pi.

    Here rhat = beta log(pi / pi_ref).
    """
    _, ref = rewards_and_reference()
    rhat = dpo.implicit_reward(policy_logp(), ref, BETA)
    total = dpo.log_partition(ref, rhat, BETA).exp()
    world.agree(total, torch.ones(world.X, dtype=torch.float64),
                "Eq. 9: sum_y pi_ref exp(rhat / beta) = sum_y pi(y|x) = 1; does log pi(y|x) count "
                "a prompt or filler token, or leave out the end token?")


def test_every_policy_is_optimal_for_its_own_implicit_reward():
    """Theorem 1, the converse: the optimum (Eq. 4) of rhat = beta log(pi / pi_ref) is pi itself."""
    _, ref = rewards_and_reference()
    logp = policy_logp()
    rhat = dpo.implicit_reward(logp, ref, BETA)
    world.agree(dpo.optimal_policy(ref, rhat, BETA), logp,
                "Theorem 1: pi is the optimum of its own implicit reward; are Eq. 4 and Eq. 5 "
                "inverse to each other?")


def test_every_class_of_rewards_holds_an_implicit_reward():
    """Theorem 1: for each r there is a policy pi with beta log(pi / pi_ref) = r - f(x).

    So the change of variables from rewards to policies loses nothing.
    """
    r, ref = rewards_and_reference()
    star = dpo.optimal_policy(ref, r, BETA)
    f = r - dpo.implicit_reward(star, ref, BETA)
    world.agree(f, f[:, :1].expand_as(f),
                "Theorem 1: r - beta log(pi / pi_ref) must be the same for all y")
    world.agree(star.exp().sum(1), torch.ones(world.X, dtype=torch.float64),
                "Theorem 1: pi must be a distribution, sum_y pi(y|x) = 1")


def normalising_constant(r, ref):
    """Return the c(x), (X, 1), with sum_y pi_ref(y|x) exp((r + c) / beta) = 1, by bisection.

    r (X, N), ref (X, N).
    """
    low = torch.full((world.X, 1), -50., dtype=torch.float64)
    high = torch.full((world.X, 1), 50., dtype=torch.float64)
    for _ in range(60):                             # the sum grows with c, so it is 1 exactly once
        middle = (low + high) / 2
        total = (ref.exp() * torch.exp((r + middle) / BETA)).sum(1, keepdim=True)
        low = torch.where(total > 1, low, middle)
        high = torch.where(total > 1, middle, high)
    return middle


def test_only_one_member_of_a_class_is_an_implicit_reward():
    """Proposition 1: exactly one r + c(x) is normalised as in Eq. 9, with c(x) = -beta log Z(x).

    c(x) is found by bisection, without Z(x).
    """
    r, ref = rewards_and_reference()
    star = dpo.optimal_policy(ref, r, BETA)
    world.agree(r + normalising_constant(r, ref), dpo.implicit_reward(star, ref, BETA),
                "Proposition 1: the only member of the class of r with "
                "sum_y pi_ref exp(. / beta) = 1 is r - beta log Z(x)")


def test_two_policies_never_have_equivalent_implicit_rewards():
    """Proposition 1: rhat + f(x) is the implicit reward of a distribution only if f = 0.

    The total of that distribution would be exp(f / beta).
    """
    _, ref = rewards_and_reference()
    f = prompt_shift()
    rhat = dpo.implicit_reward(policy_logp(), ref, BETA)
    world.agree(dpo.log_partition(ref, rhat + f, BETA), f[:, 0] / BETA,
                "Proposition 1: log sum_y pi_ref exp((rhat + f) / beta) = f / beta, which is 0 "
                "only for f = 0")


# ---------------------------------------------------- 5.2, Instability of Actor-Critic Algorithms
def test_the_actor_critic_objective_is_minus_beta_kl_to_the_optimum():
    """Eq. 10: E_pi[r - beta log Z - beta log(pi / pi_ref)] = -beta KL(pi || pi*).

    Z(x) = sum_y pi_ref exp(r / beta), as in Eq. 4.
    """
    r, ref = rewards_and_reference()
    logp = policy_logp()
    soft_value = BETA * dpo.log_partition(ref, r, BETA)
    star = dpo.optimal_policy(ref, r, BETA)
    world.agree(dpo.objective(logp, ref, r, BETA) - soft_value, -BETA * world.kl(logp, star),
                "Eq. 10: Eq. 3 minus the soft value beta log Z(x) is -beta KL(pi || pi*)")


def test_at_the_optimum_the_actor_critic_advantage_of_every_response_is_0():
    """Eq. 10: at pi*, r - beta log Z - beta log(pi / pi_ref) is 0 for each response.

    So the policy gradient has no variance there.
    """
    r, ref = rewards_and_reference()
    star = dpo.optimal_policy(ref, r, BETA)
    advantage = projection(r, ref) - dpo.implicit_reward(star, ref, BETA)
    world.agree(advantage, torch.zeros_like(r),
                "Eq. 10: at pi* the advantage of every response is 0, not only their mean")


def test_the_normaliser_is_a_baseline_that_changes_no_gradient():
    """Eq. 10: grad J = E_pi[grad log pi (r - beta log(pi / pi_ref) - b(x))] for every b(x).

    Here the baseline is b(x) = beta log Z(x).
    """
    r, ref = rewards_and_reference()
    theta = world.normal(world.X, world.N, seed=7).requires_grad_()
    objective = dpo.objective(world.tabular(theta), ref, r, BETA).sum()
    exact, = torch.autograd.grad(objective, theta)

    logp = world.tabular(theta)
    advantage = (projection(r, ref) - dpo.implicit_reward(logp, ref, BETA)).detach()
    surrogate = (logp.detach().exp() * advantage * logp).sum()
    policy_gradient, = torch.autograd.grad(surrogate, theta)
    world.agree(policy_gradient, exact,
                "Eq. 10: the policy gradient with baseline beta log Z(x) is the gradient of Eq. 3")
