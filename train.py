"""The experiment of Section 6: SFT, preferences, DPO, reward model, PPO, evaluation, the sweep.

    python train.py                                        the default experiment
    python train.py --loss my_loss.py:my_loss              a loss of your own, beside the others
    python train.py --help                                 every flag, with its meaning

Every result is a stage (harness.py): computed once, kept in a file under --out, and loaded from
there the next time. So a run that was stopped repeats only its unfinished stages, and a new loss
reuses the baselines. Several workers run this program at once and share the stages.
"""
import harness    # first: Ctrl-C must work while torch is imported, which takes seconds
import argparse
import copy
import dataclasses
import math
import pathlib
import re
import sys
import time
from functools import partial
from typing import Callable, Iterable, Iterator, NamedTuple

import tiktoken
import torch
from torch import Tensor, nn

import data
import dpo
import ppo
from data import Preferences, named_generator, named_rng
from harness import PARTS, LossError, Stage, Stages, UserError, cached, option, part_indices
from model import (GPT, GPTConfig, batched_sequence_logp, cpu_state_dict, generate, lr_schedule,
                   response_token_logp)
from plots import (STYLE, cost, evaluation_prompts, figures, frontier, gap, mean_and_se,
                   mean_over_steps, prompts_of_split, tables)


# ---------------------------------------------------------------------------------- configuration
@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of the experiment; constants of PPO are in ppo.py.

    Each field is a flag: option(default, meaning, lowest, highest).
    """
    seed: int = option(0, "the first seed", 0, 2**53)
    seeds: int = option(1, "seeds, each with its own corpus, pi_ref and all else", 1, 100)
    split: str = option("test", "evaluation prompts: test for results, validation for tuning",
                        choices=("test", "validation"))
    # the task (Section 6, App. C.1)
    reviews: int = option(32_000, "film reviews: 80% train, 10% validation, 10% test; SFT also "
                          "sees a quarter as many restaurant reviews", 50, 10**6)
    vocab_size: int = option(672, "tokens in the vocabulary, end-of-text included", 300, 10**5)
    max_tokens: int = option(64, "longest response, tokens", 1, 10**4)
    # the model and SFT
    layers: int = option(2, "blocks of the GPT", 1, 100)
    heads: int = option(2, "attention heads", 1, 100)
    width: int = option(64, "width of the GPT, a multiple of the heads", 1, 10**5)
    sft_epochs: int = option(2, "epochs of SFT on the train reviews", 1, 1000)
    sft_batch: int = option(64, "reviews a step of SFT", 1, 10**5)
    sft_lr: float = option(4e-3, "peak learning rate of SFT", 1e-12, 10)
    # preferences (Section 6)
    prompts: int = option(8_000, "train prompts, of pairs and of PPO (paper: 25,000)", 1, 10**6)
    completions: int = option(4, "completions a prompt, and PPO's episodes a prompt", 2, 64)
    labels: str = option("deterministic", "deterministic: higher reward wins (paper); bt: Eq. 1",
                         choices=("deterministic", "bt"))
    tau: float = option(.1, "temperature of bt labels: sigma((r_1 - r_2) / tau); of the annotators "
                        "in plots/judges.py too", 1e-6, 1e6)
    # DPO and other losses on pairs (App. B)
    betas: tuple[float, ...] = option((.7, 1., 2., 3.), "beta of DPO and of --loss, a list (paper: "
                                      ".05,.1,1,5)", 1e-6, 1e6)
    alphas: tuple[float, ...] = option((.1, .5, 1.), "alpha of Unlikelihood, a list (paper: "
                                       ".05,.1,.5,1)", 0, 1e6)
    preferred_runs: int = option(1, "runs of Preferred-FT, each in its own order", 0, 100)
    batch_prompts: int = option(8, "prompts a step, with all their pairs (paper: 64 pairs); "
                                "of reward model and initial critic too", 1, 10**5)
    lr: float = option(5e-4, "peak learning rate of policies on pairs", 1e-12, 10)
    adam_beta2: float = option(.95, "Adam's beta2 on pairs, and of policy and critic in PPO (SFT: "
                               ".98; reward model, initial critic: .999, as usual)", 0, .99999)
    epochs: int = option(1, "epochs over the pairs, of each round", 1, 1000)
    rounds: int = option(1, "rounds of pairs, each from the policy as it is then (paper: 1)", 1,
                         10**4)
    # RLHF (Section 3)
    rm_epochs: int = option(3, "epochs of the reward model; the best is kept (paper: 3)", 1, 1000)
    rm_lr: float = option(1e-3, "peak learning rate of reward model and initial critic", 1e-12, 10)
    kl_targets: tuple[float, ...] = option((1., 2., 4.), "target KL of PPO, nats, a list (paper: "
                                           "3,6,9,12)", 1e-6, 1e6)
    ppo_steps: int = option(150, "steps of PPO, each on a batch of episodes", 1, 10**6)
    ppo_batch: int = option(256, "episodes a batch (paper: 1024)", 2, 4096)
    ppo_minibatch: int = option(64, "episodes an update", 1, 10**6)
    ppo_epochs: int = option(1, "epochs over a batch", 1, 100)
    ppo_lr: float = option(1e-3, "peak learning rate of policy and critic", 1e-12, 10)
    ppo_init_kl_coef: float = option(.75, "divided by the target KL: the initial KL coefficient, "
                                     "for a reward of standard deviation 1", 1e-9, 1e6)
    ppo_horizon: float = option(2_000, "horizon of the KL controller, episodes", 1_000, 1e12)
    # evaluation
    eval_prompts: int = option(64, "held-out prompts, for policies and optimum", 2, 10**5)
    eval_samples: int = option(16, "responses to each prompt, for a finished policy (during "
                               "training a quarter)", 1, 10**4)
    evaluations: int = option(8, "evaluations of a run, at most; the last is of its "
                              "finished policy", 1, 1000)
    optimum_samples: int = option(256, "responses to each prompt from each policy that samples for "
                                  "the optimum", 16, 10**6)
    optimum_fits: int = option(0, "policies fitted to the optimum, to sample for it instead of "
                               "PPO-GT and DPO (plots/frontier.py)", 0, 100)


PRESETS = {
    "default": {},
    # the paper's number of pairs; betas and targets for the KL at which the optimum is reliable
    "paper": dict(prompts=25_000, betas=(.7, 1.25, 2.25, 3.5), alphas=(.05, .1, .5, 1.), lr=2.5e-4,
                  kl_targets=(1., 2., 4., 7.), ppo_steps=400, eval_prompts=128,
                  eval_samples=64, optimum_samples=6_144, optimum_fits=6),
    "tiny": dict(reviews=1_500, vocab_size=512, layers=1, heads=1, width=32, sft_epochs=3,
                 sft_batch=16, sft_lr=1e-2, prompts=64, betas=(.5, 2.), alphas=(.1,), rm_epochs=1,
                 kl_targets=(1.,), ppo_steps=2, ppo_batch=16, ppo_minibatch=8, eval_prompts=12,
                 eval_samples=4, evaluations=2, optimum_samples=320),
}


def check_config(cfg: Config) -> None:
    """Raise UserError for sizes that do not fit together, or need too much memory."""
    parameters = 12 * cfg.layers * cfg.width**2 + cfg.vocab_size * cfg.width
    tokens = cfg.prompts * cfg.completions * cfg.max_tokens
    needed = 20 * parameters + 9 * tokens    # bytes: weights, gradients, Adam, pi_ref; ids, mask
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
    if cfg.rounds > cfg.prompts:
        raise UserError(f"--rounds {cfg.rounds} is more than --prompts {cfg.prompts}, which the "
                        "rounds share")
    if cfg.ppo_batch % cfg.completions:
        raise UserError(f"--ppo-batch {cfg.ppo_batch} is not a multiple of --completions "
                        f"{cfg.completions}")


# --------------------------------------------------------------- setup of a seed, SFT (App. C.1)
# A function with @cached is a stage (harness.py): its `cfg` has only the fields that its code reads
# as cfg.NAME. `Stage(function, setup, ...)` is such a call, not made yet; `stages.get_all` shares
# the calls among the workers.
class Setup(NamedTuple):
    """What all runs of one configuration and seed share."""
    cfg: Config
    seed: int                         # equals cfg.seed, which the cfg of a stage may lack
    stages: Stages
    device: str
    key: str                          # the name of pi_ref's file
    encoding: tiktoken.Encoding
    corpus: dict[str, list[str]]      # split -> film reviews
    ref: GPT                          # pi_ref
    user_pairs: Preferences | None = None
    # for figures alone, and in no hash: no function with @cached may read it from its setup
    learned_reward: Callable[[Tensor, Tensor], Tensor] | None = None


@cached
def make_corpus(setup: Setup, domain: str) -> dict[str, list[str]]:
    """The reviews of each split."""
    count = setup.cfg.reviews if domain == "film" else setup.cfg.reviews // 4
    return data.write_corpus(count, setup.cfg.seed, domain)


def train_texts(setup: Setup, films: int | None = None, restaurants: int | None = None) -> list:
    """The first train reviews of both domains, by default all."""
    return (make_corpus(setup, "film")["train"][:films]
            + make_corpus(setup, "restaurant")["train"][:restaurants])


@cached
def learn_tokenizer(setup: Setup) -> dict[bytes, int]:
    """Byte-pair ranks, from enough train reviews to contain nearly every word."""
    try:
        return data.learn_ranks(train_texts(setup, 150, 30), setup.cfg.vocab_size)
    except ValueError:
        raise UserError("the reviews for the tokenizer have too few different words for "
                        f"--vocab-size {setup.cfg.vocab_size}: choose a smaller one") from None


def new_gpt(cfg: Config, device: str) -> GPT:
    """The GPT before any training."""
    context = cfg.max_tokens + data.MAX_PROMPT_TOKENS
    config = GPTConfig(cfg.vocab_size, context, cfg.layers, cfg.heads, cfg.width)
    return GPT(config, named_generator("init", cfg.seed)).to(device)


def sft(model: GPT, ids: Tensor, lengths: Tensor, batches: list[list[int]], lr: float) -> None:
    """Train the model in place by maximum likelihood of each token given those before it.

    ids (N, T), lengths (N,). `batches` are lists of rows, one for each step.
    """
    device = model.token.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .98), weight_decay=0.,
                                  fused=True)
    scheduler = lr_schedule(optimizer, len(batches))
    for step, rows in enumerate(batches, 1):
        longest = int(lengths[rows].max())
        mask = torch.arange(longest) < lengths[rows][:, None]
        mask[:, 0] = False                                # nothing predicts the first token
        mask = mask.to(device)
        logp = response_token_logp(model, ids[rows, :longest].to(device), mask)
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
    """The parameters of pi_ref: SFT on the train reviews of both domains."""
    cfg, encoding = setup.cfg, data.make_encoding(learn_tokenizer(setup))
    model = new_gpt(cfg, setup.device)
    rows = [encoding.encode(text) + [encoding.eot_token] for text in train_texts(setup)]
    rows = [row[:model.config.context] for row in rows]
    order = []
    for epoch in range(cfg.sft_epochs):
        order += named_rng("sft", cfg.seed, epoch).sample(range(len(rows)), len(rows))
    batches = [order[i:i + cfg.sft_batch] for i in range(0, len(order), cfg.sft_batch)]
    sft(model, *data.pad(rows, encoding.eot_token), batches, cfg.sft_lr)
    return cpu_state_dict(model)


def prepare(cfg: Config, seed: int, stages: Stages, device: str, pair_texts: list[dict] = [],
            path: str | None = None) -> Setup:
    """The Setup of a seed. `pair_texts` are a user's pairs; `path`, their file, is for messages."""
    cfg = dataclasses.replace(cfg, seed=seed)
    ref = new_gpt(cfg, device).requires_grad_(False)
    # not complete yet: the tokenizer and pi_ref are stages too, and need only these fields
    setup = Setup(cfg, seed, stages, device, key="", encoding=None, corpus=None, ref=ref)
    encoding = data.make_encoding(learn_tokenizer(setup))
    user_pairs = None
    if pair_texts:    # before pi_ref is trained: a bad line is refused at once
        user_pairs = harness.encode_pairs(encoding, pair_texts, cfg.max_tokens, path)
    ref.load_state_dict(train_reference(setup))
    if user_pairs:
        ref_logp = batched_sequence_logp(ref, user_pairs.ids, user_pairs.mask, device)
        user_pairs = user_pairs._replace(ref_logp=ref_logp)
    return setup._replace(corpus=make_corpus(setup, "film"), encoding=encoding,
                          user_pairs=user_pairs, key=Stage(train_reference, setup).path.name)


