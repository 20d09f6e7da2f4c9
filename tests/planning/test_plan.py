"""What a plan concludes: arithmetic, by hand."""

import json
from dataclasses import replace

import pytest

from codi_jax.planning.chips import Chip
from codi_jax.planning.hlo import Census, Traffic
from codi_jax.planning.plan import EFFICIENCY, Plan, describe
from codi_jax.planning.programs import Program

CHIP = Chip("Chip", memory=1000, flops=100.0, flops_float32=50.0, bandwidth=10.0, network=4.0, reserved=100)
CENSUS = Census(
    bytes_moved=60, collectives={"all-reduce": Traffic(2, 8), "all-gather": Traffic(1, 4)}, convolutions=5,
    convolutions_not_nhwc=1, moves=3, bytes_of_moves=6, converts=2, bytes_of_converts=4,
    kernels={"flash": 2},
)  # fmt: skip
PROGRAM = Program(given=300, needed=700, flops=4000, bytes_accessed=80.0, census=CENSUS, seconds=12.0, is_whole=True)
PLAN = Plan(
    title="train_x.py, model, 64 px", target="chip:4", chip=CHIP, devices=4, batch=2, samples=8,
    kinds={"parameters": 100, "optimizer": 200}, program=PROGRAM, is_half=True, steps=7200,
)  # fmt: skip


def test_the_slowest_resource_is_the_bound():
    assert PLAN.seconds_by_cause == {"compute": 10.0, "memory": 6.0, "network": 3.0}
    assert PLAN.seconds == 10.0 / EFFICIENCY
    assert PLAN.share_of_peak == EFFICIENCY
    busy = replace(PROGRAM, census=replace(CENSUS, bytes_moved=200))
    slow = replace(PLAN, program=busy)
    assert slow.seconds == 20.0 / EFFICIENCY
    assert slow.share_of_peak == EFFICIENCY / 2


def test_full_precision_has_its_own_peak():
    assert replace(PLAN, is_half=False).seconds_by_cause["compute"] == 20.0


def test_what_fits():
    """Of 1000 bytes the device keeps 100."""
    assert replace(PLAN, program=replace(PROGRAM, needed=900)).fits
    assert not replace(PLAN, program=replace(PROGRAM, needed=901)).fits


def test_json():
    values = json.loads(json.dumps(PLAN.to_json()))
    assert values["bytes_per_device"] == {"parameters": 100, "optimizer": 200, "temporaries": 400, "total": 700}
    assert values["bytes_usable"] == 900
    assert values["estimate"]["samples_per_second"] == pytest.approx(8 / 20)
    assert values["estimate"]["hours"] == pytest.approx(40)
    assert values["estimate"]["chip_hours"] == pytest.approx(160)
    assert values["program"]["census"]["collectives"]["all-reduce"] == {"count": 2, "bytes": 8}
    assert replace(PLAN, steps=None).to_json()["estimate"]["hours"] is None


def test_text():
    large = replace(PROGRAM, given=3 * 2**30, needed=7 * 2**30)
    text = describe(replace(PLAN, program=large, chip=replace(CHIP, memory=8 * 2**30, reserved=0), advice=["do this"]))
    assert "4 × Chip, 2 samples per device" in text
    assert "in all" in text
    assert "7.00 of 8.00: fits (88%)" in text
    assert "temporaries" in text
    assert "about 20 s, bound by compute, if it reaches 50% of that" in text
    assert "7,200 steps" in text
    assert "40 hours, 160 chip-hours" in text
    assert "5, 1 of them not NHWC" in text
    assert "2 × flash" in text
    assert text.endswith("- do this")
    refused = replace(large, census=None)
    text = describe(replace(PLAN, program=refused, chip=replace(CHIP, memory=6 * 2**30, reserved=0)))
    assert "does NOT fit, by 1.00" in text
    assert "the compiled program" not in text
