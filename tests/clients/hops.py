"""IP's limit of what comes from the metadata service on one kept connection: of a value, of a token, of a value again. Prints
JSON: for each packet with data its limit and whether a token is in it."""

import json
import socket

IMDS = "169.254.169.254"
TTL = b"X-Aws-Ec2-Metadata-Token-Ttl-Seconds"

sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
sniffer.settimeout(0.5)
client = socket.create_connection((IMDS, 80), timeout=5)
get = f"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: {IMDS}\r\n\r\n"
put = f"PUT /latest/api/token HTTP/1.1\r\nHost: {IMDS}\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"
for request in (get, put):
    client.sendall(request.encode())
    assert client.recv(4096).startswith(b"HTTP/1.1 200")
seen = []
try:
    while True:
        packet = sniffer.recv(65536)
        header = (packet[0] & 15) * 4
        if packet[9] != socket.IPPROTO_TCP or packet[12:16] != socket.inet_aton(IMDS):
            continue
        length = int.from_bytes(packet[2:4], "big")
        data = packet[header + (packet[header + 12] >> 4) * 4 : length]
        if data:
            seen.append([packet[8], TTL in data])
except TimeoutError:
    print(json.dumps(seen))
