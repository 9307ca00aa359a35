"""What every long experiment needs and no paper mentions. A reader of the paper can skip this file.

  1. Errors: one sentence instead of a traceback for what the user can fix; Ctrl-C.
  2. Flags, made from the fields of a dataclass.
  3. Stages: values that are computed once and kept in files.
  4. Workers: several processes, on one machine or many, that share the stages.
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


MAIN_FILE = getattr(sys.modules["__main__"], "__file__", None) or ""
if os.path.basename(MAIN_FILE) == "train.py" or multiprocessing.parent_process():
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
from types import SimpleNamespace
from typing import Callable, Iterable

import torch
import torch.multiprocessing
from torch import Tensor

import data
from data import Preferences
from dpo import Pair


# --------------------------------------------------------------------------------------- 1. errors
class UserError(Exception):
    """Something that the user can fix; the message names the cause and the fix."""


def run_program(main: Callable[[], int], may_print: Callable[[], bool] = lambda: True) -> int:
    """The exit code of main(), or 2 and one line on stderr for an error that the user can fix.

    Of several workers that meet the same error, only one may print it (`may_print`).
    """
    try:
        return main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = (f"cannot read or write {error.filename or 'the output'}: {error.strerror}; "
                   "make it writable, or choose another --out")
    except (MemoryError, RuntimeError) as error:                   # torch raises RuntimeError
        is_memory = re.search("allocate|out of memory", str(error))
        if isinstance(error, RuntimeError) and not is_memory:
            raise
        message = ("out of memory; use fewer --workers, or a smaller --width, --batch-prompts or "
                   "--optimum-samples")
    if may_print():
        print("train.py: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


# ---------------------------------------------------------------------------------------- 2. flags
def option(default, meaning: str, low: float = 0, high: float = math.inf, choices: tuple = ()):
    """A field of a configuration: its default, its meaning, and the values that it may have."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def parse_value(flag: str, field: dataclasses.Field, text: str):
    """The text of a flag as a value of its field; a tuple is a comma-separated list.

    Raises UserError if the text is of another type or out of bounds.
    """
    is_list = isinstance(field.default, tuple)
    kind = type(field.default[0] if is_list else field.default)
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    try:
        values = [kind(part) for part in (text.split(",") if is_list else [text])]
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{flag} takes {numbers}, not {text!r}") from None
    if choices and text not in choices:
        raise UserError(f"{flag} is one of {', '.join(choices)}, not {text!r}")
    if kind is not str and not all(low <= x <= high and math.isfinite(x) for x in values):
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
                        "a JSON object a line with prompt, chosen, rejected")
    parser.add_argument("--study", action="store_true",
                        help="also find out what keeps DPO from the optimum (plots/gap.py)")
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
# versions of packages are not in the hash. Definitions with a name in NOT_HASHED are left out too:
# nearly every stage names them, so an edit of them would recompute all.
ROOT = pathlib.Path(__file__).resolve().parent
NOT_HASHED = "Config", "Setup", "Stage", "cached"


