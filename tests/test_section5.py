"""Section 5, Theoretical Analysis (and App. A.5, A.6): equivalent rewards, the reparameterisation, actor-critic algorithms."""
import torch

import data
import dpo
import ppo
import world

BETA = .3


def setting():
    """r (X, N), pi_ref (X, N) of a GPT, and f(x) (X, 1): a number for each prompt, of the size of the rewards."""
    return world.rewards(seed=1), world.table(world.gpt(seed=2)).detach(), torch.tensor([[2.5], [-.7]], dtype=torch.float64)


# ---------------------------------------------------------------------------- 5.1: Your Language Model Is Secretly a Reward Model
def test_rewards_that_differ_by_a_function_of_the_prompt_give_the_same_preferences():
    """Lemma 1, Bradley-Terry: sigma(r_1 - r_2) (Eq. 1) and the loss (Eq. 2) are those of r + f(x)."""
    r, _, f = setting()
    i, j = torch.triu_indices(world.N, world.N, 1)
    both = [torch.stack([data.bradley_terry(s[:, i], s[:, j]), ppo.reward_model_loss(s[:, i], s[:, j])]) for s in (r, r + f)]
    world.agree(both[1], both[0], "Lemma 1: r + f(x) prefers as r does (Eq. 1, 2): only differences of rewards may count")


def test_rewards_that_differ_by_a_function_of_the_prompt_give_the_same_rankings():
    """Lemma 1, Plackett-Luce (Eq. 18): the probability of a ranking of K = 4 responses is that under r + f(x)."""
    r, ref, f = setting()
    ranked = torch.randint(world.N, (7, 4), generator=world.generator(3))
    losses = [dpo.plackett_luce_loss((ref + s / BETA)[1][ranked], ref[1][ranked], BETA) for s in (r, r + f)]
    world.agree(losses[1], losses[0], "Lemma 1, Eq. 18: r + f(x) ranks as r does: each factor must be a softmax over the rest")


def test_rewards_that_differ_by_a_function_of_the_prompt_have_the_same_optimal_policy():
    """Lemma 2: pi_r = pi_{r + f(x)} under Eq. 4, f(x) being absorbed by Z(x)."""
    r, ref, f = setting()
    world.agree(dpo.optimal_policy(ref, r + f, BETA), dpo.optimal_policy(ref, r, BETA),
                "Lemma 2: f(x) must not change the optimum of Eq. 4; is Z(x) one number for each prompt?")


def test_dpo_is_blind_to_a_shift_common_to_both_responses():
    """Lemma 1 in Eq. 7: log pi_ref(y|x) + f(x) for both responses changes nothing, which is why Z(x) is never needed."""
    pair, f = world.random_pairs(7, seed=4), world.normal(7, seed=5, scale=2.)
    shifted = pair._replace(ref_w=pair.ref_w + f, ref_l=pair.ref_l + f)
    world.agree(dpo.dpo_loss(shifted, BETA), dpo.dpo_loss(pair, BETA),
                "Eq. 7: beta log Z(x) must cancel between y_w and y_l: is the reference subtracted once from each?")


def test_the_projection_of_a_reward_is_the_implicit_reward_of_its_optimal_policy():
    """Eq. 8: f(r; pi_ref, beta) = r - beta log Z = beta log(pi_r / pi_ref)."""
    r, ref, _ = setting()
    projected = r - BETA * dpo.log_partition(ref, r, BETA)[:, None]
    world.agree(dpo.implicit_reward(dpo.optimal_policy(ref, r, BETA), ref, BETA), projected,
                "Eq. 8: beta log(pi_r / pi_ref) = r - beta log Z(x)")


def test_the_projection_sends_a_whole_class_to_one_member_and_leaves_it_there():
    """Eq. 8: r, r + f(x) and the projection itself all have the same projection."""
    r, ref, f = setting()
    project = lambda s: s - BETA * dpo.log_partition(ref, s, BETA)[:, None]
    world.agree(torch.stack([project(r + f), project(project(r))]), project(r).expand(2, world.X, world.N),
                "Eq. 8: r - beta log Z(x) must depend on the class of r alone, and projecting twice is projecting once")


def test_every_implicit_reward_is_normalised():
    """Eq. 9: sum_y pi_ref(y|x) exp(beta log(pi / pi_ref) / beta) = sum_y pi(y|x) = 1, for any GPT pi."""
    _, ref, _ = setting()
    pi = world.table(world.gpt(seed=6)).detach()
    total = dpo.log_partition(ref, dpo.implicit_reward(pi, ref, BETA), BETA).exp()
    world.agree(total, torch.ones(world.X, dtype=torch.float64),
                "Eq. 9: sum_y pi_ref exp(rhat / beta) = sum_y pi(y|x) = 1: does log pi(y|x) count a prompt or filler token, "
                "or leave out the end token?")


