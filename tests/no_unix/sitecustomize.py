"""Remove from Python what Windows lacks: modules and functions that only Unix systems have.

With this folder in PYTHONPATH, Python imports this file at every start, also in worker processes.
"""
import os
import signal
import sys

for module in ("fcntl", "resource"):
    sys.modules[module] = None    # an import raises ImportError
for function in ("sysconf", "fork", "killpg"):
    delattr(os, function)
del signal.SIGKILL