# ---------------------------------------------------------------- completions, labels (Section 6)
# The figures need prompts too: prompts_of_split and evaluation_prompts are in plots/__init__.py.
def sample_completions(setup: Setup, policy: GPT, prompts: tuple[Tensor, Tensor],
                       generator: torch.Generator) -> dict[str, Tensor]:
    """A policy's completions of N prompts, with log pi_ref and the true rewards.

    -> ids (C, T), mask (C, T), ref_logp (C,), reward (C,), for C = N * completions.
    """
    prompts = tuple(p.to(setup.device) for p in prompts)
    ids, mask = generate(policy, prompts, setup.cfg.completions, setup.cfg.max_tokens,
                         setup.encoding.eot_token, generator)
    return {"ids": ids.cpu(), "mask": mask.cpu(),
            "ref_logp": batched_sequence_logp(setup.ref, ids, mask, setup.device),
            "reward": data.true_reward(setup.encoding, ids, mask).cpu()}


@cached
def sample_completions_part(setup: Setup, split: str, count: int, part: int) -> dict[str, Tensor]:
    """pi_ref's completions of one part of the prompts."""
    prompts = tuple(p.chunk(PARTS)[part] for p in prompts_of_split(setup, split, count))
    generator = named_generator("completions", split, setup.cfg.seed, part, device=setup.device)
    return sample_completions(setup, setup.ref, prompts, generator)


