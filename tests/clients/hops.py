"""IP's limit of what comes from the metadata service on one kept connection, at an address: of a value, then of a token. Prints
JSON: for each packet with data its limit and whether a token is in it."""

import ipaddress
import json
import socket
import sys

IMDS = ipaddress.ip_address(sys.argv[1])
TTL = b"X-Aws-Ec2-Metadata-Token-Ttl-Seconds"


def told(packet):
    """Sender, limit and what TCP carries (RFC 791, 8200, 9293); None for what is not TCP."""
    if IMDS.version == 4:
        protocol, limit, sender, header = packet[9], packet[8], packet[12:16], (packet[0] & 15) * 4
        end = int.from_bytes(packet[2:4], "big")
    else:
        protocol, limit, sender, header = packet[6], packet[7], packet[8:24], 40
        end = header + int.from_bytes(packet[4:6], "big")
    if protocol != socket.IPPROTO_TCP:
        return None
    return sender, limit, packet[header + (packet[header + 12] >> 4) * 4 : end]


# ETH_P_IP, ETH_P_IPV6 (linux/if_ether.h)
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800 if IMDS.version == 4 else 0x86DD))
sniffer.settimeout(0.5)
client = socket.create_connection((str(IMDS), 80), timeout=5)
host = f"Host: {IMDS if IMDS.version == 4 else f'[{IMDS}]'}\r\nConnection: keep-alive"
get = f"GET /latest/meta-data/instance-id HTTP/1.1\r\n{host}\r\n\r\n"
put = f"PUT /latest/api/token HTTP/1.1\r\n{host}\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"
for request in (get, put):
    client.sendall(request.encode())
    assert client.recv(4096).startswith(b"HTTP/1.1 200")
seen = []
try:
    while True:
        match told(sniffer.recv(65536)):
            case (sender, limit, data) if sender == IMDS.packed and data:
                seen.append([limit, TTL in data])
except TimeoutError:
    print(json.dumps(seen))
