"""Zero-shot classification: class names in sentences, and images compared with them.

As https://github.com/Sense-GVT/DeCLIP at 5d99a855 does it (prototype/solver/clip_solver.py): the
features of a class are the mean of its sentences' unit features, made unit again. The 80 sentences
in imagenet80.txt are OpenAI's for ImageNet (https://github.com/openai/CLIP, MIT).

Shape letters: C classes, S sentences a class, N texts, T tokens, B images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from declip.model import CLIP
from declip.tokenizer import Tokenizer
from zoo_common.distributed import Processes, sum_across
from zoo_common.errors import UserError

IMAGENET80 = Path(__file__).with_name("imagenet80.txt")

_PLACE = "{}"
_ROUND = 8


def read_prompts(name: str) -> list[str]:
    """Sentences with ``{}`` for the class.

    Args:
        name: ``imagenet80``, ``one``, or a file with a sentence a line; ``{0}`` is ``{}``, too.

    Raises:
        UserError: no such file, or a sentence without a place for the class.
    """
    if name == "one":
        return ["a photo of a {}."]
    file = IMAGENET80 if name == "imagenet80" else Path(name)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"evaluate.prompts={name} cannot be read ({error}): give imagenet80, one, or a text "
            "file with a sentence a line."
        ) from error
    prompts = [line.strip().replace("{0}", _PLACE) for line in lines if line.strip()]
    wrong = next((prompt for prompt in prompts if prompt.count(_PLACE) != 1), None)
    if not prompts or wrong is not None:
        what = "is empty" if wrong is None else f"has the line '{wrong:.100}'"
        raise UserError(f"{file} {what}: give sentences with {{}} once, where the class goes.")
    return prompts


class ClassTexts:
    """The sentences of all classes as tokens.

    Args:
        classes: their names.
        prompts: sentences with ``{}``.
        tokenizer: the vocabulary.
        context_length: longest row of tokens.
        static: rows of the context's length, in place of the longest sentence's.
    """

    def __init__(
        self,
        classes: Sequence[str],
        prompts: Sequence[str],
        tokenizer: Tokenizer,
        context_length: int,
        *,
        static: bool = False,
    ) -> None:
        self.classes = len(classes)
        self.prompts = len(prompts)
        texts = [prompt.replace(_PLACE, name) for name in classes for prompt in prompts]
        self.tokens_NT, self.ends_N = tokenize(tokenizer, texts, context_length, static=static)

    def shard(self, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
        """The tokens (N, T) and ends (N,) of every ``world_size``-th class from ``rank`` on."""
        tokens_CST = self.tokens_NT.unflatten(0, (self.classes, self.prompts))
        ends_CS = self.ends_N.unflatten(0, (self.classes, self.prompts))
        mine = slice(rank, None, world_size)
        return tokens_CST[mine].flatten(0, 1), ends_CS[mine].flatten()


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], context_length: int, *, static: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T), zeros behind the end token, and where that stands, (N,); both int64."""
    rows = [tokenizer.row(text, context_length) for text in texts]
    longest = max(map(len, rows))
    length = context_length if static else min(context_length, -(-longest // _ROUND) * _ROUND)
    tokens_NT = torch.zeros(len(rows), length, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens_NT[place, : len(row)] = torch.tensor(row)
    return tokens_NT, torch.tensor([len(row) - 1 for row in rows])


def class_features(
    model: CLIP, texts: ClassTexts, processes: Processes, device: torch.device, batch_size: int
) -> Tensor:
    """Unit features (C, D) of all classes, float32, on every rank; each rank makes its share.

    Args:
        model: in evaluation mode.
        texts: the classes' sentences.
        processes: this rank, and how many there are.
        device: the model's.
        batch_size: texts a pass; the last pass is filled up, so that all have one shape.
    """
    tokens_NT, ends_N = texts.shard(processes.rank, processes.world_size)
    count = len(tokens_NT)
    filled = torch.arange(-(-count // batch_size) * batch_size) % max(count, 1)
    parts = [
        F.normalize(
            model.caption_features(tokens_NT[part].to(device), ends_N[part].to(device)).float(),
            dim=1,
        )
        for part in filled.split(batch_size)
        if len(part)
    ]
    width = model.encode_text.text_projection.out_features
    means_CD = torch.zeros(texts.classes, width, device=device)
    if parts:
        units_ND = torch.cat(parts)[:count]
        means_CD[processes.rank :: processes.world_size] = units_ND.unflatten(
            0, (-1, texts.prompts)
        ).mean(dim=1)
    # Each class comes from one rank, the others add zeros: exact.
    return F.normalize(sum_across(means_CD).to(device), dim=1)


def similarities(model: CLIP, images_BCHW: Tensor, classes_CD: Tensor) -> Tensor:
    """Cosines (B, C) of images with classes, float32."""
    units_BD = F.normalize(model.image_features(images_BCHW).float(), dim=1)
    return units_BD @ classes_CD.T