def reference_completions(setup: Setup, split: str, count: int) -> dict[str, Tensor]:
    """pi_ref's completions of `count` prompts; the workers share the work."""
    parts = setup.stages.get_all([Stage(sample_completions_part, setup, split, count, index)
                                  for index in part_indices(count)])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def label_completions(setup: Setup, completions: dict[str, Tensor], *names) -> Preferences:
    """All pairs of the completions of each prompt, labelled; the generator depends on names."""
    cfg = setup.cfg
    reward = completions["reward"].view(-1, cfg.completions)
    generator = named_generator("labels", *names, cfg.seed)
    winner, loser = data.label_pairs(reward, cfg.labels, cfg.tau, generator)
    return Preferences(completions["ids"], completions["mask"], completions["ref_logp"], winner,
                       loser, cfg.completions)


NO_PAIRS = ("at every prompt all completions have the same reward, so there is no pair to learn "
            "from: train pi_ref longer (--sft-epochs), or use more --prompts")


def reference_preferences(setup: Setup, split: str, count: int) -> Preferences:
    """The labelled pairs of pi_ref's completions of `count` prompts of a split."""
    pairs = label_completions(setup, reference_completions(setup, split, count), split)
    if not len(pairs.winner):
        raise UserError(NO_PAIRS)
    return pairs


