"""The task: film reviews, their true sentiment, a tokenizer, prompts and preferences (Section 6, "controlled sentiment").

The paper prompts a language model with the beginning of an IMDb review and asks for a positive continuation. Here a small
grammar writes the reviews and `sentiment` reads them, so the true reward r(x, y) is known exactly and costs microseconds.

What is simplified, and why:
  1. Reviews come from a grammar, not from IMDb: a laptop can learn it, and its reward has no errors of its own.
  2. The reward is a formula over parsed clauses, not a classifier: a clause that does not parse earns nothing.
  3. Prompts have no beginning-of-text token: a prompt of 2-8 tokens is where the model starts, as in the paper.

Everything random takes a generator made from names (`rng`), so that changing a loss never changes the data. At the end, what any
long experiment needs and no paper mentions: flags with bounds, stages that are made once, several processes.
"""
import fcntl
import functools
import hashlib
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import tiktoken
import torch
from tiktoken._educational import bpe_train
from torch import Tensor

class UserError(Exception):
    """Something that the user can mend; its text says what and how."""


# ---------------------------------------------------------------------------------------------------------- the language
# A domain is a subject with its openings (neutral, one word from each column) and the aspects one may have an opinion on.
DOMAINS = {
    "film": (
        [["I", "We", "My sister", "Two friends"], ["saw", "watched", "rented"],
         ["this film", "this movie", "a thriller", "a comedy", "an old western"],
         ["last night", "on Sunday", "on the train", "after dinner"]],
        ["acting", "plot", "script", "score", "pacing", "ending", "cast", "humour", "editing", "story", "villain", "finale"]),
    "restaurant": (
        [["I", "We", "My sister", "Two friends"], ["tried", "visited", "booked"],
         ["this bistro", "the diner", "a tavern", "an old noodle bar"],
         ["last night", "on Sunday", "on the way", "after the film"]],
        ["soup", "service", "dessert", "menu", "wine", "bread", "music", "coffee", "pasta", "waiter"]),
}
VERBS = ["was", "felt", "seemed", "looked"]
INTENSIFIERS = {"slightly": .5, "fairly": .7, "rather": .8, "really": 1.2, "truly": 1.4, "utterly": 1.6}
ADJECTIVES = {  # valence, from -3 to 3
    "decent": 1, "fine": 1, "pleasant": 1, "solid": 1, "likeable": 1,
    "charming": 2, "clever": 2, "gripping": 2, "elegant": 2, "witty": 2,
    "brilliant": 3, "superb": 3, "dazzling": 3, "magnificent": 3,
    "flat": -1, "thin": -1, "plain": -1, "slow": -1, "predictable": -1,
    "dull": -2, "clumsy": -2, "bland": -2, "shallow": -2, "tedious": -2,
    "awful": -3, "dreadful": -3, "appalling": -3, "excruciating": -3}
NEGATION = -.6    # "not superb" is weaker than "dull" is
CONTRAST = 1.5    # a clause after "but" weighs more: it is the reviewer's last word


def _any(words) -> str:
    return "(" + "|".join(words) + ")"


_ASPECTS = sorted({aspect for _, aspects in DOMAINS.values() for aspect in aspects})
_OPINION = rf"{_any(_ASPECTS)} {_any(VERBS)}( not)?(?: {_any(INTENSIFIERS)})? {_any(ADJECTIVES)}"
CLAUSE = re.compile(rf"(The|and the|but the) {_OPINION}")
REVIEW = re.compile(_any(" ".join(map(_any, openings)) for openings, _ in DOMAINS.values())
                    + rf"\.(?: The {_OPINION}(?:, (?:and|but) the {_OPINION})*\.)+")


