"""Requests that no decent client makes, from a container that has a role of its own: what it gets by them.

Prints, for each trick, the statuses that came back and whether the answers tell of the victim, or give credentials under a
name that is not the asker's own.
"""

import argparse
import json
import re
import socket

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--own", required=True, help="the role of this container")
parser.add_argument("--role", required=True, help="the victim's")
parser.add_argument("--victim", required=True, help="the victim's address")
parser.add_argument("--server", default="169.254.169.254")
parser.add_argument("--server-port", type=int, default=80)
told = parser.parse_args()
ROLES = "/latest/meta-data/iam/security-credentials/"
OWN, VICTIM = told.own, told.role


def get(path, *headers, host="169.254.169.254", line=None):
    lines = [line or f"GET {path} HTTP/1.1"]
    lines += [f"Host: {host}"] if host is not None else []
    return "\r\n".join([*lines, *headers, "Connection: close", "", ""]).encode("latin-1")


plain = get(ROLES)
forwarding = [
    "X-Forwarded-For: {}", "Forwarded: for={}", "X-Real-IP: {}", "True-Client-IP: {}", "X-Client-IP: {}", "CF-Connecting-IP: {}",
    "X-Forwarded-Host: {}", "X-Original-URL: " + ROLES + VICTIM, "X-Rewrite-URL: " + ROLES + VICTIM, "Via: 1.1 {}",
    "X-aws-ec2-metadata-instance-id: {}",
]

# What may come of it: "own" (as if there were no trick), "refused" (not one 200), "own or refused".
tricks = [("plain", "own", plain), ("own credentials", "own credentials", get(ROLES + OWN))]
for name, host in [
    ("another", "attacker.example"), ("suffix", "169.254.169.254.attacker.example"), ("user", "x@169.254.169.254"),
    ("port", "169.254.169.254:8080"), ("decimal", "2852039166"), ("hexadecimal", "0xa9fea9fe"), ("zeros", "169.254.169.254."),
    ("list", "169.254.169.254, attacker.example"), ("space", "169.254.169.254 attacker.example"), ("localhost", "localhost"),
    ("loopback", "127.0.0.1"), ("v6", "[::ffff:169.254.169.254]"), ("victim", told.victim), ("null", "169.254.169.254\0"),
]:
    tricks.append((f"Host: {name}", "refused", get(ROLES, host=host)))
two = [("169.254.169.254", "attacker.example"), ("attacker.example", "169.254.169.254"), ("169.254.169.254", "169.254.169.254")]
for first, second in two:
    tricks.append((f"two Hosts: {first} {second}", "refused", get(ROLES, f"Host: {second}", host=first)))
tricks.append(("folded Host", "refused", get(ROLES, " attacker.example")))
tricks.append(("Host with a space before the colon", "refused", get(ROLES, "Host : attacker.example")))
tricks.append(("absolute form", "refused", get("", line=f"GET http://attacker.example{ROLES} HTTP/1.1")))
tricks.append(("absolute form, other Host", "refused", get("", line=f"GET http://169.254.169.254{ROLES} HTTP/1.1", host="attacker.example")))
tricks.append(("absolute form, user", "refused", get("", line=f"GET http://a@169.254.169.254{ROLES} HTTP/1.1")))
tricks.append(("absolute form, other scheme", "own or refused", get("", line=f"GET https://169.254.169.254{ROLES} HTTP/1.1")))
tricks.append(("CONNECT", "refused", get("", line="CONNECT 169.254.169.254:80 HTTP/1.1")))
for origin in ["http://attacker.example", "null", "", "http://169.254.169.254"]:
    tricks.append((f"Origin: {origin}", "refused", get(ROLES, f"Origin: {origin}")))
for header in forwarding:
    tricks.append((header, "own", get(ROLES, header.format(told.victim))))
    tricks.append((header + " PUT", "own or refused", get("", header.format(told.victim), "X-aws-ec2-metadata-token-ttl-seconds: 60", line="PUT /latest/api/token HTTP/1.1")))
for method in ["POST", "DELETE", "PATCH", "TRACE", "get", "GETX", "PROPFIND"]:
    tricks.append((method, "refused", get("", line=f"{method} {ROLES} HTTP/1.1")))
for name, token in [("empty", ""), ("garbage", "A" * 56), ("long", "A" * 9000), ("bytes", "\xff\xfe"), ("null", "\0")]:
    tricks.append((f"token: {name}", "refused", get(ROLES, f"X-aws-ec2-metadata-token: {token}")))
tricks.append(("two tokens", "refused", get(ROLES, "X-aws-ec2-metadata-token: a", "X-aws-ec2-metadata-token: b")))

