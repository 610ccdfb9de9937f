"""The standard networks with random weights against independent ones, and what is refused."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from inception_weights import golden_images, seeded_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPImageProcessorPil, CLIPModel

from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.extractors import CLIP_SCORE, StandardExtractor, open_extractor
from pocketfusion.evaluate.inception import FidInception, load_inception
from pocketfusion.evaluate.metrics import clip_score, frechet_distance
from tiny_clip import clip_tokenizer, make_clip

# torch-fidelity 0.4.0's FeatureExtractorInceptionV3 with `seeded_weights` on `golden_images`: every 256th of its 2048
# pool3 features, and their mean. It scales pixels by (u - 128) / 128.
GOLDEN = [
    [0.307087, 0.026302, 0.015086, 5.04249, 0.448507, 0.184454, 0.0, 0.105983],
    [0.202049, 0.003498, 0.012769, 6.291007, 0.562234, 0.229101, 0.0, 0.224542],
]
GOLDEN_MEAN = [1.204495, 1.399110]


@pytest.fixture(scope="module")
def weights():
    shapes = {name: tuple(value.shape) for name, value in FidInception().state_dict().items()}
    return seeded_weights({name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")})


@pytest.fixture(scope="module")
def inception(weights, tmp_path_factory):
    """As pytorch-fid publishes them: a `.pth` that holds the classifier too."""
    file = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, file)
    return file


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "CLIP-tiny")


@pytest.fixture(scope="module")
def extractor(inception, clip):
    return open_extractor(None, inception, clip)


def test_the_network_is_torch_fidelitys(inception):
    network = load_inception(inception)
    pixels = torch.from_numpy(golden_images()).permute(0, 3, 1, 2).float()
    features = network.pool3((pixels - 128) / 128).numpy()
    assert features.shape == (2, 2048)
    assert np.allclose(features[:, ::256], GOLDEN, rtol=1e-4, atol=1e-4)
    assert np.allclose(features.mean(axis=1), GOLDEN_MEAN, rtol=1e-5)
    assert sum(p.numel() for p in network.parameters()) == 21_785_568  # the published network without its classifier


def test_pictures_are_resized_and_scaled_as_pytorch_fid_does(inception):
    network = load_inception(inception)
    seen = []
    network.pool3 = lambda x: seen.append(x) or torch.zeros(len(x), 2048)
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    assert network.features(images, batch=2).shape == (3, 2048)
    x = torch.cat(seen)
    assert x.shape == (3, 3, 299, 299)
    # bilinear with half-pixel centres, by hand at one point
    row = column = (150 + 0.5) * 64 / 299 - 0.5
    top, left = int(row), int(column)
    down, right = row - top, column - left
    part = images[1, top : top + 2, left : left + 2].astype(np.float64) / 127.5 - 1
    expected = np.einsum("i,j,ijc->c", [1 - down, down], [1 - right, right], part)
    assert np.allclose(x[1, :, 150, 150], expected, atol=1e-5)


def test_the_fid_of_its_features_is_torchmetrics(extractor):
    rng = np.random.default_rng(2)
    real = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    drawn = (real // 2 + rng.integers(0, 100, real.shape)).astype(np.uint8)
    features = [extractor.image_features(images)[0][:, ::128] for images in (real, drawn)]
    features += [np.concatenate([part, part[::-1] * 1.01 + 0.01]) for part in features[:2]]
    for a, b in (features[:2], features[2:]):
        metric = FrechetInceptionDistance(feature=_Given(a.shape[1]), input_img_size=(1, 1, a.shape[1]))
        metric.set_dtype(torch.float64)
        for part, is_real in ((a, False), (b, True)):
            metric.update(torch.from_numpy(part.astype(np.float64))[:, None, None, :], real=is_real)
        assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-4, abs=1e-6)


class _Given(torch.nn.Module):
    """Hands features through as if it had extracted them."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x.flatten(1)


def test_clip_embeddings_are_transformers(extractor, clip):
    model = CLIPModel.from_pretrained(clip).eval()
    images = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    captions = ["a red cat", "red", "cat " * 40]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    tokens = clip_tokenizer()(captions, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    seen, read = extractor.image_features(images)[1], extractor.text_embeddings(captions)
    assert np.allclose(seen, out.image_embeds.numpy(), atol=1e-5)
    assert np.allclose(read, out.text_embeds.numpy(), atol=1e-5)
    # 100 times the cosine that BK-SDM prints
    cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).numpy()
    assert np.allclose(clip_score(seen, read), 100 * cosines, atol=1e-3)


