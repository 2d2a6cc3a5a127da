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
reserved = os.open("/dev/null", os.O_RDONLY)  # the next one, for what the daemon has kept
assert reserved == FIRST + 1
HEARS_AT = f"{tempfile.mkdtemp()}/notify"
heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
heard.bind(HEARS_AT)


def say(what):
    print(f"supervisor: {what}", flush=True)


kept = []  # the descriptor store (FileDescriptorStoreMax=1)


def hear():
    while True:
        message, descriptors, _, _ = socket.recv_fds(heard, 4096, 4)
        lines = message.decode().splitlines()
        if "FDSTORE=1" in lines:
            kept[:] = descriptors[:1]
        if "FDSTOREREMOVE=1" in lines:
            kept.clear()
        for line in lines:
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
    if kept:
        # Right after the listener.
        os.dup2(kept[0], FIRST + 1)
        environment.update(LISTEN_FDS="2", LISTEN_FDNAMES="imds-router.socket:netns")
    daemon = subprocess.Popen(as_itself, env=environment, pass_fds=range(FIRST, FIRST + 1 + len(kept)))
    signal.signal(signal.SIGTERM, end)
    say(f"started {daemon.pid}")
    code = daemon.wait()
    say(f"ended {daemon.pid}, {code}")
    if not ending.is_set():
        time.sleep(0.2)  # RestartSec
time.sleep(0.1)  # what was said last is heard
shutil.rmtree(os.path.dirname(HEARS_AT))
sys.exit(code)
