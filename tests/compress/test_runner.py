"""What runs again, what is skipped, and what a gate, a lock or a stop does; small functions play the stages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pocketfusion.compress import calls, overview
from pocketfusion.compress.calls import Made
from pocketfusion.compress.chain import chain_of
from pocketfusion.compress.overview import provenance_of, standings
from pocketfusion.compress.records import Record, Records, content_hash, sole
from pocketfusion.compress.runner import Span, run_chain
from pocketfusion.errors import PocketfusionError
from pocketfusion.recipe import Recipe

TINY = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "tiny.yaml").read_text())
ALL = list(TINY["stages"])


@pytest.fixture(autouse=True)
def played(monkeypatch) -> list[str]:
    """Every stage writes the recipe and inputs that it saw; returns the names in the order of their work."""
    worked: list[str] = []

    def play(kind: str):
        def call(work) -> Made:
            out = work.place.out
            worked.append(out.name)
            out.mkdir(exist_ok=True)
            read = {
                role: [content_hash(Path(one.partition("@")[0])) for one in paths]
                for role, paths in work.inputs.items()
            }
            section = json.dumps(
                [kind, read, work.recipe.model_dump(mode="json"), work.options.model_dump(mode="json")]
            )
            (out / "seen.json").write_text(section)
            scores = {"val_psnr_db": 20.0, "pictures": 72.0}
            return Made(scores | ({"steps": work.place.goal.up_to} if work.place.goal else {}), True, 24)

        return call

    monkeypatch.setattr(calls, "CALLS", {kind: play(kind) for kind in calls.CALLS})
    return worked


def tiny(**changes):
    """The tiny chain with `section__field=value` changes; `stages__NAME` replaces a stage's own settings."""
    recipe = json.loads(json.dumps(TINY))
    recipe["stages"]["autoencoder"].pop("gate")
    for path, value in changes.items():
        *sections, field = path.split("__")
        place = recipe
        for section in sections:
            place = place[section]
        place[field.replace("_", "-") if sections == ["stages"] else field] = value
    return chain_of(Recipe.model_validate(recipe))


def after(*names: str) -> set[str]:
    return set(ALL[min(ALL.index(name) for name in names) :])


#: A change → the stages that must run again. The base's training reaches all made of it, the judge's only the search
#: and what follows it; options of the last stages only themselves.
_FROM_BASE = set(ALL) - {"data", "loss-judge", "autoencoder", "judge"}
_FROM_EVOLVE = after("evolve")
RERUN = [
    ({}, set()),
    ({"data__scene_share": 0.5}, set(ALL) - {"data"}),
    ({"loss_judge__train__seed": 9}, {"loss-judge", "autoencoder"} | _FROM_BASE),
    ({"autoencoder__kl_weight": 0.5}, {"autoencoder"} | _FROM_BASE),
    ({"judge__embed_dim": 8}, {"judge"} | _FROM_EVOLVE),
    ({"teacher__train__steps": 8}, _FROM_BASE),
    ({"teacher__guidance_scale": 3.0}, _FROM_BASE),
    ({"elastic__ramp_steps": 3}, {"elastic"} | _FROM_EVOLVE),
    ({"recovery__task_weight": 2.0}, after("recover")),
    ({"step_distillation__original_weight": 0.0}, after("distill-steps")),
    ({"decoder__samples": 10}, after("distill-decoder")),
    ({"guidance__embedding_dim": 32}, set()),  # no stage of the chain reads it
    ({"consistency__steps": 3}, set()),
    ({"stages__quantize": {"min_sqnr": 12}}, {"quantize", "export", "check", "bench"}),
    ({"stages__export": {"gate_steps": 2}}, {"export", "check", "bench"}),
    ({"stages__evaluate": {"samples": 8}}, {"evaluate"}),
    ({"stages__bench": {"runs": 2}}, {"bench"}),
    ({"stages__profile": {"runs": 2}}, {"profile"} | _FROM_EVOLVE),
    ({"stages__evolve": {"budget_ratio": 0.5}}, _FROM_EVOLVE),
]


@pytest.mark.parametrize(("change", "again"), RERUN, ids=[str(change) for change, _ in RERUN])
def test_a_change_reruns_exactly_what_depends_on_it(tmp_path, played, change, again):
    assert run_chain(tiny(), tmp_path / "out").ran == ALL
    played.clear()
    result = run_chain(tiny(**change), tmp_path / "out")
    assert set(result.ran) == again == set(played) and set(result.skipped) == set(ALL) - again


def test_a_change_taken_back_finds_the_earlier_results(tmp_path, played):
    run_chain(tiny(), tmp_path / "out")
    before = {name: content_hash(tmp_path / "out" / name) for name in ALL}
    run_chain(tiny(teacher__guidance_scale=3.0), tmp_path / "out")
    played.clear()
    assert run_chain(tiny(), tmp_path / "out").ran == [] and not played
    assert {name: content_hash(tmp_path / "out" / name) for name in ALL} == before