def test_every_policy_is_optimal_for_its_own_implicit_reward():
    """Theorem 1, backwards: the optimum (Eq. 4) of rhat = beta log(pi / pi_ref) is pi, for any GPT pi."""
    _, ref, _ = setting()
    pi = world.table(world.gpt(seed=6)).detach()
    world.agree(dpo.optimal_policy(ref, dpo.implicit_reward(pi, ref, BETA), BETA), pi,
                "Theorem 1: pi is the optimum of its own implicit reward; are Eq. 4 and Eq. 5 inverse to each other?")


def test_every_class_of_rewards_holds_an_implicit_reward():
    """Theorem 1: for any r there is a policy pi with beta log(pi / pi_ref) = r - f(x): the change of variables loses nothing."""
    r, ref, _ = setting()
    pi = dpo.optimal_policy(ref, r, BETA)
    f = r - dpo.implicit_reward(pi, ref, BETA)
    world.agree(torch.cat([f, pi.exp().sum(1, keepdim=True)], 1), torch.cat([f[:, :1].expand_as(f), torch.ones(world.X, 1)], 1),
                "Theorem 1: r - beta log(pi / pi_ref) must be the same for all y, with sum_y pi(y|x) = 1")


def test_only_one_member_of_a_class_is_an_implicit_reward():
    """Proposition 1: of all r + c, exactly one is normalised as Eq. 9 demands: c = -beta log Z(x), found here by bisection."""
    r, ref, _ = setting()
    low, high = torch.full((world.X, 1), -50.).double(), torch.full((world.X, 1), 50.).double()
    for _ in range(60):    # sum_y pi_ref exp((r + c) / beta) grows with c, so it is 1 once
        c = (low + high) / 2
        above = (ref.exp() * torch.exp((r + c) / BETA)).sum(1, keepdim=True) > 1
        low, high = torch.where(above, low, c), torch.where(above, c, high)
    world.agree(r + c, dpo.implicit_reward(dpo.optimal_policy(ref, r, BETA), ref, BETA),
                "Proposition 1: the only member of the class of r with sum_y pi_ref exp(. / beta) = 1 is r - beta log Z(x)")


def test_two_policies_never_have_equivalent_implicit_rewards():
    """Proposition 1: rhat + f(x) is beta log(pi' / pi_ref) of a distribution pi' only if f = 0: its total is exp(f / beta)."""
    _, ref, f = setting()
    rhat = dpo.implicit_reward(world.table(world.gpt(seed=6)).detach(), ref, BETA)
    world.agree(dpo.log_partition(ref, rhat + f, BETA), f[:, 0] / BETA,
                "Proposition 1: log sum_y pi_ref exp((rhat + f) / beta) = f / beta, which is 0 for f = 0 alone")


# ----------------------------------------------------------------------------------- 5.2: Instability of Actor-Critic Algorithms
def test_the_actor_critic_objective_is_minus_beta_kl_to_the_optimum():
    """Eq. 10: E_pi[r - beta log sum_y pi_ref exp(r / beta) - beta log(pi / pi_ref)] = -beta KL(pi || pi*)."""
    r, ref, _ = setting()
    pi = world.table(world.gpt(seed=6)).detach()
    soft_value = BETA * dpo.log_partition(ref, r, BETA)
    star = dpo.optimal_policy(ref, r, BETA)
    world.agree(dpo.objective(pi, ref, r, BETA) - soft_value, -BETA * world.kl(pi, star),
                "Eq. 10: Eq. 3 less the soft value beta log Z(x) is -beta KL(pi || pi*)")


def test_at_the_optimum_the_actor_critic_advantage_of_every_response_is_0():
    """Eq. 10: at pi* the bracket r - beta log Z - beta log(pi / pi_ref) is 0 for each response: no variance is left."""
    r, ref, _ = setting()
    star = dpo.optimal_policy(ref, r, BETA)
    bracket = r - BETA * dpo.log_partition(ref, r, BETA)[:, None] - dpo.implicit_reward(star, ref, BETA)
    world.agree(bracket, torch.zeros_like(r), "Eq. 10: at pi* every response's advantage vanishes, not only their mean")


def test_the_normaliser_is_a_baseline_that_changes_no_gradient():
    """Eq. 10: grad J = E_pi[grad log pi (r - beta log(pi / pi_ref) - b(x))] for every b(x), beta log Z(x) among them."""
    r, ref, _ = setting()
    theta = world.normal(world.X, world.N, seed=7).requires_grad_()
    exact, = torch.autograd.grad(dpo.objective(world.tabular(theta), ref, r, BETA).sum(), theta)
    logp = world.tabular(theta)
    bracket = r - BETA * dpo.log_partition(ref, r, BETA)[:, None] - dpo.implicit_reward(logp, ref, BETA)
    score, = torch.autograd.grad((logp.detach().exp() * bracket.detach() * logp).sum(), theta)
    world.agree(score, exact, "Eq. 10: the policy gradient with baseline beta log Z(x) is the gradient of Eq. 3")
