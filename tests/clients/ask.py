"""Asks the metadata service for each path that it reads, a line each, just as it stands there; prints all answers."""

import socket
import sys

for path in sys.stdin.read().splitlines():
    with socket.create_connection(("169.254.169.254", 80), timeout=3) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n".encode("latin-1"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    print(f"{path} -> {answer.decode('latin-1')}")
