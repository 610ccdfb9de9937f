"""Shards behind a URL, from a server on loopback that fails in the ways servers do."""

import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from made_pictures import encode_means, photo_shards

from pocketfusion.data import remote
from pocketfusion.data.buckets import Bucket
from pocketfusion.data.latents.filling import fill
from pocketfusion.data.latents.finishing import finish
from pocketfusion.data.latents.layout import Encoding, Plan
from pocketfusion.data.latents.reading import open_cache
from pocketfusion.data.rows import LeftOut
from pocketfusion.data.sources import any_source, open_dataset, open_training_data
from pocketfusion.errors import PocketfusionError

pytest.importorskip("aiohttp", reason="aiohttp: pip install '.[remote]'")
ENCODING = Encoding("a" * 64, 4, 8, 16, (Bucket(16, 16),))


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `faults`: path → how many times it breaks off in the middle, or a status."""

    asked: Counter
    faults: dict

    def do_GET(self):
        self.asked[self.path] += 1
        fault = self.faults.get(self.path)
        if isinstance(fault, str):
            return self.send_error(int(fault))
        if fault and self.asked[self.path] <= fault:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            self.close_connection = True
            return None
        return super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01, 0.01))
    data = photo_shards(tmp_path / "data", 3, 4)
    handler = type("Here", (Handler,), {"asked": Counter(), "faults": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: handler(*given, directory=str(data))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        handler.url, handler.data = f"http://127.0.0.1:{running.server_port}", data
        yield handler
        running.shutdown()
        thread.join()


def make(url, out):
    source = any_source(url, 16, LeftOut(False), out)
    fill(out, source, Plan.of(source, ENCODING, False, remote.shown(url)), encode_means)
    finish(out)
    return open_cache(out)


@pytest.mark.parametrize("way", ["/", "", "/{00000..00002}.tar", "/{00000..00002}.tar?key=secret"])
def test_shards_of_a_server(server, tmp_path, way):
    """Each is fetched once; what is made is what the folder gives, and no secret is written down."""
    cache = make(server.url + way, tmp_path / "c")
    local = open_dataset(server.data, 16)
    assert list(cache.rows) == local.rows and cache.fingerprint == local.fingerprint
    tars = {path: count for path, count in server.asked.items() if ".tar" in path}
    assert len(tars) == 3 and set(tars.values()) == {1}
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "c").rglob("*.json"))
    assert not [file for file in (tmp_path / "c").iterdir() if file.name.startswith(".")]


def test_a_server_that_breaks_off_is_asked_again_and_not_for_ever(server, tmp_path):
    server.faults["/00001.tar"] = 2
    assert len(make(server.url, tmp_path / "c")) == 12 and server.asked["/00001.tar"] == 3
    server.asked.clear()
    server.faults["/00001.tar"] = 99
    with pytest.raises(PocketfusionError, match=r"http://127.0.0.1:\d+/00001.tar cannot be reached after 4 tries \("):
        make(server.url, tmp_path / "d")
    assert server.asked["/00001.tar"] == 4
    assert [part.name for part in (tmp_path / "d" / "parts").iterdir()] == ["shard-00000"]
    server.faults.clear()
    assert len(make(server.url, tmp_path / "d")) == 12  # and goes on
    assert server.asked["/00000.tar"] == 1


@pytest.mark.parametrize(
    ("fault", "match"), [("403", r"may not be read \(403\)"), ("404", "is not there: check the URL")]
)
def test_what_is_refused_is_asked_for_once(server, tmp_path, fault, match):
    server.faults["/00000.tar"] = fault
    with pytest.raises(PocketfusionError, match=match):
        make(server.url + "/00000.tar", tmp_path / "c")
    assert server.asked["/00000.tar"] == 1


def test_nobody_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "_WAITS", (0.01,))
    with pytest.raises(PocketfusionError, match="http://127.0.0.1:9 cannot be reached after 2 tries .*run again"):
        make("http://user:word@127.0.0.1:9", tmp_path / "c")


def test_shards_that_a_listing_lacks(server, tmp_path):
    (server.data / "00001.tar").unlink()
    with pytest.raises(PocketfusionError, match="lacks 00001.tar between 00000.tar and 00002.tar"):
        make(server.url, tmp_path / "c")
    for file in server.data.glob("*.tar"):
        file.unlink()
    with pytest.raises(PocketfusionError, match="lists no .tar shards: name them"):
        make(server.url, tmp_path / "c")


@pytest.mark.parametrize(
    "url", ["file:///etc", "ftp://a/b.tar", "memory://x", "pipe://x", "s3a://b", "simplecache::s3://b"]
)
def test_other_kinds_are_never_opened(url, tmp_path):
    with pytest.raises(PocketfusionError, match="of a kind that is not read"):
        any_source(url, 16, LeftOut(False), tmp_path)


def test_local_names_are_paths_whatever_they_look_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo_shards(tmp_path / "s3::b", 1, 2)
    assert len(any_source("s3::b", 16, LeftOut(False), tmp_path).parts) == 1
    with pytest.raises(PocketfusionError, match="of a URL make a cache first, with 'pocketfusion data cache'"):
        open_training_data(type(tmp_path)("s3://bucket/x"), 16)
    with pytest.raises(PocketfusionError, match=r"names -?\d+ shards|names 1,000,000,000 shards"):
        any_source("http://h/{0..999999999}.tar", 16, LeftOut(False), tmp_path)
