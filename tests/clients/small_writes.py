"""Sends requests byte by byte. Prints how many were answered, and the median of the milliseconds from the last byte to the answer,
as JSON. Argument: how many."""

import json
import socket
import statistics
import sys
import time

REQUEST = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.0\r\nHost: 169.254.169.254\r\nX-Padding: 1234567890\r\n\r\n"
answered, times = 0, []
for _ in range(int(sys.argv[1])):
    with socket.create_connection(("169.254.169.254", 80), timeout=10) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in REQUEST:
            link.send(bytes([byte]))
        sent = time.monotonic()
        answered += b" 200 " in link.recv(4096)
        times.append((time.monotonic() - sent) * 1000)
print(json.dumps({"answered": answered, "median_ms": round(statistics.median(times), 2)}))