def opinions(text: str) -> list[tuple[str, float, float]]:
    """The clauses of a text that parse, as (aspect, valence, weight), in order; only the first on each aspect counts."""
    found = {}
    for part in re.split(r"[.,] ?", text):
        if match := CLAUSE.fullmatch(part):
            start, aspect, _, negated, intensifier, adjective = match.groups()
            valence = ADJECTIVES[adjective] * INTENSIFIERS.get(intensifier, 1.) * (NEGATION if negated else 1.)
            found.setdefault(aspect, (aspect, valence, CONTRAST if start == "but the" else 1.))
    return list(found.values())


def sentiment(text: str) -> float:
    """The true reward r(x, y): probability in [0, 1] that a text (prompt and completion together) is positive.

    sigma(weighted mean valence) over the opinions that parse; .5 where there is none. Takes any string, in linear time.
    Repeated and broken clauses earn nothing and cost nothing, nor does being cut off: the opinions that parse still count.
    """
    clauses = opinions(text)
    if not clauses:
        return .5
    mean = sum(valence * weight for _, valence, weight in clauses) / sum(weight for _, _, weight in clauses)
    return 1 / (1 + math.exp(-mean))


def is_grammatical(text: str) -> bool:
    """Whether a whole text is a review of the grammar: one opening, then at least one sentence of opinions."""
    return REVIEW.fullmatch(text) is not None


def write_opinion(aspect: str, positive: bool, r: random.Random) -> str:
    negated = r.random() < .2
    wanted = [a for a, v in ADJECTIVES.items() if (v > 0) == (positive != negated)]
    adjective = r.choices(wanted, [5 - abs(ADJECTIVES[a]) for a in wanted])[0]    # strong words are rarer
    intensifier = r.choice(list(INTENSIFIERS)) + " " if r.random() < .4 else ""
    return f"{aspect} {r.choice(VERBS)} {'not ' if negated else ''}{intensifier}{adjective}"


def write_review(r: random.Random, domain: str = "film") -> str:
    """One review. A latent mood makes its clauses agree, "but" joins clauses that disagree and "and" those that agree."""
    openings, aspects = DOMAINS[domain]
    mood = r.choice([.25, .5, .75])                                    # probability that a clause is positive
    text, last = " ".join(r.choice(column) for column in openings), None
    for aspect in r.sample(aspects, r.choice([3, 4])):
        positive = r.random() < mood
        joint = ". The " if last is None or r.random() < .5 else ", and the " if positive == last else ", but the "
        text, last = text + joint + write_opinion(aspect, positive, r), positive
    return text + "."


def rng(*names) -> random.Random:
    """A generator of its own for each purpose: the same names, the same numbers, whatever else ran before."""
    return random.Random(repr(names))


def torch_rng(*names, device="cpu") -> torch.Generator:
    """`rng` for tensors."""
    seed = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def write_corpus(count: int, seed: int, domain: str = "film") -> dict[str, list[str]]:
    """`count` different reviews in disjoint splits: train (80%), validation (10%: tuning) and test (10%: the results)."""
    r, reviews = rng("corpus", domain, seed), {}
    while len(reviews) < count:
        reviews[write_review(r, domain)] = None                        # a dict keeps the order and drops repeats
    texts, a, b = list(reviews), int(.8 * count), int(.9 * count)
    return {"train": texts[:a], "validation": texts[a:b], "test": texts[b:]}


# --------------------------------------------------------------------------------------------------------- the tokenizer
PATTERN = r" ?\p{L}+| ?[^\s\p{L}]+|\s+"    # words with their leading space, punctuation, the rest: no text is lost


