"""Pruning: what the two rules take, what the estimate of harm is worth, and the command on a tiny folder."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from pocketfusion.cli import main
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import ModelFolder
from pocketfusion.folder import folder_hash, read_provenance
from pocketfusion.models.elastic.transfer import without_units
from pocketfusion.models.elastic_unet import ElasticUNet, load_elastic
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sd_configs import CONFIGS
from pocketfusion.prune.harm import noise, predictions, real_calls, unit_harm
from pocketfusion.prune.pruning import Prunable, least_harm, uniform, uniform_counts


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `pocketfusion ARGS` in this process: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocketfusion", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def tiny_unet(tiny_folder) -> ElasticUNet:
    """The tiny folder's, with every weight away from its start, so that all units do something."""
    unet = load_elastic(tiny_folder).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return unet


def parameters(unet) -> int:
    return sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("source", ["sd-1.5", "sd-2.1"])
def test_uniform_takes_one_share_of_the_largest_layers(source):
    with torch.device("meta"):
        unet = ElasticUNet(**CONFIGS[source]["unet"])
    prunable = Prunable.of(unet)
    counts = uniform_counts(prunable, 0.11)
    removed = prunable.removed(counts) / parameters(unet)
    step = max(units.step * size for (_, units), size in prunable.sizes.items())
    assert 0.11 <= removed < 0.11 + step / parameters(unet)
    size = {place: place[1].count * each for place, each in prunable.sizes.items()}
    assert min(size[place] for place in counts) > max(size[place] for place in size if place not in counts)
    shares = [count / place[1].count for place, count in counts.items()]
    assert max(shares) <= 0.25 and max(shares) - min(shares) <= 1 / 32  # whole groups of 32
    # by hand: 1280 + 1280 channels in, 1280 out, time embedding of 1280, norm: one of 32 groups has 40 channels
    (largest,) = (each for (name, _), each in prunable.sizes.items() if name == "up_blocks.0.resnets.0")
    assert largest == 40 * (2560 * 9 + 1 + 1280 + 1 + 2 + 1280 * 9)


def test_counts_are_parameters(tiny_unet):
    for ratio in (0.02, 0.11, 0.4):
        kept = uniform(tiny_unet, ratio)
        pruned = without_units(tiny_unet, kept)
        prunable = Prunable.of(tiny_unet)
        counts = {place: place[1].count - len(index) for place, index in kept.items()}
        assert parameters(tiny_unet) - parameters(pruned) == prunable.removed(counts) >= ratio * prunable.total


def test_everything_that_can_go_goes(tiny_unet):
    most = Prunable.of(tiny_unet).most
    for kept in (uniform(tiny_unet, most - 1e-9), least_harm(tiny_unet, most - 1e-9, ones(tiny_unet))):
        pruned = without_units(tiny_unet, kept)
        assert Prunable.of(pruned).sizes == {}
        assert 1 - parameters(pruned) / parameters(tiny_unet) == pytest.approx(most)
    with pytest.raises(PocketfusionError, match=r"--ratio 0.99 is beyond .* choose at most 0\.\d+"):
        uniform(tiny_unet, 0.99)


def ones(unet) -> dict:
    return {place: torch.ones(place[1].count) for place in Prunable.of(unet).sizes}


def test_least_harm_takes_the_cheapest_steps(tiny_unet):
    prunable, generator = Prunable.of(tiny_unet), torch.Generator().manual_seed(1)
    harm = {place: torch.rand(place[1].count, generator=generator) for place in prunable.sizes}
    kept = least_harm(tiny_unet, 0.2, harm)
    removed = prunable.removed({place: place[1].count - len(index) for place, index in kept.items()})
    assert 0.2 * prunable.total <= removed
    prices, next_prices = [], []
    for place, size in prunable.sizes.items():
        units, ascending = place[1], harm[place].sort().values
        count = units.count - len(kept.get(place, ascending))
        assert count % units.step == 0
        if place in kept:
            gone = [i for i in range(units.count) if i not in kept[place].tolist()]
            assert sorted(harm[place][gone].tolist()) == ascending[:count].tolist()
            prices.append(float(ascending[count - units.step : count].sum()) / (units.step * size))
        if count < units.most:
            next_prices.append(float(ascending[count : count + units.step].sum()) / (units.step * size))
    assert max(prices) <= min(next_prices)
    assert removed - 0.2 * prunable.total < max(p[1].step * s for p, s in prunable.sizes.items())


@pytest.fixture(scope="module")
def calls(tiny_folder, tiny_data):
    return real_calls(ModelFolder(tiny_folder), open_dataset(tiny_data, 64), "train", 24)


def test_real_calls_are_noised_pictures_at_sampling_times(tiny_folder, tiny_data, calls):
    system, data = ModelFolder(tiny_folder), open_dataset(tiny_data, 64)
    assert calls.z_t.shape == (24, 4, 8, 8) and calls.guided and calls.condition is None
    system.scheduler.set_timesteps(25)
    assert set(calls.timesteps.tolist()) <= set(system.scheduler.timesteps.tolist())
    again = real_calls(system, data, "train", 24)
    assert torch.equal(again.z_t, calls.z_t)
    assert not torch.equal(real_calls(system, data, "train", 24, seed=1).z_t, calls.z_t)


