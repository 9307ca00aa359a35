"""The experiment of Section 6: corpus, SFT, completions, labels, reward model, the sweep, evaluation, plot.   python train.py

Everything is made in stages: files named by a hash of all that determines them, loaded if they are there and made if not. So a
stopped run goes on where it was, a new loss reuses the baselines, and workers share the sweep. `--help` lists every number.
"""
import argparse
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import pathlib
import signal
import sys
import time
from functools import partial
from typing import Callable, Iterator, NamedTuple

if __name__ == "__main__":    # before torch is imported, which takes seconds; what is finished is in its file, so nothing need be tidied
    signal.signal(signal.SIGINT, lambda *_: ("RANK" in os.environ or os.write(2, b"stopped; the same command goes on from here\n"), os._exit(130)))

import torch
from torch import Tensor

import data
import dpo
import ppo
from data import Job, Preferences, Stages, UserError, end_with_parent, launch, load_stage, rng, source, torch_rng
from model import GPT, GPTConfig, fit, log_probabilities, respond, response_logp, schedule, state_of
from plots import STYLE, frontier, gap, results


# ----------------------------------------------------------------------------------------------------------- configuration
def option(default, meaning: str, low: float = 0, high: float = math.inf, choices: tuple = ()):
    return dataclasses.field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = option(0, "seed of the corpus and of pi_ref, and the first of the experiments' seeds", 0, 2**53)
    seeds: int = option(1, "experiments, each with its own preferences, reward model and policies", 1, 100)
    split: str = option("test", "whose prompts judge policies: test for results, validation for tuning",
                        choices=("test", "validation"))
    # the task (Section 6, App. C.1)
    reviews: int = option(32_000, "reviews in all: 80% train, 10% validation, 10% test", 50, 10**6)
    vocab_size: int = option(512, "tokens of the vocabulary, end-of-text included", 300, 10**5)
    max_tokens: int = option(64, "longest response, tokens", 1, 10**4)
    # the model
    layers: int = option(2, "blocks of the GPT", 1, 100)
    heads: int = option(2, "attention heads", 1, 100)
    width: int = option(64, "width of the GPT, a multiple of the heads", 1, 10**5)
    sft_epochs: int = option(2, "epochs of SFT on the train reviews", 1, 1000)
    sft_batch: int = option(64, "reviews a step", 1, 10**5)
    sft_lr: float = option(4e-3, "peak learning rate of SFT", 1e-12, 10)
    # preferences (Section 6)
    prompts: int = option(8_000, "prompts with labelled completions (paper: 25,000)", 1, 10**6)
    completions: int = option(4, "completions a prompt: 4 give 6 pairs; also PPO's episodes for each prompt it draws", 2, 64)
    labels: str = option("deterministic", "deterministic: the higher true reward wins (paper); bt: Bradley-Terry, Eq. 1",
                         choices=("deterministic", "bt"))
    tau: float = option(.1, "temperature of bt labels: P(1 beats 2) = sigma((r1 - r2) / tau)", 1e-6, 1e6)
    # DPO and the other losses on pairs (App. B)
    betas: tuple[float, ...] = option((.7, 1., 2., 3.), "beta of DPO and of --loss, a list (paper: .05,.1,1,5)", 1e-6, 1e6)
    alphas: tuple[float, ...] = option((.1, .5, 1.), "alpha of Unlikelihood, a list (paper: .05,.1,.5,1)", 0, 1e6)
    preferred_runs: int = option(1, "runs of Preferred-FT, each in an order of its own", 0, 100)
    batch_prompts: int = option(8, "prompts a step, with all their pairs (paper: 64 pairs), of the reward model too", 1, 10**5)
    lr: float = option(5e-4, "peak learning rate on pairs, after 10% warm-up, then linear to 0", 1e-12, 10)
    epochs: int = option(1, "epochs over the pairs", 1, 1000)
    # RLHF (Section 3)
    rm_epochs: int = option(3, "epochs of the reward model; the best by validation accuracy is kept (paper: 3)", 1, 1000)
    rm_lr: float = option(1e-3, "peak learning rate of the reward model, and of the values that PPO starts from", 1e-12, 10)
    kl_targets: tuple[float, ...] = option((1., 2., 4.), "target KL of PPO, nats, a list (paper: 3,6,9,12)", 1e-6, 1e6)
    ppo_steps: int = option(100, "batches of episodes", 1, 10**6)
    ppo_batch: int = option(256, "episodes a batch (paper: 1024)", 2, 4096)
    ppo_minibatch: int = option(64, "episodes an update", 1, 10**6)
    ppo_epochs: int = option(1, "passes over a batch", 1, 100)
    ppo_lr: float = option(1e-3, "peak learning rate of policy and values, after 10% warm-up, then linear to 0", 1e-12, 10)
    ppo_coefficient: float = option(.75, "price of a nat to start with, at target 1, in standard deviations of the reward", 1e-9, 1e6)
    ppo_horizon: float = option(2_000, "horizon of the KL controller, episodes", 1_000, 1e12)
    # evaluation
    eval_prompts: int = option(64, "held-out prompts that judge every policy, and the optimum", 2, 10**5)
    eval_samples: int = option(16, "responses to each, for a finished policy", 1, 10**4)
    evaluations: int = option(8, "evaluations of a run, the last of them of the finished policy", 1, 1000)
    optimum_samples: int = option(1024, "responses of pi_ref to each, for the optimum", 512, 10**6)


