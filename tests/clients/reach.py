"""Sends one request to the metadata service as each of the users that are given, and prints what came of it, as JSON.
Arguments: the address, then user ids."""

import json
import os
import socket
import sys
import time

address = sys.argv[1]
REQUEST = b"GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n"


def outcome(user):
    """Of a process of that user."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setresuid(user, user, user)
        os.write(writer, attempt().encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    return os.read(reader, 4096).decode()


def attempt():
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as connection:
        connection.settimeout(0.8)
        try:
            connection.connect((address, 80))
            connection.sendall(REQUEST)
            answer = connection.recv(4096).decode("latin-1")
        except OSError as error:
            return "timeout" if isinstance(error, TimeoutError) else os.strerror(error.errno)
    return answer.rpartition("\r\n\r\n")[2] if " 200 " in answer else answer.partition("\r\n")[0]


print(json.dumps([outcome(int(user)) for user in sys.argv[2:]]))
