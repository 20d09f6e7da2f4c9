import json
from pathlib import Path

from codi_jax.evaluation import samples


def test_captions_with_unusual_ends_of_lines_are_read(tmp_path: Path) -> None:
    rows = [{"text": f"a{separator}b"} for separator in "\u2028\u2029\x85"]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(f"\ufeff{lines}\n".encode())
    assert samples._read_rows(tmp_path) == rows
