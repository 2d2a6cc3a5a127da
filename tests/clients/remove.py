"""Removes the route to the metadata service as fast as it is restored. Argument: how many times. Prints how many there were
until it was not restored within 300 ms."""

import subprocess
import sys
import time

removed = 0
last = time.monotonic()
while removed < int(sys.argv[1]) and time.monotonic() < last + 0.3:
    if subprocess.run(["/usr/sbin/ip", "route", "del", "169.254.169.254", "dev", "imds0", "table", "169"], capture_output=True).returncode == 0:
        removed += 1
        last = time.monotonic()
print(removed)
