"""Prints the links and addresses of the machine as several programs list them, as JSON. Argument: the client of the Go SDK."""

import json
import socket
import subprocess
import sys


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


links = json.loads(output("/usr/sbin/ip", "-j", "addr"))
go = json.loads(output(sys.argv[1], "addresses"))
print(
    json.dumps(
        {
            "hostname -I": output("/usr/bin/hostname", "-I").split(),
            "hostname -i": socket.gethostbyname_ex(socket.gethostname())[2],
            "Go addresses": go["addresses"],
            "ip addresses": [
                [link["ifname"], info["local"], info["prefixlen"]] for link in links for info in link["addr_info"]
            ],
            "Go links": go["links"],
            "ip links": [link["ifname"] for link in links],
            "Python links": [name for _, name in socket.if_nameindex()],
        }
    )
)
