"""The experiment of Section 6: SFT, preferences, reward model, DPO, PPO, evaluation, the frontier.

    python train.py                                        the default experiment
    python train.py --loss my_loss.py:my_loss              a loss of your own, beside the others
    python train.py --help                                 every number, with its meaning

Every result is a stage (harness.py): computed once, kept in a file under --out, and loaded from
there the next time. So a run that was stopped continues where it was, and a new loss reuses the
baselines. Several workers run this program at once and share the stages.
"""
import multiprocessing
import os
import signal
import sys


def stop(*_) -> None:
    """Ctrl-C: end this process and its workers at once; finished stages are in their files."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if multiprocessing.parent_process() is None:
        os.write(2, b"stopped; the same command continues from here\n")
    os._exit(130)


if __name__ in ("__main__", "__mp_main__"):    # before torch, whose import takes seconds
    signal.signal(signal.SIGINT, stop)

import argparse
import copy
import dataclasses
import math
import pathlib
import re
import time
from functools import partial
from typing import Callable, Iterator, NamedTuple

import tiktoken
import torch
from torch import Tensor, nn

import data
import dpo
import harness
import ppo
from data import Preferences, rng, torch_rng
from harness import LossError, Stages, UserError, cached, option
from model import (GPT, GPTConfig, batched_sequence_logp, cpu_state_dict, generate, lr_schedule,
                   map_batches, response_kl, response_token_logp)
from plots import STYLE, cost, figures, gap, mean_and_se, mean_over_steps, style, tables


# ---------------------------------------------------------------------------------- configuration
@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment; each field is a flag."""
    seed: int = option(0, "seed of corpus and pi_ref, and the first of --seeds", 0, 2**53)
    seeds: int = option(1, "repetitions, each with its own preferences and policies", 1, 100)
    split: str = option("test", "evaluation prompts: test for results, validation for tuning",
                        choices=("test", "validation"))
    # the task (Section 6, App. C.1)
    reviews: int = option(32_000, "reviews: 80% train, 10% validation, 10% test", 50, 10**6)
    vocab_size: int = option(512, "tokens in the vocabulary, end-of-text included", 300, 10**5)
    max_tokens: int = option(64, "longest response, tokens", 1, 10**4)
    # the model
    layers: int = option(2, "blocks of the GPT", 1, 100)
    heads: int = option(2, "attention heads", 1, 100)
    width: int = option(64, "width of the GPT, a multiple of the heads", 1, 10**5)
    sft_epochs: int = option(2, "epochs of SFT on the train reviews", 1, 1000)
    sft_batch: int = option(64, "reviews a step of SFT", 1, 10**5)
    sft_lr: float = option(4e-3, "peak learning rate of SFT", 1e-12, 10)
    # preferences (Section 6)
    prompts: int = option(8_000, "prompts with labelled completions (paper: 25,000)", 1, 10**6)
    completions: int = option(4, "completions a prompt, and PPO's episodes a prompt", 2, 64)
    labels: str = option("deterministic", "deterministic: higher reward wins (paper); bt: Eq. 1",
                         choices=("deterministic", "bt"))
    tau: float = option(.1, "temperature of bt labels: sigma((r_1 - r_2) / tau)", 1e-6, 1e6)
    # DPO and other losses on pairs (App. B)
    betas: tuple[float, ...] = option((.7, 1., 2., 3.), "beta of DPO and of --loss, a list (paper: "
                                      ".05,.1,1,5)", 1e-6, 1e6)
    alphas: tuple[float, ...] = option((.1, .5, 1.), "alpha of Unlikelihood, a list (paper: "
                                       ".05,.1,.5,1)", 0, 1e6)
    preferred_runs: int = option(1, "runs of Preferred-FT, each in its own order", 0, 100)
    batch_prompts: int = option(8, "prompts a step, with all their pairs (paper: 64 pairs)", 1,
                                10**5)
    lr: float = option(5e-4, "peak learning rate on pairs", 1e-12, 10)
    epochs: int = option(1, "epochs over the pairs", 1, 1000)
    # RLHF (Section 3)
    rm_epochs: int = option(3, "epochs of the reward model; the best is kept (paper: 3)", 1, 1000)
    rm_lr: float = option(1e-3, "peak learning rate of reward model and initial values", 1e-12, 10)
    kl_targets: tuple[float, ...] = option((1., 2., 4.), "target KL of PPO, nats, a list (paper: "
                                           "3,6,9,12)", 1e-6, 1e6)
    ppo_steps: int = option(100, "steps of PPO, each on a batch of episodes", 1, 10**6)
    ppo_batch: int = option(256, "episodes a batch (paper: 1024)", 2, 4096)
    ppo_minibatch: int = option(64, "episodes an update", 1, 10**6)
    ppo_epochs: int = option(1, "epochs over a batch", 1, 100)
    ppo_lr: float = option(1e-3, "peak learning rate of policy and values", 1e-12, 10)
    ppo_coefficient: float = option(.75, "initial price of a nat at target 1, in standard "
                                    "deviations of the reward", 1e-9, 1e6)
    ppo_horizon: float = option(2_000, "horizon of the KL controller, episodes", 1_000, 1e12)
    # evaluation
    eval_prompts: int = option(64, "held-out prompts, for policies and optimum", 2, 10**5)
    eval_samples: int = option(16, "responses to each, for a finished policy", 1, 10**4)
    evaluations: int = option(8, "evaluations of a run, the last of its finished policy", 1, 1000)
    optimum_samples: int = option(1024, "responses of pi_ref to each, for the optimum", 512, 10**6)


