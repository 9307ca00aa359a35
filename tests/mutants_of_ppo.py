"""Planted bugs of the reward model and of PPO. See mutants.py."""
from unittest import mock

import torch
import torch.nn.functional as F

import ppo
from planting import plant


# ------------------------------------------------------------------------------ the reward model
@plant("the reward model learns the loser",
       "ppo.reward_model_loss",
       "reward_model_loss_is_the_negative_log_of_equation_1",
       "reward_model_gradient_is_the_probability_of_the_wrong_order",
       "the_reward_model_ends_at_reward_over_tau_up_to_a_constant_of_the_prompt")
def reward_pair_swapped(original, r_w, r_l):
    return original(r_l, r_w)


@plant("the reward is read at the last column",
       "model.last_response_token",
       "the_reward_is_read_at_the_last_response_token",
       "filler_does_not_change_the_reward",
       "the_score_is_paid_on_the_last_real_token")
def last_column(original, mask):
    return torch.full((len(mask),), mask.shape[1] - 1)


@plant("the critic shares its weights with the reference",
       "ppo.ScalarModel.__init__",
       "a_scalar_model_has_weights_of_its_own")
def critic_shares_weights(original, critic, gpt):
    original(critic, gpt)
    critic.gpt = gpt


@plant("values and rewards do not start at 0",
       "ppo.ScalarModel.__init__",
       "a_scalar_model_starts_at_zero",
       "a_constant_reward_ranks_no_pair",
       "without_fitted_values_ppo_follows_the_trace_from_zero")
def head_starts_anywhere(original, critic, gpt):
    original(critic, gpt)
    torch.nn.init.normal_(critic.head.weight)


@plant("the parameters of the best epoch are not copied, so the last epoch overwrites them",
       "ppo.cpu_state_dict",
       "the_reward_model_learns_the_preferences_and_keeps_its_best_epoch")
def last_epoch_kept(original, model):
    return model.state_dict()


# ----------------------------------------------------------------------------- rewards and values
@plant("the score is on a padding token",
       "ppo.token_rewards",
       "the_score_is_paid_on_the_last_real_token",
       "clipped_ppo_arrives_at_the_optimum")
def score_on_padding(original, score, logp, ref_logp, mask, coefficient):
    rewards = original(0 * score, logp, ref_logp, mask, coefficient)
    rewards[:, -1] += score
    return rewards


@plant("the penalty rewards KL",
       "ppo.token_rewards",
       "the_mean_penalty_is_the_kl",
       "each_token_pays_for_its_own_log_ratio",
       "at_the_optimum_every_advantage_is_zero",
       "token_rewards_sum_to_score_minus_the_price_of_the_log_ratio")
def penalty_rewards_kl(original, score, logp, ref_logp, mask, coefficient):
    return original(score, logp, ref_logp, mask, -coefficient)


@plant("a value is read at its token, which it then knows",
       "ppo.states_before_tokens",
       "the_value_of_a_token_is_read_before_it",
       "fitted_values_are_expected_scores_at_every_prefix")
def value_at_the_token(original, critic, ids):
    return critic.gpt.hidden(ids)


@plant("values are fitted to the scores of other rows",
       "ppo.map_batches",
       "fitted_values_are_expected_scores")
