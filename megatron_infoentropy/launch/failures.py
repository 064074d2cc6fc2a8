"""What the words that a dying training leaves in its log mean, and what to do about it.

docs/failures.md is this table for readers; a test keeps the two together.
"""

import itertools
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

OURS = "--infoentropy-"
TAIL_BYTES = 1 << 20  # the end of a log, which holds what the ranks said when they died


@dataclass(frozen=True)
class Failure:
    """A cause by the words (a regular expression) it leaves; the advice is one sentence."""

    words: str
    cause: str
    advice: str


# The first that is found counts: what causes others stands before them.
FAILURES = (
    Failure(
        r"No space left on device",
        "a disk is full",
        "make room where the run folder, the data cache or /tmp is; training goes on from the last "
        "complete checkpoint",
    ),
    Failure(
        r"Worker failure: An error is caught .*OSError",
        "a checkpoint could not be written, most often because its disk is full",
        "make room where --save is, or keep fewer with --infoentropy-keep-last; training goes on "
        "from the last complete checkpoint",
    ),
    Failure(
        r"DamagedCheckpointError: ",
        "none of the checkpoints can be loaded",
        "the log names each file and what is wrong with it; copy them again, or give another "
        "--load",
    ),
    Failure(
        r"CheckpointingException: Global shape mismatch",
        "the checkpoint is of a model of another shape",
        "give the model's flags (num-layers, hidden-size, ...) as the checkpoint was trained with, "
        "or start anew in another --run; the log names the tensor",
    ),
    Failure(
        r"assert self\.lr_warmup_steps < self\.lr_decay_steps",
        "the learning rate would warm up for the whole training",
        "make lr-warmup-iters smaller, or lr-decay-iters or train-iters larger",
    ),
    Failure(
        r"CUDA out of memory|OutOfMemoryError",
        "a GPU's memory does not hold the training",
        "use a smaller micro-batch-size, more tensor or pipeline parallelism, "
        "--recompute-granularity full or --infoentropy-fused-linear; `infoentropy train RECIPE "
        "--dry-run` counts each",
    ),
    Failure(
        r"found (NaN|Inf) in local forward loss",
        "the loss of a rank became NaN or infinite",
        "go on from an earlier checkpoint with a lower lr, or look at the data of that step; the "
        "log names rank and iteration",
    ),
    Failure(
        r"OptimizerParamScheduler: class input value",
        "the learning rate's schedule differs from the checkpoint's",
        "give the flags of the batch and the schedule as before, or accept the new ones with "
        "--override-opt_param-scheduler",
    ),
    Failure(
        r"Timed out waiting \d+ms for (recv|send) operation|Watchdog caught collective operation "
        r"timeout|wait timeout after \d+ms",
        "a rank waited for another one until the time-out: a host or its network is gone, or a "
        "rank hangs",
        "see which host answers no more, replace it or leave it out, and start again: training "
        "goes on from the last checkpoint; --distributed-timeout-minutes and "
        "--distributed-timeout-seconds-after-init set the time-out",
    ),
    Failure(
        r"SIGKILL|exitcode *: -9\b",
        "a rank was killed from outside (SIGKILL), most often because the host ran out of memory",
        "look at the host's kernel log (dmesg) for the out-of-memory killer; start again: training "
        "goes on from the last checkpoint",
    ),
    Failure(
        r"^host \S+ cannot take part: ",
        "a host of --hosts is not reached, or lacks the run folder",
        "the log names it; `ssh -o BatchMode=yes HOST true` must work from here without a "
        "question: its port, user, key and host key belong into ~/.ssh/config",
    ),
    Failure(
        r"^the ssh connection to node \d+ .* broke$",
        "the ssh connection to a host broke",
        "see whether it still runs; the others were told to save a checkpoint, and so was it if it "
        "was reached again: the same command goes on from there",
    ),
    Failure(
        r"^another training has the run folder ",
        "another training runs in the same run folder",
        "wait until it ends or stop it, the log says which one it is; or name another --run",
    ),
    Failure(
        r"Connection closed by peer|Connection reset by peer|remote process exited",
        "a rank lost its connection to another one, which had died before",
        "look for the first traceback in the log, and at the other hosts' output",
    ),
    Failure(
        r"RendezvousTimeoutError|no ranks for \d+ s: other nodes did not come",
        "not all nodes came to the rendezvous in time",
        "see which node started no ranks: it must run node.sh with a NODE of its own, and reach "
        "the --rdzv-endpoint; --join-timeout sets how long nodes wait",
    ),
    Failure(
        r"RendezvousConnectionError|The client socket has (failed|timed out)|"
        r"failed to connect to .*TCPStore|DistNetworkError",
        "a node does not reach the one where all meet",
        "node 0 must run, its --rdzv-endpoint must be an address that the others reach (not one of "
        "127.x), and no firewall may close the port; --interface chooses the network",
    ),
    Failure(
        r"EADDRINUSE|Address already in use",
        "the port of the rendezvous is taken on its host",
        "another training runs there, or an earlier one still does: end it, or choose another port "
        "with --rdzv-endpoint",
    ),
    Failure(
        r"Unable to find address for: |Unable to find interface|no IPv4 address on",
        "a network interface is not there on a node, or has no address",
        "name one with --interface that every node has; `ip -br addr` lists them",
    ),
    Failure(
        r"^node \d+: ended without a checkpoint: ",
        "it was asked to stop before its ranks trained, or after they had died",
        "the same command goes on from the last checkpoint, if there is one",
    ),
    Failure(
        r"Received \w+ death signal, shutting down workers",
        "a signal told torchrun to end it",
        "the same command goes on from the last checkpoint, if there is one; a training of "
        "`infoentropy launch` saves one when it is told to stop",
    ),
)


