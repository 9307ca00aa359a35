"""The speed of this repository on this machine.

    python -m tests.benchmark [--help]

It measures two shapes. `default` is the default model of train.py with responses of 27 tokens,
about as long as those of the experiment. `the shape above` is the same model with prompts of 4
and responses of 24 tokens, 11 prompts x 4 completions (44 sequences, 66 pairs) in a step of DPO,
and 4 epochs of PPO. `--scale` adds longer responses and wider models. Models are untrained and
learning rates almost 0, so that responses keep their lengths and all rounds do the same work.

There is one process for each core, with one thread, as in train.py; on a CUDA GPU there is one
process. All processes measure the same thing at the same time. A rate is the sum over processes
of the median over rounds. A round contains all measures, so a slow minute affects all of them.
The last line is one JSON object, for the shape above. This is not a test: no speed is too low.
"""
import contextlib
import copy
import json
import os
import pathlib
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import dpo  # noqa: E402
import harness  # noqa: E402
import ppo  # noqa: E402
import train  # noqa: E402
from data import named_generator  # noqa: E402
from harness import UserError, option  # noqa: E402
from model import GPT, GPTConfig, response_mask, sample  # noqa: E402

try:
    import resource
except ImportError:    # Windows: no peak memory there
    resource = None


# ----------------------------------------------------------------------------------------- flags
@dataclass(frozen=True)
class Flags:
    """The flags of the command line that have a number."""
    seconds: float = option(1.5, "seconds of each measure in each round", .001, 60)
    rounds: int = option(3, "rounds of all measures", 1, 100)
    workers: int = option(1 if torch.cuda.is_available() else os.cpu_count() or 1, "processes", 1,
                          256)
    rows: int = option(1024, "responses sampled at once, and the most episodes of a PPO step", 64,
                       10**6)


# ----------------------------------------------------------------------------------------- shapes
@dataclass(frozen=True)
class Shape(train.Config):
    """A configuration of train.py, and the sizes of the random texts."""
    min_prompt: int = 2                          # tokens
    max_prompt: int = data.MAX_PROMPT_TOKENS
    rows: int = 1024                             # texts, and responses sampled at once


# Nothing is learned, and PPO does not end.
FROZEN = dict(lr=1e-9, sft_lr=1e-9, ppo_lr=1e-9, ppo_horizon=1e12, ppo_steps=10**6)
SHAPES = {    # the larger one last, because the peak memory of a process never falls
    "the shape above": Shape(**FROZEN, max_tokens=24, batch_prompts=11, ppo_epochs=4, min_prompt=4,
                             max_prompt=4),
    "default": Shape(**FROZEN, max_tokens=27),
}
SCALE = {
    "responses of 54": Shape(**FROZEN, max_tokens=54),
    "responses of 108": Shape(**FROZEN, max_tokens=108),
    "width 128": Shape(**FROZEN, max_tokens=27, width=128, heads=4),
    "width 256": Shape(**FROZEN, max_tokens=27, width=256, heads=8),
}


