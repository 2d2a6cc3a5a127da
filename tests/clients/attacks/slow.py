"""Passes requests on to another HTTP server, after a while: an STS that is far away. With --record, prints the parameters
of every AssumeRole, a line of JSON each."""

import argparse
import http.client
import http.server
import json
import time
import urllib.parse

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--to-port", type=int, required=True)
parser.add_argument("--seconds", type=float, default=0.1)
parser.add_argument("--record", action="store_true")
told = parser.parse_args()


class Slow(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one go: Nagle's wait is not ours to add.
    wbufsize = -1

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        start = time.monotonic()
        asked = dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
        if told.record and asked.get("Action") == "AssumeRole":
            # One write a line: requests come in threads.
            print(json.dumps(asked) + "\n", end="", flush=True)
        link = http.client.HTTPConnection("127.0.0.1", told.to_port)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        link.request("POST", self.path, body, headers)
        reply = link.getresponse()
        answer = reply.read()
        link.close()
        # So long in all, or as long as the server behind takes.
        time.sleep(max(0, told.seconds - (time.monotonic() - start)))
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.headers.get("Content-Type", "text/xml"))
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", told.port), Slow).serve_forever()