def explain(text: str) -> str | None:
    """One sentence with cause and advice for a log's last words; None for what is not known."""
    for failure in FAILURES:
        if re.search(failure.words, text, re.MULTILINE):
            return f"{failure.cause}: {failure.advice}"
    return None


def refusal(text: str) -> str | None:
    """One sentence if the ranks refused their flags, in the words of argparse or of a check."""
    usage = re.search(r"^\S+\.py: error: (.+)$", text, re.MULTILINE)
    if usage:
        return f"Megatron refuses the flags: {usage[1]}{_meant(usage[1], text[: usage.start()])}"
    check = re.search(
        r"^(?:\[rank\d+\]: )?  File \".*pretrain\.py\", line \d+, in prepare\n(?s:.{0,4000}?)"
        r"\n(?:\[rank\d+\]: )?\s+(?P<code>\S.*)(?:\n(?:\[rank\d+\]: )?[ ^~]+)?"
        r"\n(?:\[rank\d+\]: )?(?P<kind>AssertionError|ValueError|ZeroDivisionError|OverflowError)"
        r"(?:: (?P<said>.+))?$",
        text,
        re.MULTILINE,
    )
    if check is None or "Traceback" in check[0]:
        return None
    return f"Megatron refuses the flags: {(check['said'] or check['code']).removesuffix('.')}"


def _meant(refused: str, usage: str) -> str:
    """Return the flags of argparse's usage that look like the ones it does not know."""
    if not refused.startswith("unrecognized arguments"):
        return ""
    known = {flag.replace(OURS, "--"): flag for flag in re.findall(r"--[a-z][\w-]+", usage)}
    near = [
        known[name]
        for flag in re.findall(r"--[\w-]+", refused)
        for name in get_close_matches(flag.replace(OURS, "--"), known, 1)
    ]
    return f"; is {' and '.join(near)} meant?" if near else ""


def tail(log: Path, start: int = 0) -> str:
    """Return the end of what was written into a log from byte `start` on."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - TAIL_BYTES))
        return file.read().decode("utf-8", "replace")


def describe(code: int, log: Path, start: int) -> str:
    """Return what a log from byte `start` on means, and its first traceback.

    Flags that are refused need none.
    """
    text, whole = tail(log, start), f"the whole log is {log}"
    refused, reason = refusal(text), explain(text)
    if refused and not reason:
        return f"{refused}; {whole}"
    means = f": {reason}" if reason else ""
    return f"training ended with exit code {code}{means}; {whole}\n{_first_failure(text)}"


TORCHRUNS_OWN = re.compile(
    r"torch.distributed.elastic.multiprocessing|Traceback[^\0]{0,400}torch/distributed/run.py"
)

# Where ranks have met, torch puts their number before every line.
TRACEBACK = re.compile(r"^(\[rank\d+\]: )?Traceback \(most recent call last\):$", re.MULTILINE)


def _first_failure(text: str) -> str:
    """Return a rank's first traceback, without torchrun's own account of its dead children.

    Of a deep one the frames in the middle are left out: what was raised stands at its end.
    """
    own = TORCHRUNS_OWN.search(text)
    text = text[: own.start()].rpartition("\n")[0] if own else text
    begin = TRACEBACK.search(text)
    if begin is None:
        return text[-3000:].rstrip()
    rank = begin[1] or ""
    lines = [line for line in text[begin.start() :].splitlines() if line.startswith(rank)]
    title, *rest = [line.removeprefix(rank) for line in lines]
    frames = "\n".join([title, *itertools.takewhile(lambda line: line[:1] in " \t", rest)])
    after = rest[frames.count("\n") :]
    raised = itertools.takewhile(lambda line: not line.startswith("Traceback"), after)
    if len(frames) > 2500:
        frames = f"{frames[:500]}\n  ...\n{frames[-2000:]}"
    return f"{frames}\n{'\n'.join(raised)[:1500]}".rstrip()
