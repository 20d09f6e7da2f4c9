import math
from pathlib import Path

import pytest

from codi_jax.io.json_files import JsonError, parse_lines, parse_object, read_object


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", r"is not valid JSON \(Expecting property name.*\): download it again\."),
        (b"", r"is not valid JSON \(Expecting value.*\): download it again\."),
        (b"[]", r"holds a JSON list instead of an object: download it again\."),
        (b"3", "holds a JSON int instead of an object"),
        (b"\xff{}", r"is not valid JSON \(not UTF-8: "),
        (b"[" * 100_000, r"is not valid JSON \(nested too deeply\)"),
        (b'{"a": NaN}', r"is not valid JSON \(it holds NaN\)"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(JsonError, match=f"^{path} {reason}") as error:
        read_object(path, "download it again")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_infinity_are_read(tmp_path: Path):
    path = tmp_path / "flags.json"
    path.write_bytes(b'\xef\xbb\xbf{"max_grad_norm": Infinity, "name": "\xc3\xa9"}')
    assert read_object(path, "") == {"max_grad_norm": math.inf, "name": "é"}
    assert parse_object('{"a": 1}', "text", "") == {"a": 1}
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none.json", "")


def test_lines_have_numbers_and_may_hold_nan():
    (first, row), (second, other) = parse_lines([b'{"score": NaN}\n', b"\n", b"{}"], "meta.jsonl", "fix it")
    assert (first, second, other) == (1, 3, {})
    assert math.isnan(row["score"])
    with pytest.raises(JsonError, match=r"meta\.jsonl, line 2 holds a JSON list instead of an object: fix it"):
        list(parse_lines([b"{}", b"[]"], "meta.jsonl", "fix it"))
