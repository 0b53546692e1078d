"""Measures `prepare`, the order of the samples and the first batch of a large corpus; prints Markdown tables.

    OMP_NUM_THREADS=1 python tools/bench/data.py [--megabytes 35] [--rounds 3] [--only prepare memory order first]
        [--out data.json]

On a machine that others use as well, trust CPU seconds and ratios: what is compared runs in turn.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import resource
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    QUICKSTART,
    BenchParser,
    in_turn,
    median_ratio,
    print_table,
    process_status,
    status_bytes,
    write_results,
)

from megatron_mea.data.order import Mixture, permute
from megatron_mea.data.prepare import Encoder, prepare
from megatron_mea.data.tokenizer import load_tokenizer, train_tokenizer

FILES = 4
"""Into which the text for `prepare` is split."""


def quickstart_texts() -> list[str]:
    """The documents that ship with the project."""
    return [
        json.loads(line)["text"]
        for path in sorted(QUICKSTART.glob("*.jsonl.gz"))
        for line in gzip.open(path, "rt", encoding="utf-8")
    ]


def write_documents(path: Path, documents: Sequence[str]) -> str:
    """Writes a .jsonl.gz and returns its path."""
    with gzip.open(path, "wt", compresslevel=6) as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    return str(path)


def cpu_and_wall_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call: CPU time of this process and of its children that ended, and elapsed time."""

    def now() -> tuple[float, float]:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages), time.monotonic()

    before = now()
    work()
    after = now()
    return after[0] - before[0], after[1] - before[1]


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what is written to stderr: a progress bar leaves a line there."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    yield
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)


def tokenize(encoder: Encoder, documents: Sequence[str]) -> None:
    """Calls the bare tokenizer on 100 documents at a time; writes nothing."""
    for start in range(0, len(documents), 100):
        encoder._tokenize(list(documents[start : start + 100]))


def tokenize_half(*, encoder: Encoder, repeats: int, part: int, start: Barrier, queue: Queue) -> None:
    """The body of a process of `tokenize_in_two`: puts its CPU and wall seconds in the queue."""
    documents = (quickstart_texts() * repeats)[part::2]
    tokenize(encoder, documents[:10])
    start.wait()
    queue.put(cpu_and_wall_seconds(lambda: tokenize(encoder, documents)))


def tokenize_in_two(encoder: Encoder, repeats: int) -> tuple[float, float]:
    """CPU seconds and wall seconds of the bare tokenizer in two processes at once, half of the text each."""
    context = multiprocessing.get_context("spawn")
    shared = {"encoder": encoder, "repeats": repeats, "start": context.Barrier(2), "queue": context.Queue()}
    processes = [context.Process(target=tokenize_half, kwargs=shared | {"part": part}) for part in range(2)]
    for process in processes:
        process.start()

    seconds = [shared["queue"].get() for _ in processes]
    for process in processes:
        process.join()

    return sum(cpu for cpu, _ in seconds), max(wall for _, wall in seconds)


