"""End any Python process that opens a socket or looks up a name.

With this folder in PYTHONPATH, Python imports this file at every start, also in worker processes.
"""
import os
import sys


def forbid_network(event: str, arguments: tuple) -> None:
    """An audit hook: exit with code 99 at any event of the module socket."""
    if event.startswith("socket."):
        os.write(2, f"network: {event}".encode())
        os._exit(99)


sys.addaudithook(forbid_network)