PRESETS = {
    "default": {},
    "paper": dict(prompts=25_000, betas=(1., 2., 4., 8.), alphas=(.05, .1, .5, 1.), ppo_steps=400,
                  optimum_samples=8_192),
    "tiny": dict(reviews=1_500, vocab_size=440, layers=1, heads=1, width=32, sft_epochs=3,
                 sft_batch=16, sft_lr=1e-2, prompts=64, betas=(.5, 2.), alphas=(.1,), rm_epochs=1,
                 kl_targets=(1.,), ppo_steps=2, ppo_batch=16, ppo_minibatch=8, eval_prompts=12,
                 eval_samples=4, evaluations=2, optimum_samples=640),
}


def check_config(cfg: Config) -> None:
    """Raise UserError for sizes that do not fit together, or not into this machine."""
    parameters = 12 * cfg.layers * cfg.width**2 + cfg.vocab_size * cfg.width
    tokens = cfg.prompts * cfg.completions * cfg.max_tokens
    needed = 20 * parameters + 9 * tokens    # bytes: weights, gradients, Adam, pi_ref; ids, masks
    memory = harness.total_memory()
    if needed > memory:
        raise UserError(f"these sizes need at least {needed / 1e9:,.0f} GB of memory, but there "
                        f"are {memory / 1e9:.0f}: choose smaller ones")
    if cfg.width % cfg.heads:
        raise UserError(f"--width {cfg.width} is not a multiple of --heads {cfg.heads}")
    if cfg.prompts > .8 * cfg.reviews:
        raise UserError(f"--prompts {cfg.prompts} is more than the train reviews, 80% of "
                        f"--reviews {cfg.reviews}")
    if cfg.eval_prompts > .1 * cfg.reviews:
        raise UserError(f"--eval-prompts {cfg.eval_prompts} is more than 10% of --reviews "
                        f"{cfg.reviews}")
    if cfg.ppo_batch % cfg.completions:
        raise UserError(f"--ppo-batch {cfg.ppo_batch} is not a multiple of --completions "
                        f"{cfg.completions}")


# ---------------------------------------------------------------------------------- SFT (App. C.1)
class Setup(NamedTuple):
    """What all runs share."""
    cfg: Config
    stages: Stages
    device: str
    key: str                          # stands for the next three fields in the hash of a stage
    encoding: tiktoken.Encoding
    corpus: dict[str, list[str]]      # split -> reviews
    ref: GPT                          # pi_ref
    user_pairs: harness.UserPairs | None = None
    eval_prompts: tuple[Tensor, Tensor] | None = None           # for figures
    learned_reward: Callable[[Tensor, Tensor], Tensor] | None = None


