"""mkdocs: the README as the first page, and each file of the repository that a page links to as a page of the site."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

_log = logging.getLogger("mkdocs.hooks")  # counted by strict
_ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s:]+?)(#[^)]*)?\)")
_CODE = re.compile(r"(^```.*?^```)", re.M | re.S)
_PICTURES = (".png", ".svg", ".jpg")
_LANGUAGES = {".py": "python", ".kt": "kotlin", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".ts": "typescript"}


def _place(path: str) -> str | None:
    """Where a file of the repository stands in the site; None for what is none, which stays as it is and is told."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if not (_ROOT / path).is_file():
        return None
    return f"repository/{path}" + ("" if path.endswith((".md", *_PICTURES)) else ".md")


def _links(text: str) -> set[str]:
    return {link[2] for part in _CODE.split(text)[::2] for link in _LINK.finditer(part)}


def _text_of(path: str) -> str:
    text = (_ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"# `{path}`\n\n````{language}\n{text}\n````\n"


def _inside(path: str) -> bool:
    return not path.startswith(("..", "/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README and, from there and the pages on, whatever of the repository is linked to."""
    to_do = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    done = set(to_do[1:])
    while to_do:
        path = to_do.pop()
        place = _place(path)
        if place is None:
            continue
        if not path.startswith("docs/"):
            if path.endswith(_PICTURES):
                files.append(File.generated(config, place, abs_src_path=str(_ROOT / path)))
                continue
            files.append(File.generated(config, place, content=_text_of(path)))
        for link in _links(_text_of(path)) if path.endswith(".md") else ():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
            if target not in done and _inside(target) and not target.startswith("docs/"):
                done.add(target)
                to_do.append(target)
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """A page of docs/ that mkdocs.yml forgets is told; those of the repository stand in no menu."""
    shown = {page.file.src_uri for page in nav.pages}
    for file in files.documentation_pages():
        if file.src_uri not in shown and not file.src_uri.startswith("repository/"):
            _log.warning("mkdocs.yml's nav lacks %s", file.src_uri)


def _source(src_uri: str) -> str:
    """The repository's path of a page."""
    if src_uri == "index.md":
        return "README.md"
    if src_uri.startswith("repository/"):
        path = src_uri.removeprefix("repository/")
        return path if (_ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{src_uri}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site; a folder, which has no page, only keeps its words."""
    here = page.file.src_uri
    source = _source(here)
    if not source.endswith(".md"):
        return markdown

    def mended(found: re.Match[str]) -> str:
        words, link, anchor = found[1], found[2], found[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if (_ROOT / target).is_dir() and not (_ROOT / target / "index.md").exists():
            return words.strip("![]")
        place = _place(target) if _inside(target) else None
        if place is None:
            return found[0]
        return f"{words}({os.path.relpath(place, posixpath.dirname(here) or '.')}{anchor})"

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(mended, part) for part in parts[::2]]
    return "".join(parts)
