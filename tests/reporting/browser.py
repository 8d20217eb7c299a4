"""A headless Chromium driven through its DevTools protocol: what a page logs, asks for and looks like."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


@contextlib.contextmanager
def browser():
    """A page of a fresh browser, ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedlora-chromium-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with contextlib.closing(Page(_address(Path(folder)))) as page:
                yield page
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(folder):
    """The websocket of the first page, as soon as the browser has said its port."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            port = int((folder / "DevToolsActivePort").read_text().splitlines()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                return next(target for target in json.load(answer) if target["type"] == "page")["webSocketDebuggerUrl"]
        time.sleep(0.05)
    raise TimeoutError("Chromium said no port within 30 s")


class Page:
    """One page: commands, and the events that came meanwhile."""

    def __init__(self, address):
        host, path = address.removeprefix("ws://").split("/", 1)
        name, port = host.split(":")
        self.socket = socket.create_connection((name, int(port)), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self.rest = b""
        while b"\r\n\r\n" not in self.rest:
            self.rest += self.socket.recv(4096)
        self.rest = self.rest.split(b"\r\n\r\n", 1)[1]
        self.numbers, self.events, self.own = itertools.count(1), [], ("data:", "blob:")
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        """Hang up."""
        self.socket.close()

    def call(self, method, **params):
        """Send a command and return its answer; events before it are kept."""
        number = next(self.numbers)
        self._send(json.dumps({"id": number, "method": method, "params": params}).encode())
        while True:
            message = json.loads(self._receive())
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
            self.events.append(message)

    def evaluate(self, expression):
        """The value of a JavaScript expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path, width=1280, height=900, *, dark=False, drawn=True):
        """Show a file and wait until its charts are drawn."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.own = (Path(path).resolve().as_uri(), "data:", "blob:")
        self.call("Page.navigate", url=self.own[0])
        deadline = time.monotonic() + 30
        ready = "document.documentElement.dataset.drawn === 'true'" if drawn else "document.readyState === 'complete'"
        while not (self.evaluate("document.readyState") == "complete" and self.evaluate(ready)):
            assert time.monotonic() < deadline, f"not drawn within 30 s: {self.complaints()}"
            time.sleep(0.05)

    def complaints(self):
        """What the page logged, threw, or asked for beyond its own file; what is made of its own bytes is no request."""
        self.evaluate("new Promise(resolve => setTimeout(resolve, 100))")
        found = []
        for event in self.events:
            kind, params = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(f"thrown: {params['exceptionDetails'].get('exception', {}).get('description')}")
            elif kind == "Runtime.consoleAPICalled":
                found.append(f"{params['type']}: {[argument.get('value') for argument in params['args']]}")
            elif kind == "Log.entryAdded":
                found.append(f"{params['entry']['level']}: {params['entry']['text']}")
            elif kind == "Network.requestWillBeSent" and not params["request"]["url"].startswith(self.own):
                found.append(f"request: {params['request']['url'][:120]}")
        return found

    def screenshot(self, path, *, whole=True):
        """Save what is shown, or the whole page, as PNG."""
        options = {"captureBeyondViewport": True} if whole else {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))

    def _send(self, payload):
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else bytes([0xFE]) + struct.pack(">H", size)
        assert size < 1 << 16
        # clients mask what they send; a mask of zeros leaves it as it is
        self.socket.sendall(b"\x81" + length + bytes(4) + payload)

    def _receive(self):
        message, final = b"", False
        while not final:
            first, second = self._exactly(2)
            final, size = bool(first & 0x80), second & 0x7F
            if size >= 126:
                size = int.from_bytes(self._exactly(2 if size == 126 else 8), "big")
            part = self._exactly(size)
            if first & 0x0F in (0, 1):
                message += part
        return message

    def _exactly(self, count):
        while len(self.rest) < count:
            received = self.socket.recv(1 << 20)
            assert received, "Chromium closed the connection"
            self.rest += received
        answer, self.rest = self.rest[:count], self.rest[count:]
        return answer