PRESETS = {
    "default": {},
    "paper": dict(prompts=25_000, betas=(1., 2., 4., 8.), alphas=(.05, .1, .5, 1.), ppo_steps=400, optimum_samples=8_192),
    "tiny": dict(reviews=1_500, vocab_size=440, layers=1, heads=1, width=32, sft_epochs=3, sft_batch=16, sft_lr=1e-2, prompts=64,
                 betas=(.5, 2.), alphas=(.1,), rm_epochs=1, kl_targets=(1.,), ppo_steps=2, ppo_batch=16,
                 ppo_minibatch=8, eval_prompts=12, eval_samples=4, evaluations=2, optimum_samples=640),
}


def read_flags(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The command line: every field of Config is a flag. Raises UserError, in one sentence, for a value that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message}; see python train.py --help"))    # no lambda can raise
    parser.add_argument("--preset", default="default", choices=PRESETS, help="sizes to start from; other flags override them")
    parser.add_argument("--out", help="folder for all that is written (default runs/PRESET)")
    parser.add_argument("--loss", action="append", default=[], metavar="FILE.py:FUNCTION",
                        help="train this loss, all of it in one file, over --betas instead of the sweep, beside the baselines that are there; repeatable")
    parser.add_argument("--pairs", metavar="FILE.jsonl", help="preferences of your own, a JSON object a line: prompt, chosen, rejected")
    parser.add_argument("--study", action="store_true", help="also run DPO without one obstacle at a time, for plots/gap.py and the README")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that share the sweep (default: one a core, at most 16; GPU: 4)")
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, type=partial(data.parse, flag, f), metavar="N", default=argparse.SUPPRESS,
                            help=f"{f.metadata['meaning'].replace('%', '%%')} (default: {f.default})")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    cfg = dataclasses.replace(Config(**PRESETS[args.preset]), **given)
    needed = 20 * (12 * cfg.layers * cfg.width**2 + cfg.vocab_size * cfg.width) + 9 * cfg.prompts * cfg.completions * cfg.max_tokens
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")    # bytes; needed: weights, gradients, Adam's, pi_ref; ids, masks
    for wrong, message in (
            (args.workers is not None and not 0 < args.workers < 257, f"--workers must be from 1 to 256, not {args.workers}"),
            (args.study and (args.loss or args.pairs), "--study goes with neither --loss nor --pairs: it is of the paper's methods on pi_ref's pairs"),
            (args.out == "", "--out names no folder"),
            (needed > there, f"these sizes need at least {needed / 1e9:,.0f} GB of memory and there are {there / 1e9:.0f}: take smaller ones"),
            (cfg.width % cfg.heads, f"--width {cfg.width} is not a multiple of --heads {cfg.heads}"),
            (cfg.prompts > .8 * cfg.reviews, f"--prompts {cfg.prompts} is more than 80% of --reviews {cfg.reviews}, the train reviews"),
            (cfg.eval_prompts > .1 * cfg.reviews, f"--eval-prompts {cfg.eval_prompts} is more than 10% of --reviews {cfg.reviews}"),
            (cfg.ppo_batch % cfg.completions, f"--ppo-batch {cfg.ppo_batch} is not a multiple of --completions {cfg.completions}")):
        if wrong:
            raise UserError(message)
    return cfg, args


