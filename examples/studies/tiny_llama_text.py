"""The text that train_tiny_llama.py trains on: Python sources, split by file, and synthetic recall; and its tokenizer.

Size legend: B rows a batch, T tokens a row (the context), N tokens of a stream.
"""

import hashlib
import random
import sysconfig
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


BOS = "<s>"
EOS = "</s>"
PAD = "<pad>"
# What stands before and after the number: the needle, and how the dense blocks are written (half of them as needles).
NEEDLE = ("The magic number of {} is", ".")
DENSE = [("{}:", "\n"), ("{} =", "\n"), ("{} ->", "\n"), *[("The magic number of {} is", ".\n")] * 3]
HELD_OUT_BYTES = 145_000
CALIBRATION_BYTES = 240_000
EXCERPT_BYTES = 12_000
TEXT_IN_WORDS = {
    "stdlib": "the Python standard library's sources",
    "stdlib+packages": "the sources of the Python standard library and of installed packages",
    "smoke": "a few files of the Python standard library",
}


def hash_share(name, parts):
    """A number in [0, parts) that depends on `name` alone: the same split on every machine, whatever else is there."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % parts


def is_held_out(name, parts=16):
    """Files, keys and numbers alike: one in `parts` is never trained on."""
    return hash_share(name, parts) == 0


def read_sources(text):
    """Sorted (name, content) of the Python files of `text`; the name is the path below its root, with forward slashes.

    Left out: character tables (`encodings`), how this Python was built (`_sysconfigdata`) and files that are mostly
    digits or escapes, which only teach noise.
    """
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"]] + ([paths["purelib"]] if text == "stdlib+packages" else [])
    sources = []
    for root in map(Path, roots):
        for path in sorted(root.glob("*.py") if text == "smoke" else root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name.startswith(("encodings/", "_sysconfigdata", "site-packages/", "dist-packages/")):
                continue
            try:
                content = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            readable = sum(map(str.isalpha, content)) + sum(map(str.isspace, content))
            if len(content) > 200 and readable > 0.6 * len(content):
                sources.append((name, content))
    if not sources:
        raise SystemExit(f"no Python sources under {roots}: install Python with its library sources (not only .pyc)")
    return sources[:40] if text == "smoke" else sources


def excerpts(sources, total_bytes):
    """[(name, text)]: heads of files in hash order, whole lines, EXCERPT_BYTES each, total_bytes in all at most."""
    chosen = []
    used = 0
    for name, content in sorted(sources, key=lambda source: hash_share("excerpt " + source[0], 2**32)):
        text = content.encode()[:EXCERPT_BYTES].decode(errors="ignore")
        text = text[: text.rfind("\n") + 1]
        if used + len(text.encode()) + 1 <= total_bytes and content.isascii():
            chosen.append((name, text))
            used += len(text.encode()) + 1
    return chosen


def train_tokenizer(texts, vocab_size, context):
    """Byte-level BPE. Every digit is a token of its own, so that a number never seen is still made of known tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=context
    )


def encode(tokenizer, texts):
    """List of token lists, without special tokens."""
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def pack(tokenizer, texts):
    """All documents in one stream (N,): bos, tokens, eos, bos, ..."""
    bos = tokenizer.bos_token_id
    eos = tokenizer.eos_token_id
    chunks = []
    for start in range(0, len(texts), 256):
        documents = ([bos, *ids, eos] for ids in encode(tokenizer, texts[start : start + 256]))
        chunks.append(torch.tensor(list(chain(*documents)), dtype=torch.int32))
    return torch.cat(chunks)


def prepare_text(size, seed, tokenizer=None):
    """Read, split and tokenize: tokenizer (trained unless given), stream (N,), {what: excerpts}, numbers to record."""
    sources = [source for source in read_sources(size.text) if not is_held_out(source[0])]
    random.Random(seed).shuffle(sources)
    texts = [text for _, text in sources]
    tokenizer = tokenizer or train_tokenizer(texts[:4000], size.vocab_size, size.context)
    stream = pack(tokenizer, texts)
    # Only the standard library is quoted, for its license, and none of its tests, for their odd data.
    quoted = [source for source in read_sources(size.text.removesuffix("+packages")) if "test" not in source[0]]
    sides = {"heldout": HELD_OUT_BYTES, "calibration": CALIBRATION_BYTES * 3 // 4}
    parts = {
        side: excerpts([source for source in quoted if is_held_out(source[0]) == (side == "heldout")], room)
        for side, room in sides.items()
    }
    numbers = {
        "source": TEXT_IN_WORDS[size.text],
        "train_files": len(texts),
        "train_bytes": sum(len(text.encode()) for text in texts),
        "train_tokens": len(stream),
    }
    return tokenizer, stream, parts, numbers | {f"{what}_files": [name for name, _ in parts[what]] for what in parts}


def held_out_windows(tokenizer, text, context):
    """`text` cut into windows of context - 1 tokens, each behind a bos: (B, T). What does not fill one is dropped."""
    ids = torch.tensor(encode(tokenizer, [text])[0])
    ids = ids[: len(ids) // (context - 1) * (context - 1)].view(-1, context - 1)
    return torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], dim=1)