def project_file(module: str | None) -> pathlib.Path | None:
    """The file of a module of this project; None for any other module."""
    if module is None:
        return None
    path = ROOT.joinpath(*module.split("."))
    candidates = path.with_suffix(".py"), path / "__init__.py"
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def parse_module(file: pathlib.Path) -> tuple[dict[str, ast.stmt], dict[str, tuple]]:
    """The top-level definitions of a file and its imports from this project, by name.

    An import is (file, name in that file), or (file, None) for a module. Annotated constants
    (`X: int = 3`) and imports inside functions are not seen.
    """
    definitions, imports = {}, {}
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            names = (target.id for target in ast.walk(node) if isinstance(target, ast.Name)
                     and isinstance(target.ctx, ast.Store))
            definitions.update(dict.fromkeys(names, node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            package = getattr(node, "module", None)
            for alias in node.names:
                module = project_file(f"{package}.{alias.name}" if package else alias.name)
                # the imported name is a module, or a name in a module
                place = (module, None) if module else (project_file(package), alias.name)
                imports[alias.asname or alias.name] = place
    return definitions, {name: place for name, place in imports.items() if place[0]}


@functools.cache
def read_definition(file: pathlib.Path, name: str | None) -> tuple[str, list[tuple]]:
    """The code of a top-level definition, without its comments, and the places that it names.

    A place is (file, name). For an imported name the code is empty, and the one place is its
    definition.
    """
    definitions, imports = parse_module(file)
    if name in imports:
        return "", [imports[name]]
    if name not in definitions:
        return "", []
    places = []
    for node in ast.walk(definitions[name]):
        if isinstance(node, ast.Name):
            places.append((file, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, _ = imports.get(node.value.id, (None, None))
            places += [(module, node.attr)] if module else []
    return ast.unparse(definitions[name]), places


@functools.cache
def reachable_code(function: Callable) -> dict[str, str]:
    """{"file:name": code} of a top-level function and of all that it names in this project."""
    function = inspect.unwrap(function)
    pending = [(pathlib.Path(inspect.getsourcefile(function)).resolve(), function.__qualname__)]
    found = {}
    while pending:
        place = pending.pop()
        if place not in found and place[1] not in NOT_HASHED:
            found[place], named = read_definition(*place)
            pending += named
    code = {f"{file.relative_to(ROOT).as_posix()}:{name}": text
            for (file, name), text in found.items() if text}
    assert code, f"{function.__qualname__} is not a top-level function of this project"
    return code


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


class Stage:
    """A deferred call function(setup, *arguments), whose value is kept in a file.

    `setup` has `cfg`, `seed`, `stages`, `user_pairs`, and `key`, which stands for encoding, corpus
    and pi_ref. Arguments are plain values, stages, tuples of these, top-level functions, and
    objects with a `source`.
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
            inputs["--pairs"] = self.setup.user_pairs
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
    return digest(argument.source) if hasattr(argument, "source") else argument.__qualname__


def cached(function: Callable) -> Callable:
    """Decorator: the value of function(setup, *arguments) is computed once and kept in a file."""
    @functools.wraps(function)
    def load_or_compute(setup, *arguments):
        return Stage(function, setup, *arguments).value

    return load_or_compute


def load_stage(path: pathlib.Path) -> tuple[dict | None, str]:
    """(content, "") of a stage's file, or (None, reason); the reason is "" without a file."""
    try:
        stored = torch.load(path, weights_only=True)
        with zipfile.ZipFile(path) as archive:                     # torch ignores its checksums
            damaged = archive.testzip()
    except FileNotFoundError:
        return None, ""
    except Exception as error:                                     # a damaged file may raise any
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if damaged or not isinstance(stored, dict) or stored.get("file") != path.name:
        return None, "a part of it is damaged, or it belongs to another stage"
    return stored, ""


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """write(file), then rename the file to `path`: it appears whole or not at all.

    After Ctrl-C or kill -9 a .partial file may remain.
    """
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    try:
        write(temporary)
    except (OSError, RuntimeError) as error:                       # both for a full disk
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}): is the disk full? make room, or choose "
                        "another --out") from None
    os.replace(temporary, path)


class Stages:
    """The stages in a folder, shared by all workers: each is computed by the first that asks."""
    def __init__(self, folder: pathlib.Path, store: torch.distributed.Store):
        self.folder = folder
        self.store = store                # counts how often any worker has claimed a stage
        self.seconds = {}                 # name of a stage -> seconds that its computation took
        self.waited = 0.                  # seconds that this worker has waited for other workers
        self.on_row = lambda row: None    # called with each row of results, during training
        self.explained = set()            # explanations that were printed

    def explain(self, stage: Stage) -> None:
        """Print, once a worker, why a stage is computed although a file has its name."""
        differences = []    # for each earlier file, the inputs that differ
        for file in self.folder.glob(f"{stage.name}.*.pt"):
            stored, _ = load_stage(file)
            earlier = stored.get("inputs", {}) if stored else {}
            differences.append([place for place in {**earlier, **stage.inputs}
                                if earlier.get(place) != stage.inputs.get(place)])
        changed = min(differences, key=len, default=[])            # those of the nearest file
        name = stage.function.__name__
        explanation = f"{name} is computed: {', '.join(changed)} differ from before"
        if changed and explanation not in self.explained:
            self.explained.add(explanation)
            print(explanation, flush=True)

    def compute(self, stage: Stage) -> dict:
        """Compute a stage and save it; the file appears whole or not at all."""
        self.explain(stage)
        start = time.perf_counter() - self.waited    # waiting is no part of `seconds`
        # a field that the hash lacks is not there: reading it would be an error
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
        stored, problem = load_stage(stage.path)
        if stored is None and self.store.add(stage.path.name, 1) == 1:    # claimed by this worker
            if problem:
                print(f"{stage.path} is unusable and computed again ({problem})", flush=True)
            stored = self.compute(stage)
        start = time.perf_counter()
        while stored is None:                    # another worker computes it; its file must appear
            time.sleep(.05)
            stored, _ = load_stage(stage.path)
        self.waited += time.perf_counter() - start
        self.seconds[stage.name] = stored["seconds"]
        return stored["value"]

    def get_all(self, stages: list[Stage], report: bool = False) -> list:
        """The values of stages, in order.

        The workers compute them in parallel, each the next one that nobody has claimed. A stage may
        need earlier ones of the list, but no later ones: the workers would wait for each other.
        """
        start = time.time()
        done_before = sum(stage.path.exists() for stage in stages)
        for stage in stages:
            if stage.path.exists() or self.store.add(stage.path.name, 1) > 1:
                continue
            self.compute(stage)
            if report:
                done = sum(other.path.exists() for other in stages)
                minutes = (time.time() - start) / 60
                left = minutes / (done - done_before) * (len(stages) - done)
                print(f"[{done}/{len(stages)} done, last: {stage.name}; {minutes:.1f} min, about "
                      f"{left:.1f} min left]", flush=True)
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
# Unless these thresholds forbid it, glibc returns freed memory to the system and asks for it again:
# a third of the time of a small model's step. Other systems ignore them.
WORKER_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(2**32),
                      "MALLOC_MMAP_THRESHOLD_": str(2**25), "OMP_NUM_THREADS": "1"}


