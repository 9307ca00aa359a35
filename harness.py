"""What every long experiment needs and no paper mentions. A reader of the paper can skip this file.

  1. Errors: one sentence instead of a traceback for what the user can fix; Ctrl-C.
  2. Flags, made from the fields of a dataclass.
  3. Stages: values that are computed once and kept in files.
  4. Workers: several processes, on one machine or on many with a shared folder.
  5. A loss of the user's own (--loss).
  6. Preferences as files: exported, and of the user's own (--pairs).
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


# not under pytest or `python -m plots`, where Ctrl-C keeps its meaning
if os.path.basename(sys.argv[0]) == "train.py" or multiprocessing.parent_process():
    signal.signal(signal.SIGINT, stop)    # before torch is imported, which takes seconds

import argparse
import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import pathlib
import re
import runpy
import tempfile
import time
import traceback
import zipfile
from types import ModuleType, SimpleNamespace
from typing import Callable, Iterable

import torch
from torch import Tensor

import data
from data import Preferences
from dpo import Pair


# --------------------------------------------------------------------------------------- 1. errors
class UserError(Exception):
    """Something that the user can fix; the message names the cause and the fix."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch raises RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(re.search("allocate|out of memory", str(error))))


def run_program(main: Callable[[], int], store: torch.distributed.Store | None = None) -> int:
    """The exit code of main(), or 2 and one line on stderr for an error that the user can fix.

    Of several workers, which share a store, only the first that meets an error prints it.
    """
    try:
        return main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = (f"cannot read or write {error.filename or 'the output'}: "
                   f"{error.strerror or error}; make it writable, or choose another --out")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = ("out of memory; use fewer --workers, or a smaller --width, --batch-prompts or "
                   "--optimum-samples")
    if store is None or store.add("errors", 1) == 1:
        print("train.py: " + " ".join(message.split()), file=sys.stderr, flush=True)
    else:
        time.sleep(.5)    # the first exit ends all workers: let the first error print
    return 2


# ---------------------------------------------------------------------------------------- 2. flags
def option(default, meaning: str, low: float = 0, high: float = math.inf, choices: tuple = ()):
    """A field of a configuration: its default, its meaning, and the values that it may have."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def parse_value(flag: str, field: dataclasses.Field, text: str):
    """The text of a flag as a value of its field; a tuple is a comma-separated list.

    Raises UserError if the text is of another type, out of bounds, or lists a value twice.
    """
    is_list = isinstance(field.default, tuple)
    kind = type(field.default[0] if is_list else field.default)
    low, high = field.metadata["low"], field.metadata["high"]
    try:
        values = [kind(part) for part in (text.split(",") if is_list else [text])]
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{flag} takes {numbers}, not {text!r}") from None
    if kind is not str and not all(low <= x <= high for x in values):
        raise UserError(f"{flag} must be from {low:g} to {high:g}, not {text!r}")
    if len(set(values)) < len(values):
        raise UserError(f"{flag} lists a value twice: {text!r}")
    return tuple(values) if is_list else values[0]


class Parser(argparse.ArgumentParser):
    """A command line whose errors are UserErrors."""
    def error(self, message: str):
        raise UserError(f"{message}; see python train.py --help")

    def add_config(self, config: type) -> None:
        """Add a flag for each field of a configuration; one that is not given stays unset."""
        for field in dataclasses.fields(config):
            flag = "--" + field.name.replace("_", "-")
            meaning = field.metadata["meaning"].replace("%", "%%")
            self.add_argument(flag, type=functools.partial(parse_value, flag, field),
                              choices=field.metadata["choices"] or None,
                              metavar="NAME" if field.metadata["choices"] else "N",
                              default=argparse.SUPPRESS,
                              help=f"{meaning} (default: {field.default})")


def read_flags(argv: list[str], config: type, presets: dict[str, dict],
               description: str) -> tuple[object, argparse.Namespace]:
    """The configuration and the other flags of a command line. Raises UserError."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--preset", default="default", choices=presets,
                        help="sizes to start from; other flags override them")
    parser.add_argument("--out", help="folder for all that is written (default: runs/PRESET)")
    parser.add_argument("--loss", action="append", default=[], metavar="FILE.py:FUNCTION",
                        help="train this loss over --betas instead of the sweep, and draw it "
                        "beside the baselines in the folder; repeatable")
    parser.add_argument("--pairs", metavar="FILE.jsonl", help="train on preferences from a file: "
                        "a JSON object a line with prompt, chosen, rejected; a response begins "
                        "with its own space")
    parser.add_argument("--study", action="store_true",
                        help="also find out what keeps DPO from the optimum, on the first seed "
                        "(plots/gap.py)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best available)")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes (default: one a core, at most 16; four a GPU)")
    parser.add_config(config)
    args = parser.parse_args(argv)
    given = {name: x for name, x in vars(args).items() if name in config.__dataclass_fields__}
    if args.workers is not None and not 0 < args.workers <= 256:
        raise UserError(f"--workers must be from 1 to 256, not {args.workers}")
    if args.study and (args.loss or args.pairs):
        raise UserError("--study cannot be combined with --loss or --pairs: it studies the "
                        "paper's methods on pi_ref's own pairs")
    if args.out == "":
        raise UserError("--out names no folder")
    args.out = args.out or f"runs/{args.preset}"
    return config(**{**presets[args.preset], **given}), args


