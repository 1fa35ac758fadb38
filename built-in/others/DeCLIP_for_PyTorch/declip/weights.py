"""Weights files of others and our own; the names of their tensors are ours.

Read are Sense-GVT/DeCLIP's checkpoints (``{'model': ..., 'optimizer', 'last_iter'}``, names with
``module.`` in front) and the zoo's.
"""

from zoo_common.weights import Content, Kind, Reader


def _has_towers(content: Content) -> bool:
    return "logit_scale" in content.weights and (
        "encode_text.token_embedding.weight" in content.weights
    )


def _same(name: str) -> str:
    return name


_READER = Reader(
    kinds=(
        Kind("zoo", lambda content: content.is_zoo_checkpoint and _has_towers(content), _same),
        Kind("Sense-GVT/DeCLIP", _has_towers, _same),
    ),
    known="Sense-GVT/DeCLIP's or a checkpoint of this zoo",
    outputs=(),
    class_layer="",
    background=0,
    network_settings="model.objective, model.tower, widths and text.vocabulary",
)
load_start = _READER.load_start
load_for_evaluation = _READER.load_for_evaluation