def choose_device(name: str | None) -> str:
    """The device of this name, or the best one. Raises UserError if the machine lacks it."""
    # the best first
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    available = [kind for kind, backend in backends.items() if backend.is_available()]
    device = available[0] if name is None else name
    is_available = device.split(":")[0] in available
    try:
        torch.empty(0, device=device)
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
    return 4 * (max(torch.cuda.device_count(), 1) if device == "cuda" else 1)


def run_worker(rank: int, workers: int, folder: str | None, function: Callable, device: str,
               arguments: tuple) -> int:
    """The exit code of function(rank, store, device, *arguments), as one of several workers.

    The workers of one machine meet in a store in `folder`, those of torchrun (None) over the net.
    """
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus > 1:                              # workers take the GPUs in turn
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % gpus}"
    if folder is not None:
        store = torch.distributed.FileStore(f"{folder}/store", workers)
    elif workers == 1:
        store = torch.distributed.HashStore()
    else:
        store = next(torch.distributed.rendezvous("env://"))[0]

    def is_first_error() -> bool:
        is_first = store.add("errors", 1) == 1
        time.sleep(0 if is_first else .5)    # the first exit ends all: let the first error print
        return is_first

    return run_program(lambda: function(rank, store, device, *arguments), is_first_error)


def worker_process(*arguments) -> None:
    """The entry point of a spawned process."""
    sys.exit(run_worker(*arguments))


def launch(function: Callable, workers: int, device: str, *arguments) -> int:
    """Run function(rank, store, device, *arguments) in several processes; returns an exit code.

    Under torchrun, this process is already one of them. Raises UserError if a signal killed a
    worker (not on Windows).
    """
    if "RANK" in os.environ:
        rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return run_worker(rank, workers, None, function, device, arguments)
    os.environ.update(WORKER_ENVIRONMENT)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        worker_arguments = workers, folder, function, device, arguments
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
    """A loss that cannot be used; the message names file, function, line and reason."""