def total_memory() -> float:
    """Bytes of memory of this machine; infinite where the system does not tell (Windows)."""
    sysconf = getattr(os, "sysconf", None)
    return sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE") if sysconf else math.inf


# --------------------------------------------------------------------------------------- 3. stages
# The file of a stage is named by a hash of all that determines its value: the code of its function
# and of everything in this project that this code names, directly or not; the fields of the
# configuration that this code reads (cfg.NAME); the file of pi_ref; --pairs, if the code reads
# setup.user_pairs; and its other arguments. All of this is found by reading the code, so that
# nobody has to list it. Comments are no part of the code, docstrings are. Of a user's loss the text
# of FILE.py counts, comments too, but no module that it imports. Device, number of workers and
# versions of packages are not in the hash. (Machines that share a folder need the same version of
# Python: `ast.unparse` depends on it.) Definitions with a name in NOT_HASHED are left out too:
# nearly every stage names them, so an edit of them would recompute all; `print_row` only prints.
ROOT = pathlib.Path(__file__).resolve().parent
NOT_HASHED = "Config", "Setup", "Stage", "cached", "print_row"


@functools.cache
def parse_module(module: ModuleType) -> dict[str, ast.stmt]:
    """{name: the top-level statement that defines or imports it}; empty for installed modules.

    Imports inside functions and `from MODULE import NAME as OTHER` are not seen.
    """
    file = pathlib.Path(getattr(module, "__file__", None) or "/").resolve()
    if ROOT not in file.parents or "site-packages" in file.parts:
        return {}
    statements = {}
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        else:                                                      # a constant
            names = [x.id for x in ast.walk(node)
                     if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
        statements.update(dict.fromkeys(names, node))
    return statements


@functools.cache
def reachable_code(function: Callable) -> dict[str, str]:
    """{"file:name": code} of a top-level function and of all that it names in this project."""
    function = inspect.unwrap(function)
    pending = [(sys.modules[function.__module__], function.__qualname__)]
    visited, code = set(), {}
    while pending:
        module, name = pending.pop()
        if not inspect.ismodule(module) or (module, name) in visited or name in NOT_HASHED:
            continue
        visited.add((module, name))
        node = parse_module(module).get(name)
        if isinstance(node, ast.ImportFrom):
            pending.append((sys.modules[node.module], name))
        elif node:
            file = pathlib.Path(module.__file__).resolve().relative_to(ROOT)
            code[f"{file.as_posix()}:{name}"] = ast.unparse(node)
            pending += [(module, x.id) for x in ast.walk(node) if isinstance(x, ast.Name)]
            pending += [(getattr(module, x.value.id, None), x.attr) for x in ast.walk(node)
                        if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name)]
    assert code, f"{function.__qualname__} is not a top-level function of this project"
    return code


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Stage:
    """A deferred call function(setup, *arguments), whose value is kept in a file.

    `setup` is a NamedTuple with `cfg`, `seed`, `stages`, `user_pairs`, and `key`, which stands for
    encoding, corpus and pi_ref. Arguments are plain values, stages, tuples of these, top-level
    functions, and objects with a `source`.
    """
    def __init__(self, function: Callable, setup, *arguments):
        self.function = inspect.unwrap(function)
        self.setup = setup
        self.arguments = arguments

    @property
    def name(self) -> str:
        """function-argument-argument-seedN: the plain values among the arguments."""
        name = self.function.__name__.replace("_", "-")
        for argument in self.arguments:
            parts = argument if isinstance(argument, tuple) else (argument,)
            name += "".join(f"-{part}" for part in parts if isinstance(part, (str, int, float)))
        return f"{name}-seed{self.setup.seed}"

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """{name: digest} of all that determines the value: "file:name" of code, "cfg.NAME", ..."""
        inputs = {}
        for function in (self.function, *filter(inspect.isfunction, self.arguments)):
            inputs.update(reachable_code(function))
        code = "\n".join(inputs.values())
        fields = vars(self.setup.cfg)
        for name in set(re.findall(r"\bcfg\.(\w+)", code)) & fields.keys():
            inputs[f"cfg.{name}"] = fields[name]
        inputs["an argument, or the loss"] = self.arguments
        inputs["pi_ref"] = self.setup.key
        if self.setup.user_pairs and "setup.user_pairs" in code:
            inputs["--pairs"] = self.setup.user_pairs._replace(ref_logp=None)    # pi_ref gives it
        return {name: digest(json.dumps(x, default=describe)) for name, x in inputs.items()}

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """The file of the value: NAME.HASH.pt."""
        input_hash = digest(json.dumps(self.inputs, sort_keys=True))
        return self.setup.stages.folder / f"{self.name}.{input_hash}.pt"

    @functools.cached_property
    def value(self):
        """The value, loaded from its file or computed."""
        return self.setup.stages.get(self)


