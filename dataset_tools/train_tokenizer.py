"""Learns a small BPE vocabulary from captions, in the format of CLIP's tokenizer.

python3 dataset_tools/train_tokenizer.py --train_data_dir data/avatars/train --vocab_size 1024 --output_dir tokenizer
"""

import json
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags
from codi_jax.data.columns import Columns, captions_of
from codi_jax.data.sources import open_source
from codi_jax.data.table_files import load_prompts
from codi_jax.io.atomic import staged_folder, write_json, write_text

_START, _END = "<|startoftext|>", "<|endoftext|>"
# CLIP's pattern: contractions, words, single digits, and runs of anything else.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class Args(Flags):
    """Learns a small vocabulary from captions, for a text encoder that is trained from scratch."""

    train_data_dir: Path
    """Folder with a metadata.jsonl or meta.jsonl, or any other data that training accepts; or a file of texts, one per
    line or as parquet."""
    output_dir: Path
    """Folder for vocab.json, merges.txt and tokenizer_config.json."""
    caption_column: str = "text"
    """Column of the captions: a text, or a list of texts."""
    vocab_size: int = 2048
    """Size of the vocabulary: 512 tokens for single bytes, 2 for start and end, the rest learned."""
    model_max_length: int = 32
    """Tokens of a prompt, including start and end; longer prompts are truncated."""

    def check(self) -> None:
        super().check()
        least = 2 * len(ByteLevel.alphabet()) + 2
        if self.vocab_size < least:
            raise ValueError(
                f"--vocab_size {self.vocab_size} must be at least {least}, two tokens for every byte and two more."
            )
        self.require_at_least(3, "model_max_length")


def captions(args: Args) -> list[str]:
    """All captions of the data set."""
    if args.train_data_dir.is_file():
        rows = load_prompts(args.train_data_dir, Columns(None, args.caption_column), "--train_data_dir")
        if args.caption_column not in rows.column_names:
            raise ValueError(f"{args.train_data_dir} has no column {args.caption_column!r}: check --caption_column.")
        return [text for cell in rows[args.caption_column] for text in captions_of(cell) if text]
    source = open_source(train_data_dir=str(args.train_data_dir), caption_column=args.caption_column)
    assert isinstance(source.rows, Dataset)
    return [text for cell in source.rows[source.columns.caption or ""] for text in captions_of(cell) if text]


def train(args: Args) -> CLIPTokenizer:
    """Learns the vocabulary, writes it, and loads it again.

    Raises:
      ValueError: if there are no captions, or the vocabulary has no room for the bytes.
    """
    args.check()
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern=Regex(_WORDS), behavior="removed", invert=True),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    single = [*letters, *(letter + "</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size - 2,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(args), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    merges = merges[: args.vocab_size - len(single) - 2]
    tokens = [*single, *("".join(merge) for merge in merges), _START, _END]
    write(args, tokens, merges)
    return CLIPTokenizer.from_pretrained(args.output_dir)


def write(args: Args, tokens: list[str], merges: list[tuple[str, ...]]) -> None:
    """Writes the files of a CLIP tokenizer."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": args.model_max_length, **special}
    with staged_folder(args.output_dir) as stage:
        write_text(stage / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        write_text(stage / "merges.txt", "\n".join(lines) + "\n")
        write_json(stage / "tokenizer_config.json", config)
        write_json(stage / "special_tokens_map.json", special)


def tell(args: Args) -> None:
    """Learns the vocabulary, and prints the captions' lengths in tokens."""
    tokenizer = train(args)
    texts = captions(args)
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    longer = sum(length > args.model_max_length for length in lengths)
    print(
        f"{len(tokenizer)} tokens from {len(texts)} captions; a caption has {sum(lengths) / len(lengths):.1f} tokens "
        f"on average and {max(lengths)} at most; {longer} are longer than {args.model_max_length}"
    )


def main() -> None:
    """The command line."""
    command_line.run(Args, tell)


if __name__ == "__main__":
    main()
