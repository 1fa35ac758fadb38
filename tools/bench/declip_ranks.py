"""Memory and messages of DeCLIP's losses over many ranks: ours against the original's form.

    python tools/bench/declip_ranks.py [--batch 128] [--dim 512] [--queue 65536]

One process plays rank 0 of 16, 64 and 256 ranks over torch's fake process group, which sends
nothing but takes and returns tensors of the true sizes. A step is forward and backward pass of the
losses that ranks exchange features for, contrastive and nearest-neighbour, on two views and two
texts, from the features on. Counted are the bytes of all tensors (buffers inside an operator are
not), and of what a rank receives if messages go around a ring.

The original's form is that of Sense-GVT/DeCLIP at 5d99a855 (prototype/model/declip.py, clip.py,
utils/nnclr_modules), written down here: a list of W tensors for each of six gathers, the gradient
of a gathered tensor added up over all ranks in whole, twelve matrices of logits, and a queue that
is copied and normalised at each of three visits.

The bench ends with exit code 1 if our memory grows faster than the number of ranks, if the two
forms' losses or gradients differ, or if ours keeps, holds or receives more than the original's.

Shape letters: B images of a rank, N of all ranks, V views, U texts, D features, Q rows of a queue.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from declip.objective import Objective

MODEL_DIR = Path(__file__).resolve().parents[2] / "built-in/others/DeCLIP_for_PyTorch"
RANKS = (16, 64, 256)
VIEWS = TEXTS = 2
WEIGHTS = {"clip": 0.4, "nn_text": 0.2}
SLACK = 1.02  # of growth: a peak may lie in another place of the step at few ranks
MB = 1e6

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128, help="images of a rank (default 128)")
    parser.add_argument("--dim", type=int, default=512, help="width of features (default 512)")
    parser.add_argument("--queue", type=int, default=65536, help="texts in it (default 65536)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    return parser.parse_args()


@dataclass
class Cost:
    """What a step takes beside its inputs and the queue.

    Attributes:
        kept: bytes of tensors between forward and backward pass.
        peak: the most bytes of tensors at one time.
        messages: how often each collective was called.
        received: bytes that this rank receives.
    """

    kept: int = 0
    peak: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    received: int = 0


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it, and what collectives move."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()
        self.alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls the operator; PyTorch calls this."""
        if func.namespace == "c10d":
            self._count_message(func._opname, args)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def leave_out(self, *tensors: Tensor) -> None:
        """Does not count what was there before the step."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.cost.peak = max(self.cost.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def _count_message(self, name: str, args: Sequence[Any]) -> None:
        ranks = dist.get_world_size()
        # Whichever side is the whole tensor is the larger one; an all_reduce goes around twice.
        sides = [tensors_bytes(side) for side in args[:2]]
        rounds = 2 if name.startswith("allreduce") else 1
        if name == "barrier":
            sides = [0]
        self.cost.messages[name.strip("_")] += 1
        self.cost.received += rounds * max(sides) * (ranks - 1) // ranks


def tensors_bytes(node: Any) -> int:
    """Bytes of all tensors in containers."""
    return sum(leaf.nbytes for leaf in tree_leaves(node) if isinstance(leaf, Tensor))


# ------------------------------------------------------------------------------------------------
# The original's form.


class WholeGather(torch.autograd.Function):
    """A tensor of every rank; the gradients of all of them are added up on all ranks."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_BD)
        return torch.cat(parts).view(-1, *rows_BD.shape)

    @staticmethod
    def backward(ctx: Any, gradient_WBD: Tensor) -> Tensor:
        whole_WBD = gradient_WBD.clone()
        dist.all_reduce(whole_WBD)
        return whole_WBD[dist.get_rank()]


def whole_gather(rows_BD: Tensor) -> Tensor:
    """(B, D) to (N, D)."""
    rows_WBD: Tensor = WholeGather.apply(rows_BD)
    return rows_WBD.flatten(0, 1)


class CopiedQueue:
    """A queue of columns, (D, Q), that every visit copies and normalises."""

    def __init__(self, rows_QD: Tensor) -> None:
        self.bank_DQ = rows_QD.t().contiguous()
        self.position = 0

    def visit(self, texts_BD: Tensor, update: bool) -> Tensor:
        bank_QD = self.bank_DQ.clone().t()
        if update:
            end = min(self.position + len(texts_BD), bank_QD.shape[0])
            self.bank_DQ[:, self.position : end] = texts_BD[: end - self.position].t()
            self.position = end % bank_QD.shape[0]
        texts_BD, unit_QD = F.normalize(texts_BD, dim=1), F.normalize(bank_QD, dim=1)
        _, best_B1 = torch.einsum("nd,md->nm", texts_BD, unit_QD).topk(k=1, dim=1)
        return bank_QD.index_select(0, best_B1[:, 0])