def describe(argument) -> str:
    """The text that stands in a stage's hash for an argument that is not a plain value."""
    if isinstance(argument, Stage):
        return argument.path.name
    if isinstance(argument, Tensor):
        return hashlib.sha256(argument.numpy()).hexdigest()
    return argument.source if hasattr(argument, "source") else argument.__qualname__


def cached(function: Callable) -> Callable:
    """Decorator: the value of function(setup, *arguments) is computed once and kept in a file."""
    @functools.wraps(function)
    def load_or_compute(setup, *arguments):
        return Stage(function, setup, *arguments).value

    return load_or_compute


def load_stage(path: pathlib.Path) -> dict | None:
    """The content of a stage's file; None if it is missing, damaged, or that of another stage."""
    try:
        with zipfile.ZipFile(path) as archive:                     # torch ignores its checksums
            if archive.testzip():
                return None
        stored = torch.load(path, weights_only=True)
        is_complete = stored["file"] == path.name and "inputs" in stored    # not of old versions
        return stored if is_complete else None
    except Exception:                                              # a damaged file may raise any
        return None


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """write(file), then rename the file to `path`: it appears whole or not at all.

    After Ctrl-C or kill -9 a .partial file may remain.
    """
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    try:
        write(temporary)
    except (OSError, RuntimeError) as error:                       # both for a full disk
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full? "
                        "make room, or choose another --out") from None
    os.replace(temporary, path)


