"""Sends requests with programs that close their half of the connection after the request. Prints for each program how often
it was answered, as JSON. Argument: how many times."""

import json
import subprocess
import sys

ADDRESS = "169.254.169.254"
ROLES = "/latest/meta-data/iam/security-credentials/"
PROGRAMS = {
    "busybox nc": ["/busybox", "nc", ADDRESS, "80"],
    "ncat": ["/usr/bin/ncat", ADDRESS, "80"],
    "socat": ["/usr/bin/socat", "-", f"TCP:{ADDRESS}:80"],
    "openbsd nc": ["/usr/bin/nc.openbsd", "-N", ADDRESS, "80"],
}
results = {}


def body(program, request):
    """The body of a 200, or an empty text."""
    done = subprocess.run(PROGRAMS[program], input=request.encode(), capture_output=True, timeout=10)
    head, _, rest = done.stdout.decode("latin-1").partition("\r\n\r\n")
    if " 200 " in head.partition("\r\n")[0]:
        return rest
    print(program, done, file=sys.stderr)
    return ""


for program in PROGRAMS:
    tokens = credentials = 0
    for _ in range(int(sys.argv[1])):
        token = body(program, "PUT /latest/api/token HTTP/1.0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n")
        tokens += bool(token)
        header = f"X-aws-ec2-metadata-token: {token}\r\n"
        role = body(program, f"GET {ROLES} HTTP/1.0\r\n{header}\r\n")
        credentials += "SecretAccessKey" in body(program, f"GET {ROLES}{role} HTTP/1.0\r\n{header}\r\n")
    results[program] = {"tokens": tokens, "credentials": credentials}
print(json.dumps(results))
