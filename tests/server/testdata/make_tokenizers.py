"""Trains the small tokenizer.model fixtures of tests/server.

Needs the Python package sentencepiece (0.2.1 made the committed files): python3 make_tokenizers.py
All are BPE. prefix.model and no_prefix.model have the flags Nemotron's may have: user-defined <extra_id_N>, byte
fallback, no normalization, a dummy prefix or none. nfkc.model is the opposite in every flag: a character map, spaces
collapsed, no byte fallback.
"""

import io
import os
import pathlib

import sentencepiece

WORDS = """the quick brown fox jumps over the lazy dog while extra identities idle in a large grid of characters and
to be or not to be that is the question whether it is nobler in the mind to suffer the slings and arrows of fortune
extra_id extra id <b>bold</b> <i>id</i> x_0 x_1 s_2 /s/ café naïve über Straße 東京 北京 日本 123 2024 1999
""".split()


def corpus():
    """Sentences with every word in several contexts, deterministic."""
    for i in range(400):
        yield " ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(9)) + ".,!?<>"[i % 6]


def train(name, **options):
    # A writer, and relative paths: the trainer stores the paths it is given in the file.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=model, model_type="bpe", pad_id=0, unk_id=1, bos_id=2,
        eos_id=3, hard_vocab_limit=False, minloglevel=2, **options)
    pathlib.Path(f"{name}.model").write_bytes(model.getvalue())


def main():
    os.chdir(pathlib.Path(__file__).resolve().parent)
    special = [f"<extra_id_{i}>" for i in range(12)]
    for name, prefix in (("prefix", True), ("no_prefix", False)):
        train(name, vocab_size=500, byte_fallback=True, character_coverage=0.98, split_digits=True,
              user_defined_symbols=special, normalization_rule_name="identity", add_dummy_prefix=prefix,
              remove_extra_whitespaces=False)
    rules = pathlib.Path("rules.tsv")
    # Full-width letters to ASCII, an ideographic space and a tab to a space, a ligature to two letters, a joiner to nothing.
    pairs = [(0xFF21 + i, [0x41 + i]) for i in range(26)] + [(0x3000, [0x20]), (9, [0x20]), (0xFB01, [0x66, 0x69]),
                                                             (0x200D, [])]
    rules.write_text("".join(f"{a:04X}\t{' '.join(f'{x:04X}' for x in b)}\n" for a, b in pairs))
    train("nfkc", vocab_size=160, byte_fallback=False, character_coverage=1.0, normalization_rule_tsv=str(rules),
          add_dummy_prefix=True, remove_extra_whitespaces=True)
    rules.unlink()


if __name__ == "__main__":
    main()