class Stages:
    """The stages in a folder, shared by all workers: each is computed by the first that asks."""
    def __init__(self, folder: pathlib.Path, store: torch.distributed.Store):
        self.folder = folder
        self.store = store                # counts claims of stages, messages and errors
        self.seconds = {}                 # name of a stage -> seconds that its computation took
        self.waited = 0.                  # seconds that this worker has waited for other workers
        self.on_row = lambda row: None    # called with each row of results, during training

    def explain(self, stage: Stage) -> None:
        """Print how this stage differs from its nearest earlier file, once for each reason."""
        earlier = filter(None, map(load_stage, self.folder.glob(f"{stage.name}.*.pt")))
        differences = [sorted(dict(stored["inputs"].items() ^ stage.inputs.items()))
                       for stored in earlier]    # of each earlier file, the inputs that differ
        changed = min(differences, key=len, default=[])            # those of the nearest file
        name = stage.function.__name__
        inputs = ", ".join(changed)
        explanation = f"{name} is computed; the nearest earlier one differs in: {inputs}"
        if changed and self.store.add(explanation, 1) == 1:
            print(explanation, flush=True)

    def compute(self, stage: Stage) -> dict:
        """Compute a stage and save it; returns what is saved."""
        self.explain(stage)
        start = time.perf_counter() - self.waited    # waiting is no part of `seconds`
        # only the fields in the hash: reading another one is an error
        fields = {name: x for name, x in vars(stage.setup.cfg).items()
                  if f"cfg.{name}" in stage.inputs}
        restricted = stage.setup._replace(cfg=SimpleNamespace(**fields))
        value = stage.function(restricted, *stage.arguments)
        stored = {"file": stage.path.name, "inputs": stage.inputs, "value": value,
                  "seconds": time.perf_counter() - self.waited - start}
        write_whole(stage.path, lambda file: torch.save(stored, file))
        return stored

    def get(self, stage: Stage):
        """The value of a stage, loaded from its file or computed."""
        stored = load_stage(stage.path)
        if stored is None and self.store.add(stage.path.name, 1) == 1:    # claimed by this worker
            if stage.path.exists():
                print(f"{stage.path} is unusable and computed again", flush=True)
            stored = self.compute(stage)
        start = time.perf_counter()
        while stored is None:                    # another worker computes it; its file must appear
            time.sleep(.05)
            stored = load_stage(stage.path)
        self.waited += time.perf_counter() - start
        self.seconds[stage.name] = stored["seconds"]
        return stored["value"]

    def get_all(self, stages: list[Stage]) -> list:
        """The values of stages, in order.

        The workers compute them in parallel, each the next one that nobody has claimed. Put a
        stage after the stages that it reads. Otherwise one worker computes them inside it, the
        others wait, and its `seconds` include theirs.
        """
        for stage in stages:
            if not stage.path.exists() and self.store.add(stage.path.name, 1) == 1:
                self.compute(stage)
                done = sum(other.path.exists() for other in stages)
                print(f"[{done}/{len(stages)} done, last: {stage.name}]", flush=True)
        return [stage.value for stage in stages]


PARTS = 8    # a long stage is split into at most so many parts, which the workers share


def part_indices(count: int) -> range:
    """The indices of the parts that Tensor.chunk(PARTS) makes of `count` rows: 9 rows, 5 parts."""
    return range(len(torch.empty(count).chunk(PARTS)))


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """The objects of a file of JSON lines; none if there is no file."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def write_jsonl(path: pathlib.Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda file: file.write_text(text, "utf-8"))


# -------------------------------------------------------------------------------------- 4. workers
def choose_device(name: str | None) -> str:
    """The device of this name, or the best one. Raises UserError if the machine lacks it."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}    # best first
    available = [kind for kind, backend in backends.items() if backend.is_available()]
    device = available[0] if name is None else name
    try:
        is_available = torch.empty(0, device=device).device.type in available
    except (AssertionError, RuntimeError):
        is_available = False
    if not is_available:
        raise UserError(f"--device {device} is not on this machine; it has "
                        f"{', '.join(available)}")
    return device


def default_workers(device: str) -> int:
    """One worker a core, at most 16; four a GPU, for all GPUs if the device is `cuda`."""
    if device.startswith("cpu"):
        return min(os.cpu_count() or 1, 16)
    return 4 * torch.cuda.device_count() if device == "cuda" else 4


