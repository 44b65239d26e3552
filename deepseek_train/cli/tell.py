"""What is wrong at the start, from ranks that cannot talk to one another yet: each text once on every node."""

import hashlib
import os
import sys
from pathlib import Path


def tell(text: str) -> None:
    """Prints ``text`` to stderr, unless another rank of this node has said the same. A rank other than the node's first
    gives its number: it may be the only one that has this trouble."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    own = f"rank {rank} "
    if _is_new(text.replace(own, "rank ")):
        who = "" if local_rank == "0" or text.startswith(own) else f"rank {rank} and perhaps others: "
        print(f"{who}{text}", file=sys.stderr, flush=True)


def _is_new(text: str) -> bool:
    """Whether no rank of this node has asked for ``text``: the first makes a file in what its launcher cleans up."""
    folder = _folder()
    if folder is None:
        return True
    try:
        (folder / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better twice than not at all
        return True
    return True


def _folder() -> Path | None:
    """Of this start's ranks on this node; None where nobody gave them one."""
    if "DEEPSEEK_TRAIN_STORE" in os.environ:  # our own launcher's
        return Path(os.environ["DEEPSEEK_TRAIN_STORE"]).parent
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's: attempt_N/local rank/error.json
        return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.parent
    return None