def random_texts(shape: Shape, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random texts with responses of full length; K texts in a row have one prompt length.

    -> ids (C, T), prompt lengths (C,), mask of the response (C, T).
    """
    generator = named_generator("texts")
    end = shape.vocab_size - 1
    lengths = torch.randint(shape.min_prompt, shape.max_prompt + 1,
                            (shape.rows // shape.completions,), generator=generator)
    lengths = lengths.repeat_interleave(shape.completions)
    width = shape.max_prompt + shape.max_tokens
    ids = torch.randint(end, (len(lengths), width), generator=generator)
    mask = response_mask(ids, lengths, shape.max_tokens, end)
    return ids.to(device), lengths.to(device), mask.to(device)


# ---------------------------------------------------------------------------------- units of work
# Each function is an endless iterator: `next` does one unit of work and returns its counts.
def sft_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict[str, int]]:
    """Four steps of `train.sft`; every token of a text counts."""
    ids, lengths, _ = random_texts(shape)
    lengths = lengths + shape.max_tokens
    model = copy.deepcopy(ref).requires_grad_(True)
    batches = torch.arange(4 * shape.sft_batch).remainder(len(ids)).view(4, -1)
    tokens = int(lengths[batches].sum())
    while True:
        with contextlib.redirect_stdout(None):    # no progress
            train.sft(model, ids, lengths, batches.tolist(), shape.sft_lr)
        yield {"sft_tokens_per_s": tokens}


def sample_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict[str, int]]:
    """One call of `model.sample`; response tokens count, the end token included.

    One token in 512 is the end token, which ends a response early.
    """
    ids, lengths, _ = random_texts(shape, device)
    prompts = ids[:, :shape.max_prompt]
    max_tokens, end = shape.max_tokens, shape.vocab_size - 1
    generator = named_generator("sample", device=device)
    while True:
        sampled = sample(ref, prompts, lengths, max_tokens, end, generator=generator)
        tokens = int(response_mask(sampled, lengths, max_tokens, end).sum())
        yield {"sample_tokens_per_s": tokens, "completions_per_s": len(ids)}


def dpo_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict[str, int]]:
    """One step of `train.train_on_pairs` with Eq. 7: all pairs of K completions of some prompts."""
    ids, _, mask = random_texts(shape)
    k = shape.completions
    batch = shape.batch_prompts * k
    count = len(ids) // batch * batch    # so that all batches have the same size
    reward = torch.rand(count, generator=named_generator("reward")).view(-1, k)
    generator = named_generator("labels")
    winner, loser = data.label_pairs(reward, "deterministic", shape.tau, generator)
    pairs = data.Preferences(ids[:count], mask[:count], torch.zeros(count), winner, loser, k)
    setup = SimpleNamespace(cfg=shape, device=device, user_pairs=pairs)
    policy = copy.deepcopy(ref).requires_grad_(True)
    while True:
        _, steps = train.train_on_pairs(setup, policy, train.Run("dpo", 1.), dpo.dpo_loss)
        for _ in steps:
            yield {"dpo_sequences_per_s": batch, "dpo_pairs_per_s": batch * (k - 1) // 2}


def ppo_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict[str, int]]:
    """One step of `ppo.train_ppo`, a roll-out and all epochs over it, with a cheap score."""
    ids, lengths, _ = random_texts(shape, device)
    policy = copy.deepcopy(ref).requires_grad_(True)

    def share_of_odd_tokens(ids: Tensor, mask: Tensor) -> Tensor:
        return (ids % 2).float().mean(1)

    steps = ppo.train_ppo(shape, policy, ref, (ids[:, :shape.max_prompt], lengths),
                          share_of_odd_tokens, 1., shape.vocab_size - 1,
                          named_generator("ppo", device=device))
    for _ in steps:
        yield {"ppo_episodes_per_s": shape.ppo_batch}


def matmul_unit(shape: Shape, ref: GPT, device: str) -> Iterator[dict[str, int]]:
    """The largest matrix products of this model alone: the best rate that it could reach."""
    x = torch.rand(2048, shape.width, device=device)
    up = torch.rand(shape.width, 4 * shape.width, device=device)
    out = torch.rand(shape.width, shape.vocab_size, device=device)
    while True:
        x @ up
        x @ out
        yield {}


UNITS = sft_unit, sample_unit, dpo_unit, ppo_unit, matmul_unit
COLUMNS = {    # name in the JSON line -> its column of the table, and its unit of work
    "sft_tokens_per_s": ("SFT tokens/s", "sft_unit"),
    "sample_tokens_per_s": ("sampled tokens/s", "sample_unit"),
    "completions_per_s": ("completions/s", "sample_unit"),
    "dpo_sequences_per_s": ("DPO sequences/s", "dpo_unit"),
    "dpo_pairs_per_s": ("DPO pairs/s", "dpo_unit"),
    "ppo_episodes_per_s": ("PPO episodes/s", "ppo_unit"),
}


# ---------------------------------------------------------------------------------------- measures
def count_gflop(unit: Iterator) -> float:
    """The arithmetic of one unit of work, counted while it runs, in units of 10^9 operations.

    A product of (m, k) and (k, n) counts 2 m k n. With P parameters in matrix products, that is 2 P
    for each position (filler too), and twice as much again if there is a backward pass. The output
    matrix counts where logits are computed. The products of attention, about a twentieth, and all
    that is not a matrix product are left out. The share of a measure in the matmul rate is its
    gflop / seconds divided by that of `matmul_unit`.
    """
    with FlopCounterMode(display=False) as counter:
        next(unit)
    counts = counter.get_flop_counts()["Global"]
    return (counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0)) / 1e9


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(device: str) -> float:
    """The peak memory of this process so far, MB: of the GPU, or of the process; 0 if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)    # macOS: bytes, Linux: KB


def measure_unit(unit: Iterator, gflop: float, seconds: float, device: str) -> dict[str, float]:
    """Work for some seconds -> the rate of everything that the unit counts, and of its gflop."""
    counts = defaultdict(float)
    elapsed = 0.
    start = time.perf_counter()
    while elapsed < seconds:
        for name, count in next(unit).items():
            counts[name] += count
        counts["gflops"] += gflop
        synchronize(device)
        elapsed = time.perf_counter() - start
    return {name: count / elapsed for name, count in counts.items()}


