"""Asks for its role with the token that it has, every few milliseconds, until --stop is there.

gaps.py TOKEN ROLE   prints the longest time in seconds in which it was not answered; who answers must answer right
"""

import http.client
import os
import sys
import time

token, role = sys.argv[1:]
end = time.monotonic() + 60  # whatever becomes of whoever started us


def ask():
    connection = http.client.HTTPConnection("169.254.169.254", timeout=1)
    try:
        path = "/latest/meta-data/iam/security-credentials/"
        connection.request("GET", path, headers={"X-aws-ec2-metadata-token": token})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


last, worst = time.monotonic(), 0.0
print("asks", flush=True)
while not os.path.exists("/tmp/stop") and time.monotonic() < end:
    answer = ask()
    now = time.monotonic()
    if answer == (200, role):
        worst = max(worst, now - last)
        last = now
    elif answer is not None and answer[0] not in (403, 503):  # refused: whoever has just started does not know us yet
        sys.exit(f"wrong: {answer}")
    time.sleep(0.01)
print(max(worst, time.monotonic() - last), flush=True)