class UserLoss:
    """The function of FILE.py:FUNCTION as a loss, called as loss(pair, beta) -> (B,).

    It is tried on a few pairs when it is loaded, and checked at every call. Raises LossError.
    """
    def __init__(self, name: str):
        self.path, _, function_name = name.rpartition(":")
        self.place = f"--loss {name}"
        if not os.path.isfile(self.path):
            raise LossError(f"{self.place}: there is no file {self.path or name!r}; write "
                            "FILE.py:FUNCTION")
        self.source = pathlib.Path(self.path).read_bytes().decode("utf-8", "surrogateescape")
        self.function = self.guard(runpy.run_path, self.path).get(function_name)
        if not callable(self.function):
            raise LossError(f"{self.place}: {self.path} has no function {function_name}")
        code = getattr(self.function, "__code__", None)
        self.place += f" (line {code.co_firstlineno if code else '?'})"
        self.guard(self.try_once)

    def guard(self, function: Callable, *arguments):
        """function(*arguments); any exception of the user's code becomes a LossError."""
        try:
            return function(*arguments)
        except (KeyboardInterrupt, LossError):
            raise
        except BaseException as error:                             # SystemExit too
            lines = [getattr(error, "lineno", None) or "?"]        # of a SyntaxError
            lines += [line for frame, line in traceback.walk_tb(error.__traceback__)
                      if os.path.realpath(frame.f_code.co_filename) == os.path.realpath(self.path)]
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
            raise LossError(f"{self.place} has no gradient at some pairs: it does not depend on "
                            "logp_w or logp_l there, or detaches them")
        return value

    def try_once(self) -> None:
        """One call on ordinary pairs: the loss and its gradient must be finite."""
        logp_w = torch.tensor([-20., -31., -25., -44., -28.], requires_grad=True)
        logp_l = torch.tensor([-22., -29., -40., -43., -26.], requires_grad=True)
        pair = Pair(logp_w, logp_l, logp_w.detach() - 1., logp_l.detach() + .5,
                    torch.arange(20, 25), torch.arange(24, 29))
        value = self(pair, .5)
        slopes = torch.autograd.grad(value.sum(), (logp_w, logp_l), allow_unused=True)
        slopes = [slope for slope in slopes if slope is not None]
        if not slopes:
            raise LossError(f"{self.place} has no gradient: it does not depend on logp_w or "
                            "logp_l, or detaches them")
        for name, x in (("loss", value), *(("gradient", slope) for slope in slopes)):
            if not x.isfinite().all():
                raise LossError(f"{self.place}: the {name} is not finite on ordinary "
                                f"log-probabilities: {x.tolist()}")


def load_losses(names: list[str], reserved: Iterable[str]) -> dict[str, UserLoss]:
    """Users' losses by the names of their functions.

    Raises LossError if a name is in `reserved`, longer than 100 characters, or there twice.
    """
    losses = {name.rpartition(":")[2]: UserLoss(name) for name in names}
    taken = [name for name in losses if name in reserved or len(name) > 100]
    if len(losses) < len(names) or taken:
        raise LossError("--loss: each needs a short name of its own that is not the name of a "
                        f"method: {', '.join(losses)}")
    return losses


# ----------------------------------------------------------------------- 6. a user's preferences
# the regular expressions of reviews spell out every word of the grammar
REVIEW_PATTERNS = " ".join(review.pattern for review in data.REVIEW.values())
KNOWN_WORDS = set(re.findall(r"\w+", REVIEW_PATTERNS))


def is_known(text: str) -> bool:
    """Whether at least half of a text's words occur in reviews; its last word may be cut off."""
    words = re.findall(r"\w+", text)
    words = words[:-1] or words
    return len(words) > 0 and 2 * sum(word in KNOWN_WORDS for word in words) >= len(words)


