"""Links that leave docs/ work on the site too: the files they lead to become part of it, in repository/.

A code host shows the whole repository, a site of mkdocs only docs/. So the documents link as a code host wants it
(`../CHANGELOG.md`), and the site takes those files in and rewrites the links.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = "repository/"
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
FIGURE = re.compile(r"<!--[a-z-]+: .+?-->(.*?)<!---->")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that the documents, and those files themselves, link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in _links_of(page):
            uri = _site_uri(target)
            if files.get_file_from_path(uri) is None and (ROOT / target).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
                waiting += [uri] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites links from where a page lies in the repository to where it lies on the site."""
    source = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        target = _site_uri(_target(source, link[2]))
        return link[1] + posixpath.relpath(target, posixpath.dirname(source) or ".") + (link[3] or "") + link[4]

    return FIGURE.sub(r"\1", LINK.sub(rewritten, markdown))


def _links_of(page: str) -> list[str]:
    text = (ROOT / _in_repository(page)).read_text(encoding="utf-8")
    return [_target(page, link[2]) for link in LINK.finditer(text)]


def _target(page: str, link: str) -> str:
    """Where a link of a page leads, in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(page)), link))


def _in_repository(uri: str) -> str:
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"


def _site_uri(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path