# Paths. Whatever names the victim's role, or nearly our own, must give nothing.
for path in [
    ROLES + VICTIM, ROLES + VICTIM + "/", ROLES + "/" + VICTIM, ROLES + OWN + "/../" + VICTIM, ROLES + "../security-credentials/" + VICTIM,
    ROLES + OWN + "/%2e%2e/" + VICTIM, ROLES + OWN + "%2f..%2f" + VICTIM, ROLES + OWN + "%252f..%252f" + VICTIM, ROLES + OWN + "\\..\\" + VICTIM,
    ROLES + OWN + "/" + VICTIM, ROLES + VICTIM + "/../" + OWN, ROLES + "./" + VICTIM, ROLES + VICTIM + "%00", ROLES + VICTIM + "%00" + OWN,
    ROLES + OWN + "%00", ROLES + OWN + "%0a" + VICTIM, ROLES + OWN + ";" + VICTIM, ROLES + OWN + "," + VICTIM, ROLES + OWN + "x", ROLES + OWN[:-1],
    ROLES + "x" + OWN, ROLES + OWN.upper(), ROLES + OWN[1:], ROLES + "*", ROLES + "%2a", ROLES + OWN + ".", ROLES + OWN + "%20", ROLES + OWN + "+",
    ROLES + OWN + "%2f", ROLES + "%2f" + OWN, ROLES + "arn:aws:iam::111122223333:role/" + VICTIM, "/" + VICTIM, "/latest/" + VICTIM,
    "/1.0/meta-data/iam/security-credentials/" + VICTIM, "/2021-07-15/meta-data/iam/security-credentials/" + VICTIM,
    "/2999-01-01/meta-data/iam/security-credentials/" + OWN, "/latest/../latest/meta-data/iam/security-credentials/" + VICTIM,
    "/LATEST/meta-data/iam/security-credentials/" + OWN, "/latest/Meta-Data/iam/security-credentials/" + OWN,
    "/v2/credentials", "/v2/credentials/" + VICTIM, "/v1/credentials", "/role/" + VICTIM, "/role-arn/" + VICTIM, "/containers", "/status", "/metrics",
    ROLES + "%c0%ae%c0%ae/" + VICTIM, ROLES + "%u002e%u002e/" + VICTIM, ROLES + "%ff", ROLES + "%", ROLES + "%2",
]:
    tricks.append((path, "refused", get(path)))
tricks.append(("query", "own or refused", get(ROLES + f"?role={VICTIM}")))
tricks.append(("query on own", "own credentials or refused", get(ROLES + OWN + f"?role={VICTIM}#{VICTIM}")))
tricks.append(("double slashes", "own credentials or refused", get("//latest//meta-data//iam//security-credentials//" + OWN)))

# Two requests in what one side may take for one.
inner = get(ROLES + VICTIM, host="attacker.example")
body = b"0\r\n\r\n" + inner
tricks.append(("Content-Length and Transfer-Encoding", "own or refused", plain.replace(b"Connection: close", b"Content-Length: %d\r\nTransfer-Encoding: chunked" % len(body)) + body))
tricks.append(("Transfer-Encoding and Content-Length", "own or refused", plain.replace(b"Connection: close", b"Transfer-Encoding: chunked\r\nContent-Length: 4") + body))
tricks.append(("two Content-Lengths", "own or refused", plain.replace(b"Connection: close", b"Content-Length: 0\r\nContent-Length: %d" % len(inner)) + inner))
tricks.append(("Transfer-Encoding twice", "own or refused", plain.replace(b"Connection: close", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x") + body))
tricks.append(("Transfer-Encoding, tab", "own or refused", plain.replace(b"Connection: close", b"Transfer-Encoding:\tchunked\r\nContent-Length: %d" % len(body)) + body))
tricks.append(("pipelined, foreign Host", "own or refused", plain.replace(b"Connection: close\r\n", b"") + inner))
tricks.append(("pipelined, victim's role", "own or refused", plain.replace(b"Connection: close\r\n", b"") + get(ROLES + VICTIM)))
tricks.append(("bare line feeds", "own or refused", get(ROLES).replace(b"\r\n", b"\n")))
tricks.append(("HTTP/1.0 without Host", "own or refused", f"GET {ROLES} HTTP/1.0\r\n\r\n".encode()))
tricks.append(("HTTP/0.9", "own or refused", f"GET {ROLES}\r\n\r\n".encode()))
tricks.append(("HTTP/2 preface", "refused", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
tricks.append(("upgrade", "own or refused", get(ROLES, "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")))
tricks.append(("PROXY v1", "refused", f"PROXY TCP4 {told.victim} 169.254.169.254 40000 80\r\n".encode() + plain))
tricks.append(("PROXY v2", "refused", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + socket.inet_aton(told.victim) + b"\xa9\xfe\xa9\xfe\x9c\x40\0\x50" + plain))


def sent(request):
    answer = b""
    with socket.create_connection((told.server, told.server_port), 2) as link:
        link.settimeout(0.4)
        try:
            link.sendall(request)
            while more := link.recv(65536):
                answer += more
        except OSError:
            pass  # silence and resets: what came before counts
    return answer


def verdict(allowed, answer):
    statuses = [int(it) for it in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]
    good = 200 in statuses
    gives = b"SecretAccessKey" in answer
    if VICTIM.encode() in answer:
        return statuses, "tells of the victim"
    if allowed.startswith("own credentials"):
        well = gives if good else "refused" in allowed
    elif allowed == "own":
        well = good and answer.endswith(OWN.encode())
    elif allowed == "refused":
        well = not good
    else:
        well = not gives and (not good or OWN.encode() in answer or b"ttl-seconds: 60" in answer.lower())
    return statuses, "" if well else f"should be {allowed}: {answer[-200:].decode('latin-1')}"


told_of_victim = failed = 0
complaints = []
for name, allowed, request in tricks:
    statuses, complaint = verdict(allowed, sent(request))
    told_of_victim += complaint == "tells of the victim"
    if complaint:
        complaints.append(f"{name}: {statuses} {complaint}")
print(json.dumps({"tries": len(tricks), "tells": told_of_victim, "complaints": complaints}), flush=True)
