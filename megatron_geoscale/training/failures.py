"""What a run that cannot go on says, and the status it exits with: docs/FAULTS.md lists them.

Every error becomes one sentence. What a rank can only see as a broken connection was said by the rank that broke it.
"""

from __future__ import annotations

import argparse

FAILED, USER_ERROR = 1, 2
"""Exit statuses: of a run that has met a fault, and of a mistake of the user's (a flag, a file) or weights that are not
finite. 0: training is complete, or it was asked to stop and has saved."""
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
              "connectFullMesh failed", "recvValue failed", "sendBytes failed", "to recv, got 0 bytes",
              "Connection was likely closed", "Application timeout caused pair closure")
"""What gloo's and the rendezvous store's errors say when the process at the other end has gone."""
_TIMED_OUT = ("Timed out waiting", "imed out after", "ait timeout")
"""What they say when it is there and does not answer."""
_LOST_CHILD = "DataLoader worker"
"""In torch's error about a data worker that has been killed."""
_BAD_GRADIENT = "in local grad norm"
"""In megatron-core's error about gradients that are NaN or infinite."""


def is_lost_peer(error: BaseException) -> bool:
    """Does the error come of another rank that has gone, or does not answer? (An OSError is about a process or a file
    of this machine.)"""
    return not isinstance(error, OSError) and any(sign in str(error) for sign in (*_LOST_PEER, *_TIMED_OUT))


def sentence_of(error: BaseException, args: argparse.Namespace, rank: int) -> str | None:
    """What to say of an error of torch's or megatron-core's; None of one that is not known."""
    text = str(error)
    if _BAD_GRADIENT in text:
        return (f"rank {rank}: the gradients are not finite, training has diverged; "
                "--no-check-for-nan-in-loss-and-grad goes on all the same")
    if isinstance(error, ConnectionError | EOFError) or _LOST_CHILD in text:
        return f"rank {rank} stops because a data worker of its own has been killed"
    if not is_lost_peer(error):
        return None
    if any(sign in text for sign in _TIMED_OUT):
        return (f"rank {rank} stops because another rank has not answered for --distributed-timeout-minutes "
                f"{args.distributed_timeout_minutes:g}")
    return f"rank {rank} stops because another rank has gone"