def run_worker(rank: int, store: torch.distributed.Store, function: Callable, device: str,
               *arguments) -> int:
    """The exit code of function(rank, store, device, *arguments), as one of several workers."""
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus > 1:                              # workers take the GPUs in turn
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % gpus}"
    return run_program(lambda: function(rank, store, device, *arguments), store)


def worker_process(rank: int, workers: int, folder: str, *arguments) -> None:
    """The entry point of a spawned process; the workers of one machine meet in a folder."""
    store = torch.distributed.FileStore(f"{folder}/store", workers)
    sys.exit(run_worker(rank, store, *arguments))


def launch(function: Callable, workers: int, device: str, *arguments) -> int:
    """Run function(rank, store, device, *arguments) in several processes; returns an exit code.

    Under torchrun, this process is already one of them. Raises UserError if a signal killed a
    worker (not on Windows).
    """
    if "RANK" in os.environ:
        if os.environ["WORLD_SIZE"] == "1":
            store = torch.distributed.HashStore()
        else:
            store = next(torch.distributed.rendezvous("env://"))[0]
        return run_worker(int(os.environ["RANK"]), store, function, device, *arguments)
    # Unless these thresholds forbid it, glibc returns freed memory to the system and asks for it
    # again: a third of the time of a small model's step. Other systems ignore them.
    os.environ.update(MALLOC_TRIM_THRESHOLD_=str(2**32), MALLOC_MMAP_THRESHOLD_=str(2**25),
                      OMP_NUM_THREADS="1")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        worker_arguments = workers, folder, function, device, *arguments
        try:
            torch.multiprocessing.spawn(worker_process, worker_arguments, nprocs=workers)
        except torch.multiprocessing.ProcessExitedException as error:
            if error.exit_code < 0:
                raise UserError(f"a worker was killed ({error.signal_name}): if memory ran out, "
                                "use fewer --workers or smaller sizes") from None
            return error.exit_code
    return 0


# ------------------------------------------------------------------------------ 5. a user's loss
class LossError(UserError):
    """A loss that cannot be used; the message names file, function and reason."""


class UserLoss:
    """The function of FILE.py:FUNCTION as a loss, called as loss(pair, beta) -> (B,).

    It is tried on a few pairs when it is loaded, and checked at every call. Raises LossError.
    """
    def __init__(self, name: str):
        self.path, _, function_name = name.rpartition(":")
        self.place = f"--loss {name}"
        if not os.path.isfile(self.path):
            missing = f"no file {self.path!r}" if self.path else "no file and no function"
            raise LossError(f"{self.place}: there is {missing}; write FILE.py:FUNCTION")
        source = self.guard(pathlib.Path(self.path).read_bytes)
        self.source = source.decode("utf-8", "surrogateescape")
        self.function = self.guard(runpy.run_path, self.path).get(function_name)
        if not callable(self.function):
            raise LossError(f"{self.place}: {self.path} has no function {function_name}")
        self.guard(self.try_once)

    def guard(self, function: Callable, *arguments):
        """function(*arguments); any exception of the user's code becomes a LossError."""
        try:
            return function(*arguments)
        except (KeyboardInterrupt, LossError):
            raise
        except BaseException as error:                             # SystemExit too
            if is_out_of_memory(error):                            # `run_program` says what to do
                raise
            lines = [getattr(error, "lineno", None) or "?"]        # of a SyntaxError
            lines += [line for frame, line in traceback.walk_tb(error.__traceback__)
                      if frame.f_code.co_filename == self.path]
            raise LossError(f"{self.place} raised {type(error).__name__} in {self.path}, line "
                            f"{lines[-1]}: {error}") from None

    def __call__(self, pair: Pair, beta: float) -> Tensor:
        value = self.guard(self.function, pair, beta)
        shape = pair.logp_w.shape
        if not isinstance(value, Tensor) or value.shape != shape or value.is_complex():
            got = type(value).__name__
            if isinstance(value, Tensor):
                got = f"shape {tuple(value.shape)} of {value.dtype}"
            raise LossError(f"{self.place} must return one real loss for each of the B pairs, of "
                            f"shape (B,), here {tuple(shape)}, but returned {got}; train.py takes "
                            "the mean")
        if pair.logp_w.requires_grad and not value.requires_grad:
            raise self.no_gradient()
        return value

    def no_gradient(self) -> LossError:
        """The error of a loss that does not reach the policy."""
        return LossError(f"{self.place} has no gradient: it does not depend on logp_w or logp_l, "
                         "or detaches them")

    def try_once(self) -> None:
        """One call on ordinary pairs: the loss and its gradient must be finite."""
        logp = torch.tensor([[-20., -31., -25., -44., -28.], [-22., -29., -40., -43., -26.]],
                            requires_grad=True)                    # of chosen, of rejected
        pair = Pair(*logp, logp[0].detach() - 1., logp[1].detach() + .5, torch.arange(20, 25),
                    torch.arange(24, 29))
        value = self(pair, .5)
        [slope] = torch.autograd.grad(value.sum(), logp, allow_unused=True)
        if slope is None:
            raise self.no_gradient()
        for name, x in ("loss", value), ("gradient", slope):
            if not x.isfinite().all():
                raise LossError(f"{self.place}: the {name} is not finite on ordinary "
                                f"log-probabilities: {x.tolist()}")


