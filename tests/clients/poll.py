"""Asks for the role at the metadata service all the time, and prints what came of it, as JSON, a line now and then. Argument: the role
that is the host's own, and so a leak."""

import collections
import json
import socket
import sys
import time

REQUEST = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n"
counts = collections.Counter()
printed = 0.0


def asked():
    with socket.create_connection(("169.254.169.254", 80), timeout=1) as connection:
        connection.sendall(REQUEST)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    if sys.argv[1].encode() in answer:
        return "leaked"
    return f"got {body.decode()}" if head.startswith(b"HTTP/1.1 200") else f"status {head[9:12].decode()}"


while True:
    try:
        counts[asked()] += 1
    except OSError as error:
        counts[type(error).__name__] += 1
    if time.monotonic() > printed + 0.1:
        printed = time.monotonic()
        print(json.dumps(counts), flush=True)
    time.sleep(0.003)