def test_identity_names_everything(extractor, inception, clip, tmp_path):
    identity = extractor.identity()
    assert extractor.name == "Inception-v3 and CLIP-tiny" and extractor.feature_dimensions == 2048
    assert identity["inception"]["sha256"] == sha256_file(inception)
    assert identity["clip_score"] == CLIP_SCORE and "28 px" in identity["clip"]["preprocessing"]
    moved = shutil.copytree(clip, tmp_path / "moved")
    (moved / "README.md").write_text("not read")
    assert StandardExtractor(inception, moved).identity()["clip"]["sha256"] == identity["clip"]["sha256"]
    values = load_file(moved / "model.safetensors")
    save_file({**values, "logit_scale": values["logit_scale"] + 1}, moved / "model.safetensors", {"format": "pt"})
    assert StandardExtractor(inception, moved).identity()["clip"]["sha256"] != identity["clip"]["sha256"]


def test_safetensors_give_the_same_features(inception, weights, tmp_path):
    save_file(weights, tmp_path / "inception.safetensors")
    images = golden_images()[:, :64, :64]
    expected = load_inception(inception).features(images)
    assert np.array_equal(load_inception(tmp_path / "inception.safetensors").features(images), expected)


def test_wrong_inception_weights(weights, clip, tmp_path):
    file = tmp_path / "weights.pth"
    with pytest.raises(PocketfusionError, match="there are no Inception-v3 weights at .* give a local file"):
        load_inception(file)
    torch.save({name: value for name, value in weights.items() if "Mixed_7c" not in name}, file)
    with pytest.raises(PocketfusionError, match=r"is not FID's Inception-v3 \(Mixed_7c"):
        load_inception(file)
    torch.save([1, 2], file)
    with pytest.raises(PocketfusionError, match="it is not a plain dictionary of tensors"):
        load_inception(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(PocketfusionError, match="holds no Inception-v3 weights that can be read safely"):
        load_inception(file)


class _Harmful:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_nothing_is_unpickled(tmp_path):
    trace = str(tmp_path / "harmed")
    torch.save({"weights": _Harmful(trace)}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(_Harmful(trace)))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(PocketfusionError, match="that can be read safely"):
            load_inception(tmp_path / name)
    assert not os.path.exists(trace)


def test_wrong_clip_folders(inception, clip, tmp_path):
    def refused(message, change):
        folder = shutil.copytree(clip, tmp_path / "clip", dirs_exist_ok=True)
        change(folder)
        with pytest.raises(PocketfusionError, match=message):
            StandardExtractor(inception, folder)
        shutil.rmtree(folder)

    refused("holds no CLIP model that can be read", lambda folder: (folder / "config.json").unlink())
    refused("says model_type 'bert'", lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'))
    refused("holds no CLIP model that can be read", lambda folder: (folder / "model.safetensors").unlink())

    def spoil(folder):
        values = load_file(folder / "model.safetensors")
        values["visual_projection.weight"][0, 0] = float("nan")
        save_file(values, folder / "model.safetensors", {"format": "pt"})

    refused("the weight visual_projection.weight holds NaN", spoil)


def test_open_clips_own_checkpoints(inception, tmp_path, stand_in):
    """Through the installed open_clip; a stand-in here, since the real one needs torchvision."""
    checkpoint = tmp_path / "open_clip_model.safetensors"
    checkpoint.write_bytes(b"")
    stand_in("open_clip", "import there_is_no_torchvision")
    with pytest.raises(PocketfusionError, match="open_clip is installed but does not load .*torchvision"):
        StandardExtractor(inception, checkpoint)
    stand_in("open_clip", _OPEN_CLIP)
    save_file({"weight": torch.eye(3)[:2].contiguous(), "bias": torch.zeros(2)}, checkpoint)
    extractor = StandardExtractor(inception, checkpoint, "ViT-g-14")
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[:, 0, 0] = [[3, 4, 9], [0, 2, 0]]
    features, embeddings = extractor.image_features(images)
    assert features.shape == (2, 2048) and np.allclose(embeddings, [[0.6, 0.8], [0, 1]])
    assert extractor.identity()["clip"]["sha256"] == sha256_file(checkpoint)


_OPEN_CLIP = """
import torch
class Model(torch.nn.Linear):
    def encode_image(self, x): return self(x)
    def encode_text(self, x): return self(x)
def create_model_and_transforms(name, pretrained):
    return Model(3, 2), None, lambda picture: torch.tensor(picture.getpixel((0, 0))).float()
def get_tokenizer(name): return lambda texts: torch.tensor([[len(t), 1.0, 0.0] for t in texts])
"""


def test_one_way_to_score(inception, clip, tmp_path):
    for judge, first, second, message in (
        (tmp_path, inception, clip, "two ways to score: give one of them"),
        (None, None, None, "nothing to score with: give --judge FOLDER, or --inception FILE and --clip PATH"),
        (None, inception, None, "give --clip PATH"),
        (None, None, clip, "give --inception FILE"),
        (tmp_path, None, None, "there is no judge at"),
    ):
        with pytest.raises(PocketfusionError, match=message):
            open_extractor(judge, first, second)
