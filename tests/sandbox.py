"""Run a stranger's code: a process group of its own, a time limit, and an end to its output.

What this protects: the grader's process, and the files that later parts read, because they come
from memory (`take_snapshot`). It is no container: as the same user of the machine, a program can
read and write whatever the grader can. `user` runs it as another user, on Linux and macOS.
"""
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md", "requirements.txt"  # at the top of the repository, with its modules
SUBMITTED = "my_loss.py", "my_tests.py"      # a teacher may have files of these names there
FOLDERS = "plots", "tests"
KINDS = ".py", ".md", ".txt"
LONGEST_OUTPUT = 2_000_000                   # bytes; a program that prints more is stopped
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "SYSTEMDRIVE", "COMSPEC", "LANG",
                  "VIRTUAL_ENV", "PATHEXT", "NUMBER_OF_PROCESSORS")


class Finished(NamedTuple):
    """A program that ended, or was stopped."""
    output: str      # stdout and stderr, in the order of printing
    problem: str     # in one sentence, why it did not end well; empty if it did
    seconds: float


# ------------------------------------------------------------------------- copies of the repository
def take_snapshot(root: pathlib.Path = ROOT) -> dict[str, bytes]:
    """The files of the repository, by path, in memory: no submission can change them."""
    paths = [path for path in root.iterdir()
             if path.name in DOCUMENTS or path.suffix == ".py" and path.name not in SUBMITTED]
    for folder in FOLDERS:
        paths += [path for path in (root / folder).rglob("*") if path.suffix in KINDS]
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(paths) if "__pycache__" not in path.parts}


def write_copy(snapshot: dict[str, bytes], folder: pathlib.Path) -> pathlib.Path:
    """Write the files of a snapshot into a folder."""
    for name, content in snapshot.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def changed_files(snapshot: dict[str, bytes], root: pathlib.Path = ROOT) -> list[str]:
    """The files that differ from the snapshot. They are not written again: that is for a human."""
    return [name for name, content in snapshot.items()
            if not (root / name).is_file() or (root / name).read_bytes() != content]


# -------------------------------------------------------------------------------- other programs
def as_user(user: str | None) -> dict:
    """Arguments of subprocess.Popen that run a program as this user; none for None."""
    if not user:
        return {}
    import pwd    # not on Windows
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def problem_of_user(user: str | None) -> str:
    """Why a user cannot run Python for the grader, in one sentence; empty text if he can."""
    if not user:
        return ""
    try:
        finished = run(["-c", "import torch"], pathlib.Path("/"), 120, user=user)
    except (KeyError, OSError, ValueError) as error:
        return f"--user {user} cannot be used ({error}): start as root, and name a user of Linux"
    if finished.problem:
        return (f"--user {user} cannot import torch with {sys.executable}: install Python where "
                f"this user may read it ({shorten(finished.output, 200)})")
    return ""


def give_to(user: str | None, folder: pathlib.Path) -> None:
    """Make the user the owner of all that is in a folder, and let him reach it."""
    if not user:
        return
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, user)
    folder.parent.chmod(0o711)    # of tempfile.TemporaryDirectory


def environment(folder: pathlib.Path, **variables: str) -> dict[str, str]:
    """A small environment: home and temporary files are in the folder."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    home = str(folder)
    return {**kept, "HOME": home, "USERPROFILE": home, "TMPDIR": home, "TEMP": home, "TMP": home,
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1",
            **variables}


def end_group(process: subprocess.Popen) -> None:
    """Kill a program and the processes that it started, those that outlived it too."""
    kill_group = getattr(os, "killpg", None)
    if kill_group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill_group(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    process.wait()


def collect(stream, output: bytearray) -> None:
    """Read a stream to its end, or until there is too much."""
    while len(output) <= LONGEST_OUTPUT:
        chunk = stream.read1(2**16)
        if not chunk:
            return
        output += chunk


def wait(process: subprocess.Popen, output: bytearray, seconds: float) -> str:
    """Wait for a program; returns why it had to be stopped, or empty text."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if len(output) > LONGEST_OUTPUT:
            return f"it printed more than {LONGEST_OUTPUT / 1e6:g} MB and was stopped"
        if time.monotonic() > end:
            return f"it did not end within {seconds:g} seconds and was stopped"
        time.sleep(.02)
    return ""


def run(command: list[str], folder: pathlib.Path, seconds: float, text: str = "",
        variables: dict[str, str] | None = None, user: str | None = None) -> Finished:
    """Run a Python program in a folder, as `python COMMAND`, with a text as its input."""
    start = time.monotonic()
    variables = environment(folder) if variables is None else variables
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=variables,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True, **as_user(user))
    output = bytearray()
    reader = threading.Thread(target=collect, args=(process.stdout, output), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(OSError):    # it may have ended already
            process.stdin.write(text.encode())
            process.stdin.close()
        problem = wait(process, output, seconds)
    finally:
        end_group(process)
    reader.join(timeout=2)    # a process that left the group may hold the pipe open
    if not problem and process.returncode:
        problem = f"its process ended with exit code {process.returncode}"
    return Finished(output.decode("utf-8", "replace"), problem, time.monotonic() - start)


def shorten(text: str, length: int = 1500) -> str:
    """The end of a text."""
    text = text.strip()
    return text if len(text) <= length else "[...] " + text[-length:]
