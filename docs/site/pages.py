"""For mkdocs: pages of the site that lie elsewhere in the repository, and links as they are on the site.

In the repository every link leads to a file, so that it works wherever the files are read. On the site, pages link to
pages, pictures come along, and of links to code only the text is left.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "index.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "assets/README.md": "models.md",
}
"""Where files of the repository are on the site. Those in docs/ keep their names."""
_PICTURES = (".jpg", ".png", ".svg")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_BOOSTS = {"benchmarks.md": 0.3, "changelog.md": 0.3, "planning.md": 2, "troubleshooting.md": 2}  # of search
_SEARCH = 'data-md-component="search" role="dialog"'


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie elsewhere, and the pictures in assets/."""
    for source, page in PAGES.items():
        if source != "docs/README.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for picture in sorted((ROOT / "assets").iterdir()):
        if picture.suffix in _PICTURES:
            files.append(File.generated(config, f"assets/{picture.name}", abs_src_path=str(picture)))
    for name in ("site.css", "site.js"):
        files.append(File.generated(config, name, abs_src_path=str(Path(__file__).with_name(name))))
    return files


def on_post_page(output: str, **_: Any) -> str:
    """The page with a name for the search, which the theme lacks, for screen readers."""
    return output.replace(_SEARCH, f'{_SEARCH} aria-label="Search"')


def on_post_template(output_content: str, **_: Any) -> str:
    """The page that says that there is no such page, likewise."""
    return on_post_page(output_content)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links as they are on the site."""
    here = page.file.src_uri
    if here in _BOOSTS:
        page.meta["search"] = {"boost": _BOOSTS[here]}
    source = next((source for source, target in PAGES.items() if target == here), f"docs/{here}")
    parts = _CODE.split(markdown)
    return "".join(part if _CODE.fullmatch(part) else _relinked(part, source, here) for part in parts)


def _relinked(text: str, source: str, here: str) -> str:
    def replaced(link: re.Match) -> str:
        label = _relinked(link["text"], source, here) if "](" in link["text"] else link["text"]
        target, hash_, anchor = link["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return f"{link['image']}[{label}]({link['target']})"
        page = _on_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if page is None:
            return label
        relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
        return f"{link['image']}[{label}]({relative}{hash_}{anchor})"

    return _LINK.sub(replaced, text)


def _on_site(file: str) -> str | None:
    """The page or picture of a file of the repository; ``None`` if the site has none."""
    if file in PAGES:
        return PAGES[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return file if file.startswith("assets/") and file.endswith(_PICTURES) else None
