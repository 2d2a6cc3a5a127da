"""Waits for an address and port to become free, or shares them (SO_REUSEPORT), and answers as if it were the service.

Ends, and says how many came, when --stop is there.
"""

import argparse
import json
import os
import socket
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="169.254.169.254")
parser.add_argument("--port", type=int, default=51254)
parser.add_argument("--share", action="store_true")
parser.add_argument("--stop", default="/tmp/stop")
told = parser.parse_args()
end = time.monotonic() + 120  # whatever becomes of whoever started us
counts = {"bound": False, "refused": 0, "taken": 0, "why": ""}


def go_on():
    return not os.path.exists(told.stop) and time.monotonic() < end


print("ready", flush=True)
listener = None
while go_on() and not listener:
    attempt = socket.socket()
    # Past what is left of old connections; never past a listener.
    attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if told.share:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        attempt.bind((told.address, told.port))
        attempt.listen(16)
        listener = attempt
        counts["bound"] = True
        print("bound", flush=True)
    except OSError as error:
        counts["refused"] += 1
        counts["why"] = str(error)
        attempt.close()
        time.sleep(0.002)
while go_on() and listener:
    listener.settimeout(0.02)
    try:
        link, _ = listener.accept()
    except TimeoutError:
        continue
    counts["taken"] += 1
    with link:
        link.settimeout(0.5)
        try:
            link.recv(65536)
            link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nstolen")
        except OSError:
            pass  # who leaves has come nevertheless
print(json.dumps(counts), flush=True)
