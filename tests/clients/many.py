"""Many clients in one container. Prints the result as JSON.

`many.py sessions N`: N boto3 sessions in one process, all kept.
`many.py workers N`: N forked processes, each with a boto3 session, which all exist until the last one has its credentials.
`many.py pipelined N`: N times a PUT with a body and two more requests behind it, in one write.
"""

import json
import os
import socket
import sys
import time
import traceback

REGION = "eu-west-1"


def sessions(count):
    import boto3

    kept, without, slowest = [], 0, 0
    for _ in range(count):
        start = time.monotonic()
        session = boto3.Session(region_name=REGION)
        without += not session.get_credentials()
        slowest = max(slowest, time.monotonic() - start)
        kept.append(session)
    return {"credentials": len(kept) - without, "slowest_ms": round(1000 * slowest)}


def workers(count):
    import boto3

    reports, report = os.pipe()
    until, end = os.pipe()
    for _ in range(count):
        if os.fork():
            continue
        os.close(end)
        found = False
        try:
            found = bool(boto3.Session(region_name=REGION).get_credentials())
        except Exception:
            traceback.print_exc()
        os.write(report, b"y" if found else b"n")
        os.read(until, 1)  # returns when the parent closes the other end
        os._exit(0)
    answers = b""
    while len(answers) < count:
        answers += os.read(reports, count)
    os.close(end)
    for _ in range(count):
        os.wait()
    return {"credentials": answers.count(b"y")}


def pipelined(count):
    address = "169.254.169.254"
    read = f"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: {address}\r\n\r\n"
    requests = (
        f"PUT /latest/api/token HTTP/1.1\r\nHost: {address}\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n"
        f"Content-Length: 4000\r\n\r\n{'x' * 4000}{read}{read}"
    ).encode()
    answers = {}
    for _ in range(count):
        with socket.create_connection((address, 80), timeout=3) as connection:
            data = b""
            try:
                connection.sendall(requests)
                while part := connection.recv(65536):
                    data += part
                answer = data.partition(b"\r\n")[0].decode("latin-1")
            except OSError as error:
                answer = f"{type(error).__name__} after {len(data)} bytes"
        answers[answer] = answers.get(answer, 0) + 1
    return answers


print(json.dumps({"sessions": sessions, "workers": workers, "pipelined": pipelined}[sys.argv[1]](int(sys.argv[2]))))
