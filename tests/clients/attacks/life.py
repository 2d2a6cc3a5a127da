"""A container's life, told request by request, for a judge who reads it after its end.

life.py on PATH [--first-ask SECONDS]   asks which role it has, again and again, and writes a line for each answer to PATH
life.py first-act                       asks for a token and its credentials as its first act; prints how it went, and ends
"""

import argparse
import http.client
import json
import os
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("what", choices=["on", "first-act"])
parser.add_argument("path", nargs="?")
parser.add_argument("--first-ask", type=float, default=0)
told = parser.parse_args()
ROLE = os.environ["ROLE"]
LIST = "/latest/meta-data/iam/security-credentials/"


def ask(method, path, headers={}):
    """Status, body, milliseconds; status 0 and a reason when there was no answer."""
    start = time.monotonic()
    link = http.client.HTTPConnection("169.254.169.254", timeout=2)
    try:
        link.request(method, path, headers=headers)
        reply = link.getresponse()
        status, body = reply.status, reply.read().decode()
    except (OSError, http.client.HTTPException) as error:
        status, body = 0, f"{type(error).__name__}: {error}"
    finally:
        link.close()
    return status, body, (time.monotonic() - start) * 1000


if told.what == "first-act":
    status, token, token_ms = ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token} if status == 200 else {}
    got, document, document_ms = ask("GET", LIST + ROLE, headers)
    well = status == 200 and got == 200 and "SecretAccessKey" in document
    print(json.dumps({"well": well, "statuses": [status, got], "ms": [token_ms, document_ms]}), flush=True)
else:
    time.sleep(told.first_ask)
    # Unbuffered: what has been read is told, whenever the end comes.
    with open(told.path, "ab", buffering=0) as story:
        while True:
            status, body, ms = ask("GET", LIST)
            kind = "own" if (status, body) == (200, ROLE) else "foreign" if status == 200 else str(status)
            row = {"kind": kind, "ms": ms}
            if kind != "own":
                row["body"] = body[:120]
            story.write(json.dumps(row).encode() + b"\n")
            time.sleep(0.02)