def original(queue: CopiedQueue) -> Step:
    """The original's step."""

    def run(images_VBD: Tensor, texts_UBD: Tensor, scale: Tensor) -> Tensor:
        images = [part / part.norm(dim=-1, keepdim=True) for part in images_VBD]
        texts = [part / (part.norm(dim=-1, keepdim=True) + 1e-10) for part in texts_UBD]
        dist.barrier()
        all_images = [whole_gather(part) for part in images]
        all_texts = [whole_gather(part) for part in texts]
        dist.barrier()
        to_texts = [scale * one @ other.t() for other in all_texts for one in images]
        to_images = [scale * one @ other.t() for one in texts for other in all_images]
        plain, augmented = (part.detach() for part in texts)
        nearest = [queue.visit(plain, False), queue.visit(augmented, True)]
        queue.visit(plain, True)
        unit = [part / (part.norm(dim=-1, keepdim=True) + 1e-10) for part in nearest]
        all_nearest = [whole_gather(part) for part in unit]
        to_nearest = [scale * one @ other.t() for one in images for other in all_nearest]
        dist.barrier()
        size = images_VBD.shape[1]
        labels_B = dist.get_rank() * size + torch.arange(size)

        def mean(matrices: Sequence[Tensor]) -> Tensor:
            return torch.stack([F.cross_entropy(one, labels_B) for one in matrices]).mean()

        return WEIGHTS["clip"] * mean(to_texts + to_images) + WEIGHTS["nn_text"] * mean(to_nearest)

    return run


def ours(objective: Objective) -> Step:
    """Our step."""
    from declip.batch import Batch
    from declip.model import Features

    def run(images_VBD: Tensor, texts_UBD: Tensor, scale: Tensor) -> Tensor:
        nothing = torch.zeros(0, dtype=torch.int64)
        batch = Batch(nothing, nothing, nothing, None, [], [])
        losses = objective(Features(images_VBD, texts_UBD, scale), batch)
        return torch.stack(list(losses.values())).sum()

    return run


# ------------------------------------------------------------------------------------------------


def inputs(options: argparse.Namespace) -> list[Tensor]:
    """Features and scale, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((VIEWS, options.batch, options.dim), (TEXTS, options.batch, options.dim))
    features = [torch.randn(*shape, generator=generator) for shape in shapes]
    return [part.requires_grad_() for part in (*features, torch.full((1,), 14.0))]


def measure(step: Step, given: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[Cost, Tensor]:
    """A step's cost and loss; ``before`` was there before it."""
    with Meter() as meter:
        meter.leave_out(*given, *before)
        loss = step(given[0], given[1], given[2])
        meter.cost.kept = meter.alive
        loss.backward()
    return meter.cost, loss.detach()


def measure_both(options: argparse.Namespace, queue_size: int) -> tuple[Cost, Cost, float]:
    """Our cost, the original's, and how far loss and gradients are apart, of the largest."""
    from declip.config import LossConfig
    from declip.objective import Objective

    config = LossConfig(**WEIGHTS, simsiam=0, masked_language=0, queue_size=queue_size)
    objective = Objective(config, options.dim, device=torch.device("cpu"), seed=0, rank=0)
    assert objective.queue is not None
    theirs_queue = CopiedQueue(objective.queue.rows_ND)
    own, given = inputs(options), inputs(options)
    our_cost, our_loss = measure(
        ours(objective), own, [objective.queue.rows_ND, objective.queue.position]
    )
    their_cost, their_loss = measure(original(theirs_queue), given, [theirs_queue.bank_DQ])
    pairs = [(our_loss, their_loss)]
    for one, other in zip(own, given, strict=True):
        assert one.grad is not None and other.grad is not None
        pairs.append((one.grad, other.grad))
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return our_cost, their_cost, apart


def print_row(name: str, cost: Cost) -> None:
    """One line of the table."""
    messages = ", ".join(f"{count} {called}" for called, count in sorted(cost.messages.items()))
    print(
        f"  {name:<9} {cost.kept / MB:9.1f} {cost.peak / MB:9.1f} {cost.received / MB:12.1f}   "
        f"{messages}"
    )


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    sys.path.insert(0, str(MODEL_DIR))
    torch.set_num_threads(options.threads)
    print(f"{options.batch} images a rank, {options.dim} features, a queue of {options.queue}")
    print(f"  {'MB':<9} {'kept':>9} {'peak':>9} {'received':>12}   messages")
    failures, bare = [], []
    for ranks in RANKS:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        our_cost, their_cost, apart = measure_both(options, options.queue)
        # The queue's share does not depend on ranks and would hide how the rest grows.
        bare.append(measure_both(options, TEXTS * options.batch)[0].peak)
        dist.destroy_process_group()
        print(f"{ranks} ranks; losses and gradients differ by {apart:.0e}")
        print_row("ours", our_cost)
        print_row("original", their_cost)
        if apart > 1e-4:
            failures.append(f"at {ranks} ranks losses differ")
        for part in ("kept", "peak", "received"):
            if getattr(our_cost, part) > getattr(their_cost, part):
                failures.append(f"at {ranks} ranks more is {part}")
    print("peak without a search of the queue, MB a rank: ", end="")
    print(", ".join(f"{peak / MB / ranks:.2f}" for peak, ranks in zip(bare, RANKS, strict=True)))
    for few, many in ((0, 1), (1, 2)):
        if bare[many] > SLACK * bare[few] * RANKS[many] / RANKS[few]:
            failures.append(f"memory grows faster than ranks from {RANKS[few]} to {RANKS[many]}")
    if failures:
        sys.exit(f"failed: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
