"""A folder for one run on a stranger's Android phone over `adb`: the bundle, a script around LiteRT's own benchmark
and the C++ example's source. What the phone says is read by `device_report`.

No binary of others is in it: `benchmark_model` (https://ai.google.dev/edge/litert/next/benchmark) and libLiteRt.so (of
LiteRT's Android package) are fetched by whoever runs it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pocketfusion.artefact import atomic_folder, write_json
from pocketfusion.port.vectors import UNICODE, check_replaced
from pocketfusion.runtime.manifest import MANIFEST, NETWORKS, Bundle
from pocketfusion.runtime.output import png_text, save_png
from pocketfusion.runtime.pipeline import Pipeline

FORMAT, VERSION = "pocketfusion-device-pack", 1
INDEX, SCRIPT, RESULTS, FORM = "device-pack.json", "run.sh", "results", "form.txt"
SOURCES = Path(__file__).with_name("cpp")

_SCRIPT = r"""#!/bin/sh
# Runs this pack's bundle on the phone that adb sees and writes results/, for `pocketfusion device-report`.
#
# Usage: ./run.sh BENCHMARK_MODEL [LIBRARIES]
#   BENCHMARK_MODEL  LiteRT's benchmark_model for android_arm64 (https://ai.google.dev/edge/litert/next/benchmark)
#   LIBRARIES        folder with libLiteRt.so (and its GPU accelerator) and `draw`, built of source/ as README.md says
set -eu
tool=${1:?usage: ./run.sh BENCHMARK_MODEL [LIBRARIES]}
libraries=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
results=$here/results
remote=/data/local/tmp/pocketfusion-device
[ -f "$tool" ] || { echo "there is no file $tool" >&2; exit 2; }
[ -z "$libraries" ] || [ -f "$libraries/draw" ] || { echo "there is no $libraries/draw: see README.md" >&2; exit 2; }
rm -rf "$results"
mkdir "$results"
phone() { adb shell "$1" </dev/null; }
push() { adb push "$1" "$2" </dev/null >/dev/null; }
phone "rm -rf $remote && mkdir -p $remote/bundle"
push "$tool" "$remote/benchmark_model"
phone "chmod +x $remote/benchmark_model"
{
    echo "pack=@HASH@"
    echo "maker=$(phone 'getprop ro.product.manufacturer')"
    echo "model=$(phone 'getprop ro.product.model')"
    echo "soc=$(phone 'getprop ro.soc.manufacturer; getprop ro.soc.model' | tr '\n' ' ')"
    echo "android=$(phone 'getprop ro.build.version.release')"
    echo "driver=$(phone 'dumpsys SurfaceFlinger' | sed -n 's/.*GLES: *//p' | head -n 1)"
    echo "memory=$(phone 'cat /proc/meminfo' | sed -n 's/^MemTotal: *//p')"
    echo "tool=$(sha256sum "$tool" | cut -c 1-12)"
} | tr -d '\r' >"$results/form.txt"
for name in @NETWORKS@; do
    push "$here/bundle/$name" "$remote/bundle/$name"
    for place in cpu gpu; do
        [ $place = gpu ] && flag=true || flag=false
        echo "$name on the $place"
        phone "$remote/benchmark_model --graph=$remote/bundle/$name --num_threads=4 --num_runs=20 --warmup_runs=3 \
            --use_gpu=$flag" >"$results/$name-$place.log" 2>&1 || echo "$name failed on the $place" >&2
    done
done
if [ -n "$libraries" ]; then
    for file in "$here"/bundle/* "$here/unicode.json"; do
        case $file in *.tflite) ;; *) [ -d "$file" ] || push "$file" "$remote/bundle/$(basename "$file")" ;; esac
    done
    for file in "$libraries"/draw "$libraries"/*.so; do push "$file" "$remote/$(basename "$file")"; done
    phone "chmod +x $remote/draw"
    for place in cpu gpu; do
        echo "a picture on the $place"
        phone "cd $remote && LD_LIBRARY_PATH=. ./draw bundle bundle/unicode.json '@PROMPT@' 0 $place.png $place" \
            >"$results/draw-$place.log" 2>&1 && adb pull "$remote/$place.png" "$results/$place.png" </dev/null \
            >/dev/null || echo "no picture on the $place: see results/draw-$place.log" >&2
    done
fi
phone "rm -rf $remote"
echo "done: pocketfusion device-report $here REPORT.md"
"""

_README = """# {name} on your phone

You need: an Android phone with USB debugging, `adb`, and a Linux or macOS shell.

1. Fetch `benchmark_model` for android_arm64 from <https://ai.google.dev/edge/litert/next/benchmark>.
2. For pictures, too (optional): fetch LiteRT's Android package (`com.google.ai.edge.litert:litert:2.3.0`, an .aar,
   which is a zip), take `jni/arm64-v8a/*.so` out of it into a folder `libraries/`, and build `draw` with the NDK:

   ```
   "$NDK"/toolchains/llvm/prebuilt/*/bin/aarch64-linux-android31-clang++ -std=c++17 -O2 -ffp-contract=off \\
       -static-libstdc++ source/*.cpp libraries/libLiteRt.so -o libraries/draw
   ```

3. `./run.sh BENCHMARK_MODEL libraries` (or without `libraries`): a few minutes. Leave the phone to cool before.
4. `pocketfusion device-report . report.md` writes report.md and report.json: no account, no upload. Send them if you
   like.

Everything is written to `/data/local/tmp/pocketfusion-device` and removed at the end. The script reads the phone's
maker, model, chip, Android version, GPU driver and memory size, and nothing else.
"""


def write_device_pack(bundle_path: Path, out: Path, *, overwrite: bool = False) -> Bundle:
    """Writes the pack of the bundle at `bundle_path` to the folder `out`.

    Raises PocketfusionError for a bundle that cannot be run, and if `out` exists (without `overwrite`, or as anything
    but a pack).
    """
    check_replaced(out, INDEX, "device-pack", overwrite)
    bundle = Bundle.open(bundle_path)
    prompt = "a red apple"
    with atomic_folder(out, overwrite=overwrite) as partial:
        for path in (MANIFEST, *(entry.path for entry in bundle.manifest.files.values())):
            target = partial / "bundle" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / path, target)
        shutil.copyfile(UNICODE, partial / UNICODE.name)
        shutil.copytree(SOURCES, partial / "source")
        pipeline = Pipeline.load(bundle_path, 1, mode="sequential")
        result = pipeline.generate(prompt, seed=0)
        pipeline.close()
        save_png(result.images[0], partial / "reference.png", png_text(pipeline, result, 0))
        files = {name: bundle.manifest.files[name].path for name in NETWORKS}
        script = _SCRIPT.replace("@NETWORKS@", " ".join(files.values())).replace("@PROMPT@", prompt)
        (partial / SCRIPT).write_text(script.replace("@HASH@", bundle.hash), encoding="utf-8")
        (partial / SCRIPT).chmod(0o755)
        (partial / "README.md").write_text(_README.format(name=bundle.manifest.name), encoding="utf-8")
        index = {
            "format": FORMAT,
            "version": VERSION,
            "bundle": {"name": bundle.manifest.name, "sha256": bundle.hash, "target": bundle.manifest.target},
            "weights": {name: spec.weights for name, spec in bundle.manifest.networks},
            "files": files,
            "prompt": prompt,
            "seed": 0,
            "num_inference_steps": result.num_inference_steps,
        }
        write_json(partial / INDEX, index)
    return bundle
