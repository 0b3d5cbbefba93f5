"""The book builds from executed chapters, and its pages work without a kernel or a network."""

import functools
import re
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

ROOT = Path(__file__).resolve().parent.parent.parent
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PAGES = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())


def test_every_page_is_there_without_errors_and_every_image_says_what_it_shows(html):
    assert len(PAGES) > len(CHAPTERS)
    for page in PAGES:
        text = (html / f"{page}.html").read_text()
        assert "Traceback" not in text and "cell_output_error" not in text
        images = re.findall(r"<img\b[^>]*>", text) if "notebooks" in page else []
        assert images or "notebooks" not in page, page
        for image in images:
            alt = re.search(r'alt="([^"]*)"', image).group(1)
            assert len(alt) > 20 and image.count(alt) == 1, (page, alt)


def test_the_slider_needs_no_kernel_and_no_network(html):
    text = (html / "notebooks" / "05_concurrent_matching.html").read_text()
    assert '<div id="turn-k">' in text and "jupyter-widgets" not in text


def test_equations_need_no_network(html):
    text = (html / "notebooks" / "02_matching.html").read_text()
    path = re.search(r'src="([^"]*mathjax[^"]*)"', text).group(1).split("?")[0]
    assert (html / "notebooks" / path).resolve().exists()


def test_pages_made_by_the_build(html):
    provenance, api = ((html / "book" / f"{page}.html").read_text() for page in ("provenance", "api"))
    assert all(chapter in provenance for chapter in CHAPTERS)
    assert "profile=" in provenance and "torch" in provenance
    rooms = ("cddlib.runtime", "cddlib.matching.loss", "cddlib.cli", "cddbook.claims", "cddbook.figures.style")
    places = [api.index(f'id="module-{room}"') for room in rooms]
    assert places == sorted(places)


def test_no_link_inside_the_book_is_broken(html: Path) -> None:
    identifiers = functools.cache(lambda path: set(re.findall(r'\bid="([^"]+)"', path.read_text())))
    broken = []
    for source in [*(html / f"{name}.html" for name in PAGES), html / "genindex.html"]:
        for link in set(re.findall(r'<a [^>]*href="([^"]+)"', source.read_text())):
            address, fragment = urldefrag(urljoin(source.as_uri(), link))
            if not address.startswith("file:"):
                continue
            path = Path(unquote(address.removeprefix("file://")))
            if not path.is_file() or (fragment and unquote(fragment) not in identifiers(path)):
                broken.append((source.stem, link))
    assert broken == []