# ------------------------------------------------------------------------------------------------ corpus and SFT (App. C.1)
def key_of(cfg: Config, fields: str, *more) -> str:
    """Hash of all that determines a stage: the fields named, its parents' included, the code that makes it, and anything more."""
    makers = (prepare, complete, label, train_on_pairs, reward_model, score_of, values_of, ppo_run, train_and_judge, frontier.measure,
              frontier.optimum, frontier.clustered, frontier.averages, results.encode_pairs)
    code = [source(data.__file__, sys.modules["model"].__file__), *map(inspect.getsource, makers)]
    text = json.dumps([{name: getattr(cfg, name) for name in fields.split()}, code, more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


CORPUS = "seed reviews vocab_size"
SFT = CORPUS + " layers heads width max_tokens sft_epochs sft_batch sft_lr"
COMPLETIONS = SFT + " prompts completions"
PAIRS = COMPLETIONS + " labels tau batch_prompts"
OPTIMUM = SFT + " split eval_prompts optimum_samples"
EVALUATION = " split eval_prompts eval_samples evaluations"
PPO = PAIRS + EVALUATION + " rm_epochs rm_lr ppo_steps ppo_batch ppo_minibatch ppo_epochs ppo_lr ppo_coefficient ppo_horizon"


class Lab(NamedTuple):
    """What all runs share."""
    cfg: Config
    stages: Stages                    # the files in the run's folder, shared between the workers
    device: str
    encoding: object
    corpus: dict[str, list[str]]
    ref: GPT                          # pi_ref
    prompts: tuple[Tensor, Tensor]    # that policies are judged on
    pairs: Preferences | None         # the user's own, instead of labelled completions of pi_ref
    pairs_key: str                    # hash of their file
    learned: Callable | None = None   # the first seed's learned reward, for figures: (ids, mask) -> (B,)

    def reward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return data.true_reward(self.encoding, ids, mask)


def prepare(cfg: Config, stages: Stages, device: str, own: list[dict] = [], path: str | None = None) -> Lab:
    """Corpus, tokenizer, pi_ref, the prompts that judge, and the user's own pairs, if there are any."""
    corpus = stages.stage("corpus", key_of(cfg, CORPUS), partial(data.write_corpus, cfg.reviews, cfg.seed))
    learn = partial(data.learn_ranks, corpus["train"][:150], cfg.vocab_size)
    encoding = data.make_encoding(stages.stage("tokenizer", key_of(cfg, CORPUS), learn))
    pairs = results.encode_pairs(encoding, own, cfg.max_tokens, path) if own else None
    config = GPTConfig(cfg.vocab_size, cfg.max_tokens + data.PROMPT, cfg.layers, cfg.heads, cfg.width)
    ref = GPT(config, torch_rng("init", cfg.seed)).to(device)

    def train_sft() -> dict[str, Tensor]:
        rows = [(encoding.encode(text) + [encoding.eot_token])[:config.context] for text in corpus["train"]]
        order = [i for e in range(cfg.sft_epochs) for i in rng("sft", cfg.seed, e).sample(range(len(rows)), len(rows))]
        batches = [order[i:i + cfg.sft_batch] for i in range(0, len(order), cfg.sft_batch)]
        return state_of(fit(ref, *data.pad(rows, encoding.eot_token), batches, cfg.sft_lr))

    ref.load_state_dict(stages.stage("sft", key_of(cfg, SFT), train_sft))
    ref.requires_grad_(False)
    prompts = data.make_prompts(encoding, corpus[cfg.split][:cfg.eval_prompts], rng("judge", cfg.seed))
    lab = Lab(cfg, stages, device, encoding, corpus, ref, tuple(p.to(device) for p in prompts), None, "")
    return lab if not own else lab._replace(pairs_key=hashlib.sha256(json.dumps(own).encode()).hexdigest(),
                                            pairs=pairs._replace(ref=log_probabilities(ref, pairs.ids, pairs.mask, device)))


# ---------------------------------------------------------------------------------------------------- completions, labels
def complete(lab: Lab, split: str, count: int, seed: int) -> dict[str, Tensor]:
    """Completions of `count` prompts by pi_ref, their true rewards and their reference log-probabilities, in shared parts."""
    cfg = lab.cfg
    prompts = data.make_prompts(lab.encoding, lab.corpus[split][:count], rng("prompts", split, seed))
    parts = [tuple(p.to(lab.device) for p in part) for part in zip(*(p.chunk(8) for p in prompts))]

    def make(i: int) -> dict[str, Tensor]:
        generator = torch_rng("completions", split, seed, i, device=lab.device)
        ids, mask = respond(lab.ref, parts[i], cfg.completions, cfg.max_tokens, lab.encoding.eot_token, generator)
        return {"ids": ids.cpu(), "mask": mask.cpu(), "ref": log_probabilities(lab.ref, ids, mask), "reward": lab.reward(ids, mask).cpu()}

    key = key_of(cfg, COMPLETIONS, split, count, seed)
    made = lab.stages.share([(f"completions-{split}-seed{seed}-{i}", key, partial(make, i)) for i in range(len(parts))])
    return {name: torch.cat([part[name] for part in made]) for name in made[0]}


def label(lab: Lab, split: str, count: int, seed: int) -> Preferences:
    """The completions of `count` prompts of a split, and all pairs of them, labelled; or the user's own pairs to train on."""
    if split == "train" and lab.pairs:
        return lab.pairs
    cfg, made = lab.cfg, complete(lab, split, count, seed)
    winner, loser, _ = data.label_pairs(made["reward"].view(-1, cfg.completions), cfg.labels, cfg.tau, torch_rng("labels", split, seed))
    return Preferences(made["ids"], made["mask"], made["ref"], winner, loser, cfg.completions)


# -------------------------------------------------------------------------------------------------- the methods (Section 6)
class Run(NamedTuple):
    """One policy of the sweep."""
    method: str
    setting: float    # beta, alpha, target KL or, for Preferred-FT, the number of the run
    seed: int


def train_on_pairs(lab: Lab, policy: GPT, loss_function: Callable, run: Run) -> tuple[int, Iterator[dict]]:
    """DPO, or any other loss on pairs (App. B): the number of steps, and the steps."""
    cfg, pairs = lab.cfg, label(lab, "train", lab.cfg.prompts, run.seed)
    batches = [b for e in range(cfg.epochs) for b in data.prompt_order(pairs, cfg.batch_prompts, torch_rng("order", *run[1:], e))]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=0., fused=True)
    decay = schedule(optimizer, len(batches))

    def step(prompts: Tensor) -> dict[str, float]:
        batch = data.prompt_batch(pairs, prompts)
        ids, mask = batch.ids.to(lab.device), batch.mask.to(lab.device)
        logp = response_logp(policy, ids, mask).sum(1)                                     # 4 forwards a prompt ...
        pair = dpo.make_pairs(logp, batch.ref.to(lab.device), mask.sum(1), batch.winner.to(lab.device), batch.loser.to(lab.device))
        loss = loss_function(pair, run.setting).mean()                                     # ... for 6 pairs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        margin = ((pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)).detach()        # nats; times beta: rhat_w - rhat_l
        means = {"loss": loss, "logp_w": pair.logp_w, "logp_l": pair.logp_l, "margin": margin, "accuracy": (margin > 0).float(),
                 "weight": torch.sigmoid(-run.setting * margin), "trained_tokens": mask.sum().float()}
        return {name: x.mean().item() for name, x in means.items()}

    return len(batches), map(step, batches)


def reward_model(lab: Lab, seed: int) -> Job:
    """The stage of the learned reward: model, accuracy, and the mean and deviation of its scores on responses of pi_ref."""
    def make() -> dict:
        cfg, pairs = lab.cfg, label(lab, "train", lab.cfg.prompts, seed)
        held_out = label(lab, "validation", min(-(-cfg.prompts // 8), len(lab.corpus["validation"])), seed)
        epochs = [data.prompt_order(pairs, cfg.batch_prompts, torch_rng("reward model", seed, e)) for e in range(cfg.rm_epochs)]
        return ppo.train_reward_model(cfg, lab.ref, pairs, held_out, epochs, lab.device)

    return f"reward-model-seed{seed}", key_of(lab.cfg, PAIRS + " rm_epochs rm_lr", source(ppo.__file__), seed, lab.pairs_key), make


def score_of(lab: Lab, method: str, seed: int) -> Callable:
    """What PPO (the learned reward) and PPO-GT (the true one) are paid: mean 0 and deviation 1 on responses of pi_ref. -> (B,)"""
    if method == "ppo":
        fitted, model = lab.stages.stage(*reward_model(lab, seed)), ppo.ScalarModel(lab.ref).to(lab.device)
        model.load_state_dict(fitted["model"])
        reward, mean, deviation = partial(ppo.reward_of, model), fitted["mean"], fitted["deviation"]
    else:
        made = complete(lab, "train", lab.cfg.prompts, seed)["reward"]
        reward, mean, deviation = lab.reward, made.mean().item(), made.std().item()
    return lambda ids, mask: (reward(ids, mask) - mean) / deviation


def values_of(lab: Lab, method: str, seed: int) -> Job:
    """The stage of the values that PPO starts from, one for all its targets."""
    def make() -> dict[str, Tensor]:
        made = complete(lab, "train", lab.cfg.prompts, seed)
        return ppo.fit_values(lab.ref, made["ids"], made["mask"], score_of(lab, method, seed), 4 * lab.cfg.batch_prompts, lab.cfg.rm_lr,
                              torch_rng("values", seed))

    key = key_of(lab.cfg, PAIRS + " rm_epochs rm_lr", source(ppo.__file__), method, seed, lab.pairs_key * (method == "ppo"))
    return f"values-{method}-seed{seed}", key, make


def ppo_run(lab: Lab, policy: GPT, run: Run) -> tuple[int, Iterator[dict]]:
    """PPO or PPO-GT: the number of steps, and the steps."""
    cfg, score, values = lab.cfg, score_of(lab, run.method, run.seed), lab.stages.stage(*values_of(lab, run.method, run.seed))
    prompts = data.make_prompts(lab.encoding, lab.corpus["train"][:cfg.prompts], rng("prompts", "train", run.seed))
    return cfg.ppo_steps, ppo.train_ppo(cfg, policy, lab.ref, tuple(p.to(lab.device) for p in prompts), score, run.setting,
                                        lab.encoding.eot_token, torch_rng(*run, device=lab.device), values)


def train_and_judge(lab: Lab, run: Run, loss: Callable | None) -> dict:
    """One run, judged on its way (policies in "way", where figures need them) and at its end. NaN, or an error of a student's loss, ends it."""
    cfg, policy, rows, way, since, seconds, step = lab.cfg, copy.deepcopy(lab.ref).requires_grad_(True), [], [], [], 0., 0
    steps, log = train_on_pairs(lab, policy, loss, run) if loss else ppo_run(lab, policy, run)
    start = time.perf_counter()
    try:
        for step, values in enumerate(log, 1):
            since.append(values)
            seconds += time.perf_counter() - start
            judged, last = {}, step == steps
            if last or step % -(-steps // cfg.evaluations) == 0:
                judged = frontier.measure(lab, policy, cfg.eval_samples if last else -(-cfg.eval_samples // 4), *run, step)
                mean = frontier.averages(since)
            if wrong := [name for name, x in {**values, **judged}.items() if not math.isfinite(x)]:
                raise FloatingPointError(f"{', '.join(wrong)} not finite")
            if judged:
                rows.append({**run._asdict(), "step": step, "final": last, **judged, "seconds": seconds, **mean})
                since = []
                way += [(step, state_of(policy))] if run.method in WATCHED else []
                print(f"{run.method} {run.setting:g} seed {run.seed}, step {step}/{steps}: "
                      + "  ".join(f"{name} {x:.3g}" for name, x in {**judged, **mean}.items() if name[-3:] != "_se"), flush=True)
            start = time.perf_counter()
    except (FloatingPointError, dpo.LossError) as error:
        return {**run._asdict(), "rows": rows, "policy": {}, "way": way, "failure": {**run._asdict(), "step": step, "reason": str(error)}}
    return {**run._asdict(), "rows": rows, "policy": state_of(policy), "way": way, "failure": None}


LOSSES = {"dpo": dpo.dpo_loss, "unlikelihood": dpo.unlikelihood_loss, "preferred_ft": dpo.preferred_ft_loss}
WATCHED = {"dpo", "ppo", "unlikelihood"}    # whose policies are kept all the way, for figures


def sweep(lab: Lab, settings: dict[str, tuple], students: dict[str, tuple[str, Callable]] = {}) -> list[Job]:
    """The stages of the runs of some methods, each with its settings, for every seed."""
    cfg, jobs = lab.cfg, []
    for run in (Run(m, float(x), cfg.seed + i) for i in range(cfg.seeds) for m, xs in settings.items() for x in xs):
        code, loss = students.get(run.method) or ((dpo if run.method in LOSSES else ppo).__file__, LOSSES.get(run.method))
        key = key_of(cfg, PAIRS + " lr epochs" + EVALUATION if loss else PPO, source(code, dpo.__file__ if loss else ppo.__file__), run,
                     getattr(loss, "__name__", ""), run.method in WATCHED, lab.pairs_key * (run.method != "ppo_gt"))
        jobs.append((f"{run.method}-{run.setting:.12g}-seed{run.seed}", key, partial(train_and_judge, lab, run, loss)))
    return jobs


def study(cfg: Config, stages: Stages, device: str) -> tuple[list[dict], list[dict]]:
    """DPO once more with one obstacle at a time taken away, each method at a third and at three times its learning rate: rows, failed runs."""
    rows, failed = [], []
    for name, (fields, settings) in gap.variants(cfg).items():
        lab = prepare(dataclasses.replace(cfg, seeds=1, **fields), stages, device)
        runs = lab.stages.share(sweep(lab, settings), report=True)
        found = [{"figure": "gap", "variant": name, **row} for run in runs for row in run["rows"] if row["final"]]
        results.add_shares(found, frontier.optimum(lab, key_of(lab.cfg, OPTIMUM)))
        rows += found
        failed += [{"rows": [], "failure": {**run["failure"], "reason": f"{name}: {run['failure']['reason']}"}} for run in runs if run["failure"]]
    return rows, failed


# ---------------------------------------------------------------------------------------------------------- the experiment
def experiment(cfg: Config, out: pathlib.Path, students: dict, own: list[dict], args: argparse.Namespace, device: str) -> int:
    """Section 6, in its order, as one of several workers. Returns the exit code: 1 where a run failed or a point cannot be."""
    rank, lab = int(os.environ["RANK"]), prepare(cfg, Stages(out, {}), device, own, args.pairs)
    optimum = frontier.optimum(lab, key_of(cfg, OPTIMUM))
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    for seed in seeds if not own else []:
        pairs = label(lab, "train", cfg.prompts, seed)    # made by all workers, written by one
        path = out / f"preferences-seed{seed}.jsonl"
        if not rank and not (students and path.exists()):
            results.describe(path, lab.encoding, pairs, lab.prompts)
    true = {"ppo_gt": cfg.kl_targets}
    others = {"ppo": cfg.kl_targets, "dpo": cfg.betas, "unlikelihood": cfg.alphas, "preferred_ft": range(cfg.preferred_runs)}
    first = [job for s in seeds for job in (reward_model(lab, s), values_of(lab, "ppo_gt", s))]
    values = [values_of(lab, "ppo", s) for s in seeds]    # after what needs no reward model, so that nobody waits for one
    jobs = sweep(lab, dict.fromkeys(students, cfg.betas), students) or [*first, *sweep(lab, true), *values, *sweep(lab, others)]
    done = [value for value in lab.stages.share(jobs, report=True) if "rows" in value]
    measured, failed = study(cfg, lab.stages._replace(seconds={}), device) if args.study else ([], [])
    if not students:
        learned = score_of(lab, "ppo", cfg.seed)    # rounded, so that equal texts tie whatever batch they stand in
        lab = lab._replace(learned=lambda ids, mask: learned(ids, mask).round(decimals=4))
        key = key_of(cfg, SFT + EVALUATION, source(*sorted(pathlib.Path(results.__file__).parent.glob("*.py"))), [job[1] for job in jobs])
        figures = [(f"figure-{name}", key, partial(module.measure, lab, done)) for name, module in results.MEASURED.items()]
        measured += sum(lab.stages.share(figures), [])
    if rank:
        return 0
    if students:    # baselines are drawn if they are there, whatever their settings, and never trained; on pi_ref's pairs
        jobs = sweep(lab._replace(pairs=None, pairs_key=""), results.trained(out, [*true, *others]))
        done = [run["value"] for job in jobs if (run := load_stage(lab.stages.path(job)))] + done
    sft = lab.stages.stage("judge-sft", key_of(cfg, SFT + EVALUATION), partial(frontier.measure, lab, lab.ref, cfg.eval_samples, "sft"))
    rows = [{"method": "sft", "setting": 0., "seed": seed, "step": 0, "final": True, **sft, "seconds": 0.} for seed in seeds]
    return results.publish(out, rows, done + failed, optimum, dataclasses.asdict(cfg), measured, {} if students else lab.stages.seconds)


def main() -> int:
    cfg, args = read_flags(sys.argv[1:])
    device = data.choose_device(args.device)
    students = {name.rpartition(":")[2]: (name.rpartition(":")[0], dpo.load_loss(name)) for name in args.loss}
    if len(students) < len(args.loss) or any(name in STYLE or len(name) > 100 for name in students):
        raise UserError(f"--loss: each needs a short name of its own, and not that of a method that is there: {', '.join(students)}")
    own = results.read_pairs(args.pairs) if args.pairs is not None else []
    out = pathlib.Path(f"runs/{args.preset}" if args.out is None else args.out)
    out.mkdir(parents=True, exist_ok=True)
    if "RANK" not in os.environ:
        return launch(args.workers or (min(os.cpu_count(), 16) if device == "cpu" else 4))
    torch.set_num_threads(1)
    end_with_parent()
    return experiment(cfg, out, students, own, args, device)


if __name__ == "__main__":
    sys.exit(data.answer(main, dpo.LossError))
