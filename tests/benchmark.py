"""How fast this repository is on this machine.    python -m tests.benchmark [--help]

Two shapes: train.py's default model with responses of 27 tokens, about as long as the experiment's are; and "the shape above", the
same model with prompts of 4 and responses of 24 tokens, 11 prompts x 4 completions = 44 sequences and 66 pairs a DPO step, 4 epochs
of PPO. Models are untrained and learning rates next to nothing, so that responses keep their lengths and all rounds do the same.

`--scale` adds longer responses and wider models. Works as train.py does: a process a core, each of one thread, all at the same
measure at the same time; on a CUDA GPU one process. A rate is the sum over processes of each one's median round; a round visits all
measures, so that a slow minute hits all alike. The last line is one JSON object, for the shape above. Not a test: nothing is too slow.
"""
import argparse
import contextlib
import copy
import itertools
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Callable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))    # `launch` starts this file by its path
import data, dpo, ppo, train  # noqa: E401, E402
from data import torch_rng  # noqa: E402
from model import GPT, GPTConfig, fit, response_mask, sample  # noqa: E402

LABELS = {    # name in the JSON line -> name in the table, and the unit of work that it is counted in
    "sft_tokens_per_s": ("SFT tokens/s", "sft_unit"), "sample_tokens_per_s": ("sampled tokens/s", "sample_unit"),
    "completions_per_s": ("completions/s", "sample_unit"), "dpo_sequences_per_s": ("DPO sequences/s", "dpo_unit"),
    "dpo_pairs_per_s": ("DPO pairs/s", "dpo_unit"), "ppo_episodes_per_s": ("PPO episodes/s", "ppo_unit")}


@dataclass(frozen=True)
class Shape(train.Config):
    shortest: int = 2           # prompt, tokens
    longest: int = data.PROMPT
    rows: int = 1024            # texts that there are, and responses that the sampler writes at once


STILL = dict(lr=1e-9, sft_lr=1e-9, ppo_lr=1e-9, ppo_horizon=1e12, ppo_steps=10**6)    # nothing moves, and PPO does not end
SHAPES = {"the shape above": Shape(**STILL, max_tokens=24, batch_prompts=11, ppo_epochs=4, shortest=4, longest=4),
          "default": Shape(**STILL, max_tokens=27)}    # the larger last: the peak of a process's memory never falls
SCALE = {"responses of 54": Shape(**STILL, max_tokens=54), "responses of 108": Shape(**STILL, max_tokens=108),
         "width 128": Shape(**STILL, max_tokens=27, width=128, heads=4), "width 256": Shape(**STILL, max_tokens=27, width=256, heads=8)}


# ------------------------------------------------------ units of work: each `next` does one and gives what it was, in counts
def texts(shape: Shape, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random texts, K to a prompt, each response of full length: ids (C, T), prompt lengths (C,), mask (C, T)."""
    k, end, generator = shape.completions, shape.vocab_size - 1, torch_rng("texts")
    lengths = torch.randint(shape.shortest, shape.longest + 1, (shape.rows // k,), generator=generator).repeat_interleave(k)
    ids = torch.randint(end, (len(lengths), shape.longest + shape.max_tokens), generator=generator)
    return ids.to(device), lengths.to(device), response_mask(ids, lengths, shape.max_tokens, end).to(device)


def sft_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict]:
    """Four steps of `model.fit`; every token of a text counts."""
    (ids, lengths, _), model = texts(shape), copy.deepcopy(ref).requires_grad_(True)
    order, lengths = torch.arange(4 * shape.sft_batch).remainder(len(ids)).view(4, -1), lengths + shape.max_tokens
    while True:
        with contextlib.redirect_stdout(None):    # its progress
            fit(model, ids, lengths, order.tolist(), shape.sft_lr)
        yield {"sft_tokens_per_s": int(lengths[order].sum())}


def sample_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict]:
    """One call of `model.sample`; new tokens count, up to and with the end token (one of 512 draws ends a row early)."""
    (ids, lengths, _), stop = texts(shape, device), (shape.max_tokens, shape.vocab_size - 1)
    generator = torch_rng("sample", device=device)
    while True:
        written = sample(ref, ids[:, :shape.longest], lengths, *stop, generator=generator)
        yield {"sample_tokens_per_s": int(response_mask(written, lengths, *stop).sum()), "completions_per_s": len(ids)}


def dpo_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict]:
    """One step of `train.train_on_pairs` with `dpo.dpo_loss`: some prompts, their K completions and all pairs of those."""
    (ids, _, mask), n, k = texts(shape), shape.batch_prompts, shape.completions
    count = len(ids) // (n * k) * n * k    # so that no batch is smaller than the others
    reward = torch.rand(count, generator=torch_rng("reward")).view(-1, k)
    winner, loser, _ = data.label_pairs(reward, "deterministic", shape.tau, torch_rng("labels"))
    pairs = data.Preferences(ids[:count], mask[:count], torch.zeros(count), winner, loser, k)
    train.label = lambda *which: pairs     # instead of what a trained reference wrote
    policy, lab = copy.deepcopy(ref).requires_grad_(True), argparse.Namespace(cfg=shape, device=device)
    while True:
        for _ in train.train_on_pairs(lab, policy, dpo.dpo_loss, train.Run("dpo", 1., 0))[1]:
            yield {"dpo_sequences_per_s": n * k, "dpo_pairs_per_s": n * k * (k - 1) // 2}


def ppo_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict]:
    """One step of `ppo.train_ppo`, the roll-out and all epochs over it, with a score that is next to free."""
    (ids, lengths, _), policy = texts(shape, device), copy.deepcopy(ref).requires_grad_(True)
    for _ in ppo.train_ppo(shape, policy, ref, (ids[:, :shape.longest], lengths), lambda ids, mask: (ids % 2).float().mean(1), 1.,
                           shape.vocab_size - 1, torch_rng("ppo", device=device)):
        yield {"ppo_episodes_per_s": shape.ppo_batch}


def matmul_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict]:
    """The largest products of this model and nothing else: what it could reach."""
    x, up, out = torch.rand(2048, shape.width, device=device), *(torch.rand(shape.width, n, device=device)
                                                                 for n in (4 * shape.width, shape.vocab_size))
    while True:
        x @ up, x @ out
        yield {}


# --------------------------------------------------------------------------------------------------------- measuring them
def gflop(unit: Iterator) -> float:
    """The arithmetic of one unit of work, counted as it runs: 2 m k n for each product of (m, k) and (k, n), parameters in one.

    That is 2 x parameters in products x positions (filler too), and twice as much again where there is a backward; the output
    matrix counts where logits are made. Left out: attention's own products, about a twentieth, and all that is no product.
    A measure's share of the matmul rate is its gflop / seconds over that of `matmul_unit`.
    """
    with FlopCounterMode(display=False) as counter:
        next(unit)
    counts = counter.get_flop_counts()["Global"]
    return (counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0)) / 1e9


def measure(shape: Shape, device: str, args: argparse.Namespace, meet: Callable) -> dict[str, float]:
    """This process's medians on one shape, among them "gflops UNIT" for each unit of work, and its peak memory, MB."""
    rates, finish = defaultdict(list), torch.cuda.synchronize if device == "cuda" else lambda: None
    config = GPTConfig(shape.vocab_size, shape.longest + shape.max_tokens, shape.layers, shape.heads, shape.width)
    ref = GPT(config, torch_rng("init")).to(device).requires_grad_(False)
    units = {unit.__name__: unit(shape, ref, device) for unit in (sft_unit, sample_unit, dpo_unit, ppo_unit, matmul_unit)}
    work = {name: gflop(unit) for name, unit in units.items()}    # not timed: a first call is slow
    finish()
    for name, unit in list(units.items()) * args.rounds:
        meet()
        start, took, done = time.perf_counter(), 0., Counter()
        while took < args.seconds:
            done.update({**next(unit), f"gflops {name}": work[name]})
            finish()
            took = time.perf_counter() - start
        for what, amount in done.items():
            rates[what].append(amount / took)
    rates["memory"] = [torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else
                       resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)]
    return {what: statistics.median(rate) for what, rate in rates.items()}


