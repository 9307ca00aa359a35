"""With this folder in PYTHONPATH, python imports this file at every start, also that of workers: who opens a socket or looks up a name, ends."""
import os
import sys

sys.addaudithook(lambda event, arguments: event.startswith("socket.") and (os.write(2, f"network: {event}".encode()), os._exit(99)))