def test_a_kill_while_results_are_put_aside_loses_none(tmp_path, played, monkeypatch):
    import os

    run_chain(tiny(), tmp_path / "out")
    moves, replace = 0, os.replace

    def killed(source, target):
        nonlocal moves
        if "_earlier" in str(target) or "_earlier" in str(source):
            moves += 1
            if moves in (2, 3, 5, 8):
                raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for chain in (tiny(judge__embed_dim=8), tiny()):
        for _ in range(5):
            try:
                run_chain(chain, tmp_path / "out")
                break
            except KeyboardInterrupt:
                pass
        played.clear()
    assert moves >= 8 and run_chain(tiny(), tmp_path / "out").ran == [] and not played


def test_the_same_result_from_other_settings_stops_the_reruns(tmp_path, played, monkeypatch):
    run_chain(tiny(), tmp_path / "out")

    def same(work) -> Made:
        work.place.out.mkdir()
        (work.place.out / "seen.json").write_text((tmp_path / "was.json").read_text())
        return Made({})

    (tmp_path / "was.json").write_text((tmp_path / "out" / "evolve" / "seen.json").read_text())
    monkeypatch.setitem(calls.CALLS, "evolve", same)
    assert run_chain(tiny(stages__evolve={"budget_ratio": 0.5}), tmp_path / "out").ran == ["evolve"]


def test_from_until_and_only(tmp_path, played):
    chain, out = tiny(), tmp_path / "out"
    assert run_chain(chain, out, span=Span.of(chain, None, "base", None)).ran == ALL[:5]
    assert run_chain(chain, out, span=Span.of(chain, None, None, "profile")).ran == ["profile"]
    with pytest.raises(PocketfusionError, match="recover needs evolve, which is not finished with these settings"):
        run_chain(chain, out, span=Span.of(chain, "recover", None, None))
    assert run_chain(chain, out, span=Span.of(chain, "elastic", "evolve", None)).ran == ["elastic", "evolve"]
    for asked, said in (
        (("evolve", "base", None), "--until base comes before --from evolve"),
        ((None, None, "profil"), "no stage 'profil': did you mean 'profile'"),
        (("base", None, "data"), "--only data is one stage"),
    ):
        with pytest.raises(PocketfusionError, match=said):
            Span.of(chain, *asked)
    with pytest.raises(PocketfusionError, match="evolve needs data, which is not finished"):
        run_chain(chain, tmp_path / "new", span=Span.of(chain, "evolve", None, None))
    assert not (tmp_path / "new").exists()  # nothing half-made, which would then be this recipe's
    stale = tiny(judge__embed_dim=8)
    with pytest.raises(PocketfusionError, match="evolve needs judge, which is not finished"):
        run_chain(stale, out, span=Span.of(stale, "evolve", None, None))


def test_a_gate_that_is_not_met_stops_the_chain(tmp_path, played):
    gate = {"val_psnr_db": 28.5, "up_to": 12}
    own = {"loss": {"feature_weight": 0.1}}
    gated = tiny(stages__autoencoder={**own, "gate": gate})
    with pytest.raises(
        PocketfusionError, match=r"autoencoder does not reach its gate val_psnr_db ≥ 28.5: it has .* 20"
    ):
        run_chain(gated, tmp_path / "out")
    assert played[-1] == "autoencoder"
    assert Records(tmp_path / "out").get("autoencoder").gate_met is False
    played.clear()
    lower = tiny(stages__autoencoder={**own, "gate": {"val_psnr_db": 19}})
    assert run_chain(lower, tmp_path / "out").ran == ALL[3:] and "autoencoder" not in played
    higher = tiny(stages__autoencoder={**own, "gate": {"val_psnr_db": 21, "up_to": 18}})
    played.clear()
    with pytest.raises(PocketfusionError, match="after 18 steps"):
        run_chain(higher, tmp_path / "out")  # it may train on, and does
    assert played == ["autoencoder"]


def test_what_is_given_is_never_made_and_counts_by_its_content(tmp_path, played):
    given = tmp_path / "pictures"
    given.mkdir()
    (given / "a.txt").write_text("one")
    chain = tiny(stages__data={"from": str(given)})
    assert run_chain(chain, tmp_path / "out").ran == ALL[1:]
    assert run_chain(chain, tmp_path / "out").ran == []
    (given / "a.txt").write_text("three")
    assert run_chain(chain, tmp_path / "out").ran == ALL[1:]
    with pytest.raises(PocketfusionError, match="data is to be taken from .*nowhere, where nothing is"):
        run_chain(tiny(stages__data={"from": str(tmp_path / "nowhere")}), tmp_path / "other")


def test_an_altered_result_is_told_and_a_deleted_one_made_again(tmp_path, played):
    out = tmp_path / "out"
    run_chain(tiny(), out)
    (out / "base" / "README.md").write_text("a card changes nothing")
    assert run_chain(tiny(), out).ran == []
    (out / "base" / "seen.json").write_text("{}")
    with pytest.raises(PocketfusionError, match="base was altered since it was made"):
        run_chain(tiny(), out)
    (out / "base" / "seen.json").unlink()
    (out / "base" / "README.md").unlink()
    (out / "base").rmdir()
    assert run_chain(tiny(), out).ran == ["base"]