def bench_prepare(*, folder: Path, tokenizer: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    """Prints and returns how fast `prepare` is beside the tokenizer alone."""
    documents = quickstart_texts()
    repeats = max(1, round(megabytes * 1e6 / sum(map(len, documents))))
    documents *= repeats
    inputs = [write_documents(folder / f"{part}.jsonl.gz", documents[part::FILES]) for part in range(FILES)]
    encoder, unused_encoder = (Encoder.from_tokenizer(load_tokenizer(tokenizer), tokenizer) for _ in range(2))
    tokens = 0

    def run(workers: int) -> None:
        nonlocal tokens
        tokens = prepare(
            sources=inputs, tokenizer_folder=tokenizer, prefix=folder / "out", workers=workers, force=True
        ).tokens

    works: dict[str, Callable[[], tuple[float, float]]] = {
        "bare": lambda: cpu_and_wall_seconds(lambda: tokenize(encoder, documents)),
        "1 worker": lambda: cpu_and_wall_seconds(lambda: run(1)),
        "bare, 2 processes at once": lambda: tokenize_in_two(unused_encoder, repeats),
        "2 workers": lambda: cpu_and_wall_seconds(lambda: run(2)),
    }
    tokenize(encoder, documents[:10])
    with quiet():
        seconds = in_turn(works, rounds)

    rows = []
    for name, base in zip(works, ("bare", "bare", *["bare, 2 processes at once"] * 2), strict=True):
        rates, ratios = [], []
        for clock in (0, 1):
            values, base_values = ([pair[clock] for pair in seconds[way]] for way in (name, base))
            rates.append(f"{tokens / statistics.median(values) / 1e6:.3f}")
            ratios.append(f"{median_ratio(base_values, values):.2f}")

        rows.append([name, *rates, *ratios])

    characters = sum(map(len, documents))
    print(f"{characters / 1e6:.0f} MB in {FILES} .jsonl.gz, {tokens:,} tokens, medians of {rounds} rounds")
    print_table(["", "Mtokens a CPU second", "Mtokens a second", "of as many bare, by CPU", "by wall"], rows)
    return {"characters": characters, "files": FILES, "tokens": tokens, "cpu_and_wall_seconds": seconds}


def run_prepare(*, source: str, tokenizer: Path, prefix: Path) -> None:
    """The body of a process of `bench_memory`."""
    with quiet():
        prepare(sources=[source], tokenizer_folder=tokenizer, prefix=prefix, workers=2, force=True)


def peak_bytes(pid: int) -> dict[int, int]:
    """Peak resident bytes so far of a process and of its children, by process id."""
    peaks = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = process_status(path.name)
        except OSError:
            continue

        if int(path.name) == pid or int(status["PPid"]) == pid:
            peaks[int(path.name)] = int(status.get("VmHWM", "0 kB").split()[0]) * 1024

    return peaks


def bench_memory(folder: Path, tokenizer: Path) -> list[dict[str, int]]:
    """Prints and returns the peak memory of `prepare` and of its workers, for a text and for ten times as much."""
    # A document a line, so that memory that each document takes would show.
    lines = [line for text in quickstart_texts() for line in text.splitlines() if line]
    rows = []
    for times in (1, 10):
        source = write_documents(folder / "lines.jsonl.gz", lines * times)
        settings = {"source": source, "tokenizer": tokenizer, "prefix": folder / "out"}
        process = multiprocessing.get_context("spawn").Process(target=run_prepare, kwargs=settings)
        process.start()

        peaks: dict[int, int] = {}
        while process.is_alive():
            peaks |= {pid: peak for pid, peak in peak_bytes(process.pid).items() if peak >= peaks.get(pid, 0)}
            time.sleep(0.1)

        assert process.exitcode == 0
        rows.append(
            {
                "characters": times * sum(map(len, lines)),
                "documents": times * len(lines),
                "idx_bytes": (folder / "out.idx").stat().st_size,
                "prepare_peak_bytes": peaks.pop(process.pid),
                "worker_peak_bytes": max(peaks.values()),
            }
        )

    cells = [[f"{n:,}" if key == "documents" else f"{n / 1e6:.0f} MB" for key, n in row.items()] for row in rows]
    print_table(["text", "documents", ".idx", "peak of `prepare`", "peak of a worker"], cells)
    return rows


def bench_order() -> dict[str, Any]:
    """Prints and returns what the keyed permutation costs, beside a shuffle in memory."""
    permutation, shuffled, rows = [], [], []
    for size in (10**6, 10**9, 10**12):
        samples = [np.random.default_rng(seed).integers(0, size, 1024) for seed in range(100)]
        permute(samples[0], size=size, key="warm")
        cpu, _ = cpu_and_wall_seconds(
            lambda samples=samples, size=size: [permute(part, size=size, key="1/0/0") for part in samples]
        )
        permutation.append({"windows": size, "cpu_seconds_a_sample": cpu / 102_400})
        rows.append([f"keyed permutation, {size:.0e}", "0", "0", f"{cpu / 102_400 * 1e6:.2f}"])

    for size in (10**7, 10**8):
        random, order = np.random.default_rng(0), np.empty(0)

        def shuffle(size: int = size, random: np.random.Generator = random) -> None:
            nonlocal order
            order = np.arange(size, dtype=np.uint32)
            random.shuffle(order)

        cpu, _ = cpu_and_wall_seconds(shuffle)
        shuffled.append({"windows": size, "cpu_seconds": cpu, "bytes": order.nbytes})
        rows.append([f"numpy's shuffle, {size:.0e}", f"{cpu:.1f}", f"{order.nbytes / 1e6:.0f}", ""])
        seconds, megabytes = cpu * 10**9 / size, order.nbytes * 10**9 / size / 1e6
        del order

    rows.append(["numpy's shuffle, 1e+09 (computed)", f"{seconds:.0f}", f"{megabytes:.0f}", ""])
    print_table(["order of an epoch", "CPU s to build", "MB", "us a sample"], rows)
    cpu, _ = cpu_and_wall_seconds(lambda: Mixture([1.0] * 20))
    print(f"mixture of 20 corpora: {cpu:.2f} CPU s, once")
    return {"permutation": permutation, "shuffle": shuffled, "mixture_of_20_cpu_seconds": cpu}


def sparse_corpus(*, prefix: Path, samples: int, seq_length: int, documents: int) -> None:
    """Writes a corpus of zeros that takes no place on the disk; its last documents hold all tokens."""
    tokens = samples * seq_length + 1
    filled = -(-tokens // (1 << 30))
    lengths = np.full(filled, 1 << 30, np.int32)
    lengths[-1] = tokens - (filled - 1) * (1 << 30)
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(2 * tokens)

    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        # Lengths take 4 bytes a document, offsets and document borders 8 each; holes read as zeros.
        for end, array in ((4, lengths), (12, offsets), (20, np.empty(0))):
            stream.seek(34 + end * documents - array.nbytes)
            stream.write(array.tobytes())
        stream.write(struct.pack("<q", documents))


def bench_first(folder: Path) -> dict[str, Any]:
    """Prints and returns what the first batch of a large corpus costs, and opening many corpora."""
    # Not at the top: the workers of `prepare` import this file, and would count it.
    from megatron_mea.config.schema import TrainCorpus
    from megatron_mea.data.corpora import Corpora

    settings = {"seq_length": 512, "vocab_size": 1000, "seed": 1, "key": "data.train"}
    results, rows = [], []
    for samples, documents in ((10**6, 640_000), (10**9, 640_000_000)):
        sparse_corpus(prefix=folder / "sparse", samples=samples, seq_length=512, documents=documents)
        before = status_bytes("RssAnon")

        def first() -> None:
            corpora = Corpora(corpora=[TrainCorpus(path=str(folder / "sparse"))], **settings)
            batch = corpora.batch(np.arange(1024))
            assert batch.input_ids.shape == (1024, 512)

        cpu, wall = cpu_and_wall_seconds(first)
        remaining = status_bytes("RssAnon") - before
        size = Path(f"{folder}/sparse.idx").stat().st_size
        row = {"windows": samples, "documents": documents, "idx_bytes": size, "cpu_seconds": cpu, "wall_seconds": wall}
        results.append(row | {"kept_bytes": remaining})
        cells = [f"{samples:.0e}", f"{documents:,}", f"{size / 1e9:.2f} GB", f"{cpu:.2f}", f"{wall:.2f}"]
        rows.append([*cells, f"{remaining / 1e6:.0f} MB"])

    columns = ["windows of 512", "documents", ".idx", "CPU s to the first 1024 samples", "wall s", "memory kept"]
    print_table(columns, rows)
    corpora = [TrainCorpus(path=str(folder / f"sparse-{index}")) for index in range(1000)]
    for corpus in corpora:
        sparse_corpus(prefix=Path(corpus.path), samples=10**6, seq_length=512, documents=640_000)

    cpu, wall = cpu_and_wall_seconds(lambda: Corpora(corpora=corpora, **settings))
    print(f"opening {len(corpora):,} corpora of 10^6 windows and 640,000 documents: {cpu:.1f} CPU s, {wall:.1f} wall s")
    return {"by_size": results, "opening": {"corpora": len(corpora), "cpu_seconds": cpu, "wall_seconds": wall}}


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("--megabytes", type=int, default=35, help="of text for `prepare`")
    parser.add_argument("--tokenizer", help="default: 8,192 ids, trained on the quickstart's text")
    arguments = parser.parse(rounds=3, parts=("prepare", "memory", "order", "first"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Path(arguments.tokenizer or folder / "tokenizer")
        if not arguments.tokenizer and {"prepare", "memory"} & set(arguments.only):
            train_tokenizer(
                sources=[str(path) for path in QUICKSTART.glob("*.jsonl.gz")], vocab_size=8192, out=tokenizer
            )

        benches: dict[str, Callable[[], Any]] = {
            "order": bench_order,
            "first": partial(bench_first, folder),
            "prepare": partial(
                bench_prepare,
                folder=folder,
                tokenizer=tokenizer,
                megabytes=arguments.megabytes,
                rounds=arguments.rounds,
            ),
            "memory": partial(bench_memory, folder, tokenizer),
        }
        results = {part: bench() for part, bench in benches.items() if part in arguments.only}

    write_results(arguments.out, results)


if __name__ == "__main__":
    main()
