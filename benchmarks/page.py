"""Writes a page of search results for generated clips, and screenshots of it in a browser, light and dark.

    apt-get install chromium && pip install playwright
    python benchmarks/page.py --out pictures            # page.html and three JPEG files

One file is called <script>alert(1)</script>.mp4: its name must be text in the page. The weights are random, so the
order of the results means nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import arguments
import measuring

from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.search import Index
from xclip_fast.search.page import Page


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the page and the screenshots")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, label in enumerate(CLASSES):
            write_clip(folder / f"{label}.mp4", render(label, number, frames=36, size=(180, 320)), 12)
        odd = folder / "<script>alert(1)<"
        odd.mkdir()
        write_clip(odd / "script>.mp4", render("growing", 50, frames=36, size=(320, 180)), 12)
        index = Index.open(folder / "store", model=measuring.small_model())
        index.add(folder)
        page = Page(options.out / "page.html", overwrite=True, random_weights=True)
        page.add_hits(f"like {odd.name}/script>.mp4", index.search(index.features(odd / "script>.mp4"), top=3))
        page.add_hits("moving right", index.search("moving right", top=6))
        page.write()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        dialogs: list[str] = []
        for name, scheme, width in (("light", "light", 1000), ("dark", "dark", 1000), ("narrow", "light", 400)):
            view = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 660})  # type: ignore[arg-type]
            view.on("dialog", lambda dialog: dialogs.append(dialog.message))
            view.goto((options.out / "page.html").absolute().as_uri())
            view.get_by_role("button").nth(1).hover()
            view.wait_for_timeout(1000)
            view.screenshot(path=options.out / f"page-{name}.jpg", type="jpeg", quality=70)
            assert "<script>alert(1)</script>.mp4" in view.inner_text("main")
        assert not dialogs
        browser.close()
    print(f"{options.out}: page.html and three screenshots")


if __name__ == "__main__":
    main()
