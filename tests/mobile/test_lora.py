"""LoRA files merged against kohya's strengths by hand and diffusers' own fusing, layer by layer; what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import adapters
import pytest
import torch
from adapters import ATTENTION, ATTENTION_LAYERS, LAYERS, TEXT, clip_pipeline, merged, module, random_layers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pocketfusion.cli.export_commands import _parse_lora
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.adapters.lora import _names, merge_lora
from pocketfusion.mobile.adapters.lora_file import LoraLayer, check_lora
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import as_elastic

PLAIN = clip_pipeline()  #: read only


@pytest.fixture(scope="module")
def scratch() -> StableDiffusionPipeline:
    return deepcopy(PLAIN)


@pytest.fixture
def pipeline(scratch: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Its weights may be changed, its networks not."""
    for part in ("unet", "text_encoder"):
        getattr(scratch, part).load_state_dict(getattr(PLAIN, part).state_dict())
    return scratch


def weights_are(pipeline: StableDiffusionPipeline, wanted: Mapping[str, torch.Tensor], atol: float = 1e-5) -> None:
    """The named layers are `wanted`, and no other weight has changed."""
    for part in ("unet", "text_encoder"):
        before = dict(getattr(PLAIN, part).named_parameters())
        for key, weight in getattr(pipeline, part).named_parameters():
            name = f"{part}.{key.removesuffix('.weight')}"
            target = wanted[name] if key.endswith("weight") and name in wanted else before[key]
            torch.testing.assert_close(
                weight, target, atol=atol, rtol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
            )


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.0, 0.5), (4.0, -0.3), (0.0, 1.0)])
def test_kohya_files_merge_at_kohyas_strength(
    pipeline: StableDiffusionPipeline, tmp_path: Path, alpha: float | None, scale: float
) -> None:
    """Linear layers, 1x1 and 3x3 convolutions (LoCon), both networks, two ranks in one file."""
    layers = random_layers(pipeline, LAYERS, alpha=alpha)
    wanted = merged(pipeline, layers, scale)
    assert merge_lora(pipeline, adapters.save_kohya(layers, tmp_path / "a.safetensors"), scale) == 0
    weights_are(pipeline, wanted)


