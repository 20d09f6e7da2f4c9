"""Programs that a compiler refuses for lack of memory: in its own words, of which it has several."""

from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import pytest

from codi_jax.planning.chips import TPUS
from codi_jax.planning.programs import Program, compile_for_target
from codi_jax.planning.targets import Target

GIVEN = 2**30


def planned(message: str, reports: Path) -> Program:
    def compile_lowered(_: Any) -> NoReturn:
        raise jax.errors.JaxRuntimeError(message)

    target = Target("cpu", TPUS["v5e"], jax.devices(), reports)
    return compile_for_target(jax.jit(jnp.sin).trace(1.0), GIVEN, target, compile_lowered)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5 * 2**30),
        # Of the temporaries alone, before the rest is looked at.
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.32G) "
            "exceeds available HBM (15.75G).",
            16.32 * 2**30 + GIVEN,
        ),
    ],
)
def test_a_refusal_says_what_is_needed(message: str, needed: float, tmp_path: Path) -> None:
    made = planned(message, tmp_path)
    assert made.needed == round(needed)
    assert (made.given, made.census, made.is_whole) == (GIVEN, None, False)


@pytest.mark.parametrize("message", ["INTERNAL: Used 20.50G of 15.75G hbm.", "RESOURCE_EXHAUSTED: out of handles"])
def test_other_errors_are_not_hidden(message: str, tmp_path: Path) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=message.split(":", maxsplit=1)[0]):
        planned(message, tmp_path)