def training_preferences(setup: Setup) -> Preferences:
    """The pairs to train on: the user's own, or those of pi_ref's completions."""
    return setup.user_pairs or reference_preferences(setup, "train", setup.cfg.prompts)


# -------------------------------------------------------------------------------- DPO (Section 4)
class Run(NamedTuple):
    """What to train: a method and its setting."""
    method: str
    setting: float    # beta, alpha, target KL or, for Preferred-FT, the number of the run


def pair_step(policy: GPT, optimizer: torch.optim.Optimizer, batch: Preferences,
              loss_function: Callable, setting: float) -> dict[str, float]:
    """One step of DPO, or of another loss on pairs, on a batch of prompts (App. B).

    `setting` is the second argument of the loss: beta, or alpha for Unlikelihood. Preferred-FT
    ignores it.
    """
    device = policy.token.weight.device
    ids, mask, ref_logp = (x.to(device) for x in (batch.ids, batch.mask, batch.ref_logp))
    winner, loser = batch.winner.to(device), batch.loser.to(device)
    logp = response_token_logp(policy, ids, mask).sum(1)             # K completions of each prompt
    pair = dpo.make_pairs(logp, ref_logp, mask.sum(1), winner, loser)    # up to K (K - 1) / 2 each
    loss = loss_function(pair, setting).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    margin = ((pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)).detach()    # nats
    statistics = {"loss": loss, "logp_w": pair.logp_w, "logp_l": pair.logp_l, "margin": margin,
                  "accuracy": (margin > 0).float(),
                  "weight": torch.sigmoid(-setting * margin),     # of DPO, if `setting` is beta
                  "trained_tokens": mask.sum().float()}
    means = torch.stack([x.mean() for x in statistics.values()])
    return dict(zip(statistics, means.tolist()))    # one transfer from the device


def sample_round(setup: Setup, policy: GPT, run: Run, number: int) -> Preferences:
    """Labelled pairs of the policy's own completions of the prompts of one round."""
    prompts = prompts_of_split(setup, "train", setup.cfg.prompts)
    prompts = tuple(p.tensor_split(setup.cfg.rounds)[number] for p in prompts)
    generator = named_generator("round", *run, setup.cfg.seed, number, device=setup.device)
    completions = sample_completions(setup, policy, prompts, generator)
    return label_completions(setup, completions, "round", *run, number)


