"""What autograd keeps of a real forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def counting_what_is_kept(known: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Give the tensors that autograd keeps inside, one for each memory, without the known ones."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in addresses:
            addresses.add(address)
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