def load_losses(names: list[str], reserved: Iterable[str]) -> dict[str, UserLoss]:
    """Users' losses by the names of their functions.

    Raises LossError if a name is in `reserved`, longer than 100 characters, or there twice.
    """
    losses = {name.rpartition(":")[2]: UserLoss(name) for name in names}
    if len(losses) < len(names) or any(x in reserved or len(x) > 100 for x in losses):
        raise LossError("--loss: each needs a short name of its own that is not the name of a "
                        f"method: {', '.join(losses)}")
    return losses


# ----------------------------------------------------------------------- 6. a user's preferences
# the regular expressions of reviews spell out every word of the grammar
KNOWN_WORDS = set(re.findall(r"\w+", " ".join(x.pattern for x in data.REVIEW.values())))


def is_known(text: str) -> bool:
    """Whether at least half of a text's words occur in reviews."""
    words = re.findall(r"\w+", text)
    return len(words) > 0 and 2 * sum(word in KNOWN_WORDS for word in words) >= len(words)


def lacks_space(prompt: str, response: str) -> bool:
    """Whether two words become one where the response begins. (A prompt may end inside a word.)"""
    left, right = re.search(r"\w*\Z", prompt)[0], re.match(r"\w*", response)[0]
    return {left, right} <= KNOWN_WORDS and left + right not in KNOWN_WORDS


def parse_preference(line: str) -> dict:
    """A line of a file of preferences. Raises ValueError if nothing can be learned from it."""
    try:
        pair = json.loads(line)
        texts = [pair[name] for name in ("prompt", "chosen", "rejected")]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("not a JSON object with prompt, chosen and rejected") from None
    if not all(isinstance(x, str) for x in texts) or not texts[0].strip():
        raise ValueError("prompt, chosen and rejected must be text, and the prompt not empty")
    if "response_ids" in pair:    # exported: what a policy wrote may be anything
        return pair
    if not all(map(is_known, texts)):
        raise ValueError("a text is empty, or most of its words are in no review: pi_ref cannot "
                         "know it")
    if any(lacks_space(texts[0], response) for response in texts[1:]):
        raise ValueError("a response needs a space of its own before its first word")
    if texts[1] == texts[2]:
        raise ValueError("chosen and rejected are the same: there is nothing to learn from them")
    return pair


