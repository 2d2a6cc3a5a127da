"""What the victim of an attack does: nothing that an ordinary client would not do.

victim.py ask    asks for its credentials again and again until --stop is there; prints what it got
victim.py hold   brings one connection into a state and keeps it so until --stop is there; prints "ready"
"""

import argparse
import json
import os
import select
import socket
import sys
import time

from frames import request_for, status, whole

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("what", choices=["ask", "hold"])
parser.add_argument("--role", default="victim")
parser.add_argument("--server", default="169.254.169.254")
parser.add_argument("--server-port", type=int, default=80)
parser.add_argument("--stop", default="/tmp/stop")
parser.add_argument("--pause", type=float, default=0.02)
parser.add_argument("--bind", default="", help="the address to come from")
parser.add_argument("--port", type=int, default=0, help="the port to come from")
parser.add_argument(
    "--state",
    choices=["established", "silent", "close-wait", "time-wait", "connecting", "closing", "asking-last", "listening"],
    default="established",
)
parser.add_argument("--greeting", type=int, default=0, help="bytes that a listening server sends first")
parser.add_argument("--once", action="store_true", help="a listening server closes its listener after the first connection")
told = parser.parse_args()
end = time.monotonic() + 120  # whatever becomes of whoever started us
ROLE = f"/latest/meta-data/iam/security-credentials/"


def keep_alive(path):
    return f"GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: keep-alive\r\n\r\n".encode()


def connected(timeout):
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    link.settimeout(timeout)
    if told.bind or told.port:
        link.bind((told.bind, told.port))
    link.connect((told.server, told.server_port))
    return link


def answer(link):
    got = b""
    while not whole(got):
        more = link.recv(65536)
        if not more:
            break
        got += more
    return got


def ask():
    counts = {"own": 0, "foreign": 0, "refused": 0, "unanswered": 0, "sample": ""}
    while not os.path.exists(told.stop) and time.monotonic() < end:
        try:
            with connected(0.5) as link:
                link.sendall(keep_alive(ROLE))
                got = answer(link)
            body = got.partition(b"\r\n\r\n")[2].decode("latin-1")
            if status(got) == 200:
                kind = "own" if body == told.role else "foreign"
            else:
                kind = "refused" if got else "unanswered"
            if kind != "own":
                counts["sample"] = counts["sample"] or got[:120].decode("latin-1")
        except OSError:
            kind = "unanswered"
        counts[kind] += 1
        time.sleep(told.pause)
    print(json.dumps(counts), flush=True)


def stay():
    print("ready", flush=True)
    while not os.path.exists(told.stop) and time.monotonic() < end:
        time.sleep(0.01)


def is_deceived():
    """Whether the kernel has an ESTABLISHED socket of our port whose other end is the service's address and port."""
    service = f"{int.from_bytes(socket.inet_aton(told.server), sys.byteorder):08X}:{told.server_port:04X}"
    rows = [row.split() for row in open("/proc/net/tcp").read().splitlines()[1:]]
    return any(row[1].endswith(f":{told.port:04X}") and row[2] == service and row[3] == "01" for row in rows)


def listen():
    """Any service of the victim's. Prints whether a connection of it had the other end that only a client of ours has."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((told.bind, told.port))
    listener.listen(8)
    print("ready", flush=True)
    accepted, deceived = [], False
    while not os.path.exists(told.stop) and time.monotonic() < end:
        if listener and select.select([listener], [], [], 0.005)[0]:
            link, _ = listener.accept()
            link.setblocking(False)
            link.send(b"g" * told.greeting)
            accepted.append(link)
            if told.once:
                listener.close()
                listener = None
        elif not listener:
            time.sleep(0.005)
        deceived = deceived or is_deceived()
    print(json.dumps({"deceived": int(deceived)}), flush=True)


def hold():
    if told.state == "listening":
        listen()
        return
    if told.state == "connecting":
        # Somebody takes the answer to our SYN: this goes on until it times out. Nobody is told so.
        print("ready", flush=True)
        link = None
        try:
            link = connected(6)
        except OSError as error:
            print(error, file=sys.stderr)
        while not os.path.exists(told.stop) and time.monotonic() < end:
            time.sleep(0.01)
        return
    link = connected(3)
    if told.state == "silent":
        stay()
        return
    if told.state == "asking-last":
        # The answer, and the end of the connection, are for others to see.
        print("ready", flush=True)
        while not os.path.exists(told.stop + ".go") and time.monotonic() < end:
            time.sleep(0.005)
        link.sendall(request_for(told.role, ROLE))
        stay()
        return
    request = request_for(told.role, ROLE) if told.state == "close-wait" else keep_alive(ROLE)
    link.sendall(request)
    got = answer(link)
    if status(got) != 200:
        sys.exit(f"the victim itself got {got[:200]!r}")
    if told.state == "time-wait":
        link.close()
        time.sleep(0.1)
    elif told.state == "closing":
        print("ready", flush=True)
        while not os.path.exists(told.stop + ".go") and time.monotonic() < end:
            time.sleep(0.005)
        link.close()
    elif told.state == "close-wait":
        # The server has closed; a pool of connections notices when it wants to use this one again.
        time.sleep(0.1)
    stay()


ask() if told.what == "ask" else hold()