def test_where_and_when_a_result_was_made_is_no_content(tmp_path):
    for name, seconds in (("a", 1), ("b", 2)):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "vae" / "config.json").write_text(json.dumps({"_name_or_path": name, "channels": 4}))
        (tmp_path / name / "bundle.json").write_text(json.dumps({"provenance": {"hours": seconds}, "files": {}}))
        (tmp_path / name / "provenance.json").write_text(json.dumps({"hours": seconds}))
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "vae" / "config.json").write_text(json.dumps({"_name_or_path": "b", "channels": 8}))
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_another_recipes_folder_and_a_foreign_one_are_refused(tmp_path, played):
    run_chain(tiny(), tmp_path / "out")
    with pytest.raises(PocketfusionError, match="out is the recipe tiny's, not other's: choose another OUT"):
        run_chain(tiny(name="other"), tmp_path / "out")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(PocketfusionError, match="home holds something else"):
        run_chain(tiny(), tmp_path / "home")
    with pytest.raises(PocketfusionError, match="letter is a file"):
        run_chain(tiny(), tmp_path / "home" / "letter")


def test_a_second_run_is_refused_until_the_first_process_is_dead(tmp_path, played):
    """The holder has a child that outlives it: a lock that children inherit would be held on."""
    out = tmp_path / "out"
    out.mkdir()
    hold = (
        "import subprocess, sys, time, os; from pathlib import Path; from pocketfusion.compress.records import sole\n"
        f"with sole(Path({str(out)!r})):\n"
        "    pid = os.fork()\n"
        "    print('held', flush=True) if pid else None\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (out / "compress.json").write_text(json.dumps({"recipe": {"name": "tiny"}}))
        with pytest.raises(PocketfusionError, match=f"another compress is at work in .* \\(process {holder.pid}\\)"):
            run_chain(tiny(), out)
        holder.kill()
        holder.wait()
        assert run_chain(tiny(), out).ran == ALL
    finally:
        import os
        import signal

        os.killpg(holder.pid, signal.SIGKILL)


def test_time_that_is_over_stops_before_the_next_stage(tmp_path, played, monkeypatch):
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    result = run_chain(tiny(), tmp_path / "out", max_minutes=3)
    assert result.unfinished and 0 < len(result.ran) < len(ALL)
    with pytest.raises(PocketfusionError, match="--max-minutes 0 is not above 0"):
        run_chain(tiny(), tmp_path / "out", max_minutes=0)


def test_a_stage_that_does_not_train_says_elsewhere_what_it_does(tmp_path, played, monkeypatch):
    chain, out, seen, clock = tiny(), tmp_path / "out", [], [time.time()]
    monkeypatch.setattr(overview, "at_work", lambda folder: True)  # asked from the process that holds the lock

    def evolve(work) -> Made:
        clock[0] += 120
        work.progress("round 1", 3, 40)
        seen.append(next(one for one in standings(chain, out) if one.stage.name == "evolve"))
        work.progress("round 1", 4, 40)  # too soon to be written again
        seen.append(next(one for one in standings(chain, out) if one.stage.name == "evolve"))
        work.place.out.mkdir()
        return Made({})

    calls.CALLS["evolve"] = evolve
    monkeypatch.setattr(time, "time", lambda: clock[0])
    run_chain(chain, out, span=Span.of(chain, None, "evolve", None))
    assert [one.doing for one in seen] == ["round 1: 3 of 40"] * 2 and seen[0].seconds == pytest.approx(120)
    assert seen[0].state == "running" and not any(one.doing for one in standings(chain, out))


def test_the_standing_of_a_stage_at_work_is_read_from_its_log(tmp_path, played):
    chain, out = tiny(), tmp_path / "out"
    run_chain(chain, out, span=Span.of(chain, None, "judge", None))
    records = Records(out)
    records.put("base", Record(key={"kind": "base"}))
    lines = [{"step": n, "loss": 1.0, "seconds": 5.0 * n} for n in (1, 2, 3)]
    lines.insert(2, {"step": 2, "seconds": 10.0, "held_out": {"val_mse": 0.5}})
    (out / "base.run").mkdir()
    (out / "base.run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    found = {one.stage.name: one for one in standings(chain, out)}
    base = found["base"]
    assert (base.state, base.done, base.total, base.seconds) == ("stopped", 3, 6, 15.0)
    assert base.left == pytest.approx(15.0) and base.scores == {"val_mse": 0.5}
    assert found["judge"].state == "done" and found["elastic"].state == "waiting"
    with sole(out):  # asked from another process, as the lock is this one's own
        code = "import sys, pathlib; from pocketfusion.compress.records import at_work"
        code += "; print(at_work(pathlib.Path(sys.argv[1])))"
        assert subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True).stdout == "True\n"


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("content", ["[1]", "5", "{", "\x00", BOMB])
def test_a_given_result_may_hold_anything(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    seen = content_hash(tmp_path)
    (tmp_path / "bundle.json").write_text(content + " ")
    assert content_hash(tmp_path) != seen and provenance_of(tmp_path) == {}
