"""Stands in for the servers that attacks were made for: it trusts the address that a connection comes from.

It runs on the bridge's gateway, where such servers run. An attack that gets nothing from this one proves nothing.
"""

import argparse
import socket
import sys
import threading
import urllib.parse

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--listen", default="0.0.0.0")
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--reuse", action="store_true", help="share the port, as servers with several workers do")
parser.add_argument("--socket-of", help="the process in whose network namespace the client's socket must be ESTABLISHED")
parser.add_argument("roles", nargs="*", help="ADDRESS=ROLE")
told = parser.parse_args()
roles = dict(pair.split("=") for pair in told.roles)


def in_table(address, port):
    """An address and a port as /proc/net/tcp has them."""
    return f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}:{port:04X}"


def has_socket(link):
    wanted = [in_table(*link.getpeername()), in_table(*link.getsockname()), "01"]
    rows = open(f"/proc/{told.socket_of}/net/tcp").read().splitlines()
    return any(row.split()[1:4] == wanted for row in rows)


def serve(link, address):
    role = roles.get(address)
    proven = not told.socket_of or has_socket(link)
    with link:
        link.settimeout(15)
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                more = link.recv(65536)
                if not more:
                    return
                received += more
            head, _, received = received.partition(b"\r\n\r\n")
            if not proven:
                link.sendall(b"HTTP/1.1 403 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            asks = role
            # And whatever else is believed that the client says: forwarding headers, a name in the path.
            for name in ("x-forwarded-for", "x-real-ip", "forwarded"):
                said = headers.get(name, "").removeprefix("for=").strip('"')
                asks = roles.get(said, asks)
            last = urllib.parse.unquote(lines[0].split(" ")[1]).rstrip("/").split("/")[-1]
            if last == "security-credentials":
                body = asks or ""
            else:
                named = next((role for role in roles.values() if last.startswith(role)), asks)
                body = f'{{"SecretAccessKey" : "secret of {named}"}}'
            answer = f"HTTP/1.1 {200 if asks else 404} X\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            link.sendall(answer.encode())
            if headers.get("connection", "") == "close":
                return


listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if told.reuse:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind((told.listen, told.port))
listener.listen(64)


def attend(link, address):
    try:
        serve(link, address)
    except OSError:
        pass  # clients that leave in the middle


while True:
    link, (address, _) = listener.accept()
    threading.Thread(target=attend, args=(link, address), daemon=True).start()
