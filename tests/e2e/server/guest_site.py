"""What listens inside the VM in the tests of previews: pages, streams, uploads, and WebSockets, on port 3000."""

import base64
import hashlib
import json
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self.headers.get("upgrade", "").lower() == "websocket":
            self.websocket()
        elif path == "/":
            self.say(b'<link rel="stylesheet" href="style.css"><a href="deep/page.html">on</a>', "text/html")
        elif path in ("/style.css", "/deep/page.html"):
            self.say(f"this is {path}".encode(), "text/plain")
        elif path == "/app/":
            self.say(
                b'<link rel="stylesheet" href="app.css"><script type="module" src="app.js"></script>',
                "text/html",
            )
        elif path == "/app/app.css":
            self.say(b"body { color: rgb(1, 2, 3) }", "text/css")
        elif path == "/app/app.js":
            self.say(b"window.started = true", "text/javascript")
        elif path == "/headers":
            self.say(
                json.dumps({name.lower(): value for name, value in self.headers.items()}).encode(),
                "application/json",
            )
        elif path == "/hostile":
            self.send_response(200)
            for name, value in (
                ("Set-Cookie", "a=b; Path=/"),
                ("Clear-Site-Data", '"*"'),
                ("Content-Security-Policy", "default-src *"),
                ("Access-Control-Allow-Origin", "https://evil.example"),
                ("Access-Control-Allow-Credentials", "true"),
                ("Strict-Transport-Security", "max-age=9"),
                ("Service-Worker-Allowed", "/"),
                ("WWW-Authenticate", "Basic"),
                ("Referrer-Policy", "unsafe-url"),
                ("Cross-Origin-Opener-Policy", "same-origin"),
                ("Connection", "X-Private"),
                ("X-Private", "1"),
                ("X-Own", "kept"),
                ("Content-Length", "0"),
            ):
                self.send_header(name, value)
            self.end_headers()
        elif path.startswith("/to"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path == "/events":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(1_000_000):
                line = f"data: {number}\n\n".encode()
                try:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                except OSError:
                    open("/tmp/events-ended", "w").close()
                    return
                time.sleep(0.02)
        elif path == "/large":
            size = int(self.path.partition("?")[2])
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            block = bytes(range(256)) * 4096
            while size > 0:
                self.wfile.write(block[: min(size, len(block))])
                size -= len(block)
        elif path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        elif path == "/rubbish":
            self.wfile.write(b"\0\1\2 what is this\r\n\r\n")
            self.close_connection = True
        else:
            self.send_error(404)

    def do_POST(self):
        if self.path == "/refuse":
            self.say(b"too much", "text/plain", 413)
            self.close_connection = True
            return
        digest, count = hashlib.sha256(), 0
        for block in self.body():
            digest.update(block)
            count += len(block)
        self.say(f"{self.command} {count} {digest.hexdigest()}".encode(), "text/plain")

    do_PUT = do_PATCH = do_DELETE = do_POST

    def body(self):
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("content-length", 0))
            while left:
                block = self.rfile.read(min(left, 65536))
                left -= len(block)
                yield block

    def say(self, body, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    # -- WebSockets (RFC 6455)

    def websocket(self):
        if self.path == "/no-socket":
            self.say(b"no", "text/plain", 403)
            return
        key = self.headers["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key).digest()).decode())
        offered = [
            one.strip() for one in self.headers.get("sec-websocket-protocol", "").split(",") if one.strip()
        ]
        if offered:
            self.send_header("Sec-WebSocket-Protocol", offered[-1])
        self.end_headers()
        self.frame(
            1,
            json.dumps({"origin": self.headers.get("origin"), "cookie": self.headers.get("cookie")}).encode(),
        )
        while True:
            opcode, data = self.read_frame()
            if opcode == 1 and data == b"close please":
                self.frame(8, struct.pack(">H", 4321) + b"as you wish")
                self.read_frame()
                break
            if opcode == 1 and data == b"ping please":
                self.frame(9, b"are you there")
                continue
            if opcode == 10:
                self.frame(1, b"pong: " + data)
            elif opcode == 8:
                with open("/tmp/closed", "w") as file:
                    file.write(f"{struct.unpack_from('>H', data)[0]} {data[2:].decode()}")
                self.frame(8, data[:2])
                break
            elif opcode in (1, 2):
                self.frame(opcode, data)
        self.close_connection = True

    def frame(self, opcode, data):
        size = len(data)
        head = bytes([0x80 | opcode])
        if size < 126:
            head += bytes([size])
        elif size < 65536:
            head += b"\x7e" + struct.pack(">H", size)
        else:
            head += b"\x7f" + struct.pack(">Q", size)
        self.wfile.write(head + data)

    def read_frame(self):
        whole, first = b"", None
        while True:
            one, two = self.rfile.read(2)
            size = two & 127
            if size > 125:
                form = ">H" if size == 126 else ">Q"
                size = struct.unpack(form, self.rfile.read(struct.calcsize(form)))[0]
            mask = self.rfile.read(4)
            data = self.rfile.read(size)
            key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
            whole += (int.from_bytes(data, "big") ^ key).to_bytes(size, "big")
            first = first or one & 15
            if one & 0x80:
                return first, whole


server = ThreadingHTTPServer(("127.0.0.1", 3000), Site)
print("listening", flush=True)
sys.stdout.close()
server.serve_forever()