def parse_preference(line: str) -> dict:
    """A line of a file of preferences. Raises ValueError if nothing can be learned from it."""
    try:
        pair = json.loads(line)
        texts = [pair[name] for name in ("prompt", "chosen", "rejected")]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError('not a JSON object {"prompt": ..., "chosen": ..., "rejected": '
                         "...}") from None
    if not all(isinstance(x, str) for x in texts) or not texts[0].strip():
        raise ValueError("prompt, chosen and rejected must be text, and the prompt not empty")
    if "response_ids" in pair:    # exported: what a policy wrote may be anything
        return pair
    if not all(map(is_known, texts)):
        raise ValueError("a text is empty, or most of its words are in no review: pi_ref cannot "
                         "know it")
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
    starts = preferences.mask.int().argmax(1)                      # of the responses
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
    """The tokens of prompt, chosen and rejected; a text that was exported keeps its own."""
    exported = pair.get("prompt_ids", {}).get(pair["prompt"])
    rows = [exported or encoding.encode_ordinary(pair["prompt"])]
    for name in ("chosen", "rejected"):
        exported = pair.get("response_ids", {}).get(pair[name])
        rows.append(exported or encoding.encode_ordinary(pair[name]) + [encoding.eot_token])
    encoding.decode(sum(rows, []))                                 # an error if one is no token
    return rows


@dataclasses.dataclass(frozen=True)
class UserPairs:
    """A user's preferences as tokens, and their text, which stands for them in a stage's hash."""
    source: str
    preferences: Preferences

    def with_reference(self, ref_logp: Tensor) -> "UserPairs":
        """The same pairs with log pi_ref (C,) of their responses."""
        return UserPairs(self.source, self.preferences._replace(ref_logp=ref_logp))


def group_completions(encoding, pairs: list[dict], context: int, path: str) -> tuple[dict, list]:
    """The completions of each group of pairs, and the pairs as places among them.

    -> {group: list of response ids}, and (group, place of chosen, place of rejected) of each pair.
    A group is (`group` of the export, *prompt ids); a pair that was not exported is a group of its
    own. Raises UserError that names the line.
    """
    groups, comparisons = {}, []
    for number, pair in enumerate(pairs, 1):
        try:
            prompt, *responses = encode_preference(encoding, pair)
            group = pair.get("group", -number), *prompt
            completions = groups.setdefault(group, [])
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            raise UserError(f"{path}, line {number}: prompt_ids, response_ids or group are not as "
                            "a run exports them") from None
        tokens = len(prompt) + max(map(len, responses))
        if tokens > context:
            raise UserError(f"{path}, line {number}: {tokens} tokens do not fit into {context}: "
                            "shorten it, or use a larger --max-tokens")
        for ids in responses:
            if ids not in completions:
                completions.append(ids)
        comparisons.append((group, *map(completions.index, responses)))
    return groups, comparisons


def encode_pairs(encoding, pairs: list[dict], max_tokens: int, path: str) -> UserPairs:
    """`read_pairs` as tokens; log pi_ref is still 0. Pairs of a group share completions.

    A group with fewer completions than others repeats its last one. Raises UserError that names
    the line.
    """
    context = data.MAX_PROMPT_TOKENS + max_tokens
    groups, comparisons = group_completions(encoding, pairs, context, path)
    k = max(map(len, groups.values()))
    rows, start, first_row = [], [], {}
    for group, completions in groups.items():
        first_row[group] = len(rows)
        _, *prompt = group
        repeated = completions[-1:] * (k - len(completions))
        rows += [prompt + response for response in completions + repeated]
        start += [len(prompt)] * k
    ids, stop = data.pad(rows, encoding.eot_token, context)
    columns = torch.arange(ids.shape[1])
    mask = (columns >= torch.tensor(start)[:, None]) & (columns < stop[:, None])
    winner = torch.tensor([first_row[group] + place for group, place, _ in comparisons])
    loser = torch.tensor([first_row[group] + place for group, _, place in comparisons])
    order = (winner // k).argsort(stable=True)                     # prompt by prompt
    preferences = Preferences(ids, mask, torch.zeros(len(ids)), winner[order], loser[order], k)
    return UserPairs(json.dumps(pairs), preferences)
