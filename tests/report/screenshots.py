"""Take the pictures of pages that the documents show: `make screenshots`. Needs Chromium.

They are of the published comparison, so that every number in them is a measured one.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.report.browser import Browser, browser, program

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "eval" / "results" / "compare" / "compare.html"
OUT = ROOT / "docs" / "pictures"
WIDTH, SHOWN, COLOURS = (
    1200,
    900,
    64,
)  # CSS pixels of the window, pixels of the picture, colours of its palette
SECTIONS = {"compare-success": "Success"}  # file -> heading of the section
BOX = """(() => {
  const heads = [...document.querySelectorAll('section > h2')];
  const box = heads.find(h => h.textContent === HEADING).parentElement.getBoundingClientRect();
  return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height};
})()"""


def take(tab: Browser, heading: str) -> bytes:
    """Return a small PNG of the section with a heading, in the light colours of the open page."""
    box = tab.evaluate(BOX.replace("HEADING", repr(heading)))
    content = tab.screenshot({**box, "scale": SHOWN / box["width"]})
    with Image.open(io.BytesIO(content)) as picture:
        buffer = io.BytesIO()
        few = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)  # keeps rare colours
        few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> int:
    """Write every picture."""
    executable = program()
    if executable is None:
        sys.stderr.write("no Chromium is installed\n")
        return 1
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(executable, Path(profile)) as tab:
        tab.open(PAGE)
        tab.resize(WIDTH)
        for name, heading in SECTIONS.items():
            (OUT / f"{name}.png").write_bytes(take(tab, heading))
    return 0


if __name__ == "__main__":
    sys.exit(main())
