"""The server as clients meet it: over sockets."""

from __future__ import annotations

import gzip
import http.client
import os
import shutil
import ssl
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import pytest
from serving import SECRET, ask

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.serve import listen
from pocketfusion.serve.site import bundle_entries


def run(*command) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


@pytest.fixture(scope="module")
def pem(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for localhost, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("pem")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    about = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2")
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *about)
    return certificate, key


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def weights(site) -> str:
    return next(f"/{entry.name}" for entry in site if entry.name.endswith("decoder.tflite"))


def test_every_entry_is_served_whole_with_its_type(port, site):
    for entry in site:
        response, body = get(port, f"/{entry.name}")
        assert response.status == 200 and sha256(body).hexdigest() == entry.sha256
    types = {"/": "text/html; charset=utf-8", "/assets/main.js": "text/javascript; charset=utf-8"}
    for path, kind in types.items():
        assert get(port, path)[0].getheader("content-type") == kind
    assert get(port, weights(site))[0].getheader("content-type") == "application/octet-stream"


def test_every_answer_isolates_the_page_and_bounds_what_it_may_do(port):
    for path, method, status in (("/", "GET", 200), ("/nothing", "GET", 404), ("/", "POST", 405)):
        response, _ = get(port, path, method)
        assert response.status == status
        assert response.getheader("cross-origin-opener-policy") == "same-origin"
        assert response.getheader("cross-origin-embedder-policy") == "require-corp"
        policy = response.getheader("content-security-policy")
        assert "default-src 'none'" in policy and "unsafe-inline" not in policy and "http" not in policy
        assert response.getheader("server") is None


def test_compression_is_the_clients_choice(port):
    plain, body = get(port, "/")
    packed, small = get(port, "/", Accept_Encoding="br;q=1, gzip")
    assert plain.getheader("content-encoding") is None and packed.getheader("content-encoding") == "gzip"
    assert gzip.decompress(small) == body and len(small) < len(body)
    assert plain.getheader("etag") != packed.getheader("etag")  # two representations
    assert packed.getheader("vary") == "Accept-Encoding"
    assert get(port, "/", Accept_Encoding="gzip;q=0")[0].getheader("content-encoding") is None


def test_what_has_not_changed_is_not_sent_again(port, site):
    for path in ("/", weights(site)):
        tag = get(port, path)[0].getheader("etag")
        for wanted in (tag, f'"other", W/{tag}', "*"):
            response, body = get(port, path, If_None_Match=wanted)
            assert response.status == 304 and body == b"" and response.getheader("etag") == tag
        assert get(port, path, If_None_Match='"other"')[0].status == 200


def test_ranges(port, site):
    path = weights(site)
    whole = get(port, path)[1]
    for wanted, part in (("0-9", whole[:10]), ("100-", whole[100:]), ("-7", whole[-7:]), ("5-5", whole[5:6])):
        response, body = get(port, path, Range=f"bytes={wanted}")
        assert response.status == 206 and body == part
    assert get(port, path, Range=f"bytes={len(whole)}-")[0].status == 416
    tag = get(port, path)[0].getheader("etag")
    assert get(port, path, Range="bytes=0-9", If_Range=tag)[0].status == 206
    assert get(port, path, Range="bytes=0-9", If_Range='"other"')[0].status == 200
    head, body = get(port, path, "HEAD")
    assert head.status == 200 and body == b"" and int(head.getheader("content-length")) == len(whole)


@pytest.mark.parametrize(
    "path",
    [
        "/.env",
        "/.git/config",
        "/link.txt",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/assets/..%2f..%2fsecret.txt",
        "//etc/passwd",
    ],
)
def test_nothing_else_is_served(port, path):
    answer = ask(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404") and SECRET not in answer


def test_another_sites_name_is_refused(port):
    """A page elsewhere could point its own name at this machine and read what is served here."""
    assert get(port, "/", Host="evil.example")[0].status == 400
    assert get(port, "/", Host=f"localhost:{port}")[0].status == 200


def test_a_file_that_changed_since_is_gone(serving, tmp_path):
    bundle, secret = tmp_path / "bundle", tmp_path / "secret"
    shutil.copytree(embedded_bundle(), bundle)
    secret.write_bytes(SECRET)
    entries = bundle_entries([Bundle.open(bundle)])
    name = next(f"/{entry.name}" for entry in entries if entry.name.endswith("unet.tflite"))
    with serving(entries) as port:
        assert get(port, name)[0].status == 200
        (bundle / "unet.tflite").unlink()
        assert get(port, name)[0].status == 410
        os.symlink(secret, bundle / "unet.tflite")
        response, body = get(port, name)
        assert response.status == 410 and SECRET not in body


def test_a_client_that_never_asks_is_not_waited_for(serving, site, monkeypatch):
    monkeypatch.setattr(listen, "_PATIENCE", 0.3)
    with serving(site) as port:
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"):
            began = time.monotonic()
            ask(port, begun)  # returns when the server closes
            assert time.monotonic() - began < 5


def test_commands_say_what_is_wrong_in_a_sentence(cli, tmp_path):
    with listen.bind("127.0.0.1", 0) as taken:
        number = taken.getsockname()[1]
        done = cli("serve", "--port", number)
        assert (
            done.returncode == 2 and f"port {number} of 127.0.0.1 is in use: choose another with --port" in done.stderr
        )
    for arguments, told in (
        (("--certificate", tmp_path / "a.pem"), "go together"),
        ((tmp_path / "no",), "there is no bundle"),
    ):
        done = cli("serve", "--port", 0, *arguments)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_https_serves_the_same(serving, site, pem):
    with serving(site[:3], pem=pem) as port:
        trusted = ssl.create_default_context(cafile=pem[0])
        connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=trusted)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200 and b"page" in response.read()
        assert response.getheader("cross-origin-embedder-policy") == "require-corp"
        connection.close()


def test_certificates_that_cannot_be_used(pem, tmp_path):
    certificate, key = pem
    other, junk, locked = (tmp_path / name for name in ("other.pem", "junk.pem", "locked.pem"))
    run("openssl", "genrsa", "-out", other)
    run("openssl", "pkey", "-in", other, "-aes256", "-passout", "pass:x", "-out", locked)
    junk.write_text("junk")
    for files, told in (
        ((certificate, other), "the key is another certificate's"),
        ((junk, key), "not both in PEM form"),
        ((certificate, junk), "not both in PEM form"),
        ((certificate, locked), "locked.pem has a pass phrase"),
        ((tmp_path / "no", key), "No such file"),
        ((certificate, tmp_path), "Is a directory"),
    ):
        with pytest.raises(PocketfusionError, match=told):
            listen.server(None, *files)


def test_places_that_cannot_be_listened_on():
    for host, number, told in (("127.0.0.1", 70_000, "the port is 70000"), ("no.such.invalid", 0, "there is no host")):
        with pytest.raises(PocketfusionError, match=told):
            listen.bind(host, number)


def test_addresses_lead_to_the_server():
    assert listen.addresses("127.0.0.1", 80, False) == ["http://127.0.0.1:80/"]
    assert listen.addresses("::1", 80, True) == ["https://[::1]:80/"]
    *network, local = listen.addresses("0.0.0.0", 80, False)
    assert local == "http://localhost:80/" and all(not listen.is_loopback(url[7:-4]) for url in network)
    assert [listen.is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "0.0.0.0", "box")] == [True] * 3 + [
        False
    ] * 2