def read_pairs(path: str) -> list[dict]:
    """Preferences from a file: one JSON object a line, with prompt, chosen and rejected.

    Raises UserError that names the line.
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise UserError(f"--pairs: cannot read {path} as text ({error})") from None
    if not text:
        raise UserError(f"--pairs: {path} holds no pairs")
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):    # not splitlines: JSON may hold U+2028
        try:
            pairs.append(parse_preference(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return pairs


def export_preferences(encoding, preferences: Preferences) -> list[dict]:
    """One object for each pair: prompt, chosen, rejected, and what `encode_preference` needs.

    `prompt_ids` and `response_ids` map each text to its tokens. If chosen and rejected are the same
    text, which only --labels bt allows, these are the tokens of the rejected one. Pairs of one
    prompt have the same `group`.
    """
    starts = data.prompt_lengths(preferences.mask)
    prompts = [ids[:start].tolist() for ids, start in zip(preferences.ids, starts)]
    responses = [ids[mask].tolist() for ids, mask in zip(preferences.ids, preferences.mask)]
    lines = []
    for w, l in zip(preferences.winner.tolist(), preferences.loser.tolist()):
        rows = [prompts[w], responses[w], responses[l]]
        prompt, chosen, rejected = (
            encoding.decode([t for t in row if t != encoding.eot_token]) for row in rows)
        lines.append({"prompt": prompt, "chosen": chosen, "rejected": rejected,
                      "group": w // preferences.k, "prompt_ids": {prompt: rows[0]},
                      "response_ids": {chosen: rows[1], rejected: rows[2]}})
    return lines


def encode_preference(encoding, pair: dict) -> list[list[int]]:
    """The tokens of prompt, chosen and rejected; a text that was exported keeps its own.

    Raises an error if those do not spell the text: they are of another tokenizer, or damaged.
    """
    end = encoding.eot_token
    rows = []
    for name, column, ending in (("prompt", "prompt_ids", []), ("chosen", "response_ids", [end]),
                                 ("rejected", "response_ids", [end])):
        row = pair.get(column, {}).get(pair[name])
        if not row:
            row = encoding.encode_ordinary(pair[name]) + ending
        elif encoding.decode([token for token in row if token != end]) != pair[name]:
            raise ValueError("the tokens do not spell the text")
        rows.append(row)
    return rows


def group_completions(encoding, pairs: list[dict], context: int, path: str) -> dict:
    """Group the pairs; the pairs of a group share its completions.

    -> {key: (completions, comparisons)}. A key is (`group` of the export, *prompt ids); a pair that
    was not exported is a group of its own. `completions` is {ids of prompt and response: place},
    `comparisons` has the places [chosen, rejected] of each pair. Raises UserError that names the
    line.
    """
    groups = {}
    for line, pair in enumerate(pairs, 1):
        try:
            prompt, *responses = encode_preference(encoding, pair)
            group = pair.get("group", -line), *prompt
            completions, comparisons = groups.setdefault(group, ({}, []))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            raise UserError(f"{path}, line {line}: prompt_ids, response_ids or group are not as "
                            "a run with this --seed and --vocab-size exports them") from None
        tokens = len(prompt) + max(map(len, responses))
        if tokens > context:
            raise UserError(f"{path}, line {line}: {tokens} tokens do not fit into {context}: "
                            "shorten it, or use a larger --max-tokens")
        comparisons.append([completions.setdefault((*prompt, *ids), len(completions))
                            for ids in responses])
    return groups


def encode_pairs(encoding, pairs: list[dict], max_tokens: int, path: str) -> Preferences:
    """`read_pairs` as tokens; log pi_ref is still 0. Pairs of a group share completions.

    A group with fewer completions than others repeats its last one. Raises UserError that names
    the line.
    """
    context = data.MAX_PROMPT_TOKENS + max_tokens
    groups = group_completions(encoding, pairs, context, path)
    k = max(len(completions) for completions, _ in groups.values())
    rows, start, compared = [], [], []
    for (_, *prompt), (completions, comparisons) in groups.items():
        compared += [(len(rows) + chosen, len(rows) + rejected) for chosen, rejected in comparisons]
        different = list(completions)
        rows += different + different[-1:] * (k - len(different))
        start += [len(prompt)] * k
    ids, lengths = data.pad(rows, encoding.eot_token, context)
    columns = torch.arange(ids.shape[1])
    mask = (columns >= torch.tensor(start)[:, None]) & (columns < lengths[:, None])
    winner, loser = (torch.tensor(column) for column in zip(*compared))
    return Preferences(ids, mask, torch.zeros(len(ids)), winner, loser, k)
