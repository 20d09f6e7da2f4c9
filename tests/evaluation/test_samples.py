import json
from pathlib import Path

import numpy as np
import pytest

from codi_jax.data.avatars.looks import draw
from codi_jax.evaluation import samples
from codi_jax.io.images import canny
from dataset_tools import avatars


def test_captions_with_unusual_ends_of_lines_are_read(tmp_path: Path) -> None:
    rows = [{"text": f"a{separator}b"} for separator in "\u2028\u2029\x85"]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(f"\ufeff{lines}\n".encode())
    assert samples._read_rows(tmp_path / "metadata.jsonl") == rows


def test_what_the_avatars_tool_writes_is_read(tmp_path: Path) -> None:
    """Captions, edges and edits, with the attributes that each picture should show."""
    for task in ("text", "edit"):
        avatars.main(avatars.Args(train_data_dir=str(tmp_path / task), task=task, max_train_samples=3, num_proc=1))
    found, edits = (samples.open_samples(str(tmp_path / task)).read(range(3)) for task in ("text", "edit"))
    assert found.conditions is not None
    assert found.truth is not None
    assert edits.truth is not None
    assert edits.inputs is not None
    for number in range(3):
        np.testing.assert_array_equal(found.truth[number], draw(found.looks[number], 64))
        np.testing.assert_array_equal(edits.truth[number], draw(edits.looks[number], 64))
        np.testing.assert_array_equal(found.conditions[number, ..., 0], canny(found.truth[number]))


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no data .*none: check --data"):
        samples.open_samples(str(tmp_path / "none"))
