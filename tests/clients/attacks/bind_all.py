"""As an unprivileged user, listens on every port and address that could receive requests for the metadata service, and answers
them. Prints "ready", and when a file --stop exists, what it has bound and how many connections came, as JSON."""

import argparse
import json
import os
import selectors
import socket
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--stop", required=True)
arguments = parser.parse_args()
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)

IP_FREEBIND, IPV6_FREEBIND = 15, 78
PORTS = [80, *range(51254, 51318)]
ADDRESSES = ["169.254.169.254", "0.0.0.0", "fd00:ec2::254", "::"]
bound, taken = [], 0
selector = selectors.DefaultSelector()
for address in ADDRESSES:
    for port in PORTS:
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if ":" in address:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        try:
            listener.bind((address, port))
            listener.listen(16)
        except OSError:
            listener.close()
            continue
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        if port == 80:
            bound.append(address)
print("ready", flush=True)
end = time.monotonic() + 120
while not os.path.exists(arguments.stop) and time.monotonic() < end:
    for key, _ in selector.select(timeout=0.05):
        connection, _ = key.fileobj.accept()
        taken += 1
        with connection:
            connection.settimeout(0.5)
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nstolen")
print(json.dumps({"bound": bound, "taken": taken}), flush=True)
