"""Measures `prepare`, the order of the samples and the first batch of a large corpus; prints Markdown tables.

    OMP_NUM_THREADS=1 python tools/bench/data.py [--megabytes 35] [--rounds 3] [--only prepare memory order first]
        [--out data.json]

On a machine that others use as well, trust CPU seconds and ratios: what is compared runs in turn.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mea.data.order import Mixture, permute
from megatron_mea.data.prepare import Encoder, prepare
from megatron_mea.data.tokenizer import load_tokenizer, train_tokenizer

QUICKSTART = Path(__file__).parents[2] / "launch/quickstart"
FILES = 4


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def texts() -> list[str]:
    return [
        json.loads(line)["text"]
        for path in sorted(QUICKSTART.glob("*.jsonl.gz"))
        for line in gzip.open(path, "rt", encoding="utf-8")
    ]


def write(path: Path, documents: Sequence[str]) -> str:
    with gzip.open(path, "wt", compresslevel=6) as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    return str(path)


def spent() -> tuple[float, float]:
    """CPU seconds of this process and of its children that have ended, and wall seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used), time.monotonic()


def measured(work: Callable[[], object]) -> tuple[float, float]:
    before = spent()
    work()
    after = spent()
    return after[0] - before[0], after[1] - before[1]


@contextmanager
def quiet():
    """Without the line that a progress bar leaves."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    yield
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)


def bare(encoder: Encoder, documents: Sequence[str]) -> None:
    for start in range(0, len(documents), 100):
        encoder._ids(list(documents[start : start + 100]))


def bare_in_process(encoder: Encoder, repeats: int, part: int, start: Barrier, queue: Queue) -> None:
    documents = (texts() * repeats)[part::2]
    bare(encoder, documents[:10])
    start.wait()
    queue.put(measured(lambda: bare(encoder, documents)))


def bare_twice(encoder: Encoder, repeats: int) -> tuple[float, float]:
    """CPU seconds and wall seconds of the bare tokenizer in two processes at once, half of the text each."""
    context = multiprocessing.get_context("spawn")
    start, queue = context.Barrier(2), context.Queue()
    arguments = [(encoder, repeats, part, start, queue) for part in range(2)]
    processes = [context.Process(target=bare_in_process, args=one) for one in arguments]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(cpu for cpu, _ in found), max(wall for _, wall in found)


def bench_prepare(folder: Path, tokenizer: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    documents = texts()
    repeats = max(1, round(megabytes * 1e6 / sum(map(len, documents))))
    documents *= repeats
    inputs = [write(folder / f"{part}.jsonl.gz", documents[part::FILES]) for part in range(FILES)]
    encoder, fresh = (Encoder.of(load_tokenizer(tokenizer), tokenizer) for _ in range(2))
    tokens = 0

    def run(workers: int) -> None:
        nonlocal tokens
        tokens = prepare(inputs, tokenizer, folder / "out", workers=workers)[1]

    works: dict[str, Callable[[], tuple[float, float]]] = {
        "bare": lambda: measured(lambda: bare(encoder, documents)),
        "1 worker": lambda: measured(lambda: run(1)),
        "bare, 2 processes at once": lambda: bare_twice(fresh, repeats),
        "2 workers": lambda: measured(lambda: run(2)),
    }
    bare(encoder, documents[:10])
    with quiet():
        found = [{name: work() for name, work in works.items()} for _ in range(rounds)]
    rows = []
    for name, base in zip(works, ("bare", "bare", *["bare, 2 processes at once"] * 2), strict=True):
        cpu, wall = (statistics.median(one[name][i] for one in found) for i in (0, 1))
        ratios = [statistics.median(one[base][i] / one[name][i] for one in found) for i in (0, 1)]
        rates = [f"{tokens / seconds / 1e6:.3f}" for seconds in (cpu, wall)]
        rows.append([name, *rates, *(f"{ratio:.2f}" for ratio in ratios)])
    characters = sum(map(len, documents))
    print(f"{characters / 1e6:.0f} MB in {FILES} .jsonl.gz, {tokens:,} tokens, medians of {rounds} rounds")
    table(("", "Mtokens a CPU second", "Mtokens a second", "of as many bare, by CPU", "by wall"), rows)
    seconds = {name: [one[name] for one in found] for name in works}
    return {"characters": characters, "files": FILES, "tokens": tokens, "cpu_and_wall_seconds": seconds}


def run_prepare(source: str, tokenizer: str, out: str) -> None:
    with quiet():
        prepare([source], tokenizer, out, workers=2)


def peaks(pid: int) -> dict[int, int]:
    """Peak resident bytes so far of a process and of its children."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:
            continue
        if int(path.parent.name) == pid or int(fields["PPid"]) == pid:
            found[int(path.parent.name)] = int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
    return found


def bench_memory(folder: Path, tokenizer: Path) -> list[dict[str, int]]:
    # A document a line, so that what is kept a document would show.
    lines = [line for text in texts() for line in text.splitlines() if line]
    rows = []
    for times in (1, 10):
        source = write(folder / "lines.jsonl.gz", lines * times)
        arguments = (source, str(tokenizer), str(folder / "out"))
        process = multiprocessing.get_context("spawn").Process(target=run_prepare, args=arguments)
        process.start()
        highest: dict[int, int] = {}
        while process.is_alive():
            highest |= {pid: peak for pid, peak in peaks(process.pid).items() if peak >= highest.get(pid, 0)}
            time.sleep(0.1)
        assert process.exitcode == 0
        rows.append(
            {
                "characters": times * sum(map(len, lines)),
                "documents": times * len(lines),
                "idx_bytes": (folder / "out.idx").stat().st_size,
                "prepare_peak_bytes": highest.pop(process.pid),
                "worker_peak_bytes": max(highest.values()),
            }
        )
    shown = [[f"{n:,}" if key == "documents" else f"{n / 1e6:.0f} MB" for key, n in row.items()] for row in rows]
    table(("text", "documents", ".idx", "peak of `prepare`", "peak of a worker"), shown)
    return rows


