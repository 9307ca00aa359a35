"""Fig. 2, left: true reward against KL(pi || pi_ref), every method below the optimal frontier."""
import copy
import math
import statistics
from functools import partial
from typing import Callable

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import dpo
from harness import PARTS, Stage, cached, part_indices
from model import (GPT, cpu_state_dict, generate, last_response_token, map_batches, response_kl,
                   response_mask, response_token_logp, sample)
from plots import (BEST_OF_N, evaluation_prompts, load_finished_policy, plt, prompts_of_split,
                   reliable_kl, save, styles_of)

HAND_OVER = .05    # probability per token that pi_ref takes over from a sampling policy
MAX_KL = 10.    # nats; finished policies beyond are drawn at the right edge, labelled with their KL
FIT_PROMPTS = 5_000    # train prompts of each fit to the optimum, or all if there are fewer
FIT_SAMPLES = 10       # responses to each of them from each sampling policy
FIT_PICKS = 6          # of these, drawn by their probability in pi*, to train on
FIT_EPOCHS = 2
FIT_BATCH = 128        # responses a step
FIT_LR = 2e-3          # peak learning rate


# ------------------------------------------------------------------------- measuring the optimum
def sample_and_hand_over(setup, ref: GPT, policy: GPT, prompts: tuple[Tensor, Tensor], samples: int,
                         generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Responses that a policy begins and pi_ref ends: ids and mask (X * samples, T).

    Before each token pi_ref takes over with probability HAND_OVER; then it writes all the rest.
    (The policy writes whole responses, and pi_ref replaces their ends.) The optimum contains
    responses that a policy begins well, but would never end as the optimum does. Here pi_ref writes
    the end, so a response is sampled often enough if its beginning is likely under the policy.
    """
    max_tokens, end = setup.cfg.max_tokens, setup.encoding.eot_token
    ids, mask = generate(policy, prompts, samples, max_tokens, end, generator)
    prompt_lengths = prompts[1].repeat_interleave(samples)
    kept = torch.empty(len(ids), device=ids.device).geometric_(HAND_OVER, generator=generator)
    kept = (kept.long() - 1).clamp(min=0)             # tokens by the policy; CUDA may round 1 to 0
    rows = (kept < mask.sum(1)).nonzero().squeeze(1)
    rows = rows[kept[rows].argsort(stable=True)]      # rows of a batch start near the same position
    for part in rows.split(2048) if len(rows) else ():
        response = sample(ref, ids[part], prompt_lengths[part] + kept[part],
                          max_tokens - kept[part], end, generator=generator)
        ids[part] = F.pad(response, (0, ids.shape[1] - response.shape[1]), value=end)
    return ids, response_mask(ids, prompt_lengths, max_tokens, end)


def hand_over_logp(token_logp: Tensor, ref_token_logp: Tensor, mask: Tensor) -> Tensor:
    """log q(y|x) of responses y that `sample_and_hand_over` samples, nats -> (N,).

    q(y|x) = (1 - h)^L pi(y|x) + sum_{k < L} h (1 - h)^k pi(y_<k|x) pi_ref(y_>=k|x, y_<k),
    the sum over the number k of tokens by the policy, for L response tokens and h = HAND_OVER.
    token_logp and ref_token_logp (N, T) are those of `response_token_logp`, mask (N, T).
    """
    by_policy = (token_logp + math.log1p(-HAND_OVER)).masked_fill(~mask, 0.).cumsum(1)
    by_policy = F.pad(by_policy, (1, 0))    # column t: the tokens before t; the last column: all
    by_ref = ref_token_logp.flip(1).cumsum(1).flip(1)              # column t: t and all after it
    at_token = by_policy[:, :-1] + math.log(HAND_OVER) + by_ref    # (N, T) pi_ref takes over at t
    at_token = at_token.masked_fill(~mask, -math.inf)
    return torch.cat([at_token, by_policy[:, -1:]], 1).logsumexp(1)


def proposal_logp(policies: list[GPT], ids: Tensor, mask: Tensor) -> Tensor:
    """log q_m(y|x) of responses y under each of the M samplers of `sample_mixture`, nats -> (M, N).

    q_1 is pi_ref, the first policy; each other policy is ended by it (`hand_over_logp`). ids (N, T)
    and mask (N, T); the result is on the CPU.
    """
    ref_token_logp = map_batches(partial(response_token_logp, policies[0]), ids, mask)
    logps = [ref_token_logp.sum(1)]
    for policy in policies[1:]:
        token_logp = map_batches(partial(response_token_logp, policy), ids, mask)
        logps.append(hand_over_logp(token_logp, ref_token_logp, mask))
    return torch.stack(logps).cpu()


def sample_mixture(setup, policies: list[GPT], prompts: tuple[Tensor, Tensor], samples: int,
                   generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Responses of M policies, pi_ref first, with their true rewards and log weights.

    n = `samples` responses to each of X prompts are pi_ref's, and n are begun by each other policy
    and ended by pi_ref. -> ids and mask (X, M * n, T), rewards and log weights (X, M * n).
    Estimates of Z from them are unbiased for any policies (`dpo.balance_heuristic`). Policies that
    are nearer to the optimum than pi_ref give more effective samples; because of pi_ref no
    weight exceeds M (a defensive mixture; Hesterberg 1995).
    """
    ref, *others = policies
    generated = [generate(ref, prompts, samples, setup.cfg.max_tokens, setup.encoding.eot_token,
                          generator)]
    for policy in others:
        generated.append(sample_and_hand_over(setup, ref, policy, prompts, samples, generator))
    ids, mask = (torch.cat(parts) for parts in zip(*generated))              # (M * X * samples, T)
    logp = proposal_logp(policies, ids, mask)
    log_weight = dpo.balance_heuristic(logp[0], logp)
    reward = data.true_reward(setup.encoding, ids, mask).cpu()

    def by_prompt(x: Tensor) -> Tensor:
        x = x.view(len(policies), len(prompts[0]), samples, *x.shape[1:])
        return x.transpose(0, 1).flatten(1, 2)

    return by_prompt(ids), by_prompt(mask), by_prompt(reward), by_prompt(log_weight)


def sample_rewards(setup, policy: GPT, prompts: tuple[Tensor, Tensor], samples: int,
                   generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """True reward, KL(pi || pi_ref) in nats, and length in tokens of a policy's responses.

    The policy samples `samples` responses to each of X prompts. -> three tensors (X, samples) on
    the CPU, for `mean_and_se`.
    """
    ids, mask = generate(policy, prompts, samples, setup.cfg.max_tokens,
                         setup.encoding.eot_token, generator)
    reward = data.true_reward(setup.encoding, ids, mask)
    kl = map_batches(partial(response_kl, policy, setup.ref), ids, mask)
    length = mask.sum(1).float()
    return tuple(x.view(-1, samples).cpu() for x in (reward, kl, length))


def optimum_from_samples(reward: Tensor, log_weight: Tensor) -> dict:
    """The optimal frontier from rewards and log weights, and `ref_reward`, pi_ref's mean reward."""
    ref_reward = (log_weight.softmax(1) * reward).sum(1).mean().item()
    betas = torch.logspace(-3.5, 1.5, 200)
    return {**dpo.optimal_frontier(reward, betas, log_weight), "ref_reward": ref_reward}


def draw_from_optimum(samples: tuple[Tensor, Tensor, Tensor, Tensor], beta: float, count: int,
                      generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` samples of pi* for each prompt, drawn from those of `sample_mixture` (resampling).

    A response is drawn by its probability in pi*, with replacement. -> ids and mask (X * count, T)
    """
    ids, mask, reward, log_weight = samples
    probability = dpo.optimal_policy(log_weight, reward, beta).exp()                # (X, N)
    columns = torch.multinomial(probability, count, replacement=True, generator=generator)
    rows = torch.arange(len(columns))[:, None]
    return ids[rows, columns].flatten(0, 1), mask[rows, columns].flatten(0, 1)


@cached
def fit_to_optimum(setup, kls: tuple[float, ...], sft: Callable) -> dict[str, list]:
    """A policy fitted to the optimum at the last of `kls`, nats, to sample for it.

    It is fitted by maximum likelihood, so it must give probability to all that the samples of the
    optimum contain: SFT on approximate samples of pi* (Eq. 4) for train prompts. These are drawn
    from `sample_mixture` of pi_ref and the two fits before, so the KL can grow from fit to fit
    (adaptive importance sampling; Rubinstein 1999, the cross-entropy method). Training starts from
    the fit before. `sft` is that of train.py. -> `checkpoints`, a list with the parameters, as
    `load_finished_policy` reads it.
    """
    names = *kls, setup.cfg.seed
    generator = data.named_generator("fit to optimum", *names, device=setup.device)
    policies = sampling_policies(setup, fits_at(setup, kls[:-1], sft)[-2:])
    prompts = prompts_of_split(setup, "train", setup.cfg.prompts)
    chosen = torch.randperm(len(prompts[0]), generator=generator, device=setup.device)
    prompts = tuple(p.to(setup.device)[chosen[:FIT_PROMPTS]] for p in prompts)
    samples = sample_mixture(setup, policies, prompts, FIT_SAMPLES, generator)
    _, beta, _ = dpo.optimal_reward(kls[-1], optimum_from_samples(*samples[2:]))
    ids, mask = draw_from_optimum(samples, beta, FIT_PICKS, data.named_generator("picks", *names))
    orders = []
    for epoch in range(FIT_EPOCHS):
        order_generator = data.named_generator("order of fit", epoch, *names)
        orders.append(torch.randperm(len(ids), generator=order_generator))
    batches = [batch.tolist() for batch in torch.cat(orders).split(FIT_BATCH)]
    policy = copy.deepcopy(policies[-1]).requires_grad_(True)
    sft(policy, ids.cpu(), last_response_token(mask).cpu() + 1, batches, FIT_LR)
    return {"checkpoints": [cpu_state_dict(policy)]}


def fits_at(setup, kls: tuple[float, ...], sft: Callable) -> tuple[Stage, ...]:
    """The stages of the fits at these KLs, each of which reads those before."""
    return tuple(Stage(fit_to_optimum, setup, kls[:i], sft) for i in range(1, len(kls) + 1))


def fits_to_optimum(setup, sft: Callable) -> tuple[Stage, ...]:
    """The stages that fit --optimum-fits policies.

    Their KLs are a quarter of the largest target of PPO, a half, three quarters, the whole; later
    fits repeat the whole. Fewer than four take fewer steps.
    """
    count = setup.cfg.optimum_fits
    steps = min(count, 4)
    kls = tuple(max(setup.cfg.kl_targets) * min(i / steps, 1) for i in range(1, count + 1))
    return fits_at(setup, kls, sft)


def choose_proposals(setup, trained: list[Stage]) -> tuple[Stage, ...]:
    """Trained policies that sample for the optimum: PPO-GT, and DPO's two farthest.

    `trained` are stages of train.py, whose values say what was trained.
    """
    finished = [stage for stage in trained
                if stage.setup.seed == setup.seed and not stage.value["failure"]]
    finished.sort(key=lambda stage: stage.value["setting"])
    ppo_gt = [stage for stage in finished if stage.value["method"] == "ppo_gt"]
    dpo_by_beta = [stage for stage in finished if stage.value["method"] == "dpo"]
    return (*ppo_gt, *dpo_by_beta[:2])    # a smaller beta goes farther from pi_ref


def all_proposals(setups: list, trained: list[Stage], sft: Callable) -> list[tuple[Stage, ...]]:
    """For each seed the policies that sample for its optimum besides pi_ref, all finished.

    With --optimum-fits the last fit and the last but two: neighbours are alike, and each sampling
    policy costs time. Otherwise trained policies.
    """
    fits = [fits_to_optimum(setup, sft) for setup in setups]
    # the first of each seed, then the second: the workers share them, and few wait
    setups[0].stages.get_all([stage for stages in zip(*fits) for stage in stages])
    return [stages[-1:] + stages[-3:-2] or choose_proposals(setup, trained)
            for setup, stages in zip(setups, fits)]


def sampling_policies(setup, proposals: tuple[Stage, ...]) -> list[GPT]:
    """pi_ref and the finished policies of the proposals."""
    return [setup.ref] + [load_finished_policy(setup, stage) for stage in proposals]


@cached
def sample_proposals(setup, part: int, proposals: tuple[Stage, ...]) -> tuple[Tensor, Tensor]:
    """Rewards and log weights of `sample_mixture`, for one part of the evaluation prompts."""
    policies = sampling_policies(setup, proposals)
    prompts = tuple(p.chunk(PARTS)[part] for p in evaluation_prompts(setup))
    generator = data.named_generator("optimum", setup.cfg.seed, part, device=setup.device)
    *_, reward, log_weight = sample_mixture(setup, policies, prompts, setup.cfg.optimum_samples,
                                            generator)
    return reward, log_weight


def samples_of_optimum(setup, proposals: tuple[Stage, ...]) -> tuple[Tensor, Tensor]:
    """Rewards and log weights of N samples for each evaluation prompt -> (X, N) each."""
    samples = setup.stages.get_all([Stage(sample_proposals, setup, part, proposals)
                                    for part in part_indices(setup.cfg.eval_prompts)])
    return tuple(torch.cat(x) for x in zip(*samples))


def estimate_optimum(setup, proposals: tuple[Stage, ...]) -> dict:
    """The optimal frontier (Eq. 4) of the evaluation prompts, and `ref_reward`, pi_ref's mean.

    It is estimated from samples of pi_ref and of the proposals, which reach further.
    """
    return optimum_from_samples(*samples_of_optimum(setup, proposals))


def mean_optimum(optima: dict[int, dict]) -> dict:
    """The mean over seeds of optimal frontiers, at common betas; `seeds` holds each of them.

    The seeds are independent, so the squares of their errors add up.
    """
    mean = {}
    for name in ("beta", "kl", "reward", "ess"):
        columns = zip(*(optimum[name] for optimum in optima.values()))
        mean[name] = [statistics.fmean(column) for column in columns]
    errors = zip(*(optimum["se"] for optimum in optima.values()))
    mean["se"] = [math.hypot(*column) / len(column) for column in errors]
    mean["ref_reward"] = statistics.fmean(optimum["ref_reward"] for optimum in optima.values())
    return {**mean, "seeds": {str(seed): optimum for seed, optimum in optima.items()}}


# ---------------------------------------------------------------------------------------- drawing
def draw_optimum(axis, optimum: dict) -> None:
    """Draw the optimal frontier; the area that no policy can reach is shaded.

    The curve is solid where its estimate rests on enough effective samples, and dashed beyond.
    """
    kl, reward = zip(*sorted(zip(optimum["kl"], optimum["reward"])))
    end = reliable_kl(optimum)    # lies between two points of the curve
    height = numpy.interp(end, kl, reward)
    count = sum(x <= end for x in kl)
    axis.fill_between(kl, reward, 1.02, color="0.93", lw=0)
    axis.plot([*kl[:count], end], [*reward[:count], height], color="0.25", lw=2,
              label="optimum (Eq. 4)")
    axis.plot([end, *kl[count:]], [height, *reward[count:]], "--", color="0.25", lw=1.5,
              label="the same, too few samples")


def mean_over_seeds(rows: list[dict]) -> list[dict]:
    """One row for each method and setting, with means over seeds, in order of KL.

    Standard errors are over seeds, which share nothing; of one seed they are its own, over prompts.
    """
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["setting"]), []).append(row)
    means = []
    for group in groups.values():
        mean = {**group[0]}
        for name in ("kl", "kl_se", "reward", "reward_se"):
            mean[name] = statistics.fmean(row[name] for row in group)
        if len(group) > 1:
            for name in ("kl", "reward"):
                deviation = statistics.stdev(row[name] for row in group)
                mean[f"{name}_se"] = deviation / len(group) ** .5
        means.append(mean)
    return sorted(means, key=lambda row: row["kl"])


def draw_markers(axis, rows: list[dict], style: tuple[str, str, str], right: float,
                 **sizes: float) -> None:
    """Draw finished policies with error bars; those beyond a KL of `right` are drawn there."""
    label, colour, marker = style
    kl = [min(row["kl"], right) for row in rows]
    below = [row["kl_se"] if row["kl"] <= right else 0. for row in rows]
    above = [min(error, right - x) for error, x in zip(below, kl)]    # not beyond the axis
    axis.errorbar(kl, [row["reward"] for row in rows], xerr=[below, above],
                  yerr=[row["reward_se"] for row in rows], fmt=marker, color=colour, mec="white",
                  label=label, zorder=4, clip_on=False, **sizes)


def draw_method(axis, rows: list[dict], label: str, colour: str, marker: str) -> None:
    """Draw one method: small dots during training, markers with error bars for final policies.

    Best-of-N is not trained: it is a curve over N.
    """
    method = rows[0]["method"]
    during = [row for row in rows if not row["final"] and row["kl"] <= MAX_KL]
    final = mean_over_seeds([row for row in rows if row["final"]])
    axis.scatter([row["kl"] for row in during], [row["reward"] for row in during], s=9,
                 color=colour, alpha=.35, lw=0)
    if method in BEST_OF_N:
        axis.plot([row["kl"] for row in final], [row["reward"] for row in final], ":",
                  color=colour, marker=marker, ms=4, lw=1.2, label=label, zorder=3)
        return
    draw_markers(axis, final, (label, colour, marker), MAX_KL, ms=13 if method == "sft" else 8,
                 mew=.7, elinewidth=1)


def label_distant_policies(axis, rows: list[dict], styles: dict[str, tuple]) -> None:
    """Write name and KL of the policies beyond MAX_KL beside their markers at the right edge."""
    distant = [row for row in mean_over_seeds(rows) if row["kl"] > MAX_KL]
    height = 0.
    for row in sorted(distant, key=lambda row: row["reward"]):
        height = max(row["reward"], height + .025)    # labels must not overlap
        label, *_ = styles[row["method"]]
        axis.annotate(f"{label}, KL {row['kl']:.0f} \u2192", (MAX_KL, height), (-10, 0),
                      textcoords="offset points", ha="right", va="center", fontsize=9)


def draw(rows: list[dict], optimum: dict, path) -> None:
    """Draw all rows of results.jsonl and the optimum."""
    figure, axis = plt.subplots(figsize=(10.5, 5.4))
    draw_optimum(axis, optimum)
    styles = styles_of(row["method"] for row in rows)
    for method, method_style in styles.items():
        method_rows = [row for row in rows if row["method"] == method]
        if method_rows:
            draw_method(axis, method_rows, *method_style)
    axis.scatter([], [], s=9, color="0.5", lw=0, label="during training, in its colour")
    label_distant_policies(axis, [row for row in rows if row["final"]], styles)
    bottom = min(row["reward"] for row in rows if row["kl"] <= MAX_KL or row["final"])
    axis.set(xlim=(-.2, MAX_KL), ylim=(min(.45, bottom - .03), 1.02))
    axis.set_xlabel("sequence KL(\u03c0 \u2016 \u03c0_ref), nats", fontsize=12)
    axis.set_ylabel("true reward (probability of positive sentiment)", fontsize=12)
    axis.grid(alpha=.25)
    # outside the axes, because every place inside may hold a point
    axis.legend(loc="center left", bbox_to_anchor=(1.01, .5), fontsize=11, frameon=False)
    save(figure, path)
