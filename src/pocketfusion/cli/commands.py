"""Registers every command on the application, in the order in which `--help` lists them."""

# ruff: noqa: F401, I001
from pocketfusion.cli import generate, info
from pocketfusion.cli import import_model, compress
from pocketfusion.cli import data, data_cache, plan, train
from pocketfusion.cli import profile, elastic, evolve, remove, prune, architecture
from pocketfusion.cli import distill, distill_decoder, distill_guidance, distill_consistency
from pocketfusion.cli import score, evaluate, compare
from pocketfusion.cli import quantize, export, check, bench, vectors, device
from pocketfusion.cli import serve