class Recall:
    """Synthetic rows in which something said earlier is asked for again.

    `held_out` draws keys and numbers that training never draws. `filler` (N,) is the stream the needles lie in.
    """

    def __init__(self, tokenizer, filler, context, seed, held_out):
        self.tokenizer = tokenizer
        self.filler = filler
        self.context = context
        self.held_out = held_out
        self.random = random.Random(seed)
        self.newlines = {i for token, i in tokenizer.get_vocab().items() if token.startswith("\u010a")}

    def draw(self, make):
        """Draw until the word lies on our side of the split."""
        while is_held_out(word := make(), 8) != self.held_out:
            pass
        return word

    def key(self):
        syllables = self.random.choice((2, 2, 3))
        word = "".join(self.random.choice("bdfgklmnprstvz") + self.random.choice("aeiou") for _ in range(syllables))
        return (word + self.random.choice(["", "n", "r", "s", "l"])).capitalize()

    def pairs(self, count):
        """`count` different keys, each with four digits."""
        keys = set()
        while len(keys) < count:
            keys.add(self.draw(self.key))
        return [(key, self.draw(lambda: f"{self.random.randrange(10_000):04d}")) for key in sorted(keys)]

    def shuffled(self, items):
        return self.random.sample(items, len(items))

    def triples(self, pairs, prompt, end):
        """Token lists prompt, answer, end for each pair, one after another."""
        return encode(self.tokenizer, [p for key, number in pairs for p in (prompt.format(key), f" {number}", end)])

    def needle_row(self, needles):
        """One row of text in which `needles` facts lie, all asked for at its end: (T,) ids, [(start, end)] answers."""
        pairs = self.shuffled(self.pairs(needles))
        prompt = "\n" + NEEDLE[0]
        end = NEEDLE[1]
        facts = [list(chain(*self.triples([pair], prompt, end))) for pair in pairs]
        parts = self.triples(self.shuffled(pairs), prompt, end)
        room = self.context - 1 - sum(map(len, facts)) - sum(map(len, parts))
        start = self.random.randrange(len(self.filler) - room)
        text = self.filler[start : start + room].tolist()
        breaks = [i for i, token in enumerate(text) if token in self.newlines] or [0]
        # Late places first, so that earlier insertions do not move them.
        places = sorted(self.random.choices(breaks, k=needles), reverse=True)
        for place, fact in zip(places, facts, strict=True):
            text[place:place] = fact
        return self.finish([self.tokenizer.bos_token_id, *text], parts)

    def dense_row(self, count=None):
        """Blocks of `count` lines `key: number`, each told twice: (T,) ids, answers of the second telling."""
        row, answers = [], []
        while len(row) < self.context:
            pairs = self.shuffled(self.pairs(count or self.random.randrange(2, 11)))
            # Some blocks are told in the same order again: plain copying comes first and leads to look-up by key.
            again = pairs if count is None and self.random.random() < 0.35 else self.shuffled(pairs)
            parts = self.triples(pairs + again, *self.random.choice(DENSE))
            told = parts[: 3 * len(pairs)]
            asked = parts[3 * len(pairs) :]
            row, spans = self.finish([*row, self.tokenizer.bos_token_id, *chain(*told)], asked)
            answers += spans
        return row[: self.context], [span for span in answers if span[1] <= self.context]

    def repeat_row(self):
        """Runs of random tokens, each told twice: (T,) ids. This teaches copying within a few hundred steps."""
        special = len(self.tokenizer.all_special_ids)
        vocabulary = range(special, len(self.tokenizer))
        row = [self.tokenizer.bos_token_id]
        while len(row) < self.context:
            row += self.random.choices(vocabulary, k=self.random.randint(4, 40)) * 2
        return row[: self.context]

    def training_row(self):
        """Repeats teach copying, dense blocks ask for many answers a row, needles teach it across a distance."""
        kind = self.random.random()
        if kind < 0.25:
            return self.repeat_row()
        if kind < 0.65:
            return self.dense_row()[0]
        return self.needle_row(self.random.randint(1, max(1, self.context // 80)))[0]

    def finish(self, row, parts):
        """Append (prompt, answer, end) triples to `row` and note where the answers lie."""
        answers = []
        for i, part in enumerate(parts):
            if i % 3 == 1:
                answers.append((len(row), len(row) + len(part)))
            row = row + part
        return row, answers


def training_rows(size, stream, recall, share, seed):
    """Endless batches (B, T): rows of `stream` (N,) in random order, epoch after epoch, and `share` of recall rows."""
    generator = torch.Generator().manual_seed(seed)
    recall_rows = round(share * size.batch)
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size.batch:
            # Another offset every epoch: a document is not always cut at the same places.
            offset = int(torch.randint(size.context, (1,), generator=generator))
            starts = torch.arange(offset, len(stream) - size.context + 1, size.context)
            order = torch.cat([order, starts[torch.randperm(len(starts), generator=generator)]])
        taken = order[: size.batch - recall_rows]
        order = order[size.batch - recall_rows :]
        rows = [stream[start : start + size.context] for start in taken]
        rows += [torch.tensor(recall.training_row(), dtype=torch.int32) for _ in range(recall_rows)]
        yield torch.stack(rows).long()


def calibration_text(parts, tokenizer, recall):
    """Excerpts of training files, each followed by a needle row and a dense row: the mixture that was trained on."""
    text = ""
    for _, excerpt in parts:
        rows = [recall.needle_row(2)[0], recall.dense_row()[0]]
        text += excerpt + "\n" + "\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows) + "\n"
    return text[:CALIBRATION_BYTES]
