"""
A headless Chromium for the tests of the page, driven over a pipe by the DevTools protocol. It needs no driver.

    apt-get install chromium
    python tests/browser.py runs/default/report.html docs/page.png    a picture of the top of a page
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab. `errors` collects what the console of the page had to complain about."""

    def __init__(self):
        to_browser, self.requests = os.pipe()
        self.answers, from_browser = os.pipe()
        self.profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        # the shell gives two ends of the pipes the numbers 3 and 4, where Chromium looks for them
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        command = (f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars "
                   f"--remote-debugging-pipe --user-data-dir={self.profile.name} about:blank "
                   f"3<&{ends[0]} 4>&{ends[1]}")
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=ends,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self.buffer, self.number, self.session, self.errors = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def receive(self):
        """The next message of the browser."""
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(message)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        if message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] in ("error", "warning"):
            self.errors.append(message["params"])
        return message

    def call(self, method, **params):
        """Call a method of the DevTools protocol and return its result."""
        self.number += 1
        request = dict(id=self.number, method=method, params=params)
        if self.session:
            request["sessionId"] = self.session
        os.write(self.requests, json.dumps(request).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def open(self, path, width=1280, height=900, dark=False):
        """Load a file into the tab, as wide as a screen of so many pixels."""
        self.errors.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def press(self, key):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def point(self, selector, index=0):
        """Move the pointer to the middle of an element."""
        x, y = self.run(f"(() => {{ const node = document.querySelectorAll({json.dumps(selector)})[{index}];"
                        "node.scrollIntoView({block: 'center'}); const r = node.getBoundingClientRect();"
                        "return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path, selector=None):
        """Save a picture of what the tab shows, or of an element, as a PNG file."""
        part = {}
        if selector:
            box = self.run(
                f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                "return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}; })()")
            part = dict(captureBeyondViewport=True, clip=dict(box, scale=1))
        png = self.call("Page.captureScreenshot", **part)["data"]
        path.write_bytes(base64.b64decode(png))

    def close(self):
        self.process.terminate()
        self.process.wait()
        os.close(self.requests)
        os.close(self.answers)
        self.profile.cleanup()


if __name__ == "__main__":
    browser = Browser()
    browser.open(Path(sys.argv[1]), width=1280, height=1275)
    browser.screenshot(Path(sys.argv[2]))
    browser.close()