def bench_order() -> dict[str, Any]:
    permutation, shuffled, rows = [], [], []
    for size in (10**6, 10**9, 10**12):
        samples = [np.random.default_rng(turn).integers(0, size, 1024) for turn in range(100)]
        permute(samples[0], size, "warm")
        cpu, _ = measured(lambda samples=samples, size=size: [permute(part, size, "1/0/0") for part in samples])
        permutation.append({"windows": size, "cpu_seconds_a_sample": cpu / 102_400})
        rows.append([f"keyed permutation, {size:.0e}", "0", "0", f"{cpu / 102_400 * 1e6:.2f}"])
    for size in (10**7, 10**8):
        random, order = np.random.default_rng(0), np.empty(0)

        def shuffle(size: int = size, random: np.random.Generator = random) -> None:
            nonlocal order
            order = np.arange(size, dtype=np.uint32)
            random.shuffle(order)

        cpu, _ = measured(shuffle)
        shuffled.append({"windows": size, "cpu_seconds": cpu, "bytes": order.nbytes})
        rows.append([f"numpy's shuffle, {size:.0e}", f"{cpu:.1f}", f"{order.nbytes / 1e6:.0f}", ""])
        seconds, megabytes = cpu * 10**9 / size, order.nbytes * 10**9 / size / 1e6
        del order
    rows.append(["numpy's shuffle, 1e+09 (computed)", f"{seconds:.0f}", f"{megabytes:.0f}", ""])
    table(("order of an epoch", "CPU s to build", "MB", "us a sample"), rows)
    cpu, _ = measured(lambda: Mixture([1.0] * 20))
    print(f"mixture of 20 corpora: {cpu:.2f} CPU s, once")
    return {"permutation": permutation, "shuffle": shuffled, "mixture_of_20_cpu_seconds": cpu}


def sparse_corpus(prefix: Path, samples: int, seq_length: int, documents: int) -> None:
    """A corpus of zeros that takes no place on the disk; its last documents hold all tokens."""
    tokens = samples * seq_length + 1
    long = -(-tokens // (1 << 30))
    lengths = np.full(long, 1 << 30, np.int32)
    lengths[-1] = tokens - (long - 1) * (1 << 30)
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(2 * tokens)
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        for end, array in ((4, lengths), (12, offsets), (20, np.empty(0))):
            stream.seek(34 + end * documents - array.nbytes)
            stream.write(array.tobytes())
        stream.write(struct.pack("<q", documents))


def bench_first(folder: Path) -> dict[str, Any]:
    # Not at the top: the workers of `prepare` import this file, and would count it.
    from megatron_mea.config.schema import TrainCorpus
    from megatron_mea.data.corpora import Corpora

    found, rows = [], []
    for samples, documents in ((10**6, 640_000), (10**9, 640_000_000)):
        sparse_corpus(folder / "sparse", samples, 512, documents)
        before = Path("/proc/self/status").read_text()

        def first() -> None:
            corpora = Corpora([TrainCorpus(path=str(folder / "sparse"))], 512, 1000, 1, "data.train")
            batch = corpora.batch(np.arange(1024))
            assert batch.input_ids.shape == (1024, 512)

        cpu, wall = measured(first)
        private = [
            int(status.split("RssAnon:")[1].split()[0]) * 1024
            for status in (before, Path("/proc/self/status").read_text())
        ]
        size = Path(f"{folder}/sparse.idx").stat().st_size
        row = {"windows": samples, "documents": documents, "idx_bytes": size, "cpu_seconds": cpu, "wall_seconds": wall}
        found.append(row | {"kept_bytes": private[1] - private[0]})
        rows.append([f"{samples:.0e}", f"{documents:,}", f"{size / 1e9:.2f} GB", f"{cpu:.2f}", f"{wall:.2f}"])
        rows[-1].append(f"{(private[1] - private[0]) / 1e6:.0f} MB")
    table(("windows of 512", "documents", ".idx", "CPU s to the first 1024 samples", "wall s", "memory kept"), rows)
    many = [TrainCorpus(path=str(folder / f"sparse-{index}")) for index in range(1000)]
    for corpus in many:
        sparse_corpus(Path(corpus.path), 10**6, 512, 640_000)
    cpu, wall = measured(lambda: Corpora(many, 512, 1000, 1, "data.train"))
    print(f"opening {len(many):,} corpora of 10^6 windows and 640,000 documents: {cpu:.1f} CPU s, {wall:.1f} wall s")
    return {"by_size": found, "opening": {"corpora": len(many), "cpu_seconds": cpu, "wall_seconds": wall}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=35, help="of text for `prepare`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", help="default: 8,192 ids, trained on the quickstart's text")
    names = ("prepare", "memory", "order", "first")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Path(arguments.tokenizer or folder / "tokenizer")
        if not arguments.tokenizer and {"prepare", "memory"} & set(arguments.only):
            train_tokenizer([str(path) for path in QUICKSTART.glob("*.jsonl.gz")], 8192, tokenizer)
        benches: dict[str, Callable[[], Any]] = {
            "order": bench_order,
            "first": partial(bench_first, folder),
            "prepare": partial(bench_prepare, folder, tokenizer, arguments.megabytes, arguments.rounds),
            "memory": partial(bench_memory, folder, tokenizer),
        }
        results = {each: bench() for each, bench in benches.items() if each in arguments.only}
    if arguments.out:
        # Not at the top either.
        from local_ranks import facts

        arguments.out.write_text(json.dumps(facts() | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