class Meeting:
    """A barrier of all processes: a call returns when every process has called."""
    def __init__(self, rank: int, workers: int, store: torch.distributed.Store):
        self.rank = rank
        self.workers = workers
        self.store = store
        self.number = 0

    def __call__(self) -> None:
        self.number += 1
        self.store.set(f"meeting {self.number} {self.rank}", "")
        self.store.wait([f"meeting {self.number} {rank}" for rank in range(self.workers)])


def measure_shape(shape: Shape, device: str, flags: Flags, meet: Meeting) -> dict[str, float]:
    """The medians over rounds of one process: all rates, "gflops UNIT" of each unit, and memory."""
    config = GPTConfig(shape.vocab_size, shape.max_prompt + shape.max_tokens, shape.layers,
                       shape.heads, shape.width)
    ref = GPT(config, named_generator("init")).to(device).requires_grad_(False)
    units = {unit.__name__: unit(shape, ref, device) for unit in UNITS}
    gflop = {name: count_gflop(unit) for name, unit in units.items()}    # also the warm-up
    synchronize(device)
    rounds = defaultdict(list)
    for _ in range(flags.rounds):
        for name, unit in units.items():
            meet()
            rates = measure_unit(unit, gflop[name], flags.seconds, device)
            rates[f"gflops {name}"] = rates.pop("gflops")
            for what, rate in rates.items():
                rounds[what].append(rate)
    medians = {what: statistics.median(rates) for what, rates in rounds.items()}
    return {**medians, "memory": peak_memory(device)}


# ---------------------------------------------------------------------------- workers and the table
def merge(measured: list[dict[str, float]]) -> dict[str, float]:
    """The rates of all processes together: the sum of their rates, the largest of their memory."""
    merged = {name: sum(rates[name] for rates in measured) for name in measured[0]}
    merged["memory"] = max(rates["memory"] for rates in measured)
    return merged


def table_row(name: str, rates: dict[str, float]) -> list[str]:
    """The cells of one shape: each rate with its share of the matmul rate, GFLOP/s, MB."""
    peak = rates["gflops matmul_unit"]
    cells = [f"{rates[column]:,.0f} {rates['gflops ' + unit] / peak:4.0%}"
             for column, (_, unit) in COLUMNS.items()]
    return [name, *cells, f"{peak:,.1f}", f"{rates['memory']:,.0f}"]


def report(rates: dict[str, dict[str, float]], title: str) -> None:
    """Print the table of all shapes, and the JSON line."""
    print(f"{title}; in per cent of the rate of its matrix products alone, which is in the column "
          "GFLOP/s; MB: peak of a process so far")
    header = ["", *(label for label, _ in COLUMNS.values()), "GFLOP/s", "MB"]
    layout = "{:<18}" + "{:>18}" * len(COLUMNS) + "{:>10}" * 2
    for cells in (header, *(table_row(name, numbers) for name, numbers in rates.items())):
        print(layout.format(*cells))
    above = rates["the shape above"]
    numbers = {name: above[name] for name in COLUMNS if name != "completions_per_s"}
    numbers["matmul_gflops"] = above["gflops matmul_unit"]
    numbers["peak_memory_mb"] = above["memory"]
    print(json.dumps(numbers))


def worker(rank: int, store: torch.distributed.Store, device: str, shapes: dict[str, Shape],
           flags: Flags) -> int:
    """One process: it measures all shapes; the first one prints the report of all of them."""
    meet = Meeting(rank, flags.workers, store)
    rates = {name: measure_shape(shape, device, flags, meet) for name, shape in shapes.items()}
    store.set(f"rates {rank}", json.dumps(rates))
    if rank == 0:
        parts = [json.loads(store.get(f"rates {number}")) for number in range(flags.workers)]
        merged = {name: merge([part[name] for part in parts]) for name in shapes}
        plural = "es" if flags.workers > 1 else ""
        report(merged, f"{flags.workers} process{plural} of one thread, {device}, torch "
               f"{torch.__version__}")
    return 0


# ------------------------------------------------------------------------------- the command line
class Parser(harness.Parser):
    def error(self, message: str):
        raise UserError(f"{message}; see python -m tests.benchmark --help")


def main() -> int:
    """Read the command line and start the processes; returns the exit code."""
    parser = Parser(prog="benchmark.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_config(Flags)
    parser.add_argument("--scale", action="store_true",
                        help="also longer responses and wider models: some 5 minutes more")
    args = vars(parser.parse_args())
    shapes = {**SHAPES, **SCALE} if args.pop("scale") else SHAPES
    flags = Flags(**args)
    sizes = {name: replace(shape, rows=flags.rows, ppo_batch=min(shape.ppo_batch, flags.rows))
             for name, shape in shapes.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return harness.launch(worker, flags.workers, device, sizes, flags)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"benchmark.py: {error}")
