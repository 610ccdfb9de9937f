"""A site of a small page and the embedded bundle, and a server of it in a thread."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import SECRET

from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.serve.application import application
from pocketfusion.serve.listen import bind, server
from pocketfusion.serve.site import Entry, bundle_entries, page_entries


@pytest.fixture(scope="session")
def page(tmp_path_factory) -> Path:
    """A page as the build leaves one, with what must not be served in it and around it."""
    root = tmp_path_factory.mktemp("site")
    folder = root / "page"
    (folder / "assets").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "index.html.gz").write_bytes(gzip.compress(b"<!doctype html><title>page</title>" * 20))
    (folder / "icon.png").write_bytes(b"\x89PNG and so on")
    (folder / "assets" / "main.js.gz").write_bytes(gzip.compress(b"export {};\n" * 50))
    for place in (root / "secret.txt", folder / ".env", folder / ".git" / "config"):
        place.write_bytes(SECRET)
    (folder / "link.txt").symlink_to(root / "secret.txt")
    return folder


@pytest.fixture(scope="session")
def site(page: Path) -> list[Entry]:
    return [*page_entries(page), *bundle_entries([Bundle.open(embedded_bundle())])]


@pytest.fixture(scope="session")
def serving() -> Callable:
    """`with serving(entries) as port`: a server of them, of HTTPS with a certificate and its key."""

    @contextmanager
    def start(
        entries: list[Entry], hosts: tuple[str, ...] = ("localhost", "127.0.0.1"), pem: tuple[Path, ...] = ()
    ) -> Iterator[int]:
        with bind("127.0.0.1", 0) as listening:
            running = server(application(entries, list(hosts)), *pem)
            thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
            thread.start()
            try:
                yield listening.getsockname()[1]
            finally:
                running.should_exit = True
                thread.join(300)  # a loaded machine takes its time
                assert not thread.is_alive()

    return start


@pytest.fixture(scope="session")
def port(serving, site) -> Iterator[int]:
    with serving(site) as number:
        yield number