def value_of_another(original, function, ids, mask, batch=64):
    return original(function, ids, mask, batch).roll(len(ids) // 2, 0)


@plant("the network under the critic is trained too",
       "ppo.ppo_update",
       "updates_move_the_policy_and_the_critics_head_and_nothing_else")
def critic_learns_on(original, policy, critic, optimizer, rollout, *arguments):
    critic.gpt.requires_grad_(True)
    state = ppo.states_before_tokens(critic, rollout.ids)
    return original(policy, critic, optimizer, rollout._replace(state=state), *arguments)


# ------------------------------------------------------------------------------------- advantages
@plant("gae uses the value after the last token",
       "ppo.gae",
       "the_value_after_the_last_token_is_zero",
       "gae_is_the_discounted_sum_of_errors")
def value_past_the_end(original, rewards, values, mask, gamma, lam):
    next_value = F.pad(values[:, 1:], (0, 1))
    is_last = torch.arange(mask.shape[1]) == ppo.last_response_token(mask)[:, None]
    return original(rewards + gamma * next_value * is_last, values, mask, gamma, lam)


@plant("gae forgets lambda",
       "ppo.gae",
       "gae_is_the_discounted_sum_of_errors")
def lambda_forgotten(original, rewards, values, mask, gamma, lam):
    return original(rewards, values, mask, gamma, 1.)


@plant("gae swaps gamma and lambda",
       "ppo.gae",
       "with_lambda_one_the_advantage_is_return_minus_value")
def gamma_and_lambda_swapped(original, rewards, values, mask, gamma, lam):
    return original(rewards, values, mask, lam, gamma)


@plant("returns are computed from whitened advantages",
       "ppo.gae",
       "returns_are_advantages_plus_values")
def returns_of_whitened(original, rewards, values, mask, gamma, lam):
    advantages, _ = original(rewards, values, mask, gamma, lam)
    returns = ppo.whiten(advantages, mask) + values
    return advantages, returns.masked_fill(~mask, 0.)


@plant("whitening counts padding",
       "ppo.whiten",
       "whitening_counts_real_tokens_alone",
       "the_first_loss_of_an_update_is_the_critics")
def whitening_counts_padding(original, x, mask):
    x = x.masked_fill(~mask, 0.)
    whitened = (x - x.mean()) / x.std(correction=0)
    return whitened.masked_fill(~mask, 0.)


# --------------------------------------------------------------------------------- clipped losses
@plant("the ratio is pi_old / pi",
       "ppo.policy_loss",
       "policy_loss_is_the_pessimistic_bound")
def ratio_inverted(original, logp, old_logp, advantage, clip=.2):
    return original(old_logp, logp, advantage, clip)


@plant("the advantage has the wrong sign",
       "ppo.policy_loss",
       "the_policy_gradient_raises_good_tokens_until_the_clip",
       "ppo_raises_the_objective",
       "clipped_ppo_arrives_at_the_optimum",
       "ppo_on_a_fitted_reward_arrives_at_the_optimum_of_r_over_tau")
def advantage_sign(original, logp, old_logp, advantage, clip=.2):
    return original(logp, old_logp, -advantage, clip)


@plant("nothing is clipped",
       "ppo.policy_loss",
       "the_policy_gradient_raises_good_tokens_until_the_clip")
def clip_missing(original, logp, old_logp, advantage, clip=.2):
    return original(logp, old_logp, advantage, 1e9)


@plant("the value loss is the smaller error instead of the larger",
       "ppo.value_loss",
       "value_loss_is_the_worse_of_plain_and_clipped",
       "the_value_gradient_points_at_the_return")
def value_error_optimistic(original, value, old_value, returns, clip=.2):
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return .5 * torch.min((value - returns) ** 2, (clipped - returns) ** 2)


# ------------------------------------------------------------------ the controller, the roll-out
@plant("the controller lowers the price of KL above the target",
       "ppo.adapt_kl_coef",
       "the_controller_converges_to_its_target",
       "the_price_of_kl_moves_by_a_clipped_proportion",
       "ppo_starts_at_the_reference_and_prices_kl_by_its_controller")
def controller_direction(original, coefficient, kl, target, episodes, horizon):
    return 2 * coefficient - original(coefficient, kl, target, episodes, horizon)


@plant("the roll-out records log pi for log pi_ref",
       "ppo.roll_out",
       "a_roll_out_records_what_its_names_say")
def roll_out_without_reference(original, *arguments):
    rollout = original(*arguments)
    return rollout._replace(ref_logp=rollout.logp)


@plant("the roll-out keeps gradients",
       "ppo.roll_out",
       "a_roll_out_is_a_constant")
def roll_out_with_gradients(original, *arguments):
    with_gradients = original.__wrapped__    # without the decorator torch.no_grad()
    return with_gradients(*arguments)


@plant("the roll-out records log pi_ref for log pi_old",
       "ppo.roll_out",
       "the_ratio_is_one_on_the_first_minibatch")
def old_policy_is_the_reference(original, *arguments):
    rollout = original(*arguments)
    return rollout._replace(logp=rollout.ref_logp)


# -------------------------------------------------------------------------------------- the loops
@plant("the learning rate may exceed its peak",
       "model.lr_schedule",
       "the_learning_rate_has_its_hand_computed_values")
def rate_above_its_peak(original, optimizer, steps):
    def factor(step):
        return min((step + 1) / (.1 * steps), (steps - step) / (.9 * steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@plant("the reward model does not clear the gradients of earlier batches",
       "ppo.train_reward_model",
       "the_reward_model_follows_the_trace_of_equation_2")
def gradients_not_cleared(original, *arguments):
    with mock.patch("torch.optim.Optimizer.zero_grad"):
        return original(*arguments)


@plant("the values are fitted with the default weight decay of AdamW",
       "ppo.pretrain_critic",
       "fitted_values_follow_the_trace_of_a_regression")
def values_decay(original, *arguments):
    adamw = torch.optim.AdamW

    def with_default_decay(parameters, weight_decay, **options):
        return adamw(parameters, **options)

    with mock.patch("torch.optim.AdamW", with_default_decay):
        return original(*arguments)


@plant("the policy loss is summed over the tokens of a minibatch instead of averaged",
       "ppo.ppo_update",
       "an_update_follows_the_trace_of_clipped_minibatches")
def policy_loss_summed(original, *arguments):
    mean_loss = ppo.policy_loss

    def sum_loss(logp, *options):
        return mean_loss(logp, *options) * len(logp)

    with mock.patch("ppo.policy_loss", sum_loss):
        return original(*arguments)


def adam_without(option):
    """Context in which Adam ignores an option of its caller."""
    adam = torch.optim.Adam

    def create(parameters, **options):
        del options[option]
        return adam(parameters, **options)

    return mock.patch("torch.optim.Adam", create)


@plant("Adam has its default epsilon in PPO, 1e-8",
       "ppo.train_ppo",
       "ppo_follows_the_trace_of_its_recipe")
def default_eps(original, *arguments):
    with adam_without("eps"):
        yield from original(*arguments)


@plant("Adam has its default betas in PPO, .9 and .999",
       "ppo.train_ppo",
       "ppo_follows_the_trace_of_its_recipe")
def default_betas(original, *arguments):
    with adam_without("betas"):
        yield from original(*arguments)


@plant("the controller sees the sum of the batch's KLs instead of their mean",
       "ppo.train_ppo",
       "ppo_follows_the_trace_of_its_recipe",
       "ppo_arrives_at_the_target_kl_and_at_equation_4_of_its_own_price")
def controller_sees_the_sum(original, *arguments):
    adapt = ppo.adapt_kl_coef

    def adapt_to_the_sum(coefficient, kl, target, episodes, horizon):
        return adapt(coefficient, kl * episodes, target, episodes, horizon)

    with mock.patch("ppo.adapt_kl_coef", adapt_to_the_sum):
        yield from original(*arguments)