def train_on_pairs(setup: Setup, policy: GPT, run: Run,
                   loss_function: Callable) -> tuple[int, Iterator[dict[str, float]]]:
    """DPO, or another loss on pairs: the number of steps, and an iterator that takes them.

    Each step yields its statistics (`run_steps` drives the iterator). In the paper's sentiment task
    all pairs come from pi_ref. With --rounds, the prompts are divided among the rounds, and the
    completions of a round come from the policy as it is then; pi_ref stays the reference of the
    loss. A round has fewer steps than planned if some of its prompts have only ties; the learning
    rate then ends above 0.
    """
    cfg = setup.cfg
    pairs, prompt_count = None, cfg.prompts    # in rounds, `sample_round` makes the pairs
    if cfg.rounds == 1:
        pairs = training_preferences(setup)
        prompt_count = len((pairs.winner // pairs.k).unique())    # those with a pair
    parts = torch.arange(prompt_count).tensor_split(cfg.rounds)    # only their sizes matter here
    steps = cfg.epochs * sum(math.ceil(len(part) / cfg.batch_prompts) for part in parts)
    # The paper uses RMSprop (App. B). A lone gradient, with only zeros before and after it, moves
    # a parameter by 32 lr in all (its own step and the later ones) if beta2 is .999, as usual, and
    # by 6 lr if it is .95. At .999 the parameters of rare tokens leap, and after rare prompts the
    # policy loses what pi_ref is sure of (plots/README.md).
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(.9, cfg.adam_beta2),
                                  weight_decay=0., fused=True)
    scheduler = lr_schedule(optimizer, steps)

    def run_round(number: int) -> Iterator[dict[str, float]]:
        round_pairs = sample_round(setup, policy, run, number) if pairs is None else pairs
        for epoch in range(cfg.epochs):
            generator = named_generator("order", *run, cfg.seed, number, epoch)
            for prompts in data.shuffled_batches(round_pairs, cfg.batch_prompts, generator):
                batch = data.select_prompts(round_pairs, prompts)
                yield pair_step(policy, optimizer, batch, loss_function, run.setting)
                scheduler.step()

    return steps, (statistics for number in range(cfg.rounds) for statistics in run_round(number))


# ------------------------------------------------------------------------------- RLHF (Section 3)
@cached
def fit_reward_model(setup: Setup) -> dict:
    """The reward model and the scale of its rewards: see `ppo.train_reward_model`.

    The held-out pairs, which select the epoch, are labelled by the true reward, also with --pairs.
    """
    cfg, pairs = setup.cfg, training_preferences(setup)
    eighth = math.ceil(cfg.prompts / 8)
    held_out_prompts = min(eighth, len(setup.corpus["validation"]))
    held_out = reference_preferences(setup, "validation", held_out_prompts)
    epochs = [data.shuffled_batches(pairs, cfg.batch_prompts,
                                    named_generator("reward model", cfg.seed, epoch))
              for epoch in range(cfg.rm_epochs)]
    return ppo.train_reward_model(setup.ref, pairs, held_out, epochs, cfg.rm_lr, setup.device)


def make_learned_score(setup: Setup) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward of PPO: learned, with mean 0 and standard deviation 1 on responses of pi_ref."""
    fitted = fit_reward_model(setup)
    model = ppo.ScalarModel(setup.ref)
    model.load_state_dict(fitted["state_dict"])
    return lambda ids, mask: (ppo.predict_reward(model, ids, mask) - fitted["mean"]) / fitted["std"]


def make_true_score(setup: Setup) -> Callable[[Tensor, Tensor], Tensor]:
    """The reward of PPO-GT: true, with mean 0 and standard deviation 1 on responses of pi_ref."""
    reward = reference_completions(setup, "train", setup.cfg.prompts)["reward"]
    mean, std = reward.mean().item(), reward.std().item()
    return lambda ids, mask: (data.true_reward(setup.encoding, ids, mask) - mean) / std


@cached
def initial_critic(setup: Setup, method: str, make_score: Callable) -> dict[str, Tensor]:
    """The critic that PPO starts from, the same for all targets: see `ppo.pretrain_critic`.

    `method` only names the stage, for its file and for plots/cost.py.
    """
    cfg, completions = setup.cfg, reference_completions(setup, "train", setup.cfg.prompts)
    return ppo.pretrain_critic(setup.ref, completions["ids"], completions["mask"],
                               make_score(setup), cfg.completions * cfg.batch_prompts, cfg.rm_lr,
                               named_generator("values", cfg.seed))


def train_with_ppo(setup: Setup, policy: GPT, run: Run,
                   make_score: Callable) -> tuple[int, Iterator[dict[str, float]]]:
    """PPO or PPO-GT: the number of steps, and an iterator that takes them."""
    cfg = setup.cfg
    critic_state = initial_critic(setup, run.method, make_score)
    prompts = tuple(p.to(setup.device) for p in prompts_of_split(setup, "train", cfg.prompts))
    generator = named_generator(*run, cfg.seed, device=setup.device)
    training_steps = ppo.train_ppo(cfg, policy, setup.ref, prompts, make_score(setup), run.setting,
                                   setup.encoding.eot_token, generator, critic_state)
    return cfg.ppo_steps, training_steps


# To add a method: (1) an entry here; (2) a field of Config with its settings; (3) a line in the
# dict of `train_sweep`; (4) a style in plots/__init__.py; (5) if it should appear there, a line in
# plots/cost.py, plots/winrate.py and plots/samples.py. The first function of the entry is called as
# train(setup, policy, run, second function), and returns the number of steps and an iterator; each
# `next` takes one step and yields a dict of floats. The swept value is `run.setting`. Other fields
# of Config must be read as `cfg.NAME`: harness.py finds them in the code by this spelling.
METHODS = {    # method -> how it is trained; its loss, or the function that makes its score
    "ppo_gt": (train_with_ppo, make_true_score),
    "ppo": (train_with_ppo, make_learned_score),
    "dpo": (train_on_pairs, dpo.dpo_loss),
    "unlikelihood": (train_on_pairs, dpo.unlikelihood_loss),
    "preferred_ft": (train_on_pairs, dpo.preferred_ft_loss),
}


# -------------------------------------------------------------------------------------- evaluation
# `frontier.sample_rewards` samples and scores; it is in plots/ because the figures use it too. Its
# KL is `model.response_kl`.
def evaluate(setup: Setup, policy: GPT, samples: int, *names) -> dict[str, float]:
    """Mean true reward and mean sequence KL(pi || pi_ref), nats, with standard errors.

    Also the mean `length` of a response, tokens. From `samples` responses to each evaluation
    prompt; errors are over prompts. The random generator depends on `names`.
    """
    generator = named_generator("evaluation", *names, setup.cfg.seed, device=setup.device)
    reward, kl, length = frontier.sample_rewards(setup, policy, evaluation_prompts(setup), samples,
                                                 generator)
    mean_reward, reward_se = mean_and_se(reward)
    mean_kl, kl_se = mean_and_se(kl)
    return {"reward": mean_reward, "reward_se": reward_se, "kl": mean_kl, "kl_se": kl_se,
            "length": length.mean().item()}


@cached
def reference_row(setup: Setup) -> dict:
    """The row of results of pi_ref, which is the policy after SFT."""
    numbers = evaluate(setup, setup.ref, setup.cfg.eval_samples, "sft")
    return {"method": "sft", "setting": 0., "seed": setup.seed, "step": 0, "final": True,
            **numbers, "seconds": 0.}


# --------------------------------------------------------------------------------------- the sweep
def check_finite(statistics: dict[str, float]) -> None:
    """Raise FloatingPointError that names the statistics that are not finite."""
    names = [name for name, x in statistics.items() if not math.isfinite(x)]
    if names:
        raise FloatingPointError(f"{', '.join(names)} not finite")


def run_steps(setup: Setup, policy: GPT, run: Run, steps: int, training_steps: Iterator[dict],
              result: dict) -> None:
    """Take all training steps, and evaluate the policy during training and at the end.

    Each `next(training_steps)` updates the policy in place and yields its statistics. `result` gets
    `step`, `rows`, and `checkpoints`, the policies of the rows; it is filled in place so that they
    survive an exception. A row is an evaluation (during training with a quarter of the samples),
    the `seconds` of training until then, and the means of the statistics of its interval of steps.
    """
    def add_row(is_final: bool) -> None:    # reads step, seconds and recent of the loop below
        samples = setup.cfg.eval_samples if is_final else math.ceil(setup.cfg.eval_samples / 4)
        numbers = evaluate(setup, policy, samples, *run, step)
        check_finite(numbers)
        numbers.update(seconds=seconds, **mean_over_steps(recent))
        row = {**run._asdict(), "seed": setup.seed, "step": step, "final": is_final, **numbers}
        result["rows"].append(row)
        result["checkpoints"].append(cpu_state_dict(policy))
        tables.print_row(row, step if is_final else steps)    # rounds may end before `steps`
        setup.stages.on_row(row)

    seconds, start = 0., time.perf_counter()
    interval = math.ceil(steps / setup.cfg.evaluations)
    for step, statistics in enumerate(training_steps, 1):
        seconds += time.perf_counter() - start
        result["step"] = step
        check_finite(statistics)
        if (step - 1) % interval == 0:
            recent = []    # of this interval; after an early end the last two rows may share it
        recent.append(statistics)
        if step % interval == 0 and step < steps:
            add_row(is_final=False)
        start = time.perf_counter()
    if result["step"] == 0:    # only rounds can end without a step
        raise UserError(NO_PAIRS)
    add_row(is_final=True)


@cached
def train_policy(setup: Setup, run: Run, train: Callable, loss_or_make_score: Callable) -> dict:
    """Train and evaluate one policy: its `rows` of results, and the `checkpoints` of the rows.

    `train` and `loss_or_make_score` are those of METHODS; they are arguments so that the hash of
    this stage has the code of one method alone. A number that is not finite, or an error of a
    user's loss, ends the run: it keeps its rows, and `failure` gives the reason.
    """
    policy = copy.deepcopy(setup.ref).requires_grad_(True)
    steps, training_steps = train(setup, policy, run, loss_or_make_score)
    identity = {**run._asdict(), "seed": setup.seed}
    result = {**identity, "step": 0, "rows": [], "checkpoints": [], "failure": None}
    try:
        run_steps(setup, policy, run, steps, training_steps, result)
    except (FloatingPointError, LossError) as error:
        result["failure"] = {**identity, "step": result["step"], "reason": str(error)}
    return result


def policy_stages(setup: Setup, settings: dict[str, Iterable[float]]) -> list[Stage]:
    """The stages that train the policies of each method, one for each of its settings."""
    return [Stage(train_policy, setup, Run(method, float(setting)), *METHODS[method])
            for method, values in settings.items() for setting in values]


def train_sweep(setups: list[Setup]) -> list[Stage]:
    """Train all policies of Section 6, for every seed; returns their stages.

    The list is in order: each stage stands after those that it reads. The initial critic of PPO
    reads the reward model, which takes long, so it comes after the policies of PPO-GT, which need
    neither: with few workers, none waits for the reward model. The critic of PPO-GT needs only the
    true reward.
    """
    cfg = setups[0].cfg
    independent, ppo_gt, ppo_critics, remaining = [], [], [], []
    for setup in setups:
        independent += [Stage(fit_reward_model, setup),
                        Stage(initial_critic, setup, "ppo_gt", make_true_score)]
        ppo_gt += policy_stages(setup, {"ppo_gt": cfg.kl_targets})
        ppo_critics.append(Stage(initial_critic, setup, "ppo", make_learned_score))
        remaining += policy_stages(setup, {"ppo": cfg.kl_targets, "dpo": cfg.betas,
                                           "unlikelihood": cfg.alphas,
                                           "preferred_ft": tuple(range(cfg.preferred_runs))})
    setups[0].stages.get_all(independent + ppo_gt + ppo_critics + remaining)
    return ppo_gt + remaining


def train_losses(setups: list[Setup], losses: dict[str, harness.UserLoss]) -> list[Stage]:
    """Train a user's losses; returns the stages of the baselines in the folder, then theirs."""
    baselines, of_losses = [], []
    for setup in setups:
        baselines += find_baselines(setup)
        of_losses += [Stage(train_policy, setup, Run(name, beta), train_on_pairs, loss)
                      for name, loss in losses.items() for beta in setup.cfg.betas]
    setups[0].stages.get_all(of_losses)
    return baselines + of_losses


def find_baselines(setup: Setup) -> list[Stage]:
    """The policies of Section 6 in the folder, of the current settings and code, without --pairs.

    The others are named in a message. One whose file is damaged is trained again.
    """
    # an earlier command may have had other betas and targets: only the names of files tell them
    method, number = "|".join(METHODS), r"\d+(?:\.\d+)?(?:e[-+]\d+)?"
    pattern = rf"train-policy-({method})-({number})-seed{setup.seed}\.\w+\.pt"
    matches = [re.fullmatch(pattern, path.name) for path in setup.stages.folder.iterdir()]
    runs = sorted({(match[1], float(match[2])) for match in matches if match})
    setup = setup._replace(user_pairs=None)
    stages = [stage for method, setting in runs
              for stage in policy_stages(setup, {method: [setting]})]
    found = [stage for stage in stages if stage.path.exists()]
    missing = sorted({stage.name for stage in stages} - {stage.name for stage in found})
    message = f"left out, trained with other settings or code: {', '.join(missing)}"
    if missing and setup.stages.store.add(message, 1) == 1:
        print(message, flush=True)
    return found


def train_variant(setup: Setup, fields: dict, settings: dict[str, tuple]) -> tuple[Setup, list]:
    """Train a configuration with some fields changed, for plots/gap.py: its setup and stages."""
    cfg = dataclasses.replace(setup.cfg, **fields)
    changed = prepare(cfg, setup.seed, setup.stages, setup.device)
    trained = policy_stages(changed, settings)
    setup.stages.get_all(trained)
    return changed, trained


# --------------------------------------------------------------------------------- the experiment
def write_preferences(setup: Setup) -> None:
    """Write the preferences of pi_ref's completions as text, and print a summary of them."""
    pairs = reference_preferences(setup, "train", setup.cfg.prompts)
    harness.write_jsonl(setup.stages.folder / f"preferences-seed{setup.seed}.jsonl",
                        harness.export_preferences(setup.encoding, pairs))
    print(tables.summary_of_preferences(setup.encoding, pairs, evaluation_prompts(setup)),
          flush=True)


def write_and_report(out: pathlib.Path, cfg: Config, rows: list[dict], failures: list[dict],
                     optimum: dict, measured: list[dict], seconds: dict[str, float]) -> int:
    """Write all results, draw all figures and print the tables; returns the exit code.

    `measured` are the rows that figures have measured. A figure without rows in it keeps its rows
    of an earlier command, if the optimum is the same. `seconds` of each stage are for the cost
    figure; they are empty with --loss, which measures no costs.
    """
    measured = measured + figures.earlier_rows(out, optimum, measured)
    rows = tables.finish_rows(rows, measured, optimum, dataclasses.asdict(cfg))
    if seconds:
        measured = [row for row in measured if row["figure"] != "cost"]
        measured += cost.compute_costs(rows, optimum, seconds)
    figures.write_results(out, rows, failures, optimum, measured)
    figures.draw_all(out)
    print(tables.report(rows, failures, optimum), f"results and figures are in {out}", sep="\n")
    return 1 if failures or tables.above_optimum(rows, optimum) else 0


def experiment(rank: int, store: torch.distributed.Store, device: str, cfg: Config,
               args: argparse.Namespace, pair_texts: list[dict]) -> int:
    """Section 6, in its order, as one of several workers.

    The first worker writes and reports the results. It returns the exit code: 1 if a run failed, or
    if one is above the optimum, which means a bug. The others return 0.
    """
    out = pathlib.Path(args.out)
    losses = harness.load_losses(args.loss, reserved=STYLE)
    stages = Stages(out, store)
    if losses:
        stages.on_row = partial(figures.draw_progress, out)
    setups = [prepare(cfg, seed, stages, device, pair_texts, args.pairs)
              for seed in range(cfg.seed, cfg.seed + cfg.seeds)]
    for setup in setups:    # now, so that all workers share the sampling; later stages load it
        reference_completions(setup, "train", cfg.prompts)
        if rank == 0 and not pair_texts:
            write_preferences(setup)
    if losses:
        trained, measured, seconds = train_losses(setups, losses), [], {}
    else:
        trained = train_sweep(setups)
        measured = figures.measure_all(setups[0], trained, make_learned_score)
        seconds = {**stages.seconds}    # a copy, because stages of --study have the same names
    proposals = frontier.all_proposals(setups, trained, sft)
    optimum = frontier.mean_optimum({setup.seed: frontier.estimate_optimum(setup, policies)
                                     for setup, policies in zip(setups, proposals)})
    failures = [stage.value["failure"] for stage in trained if stage.value["failure"]]
    if args.study:
        gap_rows, gap_failures = gap.study(setups[0], trained, proposals[0], train_variant)
        measured += gap_rows
        failures += gap_failures
    if rank > 0:
        return 0
    rows = [reference_row(setup) for setup in setups]
    rows += [row for stage in trained for row in stage.value["rows"]]
    return write_and_report(out, cfg, rows, failures, optimum, measured, seconds)


def main() -> int:
    """Read the command line and start the workers; returns the exit code."""
    cfg, args = harness.read_flags(sys.argv[1:], Config, PRESETS, __doc__.splitlines()[0])
    check_config(cfg)
    if args.study:    # a variant that cannot be trained is refused before any work
        for fields in gap.changed_fields(cfg).values():
            check_config(dataclasses.replace(cfg, **fields))
    device = harness.choose_device(args.device)
    # each worker loads its own; a bad loss is refused here, before any work
    harness.load_losses(args.loss, reserved=STYLE)
    pair_texts = harness.read_pairs(args.pairs) if args.pairs is not None else []
    if pair_texts and cfg.rounds > 1:
        raise UserError("--rounds cannot be combined with --pairs: in rounds, the policy writes "
                        "its own pairs")
    if cfg.seeds > 1 and any("response_ids" in pair for pair in pair_texts):
        raise UserError("--seeds cannot be combined with exported --pairs: each seed has its own "
                        "tokenizer")
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    workers = args.workers or harness.default_workers(device)
    return harness.launch(experiment, workers, device, cfg, args, pair_texts)


if __name__ == "__main__":
    sys.exit(harness.run_program(main))