def learn_ranks(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair ranks learned from the texts; all tokens but one, which is kept for end-of-text. Seconds, so cache it."""
    try:
        return bpe_train("\n".join(texts), vocab_size - 1, PATTERN, visualise=None)
    except ValueError:    # there was nothing left to merge
        raise UserError(f"the reviews have too few different words for {vocab_size} tokens; choose a smaller --vocab-size") from None


def make_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """A tiktoken encoding whose last token, `encoding.eot_token`, ends a text."""
    return tiktoken.Encoding("reviews", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


PROMPT = 8    # tokens of the longest prompt


def pad(rows: list[list[int]], filler: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of token ids -> ids (B, T), filled up on the right (to `width` at least), and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), max(width, int(lengths.max()))), filler)
    for row, tokens in zip(ids, rows):
        row[:len(tokens)] = torch.tensor(tokens)
    return ids, lengths


def make_prompts(encoding, texts: list[str], r: random.Random) -> tuple[Tensor, Tensor]:
    """The first 2-8 tokens of each review (App. C.1) -> ids (B, PROMPT), lengths (B,)."""
    return pad([encoding.encode(text)[:r.randint(2, PROMPT)] for text in texts], encoding.eot_token, PROMPT)


def decode(encoding, ids: Tensor, mask: Tensor) -> list[str]:
    """Prompt and response of each row as text, without the end token. ids (B, T), mask (B, T) of the response tokens."""
    end = mask.shape[1] - mask.int().flip(1).argmax(1)                 # one past the last response token
    return [encoding.decode([t for t in row[:n] if t != encoding.eot_token]) for row, n in zip(ids.tolist(), end.tolist())]


def true_reward(encoding, ids: Tensor, mask: Tensor) -> Tensor:
    """`sentiment` of each row's text: ids (B, T), mask (B, T) -> (B,) float32 on the ids' device."""
    return torch.tensor([sentiment(text) for text in decode(encoding, ids, mask)], device=ids.device)


# ------------------------------------------------------------------------------------------------------- the preferences
def bradley_terry(r_1: Tensor, r_2: Tensor) -> Tensor:
    """P(y_1 beats y_2 | x) = sigma(r_1 - r_2)                                                                   Eq. 1"""
    return torch.sigmoid(r_1 - r_2)


def label_pairs(reward: Tensor, mode: str, tau: float, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """All pairs among K completions of each prompt, labelled: reward (N, K) -> winner (M,), loser (M,), ties dropped.

    Winner and loser index the N * K completions, laid out prompt by prompt; the pairs of a prompt are consecutive.
    `deterministic` (the paper): the higher reward wins, exact ties are dropped. `bt` (the theory): y_1 wins with the
    probability of Eq. 1 at rewards r / tau; a tie is a coin. K(K-1)/2 pairs a prompt, fewer where ties were dropped.
    """
    n, k = reward.shape
    first, second = torch.triu_indices(k, k, 1)                        # (K(K-1)/2,) each
    r_1, r_2 = reward[:, first], reward[:, second]                     # (N, K(K-1)/2)
    if mode == "deterministic":
        first_wins, keep = r_1 > r_2, r_1 != r_2
    else:
        first_wins = torch.rand(r_1.shape, generator=generator) < bradley_terry(r_1 / tau, r_2 / tau)
        keep = torch.ones_like(first_wins)
    offset = k * torch.arange(n)[:, None]
    winner = torch.where(first_wins, first, second) + offset
    loser = torch.where(first_wins, second, first) + offset
    return winner[keep], loser[keep], int((~keep).sum())


class Preferences(NamedTuple):
    """K completions for each of N prompts, prompt by prompt (C = N * K rows), and M labelled pairs, prompt by prompt."""
    ids: Tensor       # (C, T) prompt, response, filler
    mask: Tensor      # (C, T) the response tokens
    ref: Tensor       # (C,) log pi_ref(y|x), computed once for every run that uses them
    winner: Tensor    # (M,) rows of y_w
    loser: Tensor     # (M,) rows of y_l
    k: int            # completions a prompt


def prompt_batch(data: Preferences, prompts: Tensor) -> Preferences:
    """The completions and pairs of some prompts (n,), the pairs now indexing the batch's rows; cut to its longest row (App. B)."""
    rows = (prompts[:, None] * data.k + torch.arange(data.k)).flatten()
    first = torch.searchsorted(data.winner // data.k, torch.stack([prompts, prompts + 1]))      # (2, n)
    pairs = torch.cat([torch.arange(a, b) for a, b in first.T.tolist()])
    place = torch.full((int(rows.max()) + 1,), -1)
    place[rows] = torch.arange(len(rows))
    mask = data.mask[rows]
    width = int(mask.any(0).nonzero().max()) + 1
    return Preferences(data.ids[rows, :width], mask[:, :width], data.ref[rows], place[data.winner[pairs]],
                       place[data.loser[pairs]], data.k)


def prompt_order(data: Preferences, batch: int, generator: torch.Generator, window: int = 8) -> list[Tensor]:
    """One epoch of batches of the prompts that have pairs, in random order; within `window` batches like lengths go together: less filler."""
    length = data.mask.sum(1).view(-1, data.k).amax(1)
    order = (data.winner // data.k).unique()
    if not len(order):
        raise UserError("there is no pair to learn from: all completions of a prompt have the same reward; train pi_ref longer "
                        "(--sft-epochs) or take more --prompts")
    order = order[torch.randperm(len(order), generator=generator)]
    batches = []
    for part in order.split(batch * window):
        batches += part[length[part].argsort(stable=True)].split(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


# ------------------------------------------------------------------- flags, and stages: files that are made once, by many workers
def parse(flag: str, field, text: str):
    """A flag's text as the type of its dataclass field, within the bounds of the field's metadata. Raises UserError."""
    kind, m = type(field.default[0] if isinstance(field.default, tuple) else field.default), field.metadata
    try:
        values = [kind(part) for part in (text.split(",") if isinstance(field.default, tuple) else [text])]
    except ValueError:
        raise UserError(f"{flag} takes {'whole ' * (kind is int)}numbers, not {text!r}") from None
    if m["choices"] and text not in m["choices"]:
        raise UserError(f"{flag} is one of {', '.join(m['choices'])}, not {text!r}")
    if kind is not str and not all(m["low"] <= x <= m["high"] and math.isfinite(x) for x in values):
        raise UserError(f"{flag} must be from {m['low']:g} to {m['high']:g}, not {text!r}")
    if len(set(values)) < len(values):
        raise UserError(f"{flag} names a value twice: {text!r}")
    return tuple(values) if isinstance(field.default, tuple) else values[0]


@functools.cache
def source(*files) -> str:
    """Hash of files' contents: who changes the code of a stage makes it anew."""
    return hashlib.sha256(b"".join(pathlib.Path(f).read_bytes() for f in files)).hexdigest()


def load_stage(path: pathlib.Path) -> dict | None:
    """What a stage's file holds, {"value", "seconds"}; None if it is missing, or unreadable, which is said."""
    try:
        stored = torch.load(path, weights_only=True)
        assert zipfile.ZipFile(path).testzip() is None, "a part of it is not what was written"    # torch does not look at the checksums
        assert stored["key"] == path.name, "it is another stage's"
        return {"value": stored["value"], "seconds": stored["seconds"]}
    except FileNotFoundError:
        return None
    except Exception as error:    # whatever a truncated or foreign file makes the reader raise
        print(f"{path} cannot be used and is made again ({type(error).__name__}: {' '.join(str(error).split())[:200]})", flush=True)


Job = tuple[str, str, Callable]    # name, key, make() -> value


class Stages(NamedTuple):
    """The files of a run's folder, for all workers: a job's value is made once, by whoever comes to it first."""
    folder: pathlib.Path
    seconds: dict    # name -> seconds that it took, whoever made it

    def path(self, job: Job) -> pathlib.Path:
        return self.folder / f"{job[0]}.{job[1]}.pt"

    def take(self, job: Job, wait: bool = True) -> dict | None:
        """{"value", "seconds"} of a job: loaded, else made and written, atomically. One process makes it; others wait, or get None."""
        path = self.path(job)
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))    # let go when this process ends, however it ends
            except BlockingIOError:
                return None
            stored = load_stage(path)
            if stored is None:
                start = time.perf_counter()
                stored = {"value": job[2](), "seconds": time.perf_counter() - start}
                try:
                    torch.save({"key": path.name, **stored}, path.with_suffix(".partial"))
                except (OSError, RuntimeError) as error:    # the second is torch's word for a full disk
                    raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full?") from None
                os.replace(path.with_suffix(".partial"), path)
        self.seconds[job[0]] = stored["seconds"]
        return stored

    def stage(self, *job):
        """The value of one job (name, key, make)."""
        return self.take(job)["value"]

    def share(self, jobs: list[Job], report: bool = False) -> list:
        """The values of jobs that do not need each other: each worker takes the next that nobody is at, then waits for the rest."""
        start, before = time.time(), sum(self.path(job).exists() for job in jobs)
        for job in jobs:
            mine = not self.path(job).exists() and self.take(job, wait=False)
            if mine and report:
                done, took = sum(self.path(j).exists() for j in jobs), (time.time() - start) / 60
                left = took / max(done - before, 1) * (len(jobs) - done)
                print(f"[{done}/{len(jobs)} done, {job[0]} the last; {took:.1f} min, about {left:.1f} min left]", flush=True)
        return [self.stage(*job) for job in jobs]


def choose_device(name: str | None) -> str:
    """The device that was asked for, or the best there is. Raises UserError where there is no such device."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    mine = f":{os.environ['LOCAL_RANK']}" if there[0] == "cuda" and "LOCAL_RANK" in os.environ else ""    # torchrun: a GPU each
    device = there[0] + mine if name is None else name
    try:
        assert device.split(":")[0] in there
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):
        raise UserError(f"--device {device} is not on this machine; there is {', '.join(there)}") from None
    return device


def answer(main: Callable[[], int], *mendable: type[Exception]) -> int:
    """main()'s exit code; or 2, and one line on stderr, for what the user can mend."""
    try:
        return main()
    except (UserError, *mendable) as error:
        what = str(error)    # not the error, whose traceback would keep files open
    except OSError as error:
        what = f"cannot write or read {error.filename or 'the output'}: {error.strerror}; free it, or choose another --out"
    except (MemoryError, RuntimeError) as error:    # the second is torch's
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        what = "out of memory; choose fewer --workers, or smaller --width, --batch-prompts or --optimum-samples"
    print("train.py: " + " ".join(str(what).split()), file=sys.stderr)
    return 2


def end_with_parent() -> None:
    """In a process that `launch` started: the end of its pipe is the end of the parent, however it came, and so its own."""
    if "PARENT" in os.environ:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()


def launch(workers: int) -> int:
    """This command again as `workers` processes of one thread each, as torchrun would start them; their worst exit code."""
    # glibc hands freed memory back and faults it in again, a third of the time of a small model's step, unless told to keep it.
    keep = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25), "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([sys.executable, *sys.argv], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 env={**os.environ, **keep, "RANK": str(rank), "WORLD_SIZE": str(workers), "PARENT": "train.py"})
                for rank in range(workers)]
    said = set()    # all have the same to say when all meet the same error

    def pass_on(child: subprocess.Popen) -> None:
        for line in child.stderr:
            if line not in said:
                said.update([line] if line.startswith("train.py: ") else [])
                sys.stderr.write(line)

    before = signal.getsignal(signal.SIGINT)    # whoever interrupts this process alone stops all at once, even those still starting
    signal.signal(signal.SIGINT, lambda *what: ([child.kill() for child in children], before(*what)))
    with ThreadPoolExecutor(workers) as listeners:
        listeners.map(pass_on, children)
        try:
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
    if min(codes) < 0:
        raise UserError(f"a worker was killed (signal {-min(codes)}): if memory ran out, take fewer --workers or smaller sizes")
    return max(codes)
