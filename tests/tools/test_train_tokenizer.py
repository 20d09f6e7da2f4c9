"""`dataset_tools/train_tokenizer.py`: what it writes, CLIP's tokenizer reads, and cuts texts up as the library does."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from dataset_tools import train_tokenizer
from dataset_tools.train_tokenizer import Args, train

CAPTIONS = [
    "a red apple", "a green apple", "a red heart", "a green heart", "two red hearts", "a grinning face",
    "a grinning cat", "the flag of Åland", "10 o'clock", "a person's face, grinning!",
] * 3  # fmt: skip
TEXTS = [*CAPTIONS[:10], "", "A RED   APPLE", "unseen wörds 42 ✨ 東京", "it's they're I'll", "greenish-red hearts?!"]
BYTES = 514  # every byte inside a word and at its end, and start and end of the text


def write(folder: Path, captions: list, name: str = "metadata.jsonl", key: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"file_name": "x.png", key: caption}) + "\n" for caption in captions]
    (folder / name).write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Args:
    folder = tmp_path_factory.mktemp("captions")
    args = Args(write(folder / "data", CAPTIONS), folder / "tokenizer", vocab_size=560, model_max_length=24)
    train(args)
    return args


@pytest.fixture(scope="module")
def learned(args: Args) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(args.output_dir)


def test_the_vocabulary_is_that_of_clip_with_fewer_merges(args: Args, learned: CLIPTokenizer) -> None:
    vocabulary = json.loads((args.output_dir / "vocab.json").read_text(encoding="utf-8"))
    assert len(learned) == len(vocabulary) == 560
    assert sorted(vocabulary.values()) == list(range(560))
    assert (learned.bos_token_id, learned.eos_token_id, learned.pad_token_id) == (558, 559, 559)
    assert learned.model_max_length == 24
    merges = (args.output_dir / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(merges) == 560 - BYTES
    # Each merge is of tokens that there are by then, and makes the next.
    for number, merge in enumerate(merges):
        left, right = merge.split(" ")
        assert vocabulary[left + right] == 512 + number
        assert max(vocabulary[left], vocabulary[right]) < 512 + number


def test_captions_come_back(learned: CLIPTokenizer) -> None:
    for caption in CAPTIONS[:7]:
        ids = learned(caption).input_ids
        assert ids[0] == learned.bos_token_id
        assert ids[-1] == learned.eos_token_id
        assert learned.decode(ids, skip_special_tokens=True).strip() == caption
        # Learned tokens are longer than bytes.
        assert len(ids) - 2 < len(caption.replace(" ", "")) / 1.5


def test_nothing_is_unknown(learned: CLIPTokenizer) -> None:
    for text in TEXTS:
        assert learned.eos_token_id not in learned(text).input_ids[1:-1]


def bpe_of(folder: Path) -> Tokenizer:
    """The library's own BPE with the learned merges, cutting words as CLIP's paper does."""
    tokenizer = Tokenizer(
        models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_clip_cuts_texts_up_as_the_library_does(args: Args, learned: CLIPTokenizer) -> None:
    expected = bpe_of(args.output_dir)
    for text in TEXTS:
        assert learned(text).input_ids[1:-1] == expected.encode(text).ids, text


def test_frequent_words_become_tokens(learned: CLIPTokenizer) -> None:
    assert learned.tokenize("a red apple") == ["a</w>", "red</w>", "apple</w>"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "meta.jsonl"])
def test_lists_of_captions_and_other_columns(tmp_path: Path, name: str) -> None:
    data = write(tmp_path / "data", [["a b", "c"], "d"], name, "caption")
    found = train_tokenizer.captions(Args(data, tmp_path, caption_column="caption"))
    assert found == ["a b", "c", "d"]


def test_texts_without_images(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a b\n\nc\n")
    assert train_tokenizer.captions(Args(tmp_path / "texts.txt", tmp_path / "out")) == ["a b", "c"]
    with pytest.raises(ValueError, match=r"there is no folder .*none\.txt: check --train_data_dir"):
        train_tokenizer.captions(Args(tmp_path / "none.txt", tmp_path / "out"))


def test_too_few_texts_give_a_smaller_vocabulary(tmp_path: Path) -> None:
    data = write(tmp_path / "data", ["ab"])
    assert len(train(Args(data, tmp_path / "out"))) == BYTES + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": BYTES - 1}, "--vocab_size 513 must be at least 514"),
        (
            {"caption_column": "caption"},
            r"has no column 'caption': set --caption_column to one of file_name, text",
        ),
        ({"train_data_dir": Path("/nowhere")}, "there is no folder /nowhere: check --train_data_dir"),
    ],
)
def test_refused_in_a_sentence(
    args: Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    given = {"train_data_dir": args.train_data_dir, "output_dir": tmp_path / "out", **changes}
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *(f"--{name}={value}" for name, value in given.items())])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train_tokenizer.main()
    assert not (tmp_path / "out").exists()


def test_what_it_says_in_the_end(
    args: Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["train_tokenizer.py", "--train_data_dir", str(args.train_data_dir), "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--vocab_size", "514", "--model_max_length", "10"])
    train_tokenizer.main()
    assert capsys.readouterr().out.startswith("514 tokens from 30 captions; a caption has ")
