"""Headless Chromium over its DevTools protocol: open pages at a width, measure them, take screenshots."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip
# Every table with its box, every pair of labels that overlap in a chart, and the whole page's width.
MEASURE = """(() => {
  const shown = e => e.getClientRects().length > 0;
  document.querySelectorAll('details').forEach(e => e.open = true);
  const tables = [...document.querySelectorAll('table')].filter(shown).map(t => ({
    name: t.textContent.slice(0, 60), boxed: t.parentElement.classList.contains('scroll'),
    box: t.parentElement.clientWidth, table: t.scrollWidth}));
  const overlaps = [];
  for (const svg of [...document.querySelectorAll('svg')].filter(shown)) {
    const labels = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
      .map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
    labels.forEach(([a, p], i) => labels.slice(i + 1).forEach(([b, q]) => {
      const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (x > 1 && y > 1) overlaps.push([a, b]);
    }));
    const frame = svg.getBoundingClientRect();
    for (const [a, p] of labels)
      if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.top < frame.top - 1
          || p.bottom > frame.bottom + 1) overlaps.push([a, 'the edge of the chart']);
  }
  const fonts = [...document.querySelectorAll('svg text')].filter(shown).filter(t => t.textContent.trim())
    .map(t => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b));
  return JSON.stringify({window: innerWidth, page: document.documentElement.scrollWidth, tables, overlaps,
    smallest: fonts.length ? Math.min(...fonts) : null});
})()"""


@dataclass(frozen=True)
class Measured:
    """A page at one width of the window, in CSS pixels."""

    window: int
    page: int
    tables: list[dict[str, Any]]
    overlaps: list[list[str]]
    smallest: float | None
    """Height of the smallest font of a chart's labels; None without a chart."""
    errors: list[str]


def program() -> str | None:
    """Return the path of an installed Chromium or Chrome; None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab of a running Chromium."""

    def __init__(self, tab: ClientConnection) -> None:
        self.tab, self.last, self.errors = tab, 0, list[str]()
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def open(self, page: Path) -> None:
        """Open a page."""
        self.errors.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def resize(self, width: int, height: int = 900, scale: float = 1.0) -> None:
        """Give the window a size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=False,
        )  # fmt: skip

    def measure(self) -> Measured:
        """Unfold all that is folded in the page, and measure it."""
        values = json.loads(self.evaluate(MEASURE))
        return Measured(**values, errors=list(self.errors))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self, box: dict[str, float] | None = None) -> bytes:
        """Return a PNG of the window, or of a box {x, y, width, height, scale} of the page."""
        clip = {"clip": box, "captureBeyondViewport": True} if box else {}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.last += 1
        self.tab.send(json.dumps({"id": self.last, "method": method, "params": values}))
        while (answer := self._receive()).get("id") != self.last:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self.tab.recv(timeout=30))
        values = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(values["exceptionDetails"]))
            case "Log.entryAdded" if values["entry"]["level"] == "error":
                self.errors.append(values["entry"]["text"])
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "assert"):
                self.errors.append(str(values["args"]))
        return message


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium with a fresh profile, and end it afterwards."""
    process = subprocess.Popen(
        [executable, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
        with connect(address, max_size=None, proxy=None) as root:
            root.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(root.recv(timeout=30))["result"]["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        host = address.split("/devtools/")[0]
        with connect(f"{host}/devtools/page/{target}", max_size=None, proxy=None) as tab:
            yield Browser(tab)
    finally:
        process.terminate()
        process.wait(timeout=30)
