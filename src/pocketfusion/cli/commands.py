"""Registers every command; under which heading, in which order and with which examples `--help` shows them."""

from __future__ import annotations

from typing import Any

from pocketfusion.cli import (  # noqa: F401  (registers them)
    app,
    bench_commands,
    bring_commands,
    check_commands,
    compress_commands,
    distill_commands,
    draw_commands,
    evolve_commands,
    export_commands,
    look_commands,
    profile_commands,
    prove_commands,
    train_commands,
)  # fmt: skip

#: Heading → command → what one types, as `--help` shows it below the options.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "Draw": {
        "generate": (
            'generate "a red apple, noto style" -o apple.png --seed 3',
            'generate "a castle" -o castle.png --bundle my-bundle --count 4 --steps 20',
        ),
        "serve": ("serve", "serve my-bundle --host 0.0.0.0"),
        "web-build": ("web-build SITE my-bundle",),
        "info": ("info", "info my-bundle --json"),
        "doctor": ("doctor",),
    },
    "Bring a model": {
        "import": (
            "import my.safetensors my-model",
            "import my.safetensors my-model --vae vae.safetensors --clip-skip 2",
            "import my-model --from-hub someone/some-model",
        ),
        "data": (),
    },
    "Make small": {
        "compress": (
            "compress recipes/emoji128.yaml OUT --dry-run",
            "compress recipes/emoji128.yaml OUT --max-minutes 50",
        ),
        "profile": (
            "profile my-model --out latency.json --batch 1,2",
            "profile my-model --pack PACK",
        ),
        "train-elastic": ("train-elastic my-model --recipe recipes/sd15.yaml --data DATA --out elastic",),
        "evolve": (
            "evolve elastic --recipe recipes/sd15.yaml --data DATA --judge JUDGE --latency latency.json --out evolved",
        ),
        "recover": ("recover evolved --base my-model --recipe recipes/sd15.yaml --data DATA --out recovered",),
        "remove": ("remove my-model --latency latency.json --budget-ratio 0.5 --out removed",),
        "prune": ("prune my-model --ratio 0.11 --out pruned",),
        "to-v": ("to-v my-model --recipe recipes/sd15.yaml --data DATA --out v-model",),
        "distill-steps": (
            "distill-steps recovered --teacher my-model --recipe recipes/sd15.yaml --data DATA --out eight",
        ),
        "distill-guidance": ("distill-guidance my-model --recipe recipes/sd15.yaml --data DATA --out one-call",),
        "distill-consistency": (
            "distill-consistency eight --teacher my-model --recipe recipes/sd15.yaml --data DATA --steps 4 --out four",
        ),
        "distill-decoder": ("distill-decoder my-model --recipe recipes/sd15.yaml --data DATA --out small-decoder",),
        "quantize": (
            "quantize my-model weights.yaml --min-sqnr 28",
            "quantize my-model weights.yaml --max-mb 30",
        ),
        "export": (
            "export my-model my-bundle --for android",
            "export my-model my-bundle --target coreml --ios 18",
            "export my-model my-bundle --for android --few-steps lcm --lora lcm-lora.safetensors",
        ),
    },
    "Prove": {
        "check": ("check my-bundle", "check my-bundle --static"),
        "compare": (
            "compare my-model my-bundle --out report.html",
            "compare my-model my-bundle --out report.html --min-psnr 25",
        ),
        "bench": ("bench my-bundle other-bundle --json bench.json",),
        "score": ("score my-model --judge JUDGE --data DATA --out SCORES",),
        "evaluate": ("evaluate my-model my-bundle --judge JUDGE --data DATA --out OUT",),
        "card": ("card my-model",),
        "architecture": ("architecture my-model", "architecture sd-1.5"),
        "plot-drops": ("plot-drops before.json after.json --out drops.png",),
        "vectors": ("vectors my-bundle kit",),
        "device-pack": ("device-pack my-bundle PACK",),
        "device-report": ("device-report PACK report.md",),
    },
    "Train": {
        "plan": ("plan recipes/sd15.yaml --gpu-gb 24",),
        "train-autoencoder": ("train-autoencoder recipes/emoji128.yaml --data DATA --out autoencoder",),
        "train-teacher": ("train-teacher recipes/emoji128.yaml --data DATA --autoencoder autoencoder --out base",),
        "train-judge": ("train-judge recipes/emoji128.yaml --data DATA --out judge",),
    },
}

#: The same of `data`'s own commands.
DATA: dict[str, tuple[str, ...]] = {
    "emoji": ("data emoji DATA",),
    "cache": (
        "data cache PICTURES CACHE --vae my-model --size 512",
        "data cache s3://bucket/shards CACHE --vae my-model --size 512 --part 0/8",
    ),
    "merge-cache": ("data merge-cache CACHE PART-0 PART-1",),
    "show-cache": ("data show-cache CACHE",),
}


def every_example() -> list[str]:
    """All of them, without the program's name."""
    shown = [DATA, *GROUPS.values()]
    return [example for group in shown for examples in group.values() for example in examples]


def _epilog(examples: tuple[str, ...]) -> str | None:
    return "\n\n".join(("Examples:", *(f"`pocketfusion {line}`" for line in examples))) if examples else None


def _arrange() -> None:
    order = {name: (heading, examples) for heading, group in GROUPS.items() for name, examples in group.items()}
    one: Any
    for one in (*app.registered_commands, *app.registered_groups):
        one.rich_help_panel, examples = order[one.name or ""]
        one.epilog = _epilog(examples)
    for one in bring_commands.data_app.registered_commands:
        one.epilog = _epilog(DATA[one.name or ""])
    app.registered_commands.sort(key=lambda one: list(order).index(one.name or ""))


_arrange()
