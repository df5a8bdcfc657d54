"""The report in a real browser, wide and narrow, light and dark, without a network: ``make test-browser``.

The screenshots stay in pytest's temporary folder; ``--basetemp shots`` puts them where you can look at them.
"""

import re
import shutil
import subprocess

import pytest
from PIL import Image
from report_example import write_comparison, write_example

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars".split(),
    *"--disable-background-networking --disable-component-update --disable-sync".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name leads anywhere
]
PAGES = {"run": write_example, "comparison": write_comparison}
WIDTHS = {"wide": 1280, "narrow": 390}
SCHEMES = {"light": "1", "dark": "0"}  # Blink's PreferredColorScheme

# Only a copy of the page gets the script and is allowed to run it.
MEASURE = """<script>
const root = document.documentElement, said = document.createElement("pre");
const broken = [...document.images].filter(image => !image.naturalWidth).length;
said.textContent = `measured ${innerWidth} ${root.scrollWidth} ${broken}`;
document.body.append(said);
</script></body>"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium"),
]


def browse(folder, page, width, scheme, *options):
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    scheme = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    size = f"--window-size={width},2400"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", scheme, size, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    return PAGES[request.param](tmp_path_factory.mktemp(request.param))


def screenshot(page, width, scheme):
    target = page.with_name(f"{width}-{scheme}.png")
    browse(page.parent, page, WIDTHS[width], scheme, f"--screenshot={target}")
    with Image.open(target) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window_and_every_picture_shows(page, width):
    folder, text = page.parent, page.read_text(encoding="utf-8")
    copy = folder / "measured.html"
    copy.write_text(re.sub(r"<meta http-equiv.*\n", "", text).replace("</body>", MEASURE), encoding="utf-8")
    # A window of Chromium has a least width; a frame has not.
    frame = folder / "frame.html"
    frame.write_text(
        f'<!doctype html><iframe src="measured.html" style="width:{WIDTHS[width]}px;height:2400px;border:0"></iframe>'
        "<script>onload = () => document.body.append(frames[0].document.querySelector('pre').textContent)</script>"
    )
    dom = browse(folder, frame, 1400, "light", "--allow-file-access-from-files", "--dump-dom")
    inner, scroll, broken = map(int, re.search(r"measured (\d+) (\d+) (\d+)", dom).groups())
    assert inner == WIDTHS[width]
    assert scroll <= inner
    assert broken == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_light_and_dark_differ_in_background_and_ink(page, width):
    light, dark = (screenshot(page, width, scheme) for scheme in SCHEMES)
    assert light.size == dark.size == (WIDTHS[width], 2400)
    assert min(light.getpixel((3, 3))) > 240
    assert max(dark.getpixel((3, 3))) < 40
    heading = (0, 0, WIDTHS[width], 140)
    assert min(low for low, _ in light.crop(heading).getextrema()) < 60, "dark ink on light paper"
    assert max(high for _, high in dark.crop(heading).getextrema()) > 200, "light ink on dark paper"
