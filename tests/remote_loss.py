"""A loss of a student, computed in a process of its own: it sees the numbers of a Pair and beta.

    loss = RemoteLoss("my_loss.py", "my_loss", folder)        used as loss(pair, beta) -> (B,)

train.py and the contract run in the grader's process and call this object. Policy, prompts, true
reward and files of results are not in the process of the student's code, so it cannot change them
from there. Both sides talk in lines of JSON, which cannot hold code; floats survive it exactly.
"""
import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import traceback

TESTS = pathlib.Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

import sandbox  # noqa: E402
from dpo import Pair  # noqa: E402

LONGEST_LINE = 10_000_000    # characters


# ----------------------------------------------------------------------------- the grader's side
class RemoteFunction(torch.autograd.Function):
    """The loss of each pair; its slopes in logp_w and logp_l came with it."""
    @staticmethod
    def forward(context, remote, beta, *fields):
        reply = remote.ask(beta, fields)
        value = torch.tensor(reply["value"], dtype=getattr(torch, reply["dtype"]))
        value = value.view(reply["shape"]).to(fields[0].device)
        context.slopes = []
        for slope in reply["slopes"]:
            tensor = None if slope is None else torch.tensor(slope, dtype=fields[0].dtype)
            context.slopes.append(tensor)
        if not reply["has_gradient"]:
            context.mark_non_differentiable(value)
        return value

    @staticmethod
    def backward(context, upstream):
        gradients = [None if slope is None else upstream * slope for slope in context.slopes]
        return None, None, *gradients, None, None, None, None


class RemoteLoss:
    """A function of (pair, beta) that a process of its own computes. Raises harness.LossError."""
    def __init__(self, path, name: str, folder):
        """`folder` is a copy of the repository; the process starts there."""
        user = os.environ.get("GRADE_USER")
        command = [sys.executable, str(pathlib.Path(folder, "tests", "remote_loss.py")), str(path),
                   name]
        self.name = pathlib.Path(path).name
        self.process = subprocess.Popen(
            command, cwd=folder, env=sandbox.environment(folder), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, encoding="utf-8", **sandbox.as_user(user))
        self.receive()    # it has read the file

    def fail(self, reason: str):
        import harness
        raise harness.LossError(f"{self.name}: {reason}")

    def receive(self) -> dict:
        """The next reply."""
        line = self.process.stdout.readline(LONGEST_LINE)
        if not line:
            self.fail("its process ended, with exit code "
                      f"{self.process.wait()}, instead of returning a loss")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            self.fail("it wrote into the pipe that carries its losses")
        if "error" in reply:
            self.fail(str(reply["error"])[:500])
        return reply

    def ask(self, beta: float, fields: tuple) -> dict:
        """The reply to a Pair's fields: value, shape, dtype, slopes, has_gradient."""
        request = {"beta": beta, "fields": [x.tolist() for x in fields],
                   "dtypes": [str(x.dtype).removeprefix("torch.") for x in fields]}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass    # `receive` tells how it ended
        return self.receive()

    def __call__(self, pair: Pair, beta: float) -> torch.Tensor:
        return RemoteFunction.apply(self, beta, *pair)


@functools.cache
def connect(path: str, name: str, folder: str) -> RemoteLoss:
    """The loss of a file: one process, however often the file is loaded."""
    return RemoteLoss(path, name, folder)


# ---------------------------------------------------------------------------- the student's side
def explain(error: BaseException, path: str) -> str:
    """An exception of the student's code, with its line."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == path]
    line = getattr(error, "lineno", None) or (lines or ["?"])[-1]
    return f"line {line} raised {type(error).__name__}: {error}"


def answer(loss, request: dict) -> dict:
    """Compute the loss and its slopes."""
    fields = [torch.tensor(x, dtype=getattr(torch, dtype))
              for x, dtype in zip(request["fields"], request["dtypes"])]
    pair = Pair(*(x.requires_grad_(i < 2) for i, x in enumerate(fields)))
    before = [x.detach().clone() for x in pair]
    value = loss(pair, request["beta"])
    if not isinstance(value, torch.Tensor) or value.is_complex():
        return {"error": f"it returned {type(value).__name__}, not a tensor of one real loss for "
                         "each pair, (B,)"}
    changed = [name for name, x, y in zip(Pair._fields, pair, before) if not torch.equal(x, y)]
    if changed:
        return {"error": f"it changes its input {changed[0]} in place"}
    slopes = [None, None]
    if value.requires_grad:
        slopes = torch.autograd.grad(value.sum(), pair[:2], allow_unused=True)
    return {"value": value.detach().flatten().tolist(), "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."), "has_gradient": value.requires_grad,
            "slopes": [None if slope is None else slope.tolist() for slope in slopes]}


def serve(path: str, name: str) -> None:
    """Answer requests on stdin; what the student's code prints goes to stderr."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    torch.set_num_threads(1)

    def reply_with(function, *arguments) -> None:
        try:
            reply = function(*arguments)
        except BaseException as error:    # SystemExit too
            reply = {"error": explain(error, path)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    names = {}
    reply_with(lambda: names.update(runpy.run_path(path)) or {})
    for line in requests:
        reply_with(lambda: answer(names[name], json.loads(line)))


if __name__ == "__main__":
    serve(*sys.argv[1:3])
