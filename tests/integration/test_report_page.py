"""The report page in a browser: no image is missing, no error is logged, and nothing is wider than the window."""

import json
import re
import shutil

import pytest

from tests.support.progress import run_watched
from tests.unit.reporting.conftest import run_folder  # noqa: F401
from univitar_ds.cli.main import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)"),
]
INSPECT = """<pre id="found"></pre><script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => { one.open = true; });
  const focusable = [...document.querySelectorAll("a[href], summary, [tabindex='0']")];
  document.getElementById("found").textContent = JSON.stringify({
    missing: [...document.images].filter(image => !image.naturalWidth).map(image => image.alt),
    flat: [...document.querySelectorAll("svg")].filter(one => one.getBoundingClientRect().height < 50).length,
    drawn: document.querySelectorAll("svg").length, images: document.images.length,
    pageWidth: document.documentElement.scrollWidth, window: innerWidth,
    focused: focusable.filter(one => { one.focus(); return document.activeElement === one; }).length,
    focusable: focusable.length,
    background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color,
  });
});
</script>"""


def browse(page, folder, width: int, dark: bool) -> tuple[dict, str]:
    """Returns the values that the script `INSPECT` collects in the page, and the messages on the browser's console."""
    done = run_watched(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         f"--window-size={width},1200", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", f"file://{page}"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    return json.loads(found[1]) if found else {}, "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


def test_a_browser_draws_the_page_on_wide_and_narrow_screens_light_and_dark(run_folder, tmp_path):  # noqa: F811
    runs = [str(run_folder("first")), str(run_folder("second-with-a-long-name-that-has-no-place-to-break", seed=3))]
    page, inspected = tmp_path / "page.html", tmp_path / "inspected.html"
    assert main(["report", *runs, "--out", str(page)]) == 0
    assert browse(page, tmp_path, 1440, False)[1] == ""
    content = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    inspected.write_text(content.replace("</body>", f"{INSPECT}</body>"))
    colors = set()
    for width, dark in ((1440, False), (390, True)):
        found, messages = browse(inspected, tmp_path, width, dark)
        assert messages == ""
        assert found["missing"] == []
        assert found["images"] == 2
        assert found["drawn"] >= 8
        assert found["flat"] == 0
        assert found["pageWidth"] <= found["window"], f"wider than a window of {width} px"
        assert found["focused"] == found["focusable"] > 5
        assert found["background"] != found["color"]
        colors.add(found["color"])
    assert len(colors) == 2
