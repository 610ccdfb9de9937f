"""The static rules against the recorded verdicts of the delegate, always; against the delegate, where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from op_cases import CASES, VERDICTS, ask

from pocketfusion.mobile.delegate.faults import faults
from pocketfusion.mobile.delegate.graph import load
from pocketfusion.mobile.delegate.oracle import MAX_ERROR, Oracle
from pocketfusion.mobile.delegate.rules import ACCEPTED, rejections

GOLDEN = json.loads(VERDICTS.read_text())


def state(answer: dict) -> str:
    """refused, wrong or right; sines are right to 2e-4."""
    if not answer["accepted"]:
        return "refused"
    return "right" if answer["error"] is not None and answer["error"] <= MAX_ERROR["fp32"] else "wrong"


def test_recorded_for_every_case():
    assert list(GOLDEN) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rules_give_the_recorded_verdict(name, tmp_path):
    CASES[name](tmp_path / "case.tflite")
    graph = load(tmp_path / "case.tflite").graphs[0]
    refused, wrong = rejections(graph), faults(graph)
    expected = "refused" if refused else "wrong" if wrong else "right"
    assert expected == state(GOLDEN[name]), (GOLDEN[name], refused, wrong)


def test_reasons_are_the_delegates(tmp_path):
    """Where the delegate gives a reason that is not about dimensions, the rule's begins alike."""
    same = 0
    for name, answer in GOLDEN.items():
        if answer["accepted"]:
            continue
        CASES[name](tmp_path / "case.tflite")
        reasons = [one.reason for one in rejections(load(tmp_path / "case.tflite").graphs[0])]
        same += any(reason[:20] in answer["says"] for reason in reasons)
    assert same > 0.6 * sum(not answer["accepted"] for answer in GOLDEN.values())


def test_every_accepted_kind_has_a_case(tmp_path):
    seen = set()
    for case in CASES.values():
        case(tmp_path / "case.tflite")
        seen |= {op.kind for op in load(tmp_path / "case.tflite").graphs[0].operations}
    assert ACCEPTED.keys() - seen <= {
        "LOGICAL_AND",
        "LOGICAL_OR",
        "LOGICAL_NOT",
        "ONE_HOT",
        "QUANTIZE",
        "TOPK_V2",
        "SELECT",
    }


def test_the_delegate_still_says_what_was_recorded(fp32_stack, tmp_path: Path):
    with Oracle(fp32_stack, timeout=60) as oracle:
        answers = {name: ask(name, oracle, tmp_path) for name in CASES}
    changed = {name: (GOLDEN[name], now) for name, now in answers.items() if state(now) != state(GOLDEN[name])}
    assert not changed
