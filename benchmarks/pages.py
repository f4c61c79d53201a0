"""Look at a page as its readers do: in a headless browser, light and dark, wide and narrow, on paper.

    python -m benchmarks.pages REPORT.html FOLDER
    python -m benchmarks.pages --example SHARDS FOLDER

The first writes pictures and a PDF of a page that affekt has made and prints, as a line of JSON, how often the browser
complained and asked for something elsewhere. The second makes the page first, with made-up results about the clips of
some shards. `Browser` drives Chromium over two pipes by its DevTools protocol; no port is opened.
"""

import base64
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

from affekt.data.shards import ShardIndex
from affekt.finetune.report.results import write_results_report
from benchmarks.example_results import example
from benchmarks.report import print_figures

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--mute-audio",
)
PATIENCE = 60  # seconds for an answer


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a headless Chromium. `complaints` are console errors, exceptions and broken policies, `requests` the
    addresses it has asked for."""

    def __init__(self, program: str, profile: str | Path):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Root needs it off, and the page is our own; elsewhere the sandbox stays.
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        # Both ends move out of the way of 3 and 4, where the browser expects them, before they are put there.
        spare = 20
        actions = [(os.POSIX_SPAWN_DUP2, to_read, spare), (os.POSIX_SPAWN_DUP2, to_write, spare + 1)]
        actions += [(os.POSIX_SPAWN_DUP2, spare, 3), (os.POSIX_SPAWN_DUP2, spare + 1, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        arguments = [program, *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
        self._process = os.posix_spawn(program, arguments, os.environ, file_actions=actions)
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            if not select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"the browser has said nothing for {PATIENCE} s")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"][:200])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(about["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([a.get("value") for a in about["args"]]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(about["entry"]["text"])

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> None:
        """How the page is looked at from now on. `media` may be `print`."""
        phone = width < 640
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`kind` is mouseMoved, mousePressed or mouseReleased."""
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS.get(key, 0))

    def screenshot(self, whole: bool = True) -> bytes:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        found = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True, generateDocumentOutline=True)
        return base64.b64decode(found["data"])

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close")
        except (OSError, RuntimeError, TimeoutError):
            os.kill(self._process, 9)
        os.close(self._write)
        os.close(self._read)
        os.waitpid(self._process, 0)


KEYS = {"Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


@contextmanager
def browsing() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        raise SystemExit(f"none of {', '.join(NAMES)} is on the PATH; install one")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            yield browser
        finally:
            browser.close()


def main() -> None:
    if len(sys.argv) not in (3, 4) or (len(sys.argv) == 4) != (sys.argv[1] == "--example"):
        raise SystemExit(__doc__)
    report, folder = Path(sys.argv[-2]), Path(sys.argv[-1])
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == "--example":
        index = ShardIndex.open(report)
        report = write_results_report(folder / "report.html", example(index), index)
    with browsing() as browser:
        browser.open(report)
        for name, width, dark in (("light", 1280, False), ("dark", 1280, True), ("narrow", 390, False)):
            browser.look(width=width, dark=dark)
            height = min(browser.run("document.documentElement.scrollHeight"), 12_000)  # of a picture that still opens
            browser.look(width=width, height=height, dark=dark)
            (folder / f"{name}.png").write_bytes(browser.screenshot())
        browser.look()
        (folder / "print.pdf").write_bytes(browser.pdf())
        outside = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
        figures = {"bytes": report.stat().st_size, "complaints": len(browser.complaints), "requests": len(outside)}
        print("\n".join([*browser.complaints, *outside]))
    print_figures("pages", figures)


if __name__ == "__main__":
    main()
