"""The reference of preference tuning: the log-probability of each answer under the base, before
anything is added to it. It is computed once for a run, each answer alone, so that neither batches,
ranks, adapters, dropout nor noise have a part in it, and kept as two float32 a pair.

TRL 1.16 takes the policy without its adapter, which is not the base where the adapter was made of
it (pissa, olora), where biases are trained, and where dropout or a router's noise act.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

from recipes_lib.config.upstream import autocast_dtype
from recipes_lib.core.files import write_bytes
from recipes_lib.core.ranks import meet, on_main_rank, say_once
from recipes_lib.data.encoding import IGNORED
from recipes_lib.models import upstream_fixes
from recipes_lib.weights.load import device_with_room

FILE = "reference.safetensors"
ANSWERS = ("chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def add_reference(
    splits: Mapping[str, Dataset],
    model: Any,
    args: Any,
    *,
    folder: Path,
    tokens_hash: str,
    known: str | None,
) -> tuple[dict[str, Dataset], str]:
    """Return the data sets with the reference of their pairs, and its hash; every rank calls.

    Args:
        splits: the pairs, by split.
        model: the base, on which nothing was put yet.
        folder: of the run, where the reference is kept.
        tokens_hash: of the pairs, part of the reference's hash.
        known: the hash of the reference that the run began with; None at its first start.
    """
    content = on_main_rank(lambda: _read(folder / FILE, tokens_hash, known))
    if content is None:
        num_pairs = sum(map(len, splits.values()))
        say_once(f"reference: log-probabilities of {num_pairs:,} pairs under the base ...")
        values = _computed(splits, model, args)
        content = safetensors.torch.save(values)  # the same on every rank
        on_main_rank(lambda: write_bytes(folder / FILE, content))
    stored = safetensors.torch.load(content)
    with_reference = {}
    for name, rows in splits.items():
        for number, column in enumerate(REFERENCE_COLUMNS):
            rows = rows.add_column(column, stored[name][:, number].tolist())
        with_reference[name] = rows
    return with_reference, _hash(content, tokens_hash)


def _read(path: Path, tokens_hash: str, known: str | None) -> bytes | None:
    """Return what a run keeps, where it is what the run began with; else None."""
    if known is None or not path.is_file():
        return None
    content = path.read_bytes()
    return content if _hash(content, tokens_hash) == known else None


def _hash(content: bytes, tokens_hash: str) -> str:
    return hashlib.sha256(content + tokens_hash.encode()).hexdigest()


def _computed(splits: Mapping[str, Dataset], model: Any, args: Any) -> dict[str, torch.Tensor]:
    """Return (pairs, 2) log-probabilities by split; the ranks that have weights share the pairs."""
    rank = args.process_index
    readers = [0]
    if args.world_size > 1:  # under FSDP2, one rank of a machine may have them
        has_weights: list[Any] = [None] * args.world_size
        dist.all_gather_object(has_weights, model.device.type != "meta")
        readers = [number for number, reads in enumerate(has_weights) if reads]
    values = {name: torch.zeros(len(rows), 2) for name, rows in splits.items()}
    if rank in readers:
        with _answering(model, args):
            for name, rows in splits.items():
                for number in range(readers.index(rank), len(rows), len(readers)):
                    values[name][number] = _of_pair(model, rows[number])
    if args.world_size > 1:
        meet()  # however long the readers read
        for name, array in values.items():
            shared = array.to(args.device)
            dist.all_reduce(shared)  # the others added zeros
            values[name] = shared.cpu()
    return values


@contextlib.contextmanager
def _answering(model: Any, args: Any) -> Iterator[None]:
    """Have the base where it has room, as it answers: without dropout and gradients, and with the
    head that training will have.
    """
    half = autocast_dtype(args)
    was_training = model.training
    own_forward = model.forward
    home = model.device
    if home.type == "cpu" and args.device.type != "cpu":
        model.to(device_with_room(model))
    upstream_fixes.prepare_head(model, sharded=False)
    add_fused_lm_head(model)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, half, enabled=half is not None):
            yield
    finally:
        model.forward = own_forward
        model.train(was_training)
        model.to(home)


def _of_pair(model: Any, row: Mapping[str, Any]) -> torch.Tensor:
    """Return the sums over the tokens of the chosen and of the rejected answer, in nats."""
    prompt = row["prompt_ids"]
    sums = []
    for name in ANSWERS:
        ids = torch.tensor([prompt + row[name]], device=model.device)
        labels = ids.clone()
        labels[:, : len(prompt)] = IGNORED
        log_probs = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        sums.append(log_probs.double().sum())
    return torch.stack(sums).float().cpu()