def test_the_estimate_of_harm_is_the_measured_one(tiny_unet, calls):
    """Each unit alone: estimated, and measured by removing it. A mask's derivative is not its removal, but close."""
    names = ("up_blocks.2.resnets.0", "up_blocks.3.attentions.2", "mid_block.attentions.0")
    places = [place for place in Prunable.of(tiny_unet).sizes if place[0] in names]
    estimated = unit_harm(tiny_unet, places, calls, probes=16)
    exact = predictions(tiny_unet, calls)
    pairs = []
    for place in places:
        assert estimated[place].shape == (place[1].count,) and bool((estimated[place] >= 0).all())
        for unit in range(0, place[1].count, max(1, place[1].count // 3)):
            left = torch.tensor([i for i in range(place[1].count) if i != unit])
            found = noise(predictions(without_units(tiny_unet, {place: left}), calls), exact)
            pairs.append((float(estimated[place][unit]), found["output"] + found["direction"]))
    values = torch.tensor(pairs).log()
    assert len(pairs) > 15 and float(torch.corrcoef(values.T)[0, 1]) > 0.95
    assert float((values[:, 0] - values[:, 1]).abs().median()) < 0.4


def test_noise_by_hand():
    exact = torch.tensor([[[1.0], [3.0]], [[2.0], [0.0]]])[..., None, None]
    found = exact.clone()
    found[0, 1] += 1
    measured = noise(found, exact)
    assert measured["output"] == pytest.approx(1 / 14) and measured["direction"] == pytest.approx(1 / 8)
    assert measured["guidance_delta"] == pytest.approx(5 / 4)  # directions 3, -2 instead of 2, -2


def test_uniform_command(command, tiny_folder, tmp_path):
    out, before = tmp_path / "pruned", folder_hash(tiny_folder)
    code, printed, said = command("prune", tiny_folder, "--out", out, "--json")
    assert code == 0, said
    results = json.loads(printed)
    unet = load_pipeline(out).unet
    assert type(unet) is ElasticUNet and parameters(unet) == results["parameters"]
    assert (
        results["removed"] == pytest.approx(1 - parameters(unet) / results["base_parameters"])
        and "noise" not in results
    )
    assert 0.11 <= results["removed"] < 0.13 and results["multiply_adds"] < results["base_multiply_adds"]
    made = read_provenance(out)
    assert made.stage == "prune" and made.settings == {"rule": "uniform", "ratio": 0.11}
    assert made.parents == {"base": before} == {"base": folder_hash(tiny_folder)}


def test_sensitivity_command_and_recovery(command, tiny_folder, tiny_data, tiny_recipe, tmp_path):
    out = tmp_path / "pruned"
    arguments = ["--rule", "sensitivity", "--ratio", "0.3", "--data", tiny_data, "--samples", "8"]
    code, printed, said = command("prune", tiny_folder, "--out", out, *arguments)
    assert code == 0, said
    assert "% less), multiply-adds" in printed and "noise over signal on held-out latents: output" in printed
    made = read_provenance(out)
    assert made.settings["samples"] == 8 and made.data["fingerprint"] and made.results["estimated_noise"] > 0
    pruned = load_elastic(out)
    recovered = tmp_path / "recovered"
    recover = ["recover", out, "--base", tiny_folder, "--recipe", tiny_recipe, "--data", tiny_data]
    code, _, said = command(*recover, "--out", recovered)
    assert code == 0, said
    assert load_elastic(recovered).architecture == pruned.architecture
    assert read_provenance(recovered).parents == {"student": folder_hash(out), "base": folder_hash(tiny_folder)}
    # a pruned network can be pruned further
    code, _, said = command("prune", recovered, "--out", tmp_path / "more", "--ratio", "0.1")
    assert code == 0 and parameters(load_elastic(tmp_path / "more")) < parameters(pruned), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0"], "--ratio 0 is not between 0 and 1"),
        (["--ratio", "1.5"], "--ratio 1.5 is not between 0 and 1"),
        (["--ratio", "nan"], "--ratio nan is not between 0 and 1"),
        (["--ratio", "0.99"], "--ratio 0.99 is beyond what pruning can remove"),
        (["--rule", "sensitivity"], "--rule sensitivity measures on pictures: give --data"),
        (["--samples", "1"], "--samples 1 is too few"),
        (["--data", "nowhere"], "no data folder at nowhere"),
    ],
)
def test_refused_options(command, tiny_folder, tmp_path, arguments, message):
    code, _, said = command("prune", tiny_folder, "--out", tmp_path / "out", *arguments)
    assert code == 2 and message in said and "Traceback" not in said and list(tmp_path.iterdir()) == []


def test_refused_folders(command, tiny_folder, tmp_path):
    code, _, said = command("prune", tmp_path / "nothing", "--out", tmp_path / "out")
    assert code == 2 and "there is no model folder" in said
    code, _, said = command("prune", tiny_folder, "--out", tmp_path)
    assert code == 2 and "exists already" in said
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    unet = load_elastic(broken)
    unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(broken / "unet")
    code, _, said = command("prune", broken, "--out", tmp_path / "out")
    assert code == 2 and "the weight conv_in.weight holds NaN" in said
    config = broken / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"addition_embed_type": "text_time"}))
    code, _, said = command("prune", broken, "--out", tmp_path / "out")
    assert code == 2 and "not of Stable Diffusion's 1.x/2.x family" in said and not (tmp_path / "out").exists()
