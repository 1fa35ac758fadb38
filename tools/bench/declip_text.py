"""Times our tokenizer and EDA against DeCLIP's, and compares what they give.

    python tools/bench/declip_text.py --peer DIR [--captions 4000] [--random 20000]

The peer is a clone of https://github.com/Sense-GVT/DeCLIP; open_clip's tokenizer, which has the
same merges and no mask token, runs beside if it is installed. Captions are drawn here: words of
CLIP's vocabulary, the frequent ones more often, with capitals, punctuation and numbers, and one in
twenty with what only ftfy and html can read. Ids are compared on these and on random texts, from
characters of all of Unicode and from pieces that make trouble. Then all have seen the captions
once, and are timed in turns.

EDA is timed if nltk's corpora are there: ours with its cache, ours without, and textaugment's if
it is installed; ours has to give textaugment's text for the same seed.

The exit code is 1 if ids or texts differ, or if our tokenizer's rate is under ``--at_least`` times
the peer's.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alternate import alternate
from declip_peer import CLONE, MISSING

from declip.eda import Eda
from declip.tokenizer import Tokenizer, find_vocabulary
from zoo_common.errors import UserError

TROUBLE = (
    *("<|startoftext|>", "<|EndOfText|>", "<|mask|>", "<|", "it's", "'S", "'\u017f", "'ll've"),
    *("&amp;", "&lt;b&gt;", "&eacute", "&#233;", "&#x1F600;", "&#28;", "&#x85;", "&amp;amp;quot;"),
    *("café", "cafÃ©", "\u00e2\u20ac\u2122", "\u00c2\u00a0", "\u00f0\u0178\u02dc"),
    *("\u201c", "\u2026", "\ufb01", "\u0130", "\u212a", "\u00df", "\u01c5", "\u2177", "\u00bd"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469", "\u2764\ufe0f", "\ud83d", "\udc00", "\ufeff"),
    *("\x00", "\x07", "\x0b", "\x0c", "\x1b[31m", "\x1c", "\x7f", "\x85", "\r", "\r\n", "\n", "\t"),
    *(" ", "  ", "\u00a0", "\u2028", "\u3000", "\u200b", "\u00ad", "\u0301", "\u0663", "\uff11"),
    *("\uff21", "\u4e2d\u6587", "\ud55c\uae00", "\u0634\u0645\u0633", "\u0928\u092e\u0938"),
)
READ_BY_FTFY = (
    *("Café {}", "{} \u2013 M\u00fcnchen", "{}\u2026", "it\u2019s {}", "\u201c{}\u201d"),
    *("{} &amp; more", "{} &quot;here&quot;", "{} \u2665", "{} cafÃ©", "\u00a9 {}"),
)
ENDINGS = ("", "", "", ".", "!", " (2009)", " IMG_{}", " #{}", ", day {}", " - {} x 640")


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="clone of Sense-GVT/DeCLIP")
    parser.add_argument("--captions", type=int, default=4000, help="to time (default 4000)")
    parser.add_argument("--random", type=int, default=20000, help="texts to compare beside these")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each (default 7)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts (default 0)")
    parser.add_argument("--at_least", type=float, default=5.0, help="ratio to reach (default 5)")
    return parser.parse_args()


def load_file(name: str, path: Path) -> Any:
    """The module of one file, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_captions(words: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Captions of 4 to 24 of the words, of which the first ones are the frequent ones."""
    frequencies = [1 / (rank + 3) for rank in range(len(words))]
    captions = []
    for number in range(count):
        caption = " ".join(draw.choices(words, frequencies, k=draw.randint(4, 24)))
        caption = caption.capitalize() if draw.random() < 0.5 else caption.title()
        caption += draw.choice(ENDINGS).format(draw.randrange(10000))
        if number % 20 == 0:
            caption = draw.choice(READ_BY_FTFY).format(caption)
        captions.append(caption)
    return captions


def draw_text(words: Sequence[str], draw: random.Random) -> str:
    """A text of one of four kinds: pieces that make trouble, or characters of three ranges."""
    kind = draw.randrange(5)
    if kind < 2:
        pieces = [draw.choice(TROUBLE if draw.random() < 0.7 else words) for _ in range(10)]
        return "".join(pieces[: draw.randint(0, 10)])
    top = (0x80, 0x250, 0x110000)[kind - 2]
    return "".join(chr(draw.randrange(top)) for _ in range(draw.randint(0, 30)))


def differing(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> int:
    """How many texts have other ids; prints the first of them."""
    found = 0
    for text in texts:
        ids = theirs.encode(text)
        row = [ours.start_id, *ids, ours.end_id]
        cut = row if len(row) <= 16 else [row[0], *row[1:15], row[-1]]
        if ours.encode(text) != ids or ours.row(text, 16) != cut:
            if not found:
                print(f"other ids of {text!r}: ours {ours.encode(text)}, theirs {ids}")
            found += 1
    return found


def best_rates(
    calls: dict[str, Callable[[str], Any]], captions: Sequence[str], rounds: int
) -> dict[str, float]:
    """Captions a second of each in its fastest round, one call a caption."""

    def contestant(call: Callable[[str], Any]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            start = time.perf_counter()
            for caption in captions:
                call(caption)
            return {"all": time.perf_counter() - start}

        return run

    runs = {name: contestant(call) for name, call in calls.items()}
    seconds = alternate(runs, rounds=rounds, warmup=1)
    return {name: len(captions) / min(phases["all"]) for name, phases in seconds.items()}


def print_rates(title: str, rates: dict[str, float]) -> None:
    """Prints captions a second, and how many times slower than the first each is."""
    print(title)
    ours = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"  {name:<22} {rate:10,.0f} captions/s  ours: {ours / rate:5.2f} times")


def bench_tokenizer(options: argparse.Namespace) -> bool:
    """Compares and times the tokenizers; whether all is as it should be."""
    path = options.peer / "prototype" / "model" / "utils" / "text_utils" / "simple_tokenizer.py"
    if not path.is_file():
        error = f"{path} is absent"
        raise SystemExit(MISSING.format(what="DeCLIP", error=error, advice=CLONE))
    vocabulary = find_vocabulary("", None)
    theirs = load_file("simple_tokenizer", path).SimpleTokenizer(str(vocabulary))
    ours = Tokenizer(vocabulary)
    draw = random.Random(options.seed)
    ends = [name.removesuffix("</w>") for name in theirs.encoder if name.endswith("</w>")]
    words = [word for word in ends if word.isascii() and word.isalnum()]
    captions = draw_captions(words, options.captions, draw)
    texts = captions + [draw_text(words, draw) for _ in range(options.random)]
    different = differing(ours, theirs, texts)
    print(f"ids: {different} of {len(texts):,} texts differ (seed {options.seed})")

    calls: dict[str, Callable[[str], Any]] = {"ours": ours.encode, "DeCLIP": theirs.encode}
    if importlib.util.find_spec("open_clip"):
        from open_clip.tokenizer import SimpleTokenizer

        calls["open_clip"] = SimpleTokenizer().encode
    rates = best_rates(calls, captions, options.rounds)
    print_rates("tokenizing, all words seen before", rates)
    for_ftfy = captions[::20]
    print_rates("the same, texts for ftfy only", best_rates(calls, for_ftfy, options.rounds))
    ratio = rates["ours"] / rates["DeCLIP"]
    if ratio < options.at_least:
        print(f"ours is {ratio:.2f} times as fast as DeCLIP's, which is under {options.at_least}")
    return not different and ratio >= options.at_least


def textaugment_eda() -> Callable[[str], str] | None:
    """DeCLIP's augmentation by textaugment, or None without it."""
    spec = importlib.util.find_spec("textaugment")
    if spec is None or spec.submodule_search_locations is None:
        return None
    import nltk

    nltk.download = lambda *_: True  # it would ask a server
    module = load_file("textaugment_eda", Path(spec.submodule_search_locations[0], "eda.py"))
    eda = module.EDA()
    ways = [eda.synonym_replacement, eda.random_swap, eda.random_deletion]
    return lambda caption: str(random.choice(ways)(caption))


def bench_eda(options: argparse.Namespace) -> bool:
    """Compares and times EDA; whether texts are as they should be."""
    try:
        start = time.perf_counter()
        eda = Eda()
        print(f"EDA: WordNet read in {time.perf_counter() - start:.1f} s")
    except UserError as error:
        print(f"EDA: not run. {error}")
        return True
    known = eda._synonyms
    assert known is not None
    draw = random.Random(options.seed)
    words = sorted({word for word in known._wordnet.all_lemma_names() if word.isalpha()})
    draw.shuffle(words)
    words = [*known.stop_words, *words]
    captions = draw_captions(words, options.captions, draw)
    theirs = textaugment_eda()
    calls: dict[str, Callable[[str], Any]] = {"ours": eda}
    different = 0
    if theirs is not None:
        for seed, caption in enumerate(captions):
            random.seed(seed)
            text = eda(caption)
            random.seed(seed)
            different += text != theirs(caption)
        print(f"texts: {different} of {len(captions):,} differ from textaugment's")
        calls["textaugment"] = theirs
    cached = best_rates(calls, captions, options.rounds)
    known.of = known.read  # type: ignore[method-assign]
    cached["ours without cache"] = best_rates({"ours": eda}, captions, options.rounds)["ours"]
    print_rates("EDA", cached)
    return not different


def main() -> int:
    """Runs the bench.

    Returns:
        The exit code.
    """
    options = parse_options()
    as_they_should = [bench_tokenizer(options), bench_eda(options)]
    return 0 if all(as_they_should) else 1


if __name__ == "__main__":
    sys.exit(main())
