"""Random streams, each named after the piece of work that takes it."""

import hashlib
import json

import torch


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator seeded by the hash of `keys`, for example ``generator(seed, "expert", 3)``.

    Each piece of work takes a stream named after itself, so no result depends on what ran before it: an interrupted
    run needs no saved random state, and a draw is the same on every device.
    """
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
