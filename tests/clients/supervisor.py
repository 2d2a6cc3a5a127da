"""Stands in for systemd: holds the listener of imds-router.socket, starts the daemon with it, hears what the daemon says of
itself, and starts it again when it dies. What it does and hears is printed, a line each.

supervisor.py PROGRAM ARGUMENT …    SIGTERM ends the daemon, and then this
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

IP_FREEBIND = 15  # ip(7); the socket module has no name for it
FIRST = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)

# The first descriptor that is opened, and so that one.
listener = socket.socket()
assert listener.fileno() == FIRST
listener.set_inheritable(True)
listener.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as systemd does
listener.bind(("169.254.169.254", 51254))
listener.listen(1024)
HEARS_AT = f"{tempfile.mkdtemp()}/notify"
heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
heard.bind(HEARS_AT)


def say(what):
    print(f"supervisor: {what}", flush=True)


def hear():
    while True:
        for line in heard.recv(4096).decode().splitlines():
            say(f"heard {line}")


ending = threading.Event()
daemon = None


def end(*_):
    ending.set()
    daemon.terminate()


threading.Thread(target=hear, daemon=True).start()
environment = dict(os.environ, LISTEN_FDS="1", NOTIFY_SOCKET=HEARS_AT, WATCHDOG_USEC="400000")
environment.pop("WATCHDOG_PID", None)
while not ending.is_set():
    as_itself = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *sys.argv[1:]]
    daemon = subprocess.Popen(as_itself, env=environment, pass_fds=[FIRST])
    signal.signal(signal.SIGTERM, end)
    say(f"started {daemon.pid}")
    code = daemon.wait()
    say(f"ended {daemon.pid}, {code}")
    if not ending.is_set():
        time.sleep(0.2)  # RestartSec
time.sleep(0.1)  # what was said last is heard
shutil.rmtree(os.path.dirname(HEARS_AT))
sys.exit(code)