@cached
def write_corpus(setup: Setup) -> dict[str, list[str]]:
    """The reviews of each split."""
    return data.write_corpus(setup.cfg.reviews, setup.cfg.seed)


@cached
def learn_tokenizer(setup: Setup) -> dict[bytes, int]:
    """Byte-pair ranks, from as many train reviews as contain all the words."""
    corpus, vocab_size = write_corpus(setup), setup.cfg.vocab_size
    try:
        return data.learn_ranks(corpus["train"][:150], vocab_size)
    except ValueError:
        raise UserError(f"the reviews have too few different words for --vocab-size {vocab_size}: "
                        "choose a smaller one") from None


def new_gpt(cfg: Config, device: str) -> GPT:
    """The GPT before any training."""
    context = cfg.max_tokens + data.MAX_PROMPT_TOKENS
    config = GPTConfig(cfg.vocab_size, context, cfg.layers, cfg.heads, cfg.width)
    return GPT(config, torch_rng("init", cfg.seed)).to(device)


def sft(model: GPT, ids: Tensor, lengths: Tensor, batches: list[list[int]], lr: float) -> None:
    """Maximum likelihood of each token given those before it: ids (N, T), lengths (N,).

    `batches` are lists of rows, one for each step.
    """
    device = model.token.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .98), weight_decay=0.,
                                  fused=True)
    scheduler = lr_schedule(optimizer, len(batches))
    for step, rows in enumerate(batches, 1):
        width = int(lengths[rows].max())
        mask = torch.arange(width) < lengths[rows][:, None]
        mask[:, 0] = False                                # nothing predicts the first token
        mask = mask.to(device)
        logp = response_token_logp(model, ids[rows, :width].to(device), mask)
        loss = -logp.sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        scheduler.step()
        if step % max(len(batches) // 5, 1) == 0:
            print(f"SFT step {step}/{len(batches)}: {loss.item():.3f} nats a token", flush=True)


@cached
def train_reference(setup: Setup) -> dict[str, Tensor]:
    """The parameters of pi_ref: SFT on the train reviews."""
    cfg, corpus = setup.cfg, write_corpus(setup)
    encoding = data.make_encoding(learn_tokenizer(setup))
    model = new_gpt(cfg, setup.device)
    rows = [encoding.encode(text) + [encoding.eot_token] for text in corpus["train"]]
    rows = [row[:model.config.context] for row in rows]
    order = []
    for epoch in range(cfg.sft_epochs):
        order += rng("sft", cfg.seed, epoch).sample(range(len(rows)), len(rows))
    batches = [order[i:i + cfg.sft_batch] for i in range(0, len(order), cfg.sft_batch)]
    sft(model, *data.pad(rows, encoding.eot_token), batches, cfg.sft_lr)
    return cpu_state_dict(model)


def prepare(cfg: Config, stages: Stages, device: str, pairs: list[dict] = [],
            path: str = "") -> Setup:
    """Corpus, tokenizer and pi_ref; and the user's pairs, read from `path`, if there are any."""
    ref = new_gpt(cfg, device).requires_grad_(False)
    setup = Setup(cfg, stages, device, "", None, None, ref)
    encoding = data.make_encoding(learn_tokenizer(setup))
    user_pairs = harness.encode_pairs(encoding, pairs, cfg.max_tokens, path) if pairs else None
    ref.load_state_dict(train_reference(setup))
    if user_pairs:
        ids, mask = user_pairs.preferences.ids, user_pairs.preferences.mask
        user_pairs = user_pairs.with_reference(batched_sequence_logp(ref, ids, mask, device))
    return setup._replace(corpus=write_corpus(setup), encoding=encoding, user_pairs=user_pairs,
                          key=stages.path(setup, train_reference, ()).name)


# ---------------------------------------------------------------- completions, labels (Section 6)
@cached
def make_prompts(setup: Setup, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts from the first `count` reviews of a split -> ids (count, P), lengths (count,)."""
    texts = setup.corpus[split][:count]
    return data.make_prompts(setup.encoding, texts, rng("prompts", split, seed))


@cached
def complete_part(setup: Setup, split: str, count: int, seed: int, part: int) -> dict[str, Tensor]:
    """Completions of an eighth of the prompts by pi_ref, with log pi_ref and true rewards."""
    cfg, device, end = setup.cfg, setup.device, setup.encoding.eot_token
    prompts = tuple(p.chunk(8)[part].to(device) for p in make_prompts(setup, split, count, seed))
    generator = torch_rng("completions", split, seed, part, device=device)
    ids, mask = generate(setup.ref, prompts, cfg.completions, cfg.max_tokens, end, generator)
    return {"ids": ids.cpu(), "mask": mask.cpu(),
            "ref": batched_sequence_logp(setup.ref, ids, mask, device),
            "reward": data.true_reward(setup.encoding, ids, mask).cpu()}


def complete(setup: Setup, split: str, count: int, seed: int) -> dict[str, Tensor]:
    """The completions of `count` prompts: ids (C, T), mask (C, T), ref (C,), reward (C,)."""
    parts = range(len(torch.empty(count).chunk(8)))
    completions = setup.stages.get_all(
        setup, [(complete_part, split, count, seed, part) for part in parts])
    return {name: torch.cat([part[name] for part in completions]) for name in completions[0]}


def label(setup: Setup, split: str, count: int, seed: int) -> Preferences:
    """Labelled pairs of the completions of `count` prompts. Raises UserError if there are none."""
    cfg, completions = setup.cfg, complete(setup, split, count, seed)
    reward = completions["reward"].view(-1, cfg.completions)
    generator = torch_rng("labels", split, seed)
    winner, loser, _ = data.label_pairs(reward, cfg.labels, cfg.tau, generator)
    if not len(winner):
        raise UserError(f"all completions of a {split} prompt have the same reward, so that there "
                        "is no pair to learn from: train pi_ref longer (--sft-epochs), or use more "
                        "--prompts")
    return Preferences(completions["ids"], completions["mask"], completions["ref"], winner, loser,
                       cfg.completions)


def train_pairs(setup: Setup, seed: int) -> Preferences:
    """The pairs to train on: the user's own, or those of pi_ref's completions."""
    if setup.user_pairs:
        return setup.user_pairs.preferences
    return label(setup, "train", setup.cfg.prompts, seed)


# -------------------------------------------------------------------------------- DPO (Section 4)
class Run(NamedTuple):
    """One policy of the sweep."""
    method: str
    setting: float    # beta, alpha, target KL or, for Preferred-FT, the number of the run
    seed: int


def train_on_pairs(setup: Setup, policy: GPT, run: Run,
                   loss_function: Callable) -> tuple[int, Iterator[dict[str, float]]]:
    """DPO, or another loss on pairs (App. B): the number of steps, and an iterator over them."""
    cfg, device, pairs = setup.cfg, setup.device, train_pairs(setup, run.seed)
    batches = []
    for epoch in range(cfg.epochs):
        generator = torch_rng("order", run.setting, run.seed, epoch)
        batches += data.prompt_batches(pairs, cfg.batch_prompts, generator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=0., fused=True)
    scheduler = lr_schedule(optimizer, len(batches))

    def step(prompts: Tensor) -> dict[str, float]:
        batch = data.prompt_batch(pairs, prompts)
        ids, mask, ref = batch.ids.to(device), batch.mask.to(device), batch.ref.to(device)
        winner, loser = batch.winner.to(device), batch.loser.to(device)
        logp = response_token_logp(policy, ids, mask).sum(1)          # 4 forwards a prompt ...
        pair = dpo.make_pairs(logp, ref, mask.sum(1), winner, loser)
        loss = loss_function(pair, run.setting).mean()                # ... for 6 pairs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        margin = ((pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)).detach()    # nats
        statistics = {"loss": loss, "logp_w": pair.logp_w, "logp_l": pair.logp_l, "margin": margin,
                      "accuracy": (margin > 0).float(),
                      "weight": torch.sigmoid(-run.setting * margin),    # sigma(rhat_l - rhat_w)
                      "trained_tokens": mask.sum().float()}
        return {name: x.mean().item() for name, x in statistics.items()}

    return len(batches), map(step, batches)


# ------------------------------------------------------------------------------- RLHF (Section 3)
@cached
def reward_model(setup: Setup, seed: int) -> dict:
    """The reward model and the scale of its rewards: see `ppo.train_reward_model`."""
    cfg, pairs = setup.cfg, train_pairs(setup, seed)
    held_out_prompts = min(-(-cfg.prompts // 8), len(setup.corpus["validation"]))
    held_out = label(setup, "validation", held_out_prompts, seed)
    epochs = [data.prompt_batches(pairs, cfg.batch_prompts, torch_rng("reward model", seed, epoch))
              for epoch in range(cfg.rm_epochs)]
    return ppo.train_reward_model(cfg, setup.ref, pairs, held_out, epochs, setup.device)


def learned_score(setup: Setup, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward of PPO: learned, with mean 0 and deviation 1 on responses of pi_ref."""
    fitted = reward_model(setup, seed)
    model = ppo.ScalarModel(setup.ref).to(setup.device)
    model.load_state_dict(fitted["model"])

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return (ppo.predict_reward(model, ids, mask) - fitted["mean"]) / fitted["deviation"]

    return score


def true_score(setup: Setup, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward of PPO-GT: true, with mean 0 and deviation 1 on responses of pi_ref."""
    reward = complete(setup, "train", setup.cfg.prompts, seed)["reward"]
    mean, deviation = reward.mean().item(), reward.std().item()

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return (data.true_reward(setup.encoding, ids, mask) - mean) / deviation

    return score


@cached
def initial_values(setup: Setup, method: str, seed: int, score_function: Callable) -> dict:
    """The values that PPO starts from, the same for all targets: see `ppo.fit_values`."""
    cfg, completions = setup.cfg, complete(setup, "train", setup.cfg.prompts, seed)
    return ppo.fit_values(setup.ref, completions["ids"], completions["mask"],
                          score_function(setup, seed), 4 * cfg.batch_prompts, cfg.rm_lr,
                          torch_rng("values", seed))


def train_with_ppo(setup: Setup, policy: GPT, run: Run,
                   score_function: Callable) -> tuple[int, Iterator[dict[str, float]]]:
    """PPO or PPO-GT: the number of steps, and an iterator over them."""
    cfg, seed = setup.cfg, run.seed
    values = initial_values(setup, run.method, seed, score_function)
    prompts = tuple(p.to(setup.device) for p in make_prompts(setup, "train", cfg.prompts, seed))
    steps = ppo.train_ppo(cfg, policy, setup.ref, prompts, score_function(setup, seed),
                          run.setting, setup.encoding.eot_token,
                          torch_rng(*run, device=setup.device), values)
    return cfg.ppo_steps, steps


METHODS = {    # method -> how it is trained, and the loss or the reward that it is trained on
    "ppo_gt": (train_with_ppo, true_score),
    "ppo": (train_with_ppo, learned_score),
    "dpo": (train_on_pairs, dpo.dpo_loss),
    "unlikelihood": (train_on_pairs, dpo.unlikelihood_loss),
    "preferred_ft": (train_on_pairs, dpo.preferred_ft_loss),
}


# -------------------------------------------------------------------------------------- evaluation
def evaluation_prompts(setup: Setup) -> tuple[Tensor, Tensor]:
    """The prompts of every evaluation, from held-out reviews: ids (X, P), lengths (X,)."""
    texts = setup.corpus[setup.cfg.split][:setup.cfg.eval_prompts]
    prompts = data.make_prompts(setup.encoding, texts, rng("judge", setup.cfg.seed))
    return tuple(p.to(setup.device) for p in prompts)


def evaluate(setup: Setup, policy: GPT, samples: int, *names) -> dict[str, float]:
    """Mean true reward and mean sequence KL(pi || pi_ref), nats, with standard errors.

    From `samples` responses to each evaluation prompt; `names` name the random generator.
    """
    generator = torch_rng("judge", *names, device=setup.device)
    ids, mask = generate(policy, evaluation_prompts(setup), samples, setup.cfg.max_tokens,
                         setup.encoding.eot_token, generator)
    reward = data.true_reward(setup.encoding, ids, mask)
    kl = map_batches(partial(response_kl, policy, setup.ref), ids, mask, batch=64)
    mean_reward, reward_se = mean_and_se(reward.view(-1, samples))
    mean_kl, kl_se = mean_and_se(kl.view(-1, samples))
    return {"reward": mean_reward, "reward_se": reward_se, "kl": mean_kl, "kl_se": kl_se,
            "length": mask.sum(1).float().mean().item()}


@cached
def evaluate_reference(setup: Setup) -> dict[str, float]:
    return evaluate(setup, setup.ref, setup.cfg.eval_samples, "sft")


@cached
def reference_rewards(setup: Setup, index: int) -> Tensor:
    """True rewards of many responses of pi_ref to one evaluation prompt -> (N,)."""
    prompt = tuple(p[index:index + 1] for p in evaluation_prompts(setup))
    generator = torch_rng("optimum", setup.cfg.seed, index, device=setup.device)
    ids, mask = generate(setup.ref, prompt, setup.cfg.optimum_samples, setup.cfg.max_tokens,
                         setup.encoding.eot_token, generator)
    return data.true_reward(setup.encoding, ids, mask).cpu()


def estimate_optimum(setup: Setup) -> dict:
    """The optimal frontier (Eq. 4) of the evaluation prompts, and `ref_reward`, pi_ref's mean."""
    indices = range(setup.cfg.eval_prompts)
    rewards = setup.stages.get_all(setup, [(reference_rewards, index) for index in indices])
    reward = torch.stack(rewards)                                                # (X, N)
    frontier = dpo.optimal_frontier(reward, torch.logspace(-3.5, 1.5, 400))
    return {**frontier, "ref_reward": reward.mean().item()}


# --------------------------------------------------------------------------------------- the sweep
KEEP_CHECKPOINTS = "dpo", "ppo", "unlikelihood"    # methods whose figures show policies on the way


def check_finite(statistics: dict[str, float]) -> None:
    """Raise FloatingPointError that names the statistics that are not finite."""
    names = [name for name, x in statistics.items() if not math.isfinite(x)]
    if names:
        raise FloatingPointError(f"{', '.join(names)} not finite")


def evaluation_row(setup: Setup, policy: GPT, run: Run, step: int, is_final: bool,
                   seconds: float, recent: list[dict]) -> dict:
    """A row of results: the evaluation, and the means of the statistics since the one before."""
    samples = setup.cfg.eval_samples if is_final else -(-setup.cfg.eval_samples // 4)
    numbers = evaluate(setup, policy, samples, *run, step)
    check_finite(numbers)
    numbers.update(seconds=seconds, **mean_over_steps(recent))
    print(f"{run.method} {run.setting:g} seed {run.seed}, step {step}:",
          *(f"{name} {x:.3g} " for name, x in numbers.items() if name[-3:] != "_se"), flush=True)
    return {**run._asdict(), "step": step, "final": is_final, **numbers}


def run_steps(setup: Setup, policy: GPT, run: Run, steps: int, progress: Iterator[dict],
              result: dict) -> None:
    """Train, and evaluate the policy on the way; `result` gets step, rows and checkpoints."""
    recent, seconds, start = [], 0., time.perf_counter()
    for step, statistics in enumerate(progress, 1):
        seconds += time.perf_counter() - start
        result["step"] = step
        check_finite(statistics)
        recent.append(statistics)
        if step == steps or step % -(-steps // setup.cfg.evaluations) == 0:
            row = evaluation_row(setup, policy, run, step, step == steps, seconds, recent)
            result["rows"].append(row)
            recent = []
            if run.method in KEEP_CHECKPOINTS:
                result["checkpoints"].append((step, cpu_state_dict(policy)))
        start = time.perf_counter()


@cached
def train_policy(setup: Setup, run: Run, train: Callable, trained_on: Callable) -> dict:
    """Train and evaluate one policy: its `rows` of results, `checkpoints` and final `policy`.

    `train` and `trained_on` are those of METHODS. A number that is not finite, or an error of a
    student's loss, ends the run: it keeps its rows, and `failure` gives the reason.
    """
    policy = copy.deepcopy(setup.ref).requires_grad_(True)
    steps, progress = train(setup, policy, run, trained_on)
    result = {**run._asdict(), "step": 0, "rows": [], "checkpoints": [], "policy": {},
              "failure": None}
    try:
        run_steps(setup, policy, run, steps, progress, result)
    except (FloatingPointError, LossError) as error:
        failure = {**run._asdict(), "step": result["step"], "reason": str(error)}
        return {**result, "failure": failure}
    return {**result, "policy": cpu_state_dict(policy)}


def policy_stages(cfg: Config, settings: dict[str, tuple], losses: dict = {}) -> list[tuple]:
    """A stage for each policy: methods (or a student's losses) and their settings, every seed."""
    trained_by = {**METHODS, **{name: (train_on_pairs, loss) for name, loss in losses.items()}}
    return [(train_policy, Run(method, float(setting), seed), *trained_by[method])
            for seed in range(cfg.seed, cfg.seed + cfg.seeds)
            for method, values in settings.items() for setting in values]


# --------------------------------------------------------------------------------- the experiment
def train_sweep(setup: Setup) -> list[dict]:
    """All policies of Section 6. What several of them wait for comes first."""
    cfg, seeds = setup.cfg, range(setup.cfg.seed, setup.cfg.seed + setup.cfg.seeds)
    stages = []
    for seed in seeds:
        stages += [(reward_model, seed), (initial_values, "ppo_gt", seed, true_score)]
    stages += policy_stages(cfg, {"ppo_gt": cfg.kl_targets})
    stages += [(initial_values, "ppo", seed, learned_score) for seed in seeds]
    stages += policy_stages(cfg, {"ppo": cfg.kl_targets, "dpo": cfg.betas,
                                  "unlikelihood": cfg.alphas,
                                  "preferred_ft": tuple(range(cfg.preferred_runs))})
    values = setup.stages.get_all(setup, stages, report=True)
    return [value for (function, *_), value in zip(stages, values) if function is train_policy]


def load_baselines(setup: Setup) -> list[dict]:
    """The policies of Section 6 that are in the folder, trained on pi_ref's pairs."""
    settings = {method: set() for method in METHODS}
    for path in setup.stages.folder.glob("train-policy-*.pt"):
        match = re.fullmatch(r"train-policy-(\w+)-(\d+(?:\.\d+)?(?:e[-+]\d+)?)-\d+\.\w+\.pt",
                             path.name)
        if match and match[1] in settings:
            settings[match[1]].add(float(match[2]))
    stages = policy_stages(setup.cfg, {method: sorted(x) for method, x in settings.items()})
    return setup.stages.load_all(setup._replace(user_pairs=None), stages)


def study(setup: Setup) -> tuple[list[dict], list[dict]]:
    """The rows of plots/gap.py, DPO with one obstacle removed at a time; and its failed runs."""
    rows, failures = [], []
    for variant, (fields, settings) in gap.variants(setup.cfg).items():
        cfg = dataclasses.replace(setup.cfg, seeds=1, **fields)
        changed = prepare(cfg, Stages(setup.stages.folder, setup.stages.store), setup.device)
        runs = changed.stages.get_all(changed, policy_stages(cfg, settings), report=True)
        finished = [{"figure": "gap", "variant": variant, **row}
                    for run in runs for row in run["rows"] if row["final"]]
        tables.add_shares(finished, estimate_optimum(changed))
        rows += finished
        failures += [{**run["failure"], "reason": f"{variant}: {run['failure']['reason']}"}
                     for run in runs if run["failure"]]
    return rows, failures


@cached
def measure_figure(setup: Setup, name: str, measure: Callable, runs: tuple[Run, ...]) -> list[dict]:
    """The rows of a figure that needs policies: measure(setup, trained runs)."""
    score = learned_score(setup, setup.cfg.seed)

    def learned_reward(ids: Tensor, mask: Tensor) -> Tensor:
        return score(ids, mask).round(decimals=4)    # equal texts tie, whatever their batch

    setup = setup._replace(eval_prompts=evaluation_prompts(setup), learned_reward=learned_reward)
    return measure(setup, [train_policy(setup, run, *METHODS[run.method]) for run in runs])


def measure_figures(setup: Setup, runs: list[dict]) -> list[dict]:
    """The rows of all figures that need policies, those of the first seed."""
    shown = tuple(Run(run["method"], run["setting"], run["seed"])
                  for run in runs if run["seed"] == setup.cfg.seed)
    stages = [(measure_figure, name, figure.measure, shown)
              for name, figure in figures.FROM_POLICIES.items()]
    return sum(setup.stages.get_all(setup, stages), [])


def export_preferences(setup: Setup, seed: int) -> None:
    """Write the preferences of a seed as text, and print a summary of them."""
    pairs = label(setup, "train", setup.cfg.prompts, seed)
    path = setup.stages.folder / f"preferences-seed{seed}.jsonl"
    harness.write_jsonl(path, data.export_preferences(setup.encoding, pairs))
    print(tables.summary_of_preferences(setup.encoding, pairs, evaluation_prompts(setup)),
          flush=True)


def collect_rows(setup: Setup, runs: list[dict], measured: list[dict],
                 optimum: dict) -> list[dict]:
    """The rows of results.jsonl: SFT, the runs and Best-of-N, with their shares."""
    cfg, reference = setup.cfg, evaluate_reference(setup)
    rows = [{"method": "sft", "setting": 0., "seed": seed, "step": 0, "final": True, **reference,
             "seconds": 0.} for seed in range(cfg.seed, cfg.seed + cfg.seeds)]
    rows += [row for run in runs for row in run["rows"]]
    for row in measured:
        if row["figure"] == "best_of_n" and row["setting"] > 1:    # Best-of-1 is SFT
            rows.append({name: x for name, x in row.items() if name != "figure"})
    rows = [{**row, "config": dataclasses.asdict(cfg)} for row in rows]
    methods = list(style(row["method"] for row in rows))
    rows.sort(key=lambda row: methods.index(row["method"]))
    tables.add_shares(rows, optimum)
    return rows


def experiment(rank: int, store: torch.distributed.Store, device: str, cfg: Config,
               args: argparse.Namespace, pairs: list[dict]) -> int:
    """Section 6, in its order, as one of several workers; returns the exit code."""
    out, losses = pathlib.Path(args.out), harness.load_losses(args.loss, STYLE)
    setup = prepare(cfg, Stages(out, store), device, pairs, args.pairs)
    optimum = estimate_optimum(setup)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        complete(setup, "train", cfg.prompts, seed)    # by all workers
        if rank == 0 and not pairs and not losses:
            export_preferences(setup, seed)
    if losses:
        runs = setup.stages.get_all(
            setup, policy_stages(cfg, dict.fromkeys(losses, cfg.betas), losses), report=True)
        measured, failures = [], []
    else:
        runs = train_sweep(setup)
        measured, failures = study(setup) if args.study else ([], [])
        measured += measure_figures(setup, runs)
    if rank > 0:
        return 0
    failures += [run["failure"] for run in runs if run["failure"]]
    measured += figures.earlier_rows(out, optimum, measured)
    runs = load_baselines(setup) + runs if losses else runs
    rows = collect_rows(setup, runs, measured, optimum)
    if not losses:
        measured = [row for row in measured if row["figure"] != "cost"]
        measured += cost.compute_costs(rows, optimum, setup.stages.seconds)
    figures.write_results(out, rows, failures, optimum, measured)
    figures.draw_all(out)
    print(tables.report(rows, failures, optimum), f"results and figures are in {out}", sep="\n")
    return 1 if failures or tables.above_optimum(rows, optimum) else 0


def main() -> int:
    """Read the command line and start the workers; returns the exit code."""
    cfg, args = harness.read_flags(sys.argv[1:], Config, PRESETS, __doc__.splitlines()[0])
    check_config(cfg)
    device = harness.choose_device(args.device)
    harness.load_losses(args.loss, STYLE)    # a bad one is refused before any work
    pairs = harness.read_pairs(args.pairs) if args.pairs is not None else []
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    workers = args.workers or harness.default_workers(device)
    return harness.launch(experiment, workers, device, cfg, args, pairs)


if __name__ == "__main__":
    sys.exit(harness.run_program(main))
