"""End any Python process that uses the network, and remove from Python what only Unix systems have.

With this folder in PYTHONPATH, Python imports this file at every start, also in worker processes.
"""
import asyncio  # noqa: F401  (torch imports it; from Python 3.12 on it needs os.sysconf on Unix)
import os
import signal
import sys


def forbid_network(event: str, arguments: tuple) -> None:
    """An audit hook: exit with code 99 at any event of the module socket."""
    if event.startswith("socket."):
        os.write(2, f"network: {event}".encode())
        os._exit(99)


sys.addaudithook(forbid_network)
for module in ("fcntl", "resource"):
    sys.modules[module] = None    # an import raises ImportError
for function in ("sysconf", "fork", "killpg"):
    delattr(os, function)
del signal.SIGKILL
