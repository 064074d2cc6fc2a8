"""Scoring a model: by domain, by how frequent and how hard a token is, and how well calibrated.

Steps: check that model, data and token counts speak of the same vocabulary; cut the documents into
chunks, which are scored by turns of the ranks and written down one by one; add the chunks up in
their order; turn the sums into numbers. Always plain cross entropy, whatever objective the model
was trained with. In memory are one chunk of tokens, one batch of logits, and 900 bytes a document.
"""

import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_infoentropy.evaluate.chunks import cut_chunks, score_chunk
from megatron_infoentropy.evaluate.errors import FinishedEvaluationError
from megatron_infoentropy.evaluate.evaluation import SUMMARY_FILE, Evaluation, load_evaluation
from megatron_infoentropy.evaluate.job import Job, Options, open_job
from megatron_infoentropy.evaluate.journal import Journal
from megatron_infoentropy.evaluate.model import ModelSource, hugging_face
from megatron_infoentropy.evaluate.ranks import Ranks, joined_ranks
from megatron_infoentropy.evaluate.result import assemble
from megatron_infoentropy.progress import progress


def evaluate_model(
    model: Path | ModelSource,
    data: Path,
    *,
    token_counts: Path,
    output: Path | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    packed: bool = False,
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    domain_weights: str = "auto",
    dtype: str = "float32",
    device: str = "auto",
    token_scores: bool = True,
    restart: bool = False,
    overwrite: bool = False,
) -> Evaluation:
    """Score a model on a token dataset; started by torchrun, all its processes take part.

    Args:
        model: a Hugging Face folder, or where else a model comes from; nothing is fetched.
        data: folder with manifest.json and one .bin/.idx a domain.
        token_counts: token_counts.npy of the *training* data, which defines the buckets.
        output: folder to write the evaluation into, which an interrupted one resumes from; several
            processes need one that they share.
        context_length: tokens that a window reads; default: the model's positions.
        stride: tokens that a window scores; default: the context length.
        packed: let documents of a domain follow one another in a window, as in training.
        batch_tokens: tokens read at once; the logits of a batch take 4 bytes x this x vocabulary.
        max_tokens: score a fixed sample of about this many tokens instead of everything.
        domain_weights: of the weighted average, see `domain_weights`.
        dtype: of weights and activations; scores are fp32 in any case.
        device: torch device, or "auto" for the first GPU, else the CPU.
        token_scores: keep every token's cross entropy and entropy, 4 bytes a token: `compare` needs
            them to set hard tokens against easy ones.
        restart: discard what an interrupted evaluation has left in `output`.
        overwrite: replace a finished evaluation in `output`, once the new one is whole.

    Returns:
        The evaluation, the same on every process; what it holds is said in `evaluation`.

    Raises:
        ValueError: one of the named errors of `evaluate.errors`, saying what does not fit.
    """
    if output is not None and (output / SUMMARY_FILE).exists() and not overwrite:
        raise FinishedEvaluationError(
            f"{output} holds a finished evaluation: name another --output, or --overwrite to "
            "replace it"
        )
    options = Options(
        context_length, stride, packed, batch_tokens, max_tokens, domain_weights, dtype, device
    )
    source = hugging_face(model) if isinstance(model, Path) else model
    with ExitStack() as stack:
        ranks = stack.enter_context(joined_ranks())
        if output is None and ranks.size > 1:
            raise ValueError("several processes need an output folder that they share; name one")
        job = open_job(source, data, token_counts, options)
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        journal = Journal(folder, job.model.vocab_size)
        _score(job, ranks, journal, restart=restart)
        if ranks.rank == 0:
            assemble(job, journal, token_scores=token_scores).save(folder)
            journal.finish()
        ranks.wait()
        evaluation = load_evaluation(folder)
        if output is None and evaluation.token_scores is not None:
            evaluation = replace(evaluation, token_scores=np.array(evaluation.token_scores))
    return evaluation


def _score(job: Job, ranks: Ranks, journal: Journal, *, restart: bool) -> None:
    """Score this rank's chunks that are not in the journal yet; return when all ranks have."""
    if ranks.rank == 0:
        journal.start(job.plan(), restart=restart)
    ranks.wait()
    chunks = cut_chunks(job.selection, job.scoring.batch_tokens)
    mine = [n for n in range(ranks.rank, len(chunks), ranks.size) if not journal.has(n)]
    tokens = sum(int(job.selection.length[chunks[number]].sum()) for number in mine)
    shown = progress("scoring", tokens, "tokens") if ranks.rank == 0 else nullcontext(_silent)
    with shown as advance:
        for number in mine:
            scores = score_chunk(
                job.model, job.dataset, job.selection, chunks[number], job.band_of_token,
                job.scoring, advance,
            )  # fmt: skip
            journal.write(number, scores)
    ranks.wait()


def _silent(work: int) -> None:
    pass
