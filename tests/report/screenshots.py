"""Take the pictures of pages that the documents show: `make screenshots`. Needs Chromium.

They are of the published comparison, and of an evaluation that is made here of what ships, so that every
number in them is a measured one.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.report.browser import Browser, browser, program
from vlafit import cli

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "eval" / "results" / "compare" / "compare.html"
OUT = ROOT / "docs" / "pictures"
OFFLINE = ["eval", "metaworld-base", "--data", "metaworld-faucet", "--samples", "64", "--draws", "8"]
"""The shipped checkpoint on recordings of two tasks that it has not learned."""
WIDTH, SHOWN = 1200, 900  # CSS pixels of the window, pixels of the picture
COLOURS, OF_FILMS = 64, 256  # of a picture's palette
COMPARED = {"compare-success": "Success"}  # file -> heading of what it shows
EVALUATED = {"recorded-steps": "How far ahead it can see", "recorded-episode": "EPISODE"}
# The section with a heading; EPISODE is the first episode: its film strip and curves, up to the next one.
BOX = """(() => {
  const of = (top, bottom) => ({x: top.x + scrollX, y: top.y + scrollY, width: top.width,
                                height: bottom - top.y});
  const film = [...document.querySelectorAll('section > h3')];
  if (HEADING === 'EPISODE')
    return of(film[0].getBoundingClientRect(), film[1].getBoundingClientRect().y - 24);
  const heads = [...document.querySelectorAll('section > h2')];
  const box = heads.find(h => h.textContent === HEADING).parentElement.getBoundingClientRect();
  return of(box, box.bottom);
})()"""


def take(tab: Browser, heading: str) -> bytes:
    """Return a small PNG of the section with a heading, in the light colours of the open page."""
    box = tab.evaluate(BOX.replace("HEADING", repr(heading)))
    content = tab.screenshot({**box, "scale": SHOWN / box["width"]})
    with Image.open(io.BytesIO(content)) as picture:
        buffer = io.BytesIO()
        colours = OF_FILMS if heading == "EPISODE" else COLOURS
        few = picture.convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE)  # keeps rare colours
        few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> int:
    """Write every picture."""
    executable = program()
    if executable is None:
        sys.stderr.write("no Chromium is installed\n")
        return 1
    OUT.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as made,
        tempfile.TemporaryDirectory() as profile,
        browser(executable, Path(profile)) as tab,
    ):
        cli.main([*OFFLINE, "--out", f"{made}/eval"])
        for page, sections in ((PAGE, COMPARED), (Path(made) / "eval" / "report.html", EVALUATED)):
            tab.open(page)
            tab.resize(WIDTH)
            for name, heading in sections.items():
                (OUT / f"{name}.png").write_bytes(take(tab, heading))
    return 0


if __name__ == "__main__":
    sys.exit(main())
