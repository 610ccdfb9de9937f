"""The code of docs/own-loop.md, block after block, on a tiny stock folder: it runs, and what it trains learns."""

import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from pocketfusion.losses import Draws, ElasticUNet

PAGE = Path(__file__).parents[1] / "docs" / "own-loop.md"


def test_the_page_runs_and_learns(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    states, empty = torch.randn(4, 32, 32), torch.randn(32, 32)
    x = torch.randn(4, 4, 8, 8)

    def batches():
        for _ in range(3):
            yield x, states, empty

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 3 and len(blocks[0].splitlines()) <= 30
    known: dict = {"base": tiny_folder, "batches": batches}
    before = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet").state_dict()
    for block, trained in zip(blocks, ("student", "student", "elastic"), strict=True):
        start = (
            {name: value.clone() for name, value in known[trained].state_dict().items()}
            if known.get(trained)
            else before
        )
        exec(compile(block, str(PAGE), "exec"), known)
        assert torch.isfinite(known["loss"]) and known["loss"] > 0
        after = known[trained].state_dict()
        assert any(not torch.equal(after[name], value) for name, value in start.items())
    assert all(torch.equal(value, before[name]) for name, value in known["teacher"].state_dict().items())
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "student" / "unet")  # what the first block saved
    assert type(stock) is UNet2DConditionModel
    assert DDIMScheduler.from_pretrained(tiny_folder, subfolder="scheduler").config.prediction_type == "v_prediction"


def test_an_elastic_copy_is_the_stock_network(tiny_folder):
    stock = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet").eval()
    elastic = ElasticUNet.from_unet(stock)
    given = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 32, 32)
    with torch.no_grad():
        assert torch.equal(elastic(*given).sample, stock(*given).sample)
    draws = [Draws(3, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(draws[0].randn(2), draws[1].randn(2)) and draws[0].randint(5).shape == (3,)