def test_alphas_of_some_layers_only(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    layers = random_layers(pipeline, LAYERS)
    layers = {name: layer._replace(alpha=(None, 1.0, 8.0)[i % 3]) for i, (name, layer) in enumerate(layers.items())}
    wanted = merged(pipeline, layers)
    merge_lora(pipeline, adapters.save_kohya(layers, tmp_path / "a.safetensors"))
    weights_are(pipeline, wanted)


def test_bfloat16(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    layers = random_layers(pipeline, LAYERS, alpha=2.0)
    rounded = {
        n: layer._replace(down=layer.down.bfloat16().float(), up=layer.up.bfloat16().float())
        for n, layer in layers.items()
    }
    wanted = merged(pipeline, rounded)
    merge_lora(pipeline, adapters.save_kohya(layers, tmp_path / "a.safetensors", torch.bfloat16))
    weights_are(pipeline, wanted)


@pytest.mark.parametrize("save", ["save_kohya", "save_peft", "save_old_diffusers", "save_lora_linear"])
def test_every_naming_merges_as_diffusers_fuses_it(
    pipeline: StableDiffusionPipeline, tmp_path: Path, save: str
) -> None:
    names = ATTENTION_LAYERS if save == "save_old_diffusers" else LAYERS
    layers = {name: layer._replace(alpha=None) for name, layer in random_layers(pipeline, names).items()}
    file = getattr(adapters, save)(layers, tmp_path / "a.safetensors")
    stock = deepcopy(PLAIN)
    state = load_file(file)
    if save == "save_peft":  # today's names of CLIP, which stock diffusers' loader takes as they are
        assert f"{TEXT}.mlp.fc1.lora_A.weight" in state
    stock.load_lora_weights(
        {key.replace("text_model.", "").replace("te_text_model", "te"): v for key, v in state.items()}
    )
    stock.fuse_lora(lora_scale=0.7)
    stock.unload_lora_weights()
    wanted = {name: module(stock, name).weight.detach() for name in names}
    for name, weight in merged(pipeline, layers, 0.7).items():  # the judge itself is checked: it reached every layer
        torch.testing.assert_close(wanted[name], weight, atol=1e-5, rtol=1e-5)
    assert merge_lora(pipeline, file, 0.7) == 0
    weights_are(pipeline, wanted)


@pytest.mark.parametrize("elastic", [False, True])
def test_every_layer_is_found_under_kohyas_name(elastic: bool) -> None:
    """Also under names that diffusers' converters were not written for, and in a UNet of our own class."""
    pipeline = SimpleNamespace(unet=as_elastic(PLAIN.unet) if elastic else PLAIN.unet, text_encoder=PLAIN.text_encoder)
    pipeline.lora_state_dict = PLAIN.lora_state_dict
    names = [
        f"{part}.{path}"
        for part in ("unet", "text_encoder")
        for path, layer in getattr(pipeline, part).named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    ]
    some = torch.ones(1, 1)
    layers = [LoraLayer(f"{adapters.kohya_name(name)}.lora_down.weight", some, some, 1.0) for name in names]
    assert len(names) > 200 and _names(pipeline, layers, Path("a")) == names


def test_several_adapters_add_up(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    one, two = random_layers(pipeline, LAYERS), random_layers(pipeline, LAYERS[:3], rank=6, alpha=3.0)
    first = merged(pipeline, one, 0.5)
    merge_lora(pipeline, adapters.save_kohya(one, tmp_path / "1.safetensors"), 0.5)
    second = merged(pipeline, two, 2.0)
    merge_lora(pipeline, adapters.save_kohya(two, tmp_path / "2.safetensors"), 2.0)
    weights_are(pipeline, {**first, **second})


@pytest.mark.parametrize("config", [{"lora_alpha": 3}, {"lora_alpha": 3, "use_rslora": True}, {"use_dora": True}])
@torch.no_grad()
def test_what_peft_saves_has_the_effect_of_the_adapter_beside_the_weights(tmp_path: Path, config: dict) -> None:
    """Its alphas lie in the file's metadata."""
    pipeline = deepcopy(PLAIN)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([300.0]), torch.randn(1, 7, 32)
    plain = pipeline.unet(*inputs)[0]
    pattern = {"down_blocks.0.attentions.0.proj_in": 7, "to_v": 5}
    targets = ["to_q", "to_v", "proj_in", "conv1"]
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=targets, alpha_pattern=pattern, **config))
    torch.manual_seed(1)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:  # zero at first
            parameter.data.normal_(0, 0.1)
        if "magnitude" in name:
            parameter.data.mul_(1.5)
    expected = pipeline.unet(*inputs)[0]
    pipeline.unet.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert (expected - plain).abs().max() > 1e-2

    fresh = deepcopy(PLAIN)
    assert merge_lora(fresh, file) == 0
    torch.testing.assert_close(fresh.unet(*inputs)[0], expected, atol=1e-4, rtol=1e-4)


def test_peft_settings_beside_the_file(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """What `get_peft_model(unet, …).save_pretrained` writes: another prefix, alphas in adapter_config.json."""
    layers = random_layers(pipeline, LAYERS[:3])
    bare = {name.removeprefix("unet."): layer for name, layer in layers.items()}
    adapters.save_peft(bare, tmp_path / "adapter_model.safetensors", "base_model.model.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    wanted = merged(pipeline, {name: layer._replace(alpha=8.0) for name, layer in layers.items()})
    merge_lora(pipeline, tmp_path / "adapter_model.safetensors")
    weights_are(pipeline, wanted)


@pytest.mark.parametrize("of_inputs", [False, True])
def test_lycoris_dora(pipeline: StableDiffusionPipeline, tmp_path: Path, of_inputs: bool) -> None:
    """Magnitudes of some layers, linear and convolution; for each output or for each input."""
    layers = random_layers(pipeline, LAYERS)
    file = adapters.save_kohya(layers, tmp_path / "a.safetensors")
    state, wanted = load_file(file), merged(pipeline, layers)
    for name in (f"{ATTENTION}.to_k", "unet.down_blocks.0.resnets.0.conv1", f"{TEXT}.mlp.fc1"):
        weight = wanted[name].transpose(0, 1) if of_inputs else wanted[name]
        magnitude = torch.linspace(0.5, 2, len(weight))
        scaled = torch.stack([row * m / row.norm() for row, m in zip(weight, magnitude, strict=True)])
        wanted[name] = scaled.transpose(0, 1) if of_inputs else scaled
        shape = [1] * weight.ndim
        shape[int(of_inputs)] = len(weight)
        state[f"{adapters.kohya_name(name)}.dora_scale"] = magnitude.reshape(shape).contiguous()
    save_file(state, file)
    merge_lora(pipeline, file)
    weights_are(pipeline, wanted)
    with pytest.raises(PocketfusionError, match="is a DoRA, and tools do not agree on what 0.5 of one is"):
        merge_lora(pipeline, file, 0.5)


def test_a_linear_layer_and_a_pointwise_convolution_are_one(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """SD 1's `proj_in` is a convolution, SD 2's is linear; tools write either."""
    layers = random_layers(pipeline, ("unet.up_blocks.1.attentions.0.proj_in",))
    wanted = merged(pipeline, layers)
    flat = {name: layer._replace(down=layer.down.flatten(1), up=layer.up.flatten(1)) for name, layer in layers.items()}
    merge_lora(pipeline, adapters.save_kohya(flat, tmp_path / "a.safetensors"))
    weights_are(pipeline, wanted)


def test_layers_that_were_cut_are_counted(tmp_path: Path) -> None:
    """Blocks of an evolved UNet and skipped text layers; no other layer may be missing."""
    pipeline = deepcopy(PLAIN)
    unet = as_elastic(pipeline.unet)
    pipeline.unet = with_architecture(unet, unet.architecture.remove("down_blocks.0.attentions.0"))
    file = adapters.save_kohya(random_layers(PLAIN, LAYERS), tmp_path / "a.safetensors")
    assert merge_lora(pipeline, file) == 4  # the attention's to_q, to_k, to_v, to_out
    skipped = {
        name.replace("layers.0", "layers.2"): layer for name, layer in random_layers(PLAIN, LAYERS[-5:]).items()
    }
    file = adapters.save_kohya({**random_layers(PLAIN, LAYERS), **skipped}, tmp_path / "b.safetensors")
    assert merge_lora(pipeline, file) == 4 + 5
    with pytest.raises(
        PocketfusionError, match="another base: this model has no layer 'unet.down_blocks.0.attentions.0"
    ):
        merge_lora(_without_a_level(), file)


def _without_a_level() -> StableDiffusionPipeline:
    pipeline = deepcopy(PLAIN)
    pipeline.unet.down_blocks[0].attentions[0] = torch.nn.Identity()  # as BK-SDM: renumbered, not cut
    return pipeline


def test_a_half_that_reaches_nothing_is_an_error(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    from tiny import tiny_pipeline

    file = adapters.save_kohya(random_layers(pipeline, LAYERS), tmp_path / "a.safetensors")
    other = tiny_pipeline()  # its text encoder is a BERT
    before = {key: value.clone() for key, value in other.unet.state_dict().items()}
    with pytest.raises(PocketfusionError, match="the text encoder half of .* reaches nothing here, 'text_encoder"):
        merge_lora(other, file)
    assert all(torch.equal(before[key], value) for key, value in other.unet.state_dict().items())


def test_an_adapter_of_another_base_is_told(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    config = {k: v for k, v in pipeline.unet.config.items() if not k.startswith("_")}
    other = deepcopy(PLAIN)
    other.unet = UNet2DConditionModel(**config | {"cross_attention_dim": 24})
    names = (LAYERS[0], ATTENTION.replace("attn1", "attn2") + ".to_k")
    file = adapters.save_kohya(random_layers(other, names), tmp_path / "a.safetensors")
    with pytest.raises(
        PocketfusionError, match=r"of another base: unet\..*to_k is \[16, 32\] here and \[16, 24\] in it"
    ):
        merge_lora(pipeline, file)
    save_file({"unet.far.to_q.lora_A.weight": torch.ones(2, 4), "unet.far.to_q.lora_B.weight": torch.ones(4, 2)},
              tmp_path / "far.safetensors")  # fmt: skip
    with pytest.raises(PocketfusionError, match="none of its layers is in this model"):
        merge_lora(pipeline, tmp_path / "far.safetensors")
    save_file({"lora_unet_input_blocks_x.lora_down.weight": torch.ones(2, 4),
               "lora_unet_input_blocks_x.lora_up.weight": torch.ones(4, 2)}, tmp_path / "odd.safetensors")  # fmt: skip
    with pytest.raises(PocketfusionError, match="is a LoRA of another base"):
        merge_lora(pipeline, tmp_path / "odd.safetensors")


Q = f"{ATTENTION}.to_q"
K = adapters.kohya_name(Q)
NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({f"{K}.lora_down.weight": torch.full((4, 16), NAN)}, "lora_down.weight holds NaN"),
        ({f"{K}.alpha": torch.tensor(NAN)}, "alpha holds NaN"),
        ({f"{K}.alpha": torch.ones(2)}, "alpha of .* is not one number"),
        ({f"{K}.lora_down.weight": torch.ones(4, 16, dtype=torch.int32)}, "or integers"),
        ({f"{K}.lora_down.weight": torch.ones(0, 16), f"{K}.lora_up.weight": torch.ones(16, 0)}, "of rank 0"),
        ({f"{K}.lora_up.weight": torch.ones(16, 3)}, "do not fit each other"),
        ({f"{K}.lora_up.weight": torch.ones(16)}, "no matrix"),
        ({f"{K}.lora_up.weight": None}, "has no up matrix"),
        ({f"{K}.lora_down.weight": None}, "has no down matrix"),
        ({f"{K}.lora_up.weight": torch.full((16, 4), 3e38)}, "would hold NaN or infinity"),
        ({f"{K}.hada_w1_a": torch.ones(4, 4)}, "holds LoHa layers"),
        ({f"{K}.lokr_w1": torch.ones(4, 4)}, "holds LoKr layers"),
        ({f"{K}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "Tucker core"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 4)}, "SDXL"),
        ({"bundle_emb.x.string_to_param.*": torch.ones(1, 4)}, "--embedding"),
        ({f"{K}.dora_scale": torch.ones(7)}, "DoRA of another base"),
        ({"unet.conv_in.weight": torch.ones(1)}, "conv_in.weight is nothing that a LoRA"),
        ({"lora_\x1b[31m\n.x": torch.ones(1)}, r"lora_\\x1b\[31m\\n.x is nothing"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 16), f"{Q}.lora_B.weight": torch.ones(16, 2)}, "twice, under two names"),
        ({f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 16), f"{Q}.lora_A.weight": torch.ones(2, 16),
          f"{Q}.lora_B.weight": torch.ones(16, 2)}, r"holds .*to_q\.lora_A\.weight twice, under two names"),
    ],
)  # fmt: skip
def test_an_unsound_file_is_refused_in_a_sentence(
    pipeline: StableDiffusionPipeline, tmp_path: Path, changes: dict, match: str
) -> None:
    layers = random_layers(pipeline, LAYERS)
    layers[Q] = layers[Q]._replace(down=torch.ones(4, 16), up=torch.ones(16, 4))
    state = load_file(adapters.save_kohya(layers, tmp_path / "good.safetensors")) | changes
    save_file({key: value for key, value in state.items() if value is not None}, tmp_path / "a.safetensors")
    with pytest.raises(PocketfusionError, match=match):
        merge_lora(pipeline, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ("{", "settings of .* are damaged: it is not valid JSON"),
        ("[" * 100_000, "settings of .* are damaged: it is not valid JSON"),
        ('{"lora_alpha": 4, "lora_alpha": 64}', "gives 'lora_alpha' twice"),
        ("[1]", "not a JSON object"),
        ('{"lora_alpha": "much"}', "lora_alpha is not what PEFT writes"),
        ('{"lora_alpha": NaN}', "lora_alpha is not what PEFT writes"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "lora_alpha is not what PEFT writes"),
        ('{"lora_alpha": 1e300}', "would hold NaN or infinity"),
        ('{"alpha_pattern": [1]}', "alpha_pattern is not what PEFT writes"),
        ('{"alpha_pattern": {"(a+)+$": 1}}', "it is no layer's name"),
        ('{"init_lora_weights": "pissa"}', "was begun with pissa, which changes the base"),
        ('{"use_dora": true}', "is a DoRA without the magnitudes of"),
        ('{"unet.lora_alpha": {}}', "lora_alpha is not what PEFT writes"),
    ],
)
def test_hostile_settings(pipeline: StableDiffusionPipeline, tmp_path: Path, metadata: str, match: str) -> None:
    state = load_file(adapters.save_peft(random_layers(pipeline, LAYERS[:2]), tmp_path / "good.safetensors"))
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(PocketfusionError, match=match):
        merge_lora(pipeline, tmp_path / "a.safetensors")


def test_thousands_of_patterns_are_read_once(tmp_path: Path) -> None:
    state = {}
    for i in range(200):
        state[f"unet.a.b{i}.lora_A.weight"], state[f"unet.a.b{i}.lora_B.weight"] = torch.ones(1, 1), torch.ones(1, 1)
    patterns = {"b7": 3, "a.b7": 5, **{f"c{i}": 1 for i in range(40_000)}, "a.b8": 7, "b8": 9}
    said = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": patterns})
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
    began = time.process_time()
    strengths = {layer.key.split(".")[2]: layer.strength for layer in check_lora(tmp_path / "a.safetensors", 1.0)}
    assert (strengths["b7"], strengths["b8"], strengths["b9"]) == (3, 7, 2)  # the first that fits, as PEFT has it
    assert time.process_time() - began < 3  # 20 s where each layer read all of them


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_file({"cond_stage_model.transformer.x": torch.zeros(1)}, tmp_path / "whole.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "folder.safetensors").mkdir()
    for file, message in (
        ("plain", "holds no LoRA"), ("whole", "is a whole checkpoint and no LoRA"),
        ("empty", "holds no LoRA"), ("text", "not a safetensors"),
        ("folder", "is not a file"), ("none", "is not there"), ("n" * 400, "not a safetensors|is not there"),
    ):  # fmt: skip
        with pytest.raises(PocketfusionError, match=message):
            check_lora(tmp_path / f"{file}.safetensors", 1.0)
    with pytest.raises(PocketfusionError, match="is no scale"):
        check_lora(tmp_path / "plain.safetensors", NAN)


def test_a_file_and_its_scale(tmp_path: Path) -> None:
    (tmp_path / "odd:2").write_text("")
    assert _parse_lora("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert _parse_lora("a.safetensors:0.7") == (Path("a.safetensors"), 0.7)
    assert _parse_lora("C:a.safetensors") == (Path("C:a.safetensors"), 1.0)
    assert _parse_lora(f"{tmp_path}/odd:2") == (tmp_path / "odd:2", 1.0)


def test_the_command_takes_several(tiny_folder: Path, tmp_path: Path, fast_conversion: None) -> None:
    """Two of no effect, as the networks here are converted already."""
    from typer.testing import CliRunner

    from pocketfusion.cli import app

    layers = {name: layer._replace(up=layer.up * 0) for name, layer in random_layers(PLAIN, LAYERS[:10]).items()}
    file = adapters.save_kohya(layers, tmp_path / "a.safetensors")
    arguments = ["export", str(tiny_folder), str(tmp_path / "out"), "--lora", str(file), "--lora", f"{file}:0.5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "out" / "bundle.json").read_text())["provenance"]["lora"]
    assert [(one["file"], one["scale"]) for one in said] == [("a.safetensors", 1.0), ("a.safetensors", 0.5)]