def worker(shapes: dict[str, Shape], device: str, args: argparse.Namespace) -> None:
    """One of the processes: all meet before each measure; the first adds up and prints."""
    torch.set_num_threads(1)
    data.end_with_parent()
    rank, world, meetings = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), itertools.count()
    store = torch.distributed.FileStore(os.environ["BENCHMARK_STORE"], world)
    def meet() -> None:
        here = next(meetings)
        store.set(f"{here} {rank}", "")
        store.wait([f"{here} {other}" for other in range(world)])

    store.set(f"rates {rank}", json.dumps({name: measure(shape, device, args, meet) for name, shape in shapes.items()}))
    if rank == 0:
        parts = [json.loads(store.get(f"rates {other}")) for other in range(world)]
        report({name: {what: (max if what == "memory" else sum)(part[name][what] for part in parts) for what in parts[0][name]}
                for name in shapes}, f"{world} process{'es' * (world > 1)} of one thread, {device}, torch {torch.__version__}")


def report(rates: dict[str, dict[str, float]], title: str) -> None:
    """The table, each rate with its share of the matmul rate; and the JSON line."""
    row = ("{:<18}" + "{:>18}" * len(LABELS) + "{:>10}" * 2).format
    print(f"{title}; in per cent of the rate of its matrix products alone, which is in the column GFLOP/s; MB: peak of a process so far")
    print(row("", *(label for label, _ in LABELS.values()), "GFLOP/s", "MB"))
    for name, r in rates.items():
        print(row(name, *(f"{r[key]:,.0f} {r['gflops ' + unit] / r['gflops matmul_unit']:4.0%}" for key, (_, unit) in LABELS.items()),
                  f"{r['gflops matmul_unit']:,.1f}", f"{r['memory']:,.0f}"))
    above = rates["the shape above"]
    numbers = {key: above[key] for key in LABELS if key != "completions_per_s"}
    print(json.dumps({**numbers, "matmul_gflops": above["gflops matmul_unit"], "peak_memory_mb": above["memory"]}))


def main() -> int | None:
    flags = {"seconds": (1.5, .001, 60., "of each measure in each round"), "rounds": (3, 1, 100, "of all measures"),
             "workers": (1 if torch.cuda.is_available() else os.cpu_count(), 1, 256, "processes"),
             "rows": (1024, 64, 10**6, "responses sampled at once, and the most episodes of a PPO step")}
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"benchmark.py: {message}; see python -m tests.benchmark --help")
    for name, (default, low, high, meaning) in flags.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help=f"{meaning} (default: {default})")
    parser.add_argument("--scale", action="store_true", help="also longer responses and wider models: some 5 minutes more")
    args = parser.parse_args()
    for name, (_, low, high, _) in flags.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    if "RANK" in os.environ:
        shapes = {**SHAPES, **(SCALE if args.scale else {})}
        sizes = {name: replace(s, rows=args.rows, ppo_batch=min(s.ppo_batch, args.rows)) for name, s in shapes.items()}
        return worker(sizes, "cuda" if torch.cuda.is_available() else "cpu", args)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BENCHMARK_STORE"] = f"{folder}/store"
        return data.launch(args.workers)


if __name__ == "__main__":
    sys.exit(main())
