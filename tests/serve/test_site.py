"""What a site lists, and what a static one holds."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from serving import SECRET

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.serve import site as sites
from pocketfusion.serve.application import cached, make_sibling, with_siblings
from pocketfusion.serve.site import bundle_entries, model_of, page_entries, page_folder, write_site


def test_only_the_page_and_what_manifests_name_is_listed(page, site):
    assert [entry.name for entry in page_entries(page)] == ["assets/main.js", "icon.png", "index.html"]
    bundle = Bundle.open(embedded_bundle())
    named = {"bundle.json", *(file.path for file in bundle.manifest.files.values())}
    folder = next(entry.name.rpartition("/")[0] for entry in site if entry.name.endswith("bundle.json"))
    assert {entry.name.removeprefix(f"{folder}/") for entry in site if entry.name.startswith("bundles/")} == named
    assert not any(SECRET in entry.read() for entry in site)
    for entry in site:
        assert sha256(entry.read()).hexdigest() == entry.sha256


def test_the_list_names_bundles_that_share_a_model(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(embedded_bundle(), other)
    manifest = json.loads((other / "bundle.json").read_text()) | {"name": "Émoji / ../64"}
    (other / "bundle.json").write_text(json.dumps(manifest))
    bundles = [Bundle.open(embedded_bundle()), Bundle.open(other), Bundle.open(other)]
    listed = json.loads(bundle_entries(bundles)[0].read())["bundles"]
    assert len(listed) == 2  # one bundle given twice is one
    folder = bundles[0].manifest.provenance["model_folder"]
    assert listed[0]["model"] == listed[1]["model"] == f"{folder}-64x64"
    assert listed[1]["path"].startswith("bundles/moji-64-")
    assert listed[1]["sha256"] == bundles[1].hash


def test_a_page_that_was_never_built_is_told_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sites, "__file__", str(tmp_path / "site.py"))
    with pytest.raises(PocketfusionError, match="not built in this installation: run `make page`"):
        page_folder()


def test_a_static_site_is_the_same_files(tmp_path, site):
    report = write_site(site, tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {entry.name for entry in site} == {name for name in files if not name.endswith(".gz")}
    assert report.files == len(site) and report.size == sum(len(entry.read()) for entry in site)
    for name, file in files.items():
        if name.endswith(".gz"):
            assert gzip.decompress(file.read_bytes()) == files[name.removesuffix(".gz")].read_bytes()
    with pytest.raises(PocketfusionError, match="exists already"):
        write_site(site, tmp_path / "out")
    write_site(site[:1], tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").rglob("*.*"))) == 2  # and its .gz


@pytest.mark.parametrize(
    "change", [{"lora": []}, {"embeddings": []}, {"vae": {}}, {"model_folder": None}, {"model_folder": "../x"}]
)
def test_a_bundle_with_something_merged_in_is_a_model_of_its_own(change):
    bundle = Bundle.open(embedded_bundle(), verify=False)
    manifest = bundle.manifest.model_copy(update={"provenance": bundle.manifest.provenance | change})
    assert model_of(bundle) and model_of(Bundle(bundle.path, manifest, bundle.hash)) is None


def test_a_sibling_in_the_cache_is_served_beside_its_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = Bundle.open(embedded_bundle())
    assert with_siblings([bundle]) == [bundle]
    place = cached(model_of(bundle))
    assert place.parent == tmp_path / "pocketfusion"
    shutil.copytree(embedded_bundle(), place)
    found = with_siblings([bundle, bundle])
    assert [each.path for each in found] == [bundle.path, place, bundle.path]
    with pytest.raises(PocketfusionError, match="not the model folder of any bundle given"):
        make_sibling(Path(__file__).parents[2] / "models" / "emoji" / "base", [bundle], lambda *_: None)
    before = set(sys.modules)
    with pytest.raises(PocketfusionError, match="not a model folder"):
        make_sibling(tmp_path, [bundle], lambda *_: None)
    assert set(sys.modules) == before  # told at once, not after the converter is loaded
