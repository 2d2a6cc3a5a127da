"""Stands in for EC2: a metadata service for a host of the trials, which hands out what is obviously the host's own. Prints each path
that it is asked for.

ec2.py FILE    FILE is JSON: the path of each value, below the version, and the value
"""

import http.server
import json
import socket
import sys

TOKEN = "token-of-the-host"
with open(sys.argv[1]) as file:
    VALUES = json.load(file)


def listing(directory):
    """What a directory has, as EC2 lists it; nothing: there is none."""
    names = set()
    for path in VALUES:
        if path.startswith(directory):
            name, slash, _ = path[len(directory) :].partition("/")
            names.add(name + slash)
    # A value is not a directory as well, but for the list of the one role.
    return "\n".join(sorted(names))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, text="", headers=()):
        body = text.encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not ttl.isdigit():
            return self.answer(400)
        self.answer(200, TOKEN, [("X-aws-ec2-metadata-token-ttl-seconds", ttl)])

    def do_GET(self):
        print(f"asked for {self.path}", flush=True)
        # IMDSv1 is answered: nothing is in the way of a leak.
        if self.headers.get("X-aws-ec2-metadata-token", TOKEN) != TOKEN:
            return self.answer(401)
        path = self.path.removeprefix("/latest/")
        text = VALUES.get(path.rstrip("/")) or listing(path.rstrip("/") + "/")
        self.answer(200 if text else 404, text)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256
    address_family = socket.AF_INET6

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


Server(("::", 80), Handler).serve_forever()
