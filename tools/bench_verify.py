"""Our teacher-forced replay against llama.cpp's single-sequence evaluation and real decoding.

The same short sequences go, in turns, through LlamaRunner.teacher_forced with default settings,
through llama_cpp.Llama(logits_all=True).eval one after the other, and through
LlamaRunner.greedy, which decodes one token a call. Printed are wall time and CPU time, the best of
the rounds, and ratios; and the share of positions at which both evaluations choose the same token,
so that speed is not bought with wrong answers. CPU time is what counts on a busy machine: with one
thread it does not see what else runs.

Two kinds of sequences: random ids, which share nothing, and with --reference the short ones of a
bundle's held-out part, cut to --tokens; those share the beginning that the chat template gives.

    python tools/bench_verify.py MODEL.gguf --reference BUNDLE/reference.npz --json verify.json
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads
from edge_dtm.formats.record import RunSettings
from edge_dtm.formats.reference import HELD_OUT, PADDING, TOP_K, Reference
from edge_dtm.llamacpp.gguf_header import check_gguf
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.schedule import calls, replay_tokens

FEWEST_GENERATED = 4  # of a sequence that is cut


@dataclass
class Measured:
    """Seconds of each round."""

    wall_s: list[float]
    cpu_s: list[float]

    def time(self, run: Callable[[], Any]) -> Any:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)
        return result


def random_sequences(count: int, tokens: int, vocabulary: int, seed: int) -> Reference:
    """count sequences of `tokens` random ids, the first half of each being the prompt."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (count, tokens)).astype(np.int32)
    half = tokens // 2
    return _reference(list(ids[:, :half]), list(ids[:, half:]))


def short_sequences(reference: Reference, count: int, tokens: int) -> Reference:
    """The first `count` whose prompts leave FEWEST_GENERATED of `tokens`, cut to these."""
    prompts, generated = [], []
    for row in range(len(reference)):
        room = tokens - int(reference.prompt_lengths[row])
        if min(room, int(reference.generated_lengths[row])) >= FEWEST_GENERATED:
            prompts.append(np.array(reference.prompt(row), dtype=np.int32))
            generated.append(np.array(reference.generated(row)[:room], dtype=np.int32))
    if not prompts:
        raise EdgeDtmError(f"no prompt is short enough for {tokens} tokens: raise --tokens")
    return _reference(prompts[:count], generated[:count])


def _reference(
    prompts: list[npt.NDArray[np.int32]], generated: list[npt.NDArray[np.int32]]
) -> Reference:
    def padded(rows: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
        out = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int32)
        for i, ids in enumerate(rows):
            out[i, : len(ids)] = ids
        return out

    ids = padded(generated)
    return Reference(
        prompt_ids=padded(prompts),
        prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int32),
        generated_ids=ids,
        generated_lengths=np.array([len(g) for g in generated], dtype=np.int32),
        top_ids=np.zeros((*ids.shape, TOP_K), dtype=np.int32),
        top_logits=np.zeros((*ids.shape, TOP_K), dtype=np.float32),
        log_normalizers=np.zeros(ids.shape, dtype=np.float32),
        split=np.full(len(prompts), HELD_OUT, dtype=np.uint8),
        texts=np.full(len(prompts), ""),
        provenance={},
    )


def bench(path: Path, reference: Reference, threads: int, rounds: int) -> dict[str, Any]:
    """Times and ratios as plain JSON; tokens: fed in all, as by an evaluation one by one."""
    import llama_cpp

    settings = RunSettings(threads=threads)
    context = max(int((reference.prompt_lengths + reference.generated_lengths).max()), 64)
    names = ("teacher_forced", "llama_eval", "greedy")
    measured = {name: Measured([], []) for name in names}
    llama = llama_cpp.Llama(
        str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0,
        logits_all=True, verbose=False,
    )  # fmt: skip
    chosen = np.full(reference.generated_ids.shape, PADDING)

    def evaluate() -> None:
        for row in range(len(reference)):
            llama.reset()
            llama.eval(reference.prompt(row) + reference.generated(row)[:-1])
            n, first = int(reference.generated_lengths[row]), int(reference.prompt_lengths[row]) - 1
            # All that its answer is wanted for; teacher_forced also notes the top logits.
            chosen[row, :n] = llama.scores[first : first + n].argmax(axis=1)

    with LlamaRunner(path, settings, context) as runner:
        runner.time_decoding(8, 2)  # the first touch of the weights belongs to nobody
        for _ in range(rounds):
            record = measured["teacher_forced"].time(lambda: runner.teacher_forced(reference))
            measured["llama_eval"].time(evaluate)
            measured["greedy"].time(lambda: runner.greedy(reference))
    llama.close()
    counted = chosen != PADDING
    best = {name: {"wall_s": min(m.wall_s), "cpu_s": min(m.cpu_s)} for name, m in measured.items()}
    tokens = replay_tokens(reference)
    made = list(calls(reference, settings.batch_tokens, settings.sequences_per_call))
    return {
        "sequences": len(reference),
        "tokens": tokens,
        "tokens_fed_by_teacher_forced": tokens - sum(feed.cached for call in made for feed in call),
        "decode_calls": len(made),
        "settings": settings.to_json(),
        "times": best,
        "same_argmax": float((record.ids == chosen)[counted].mean()),
        **{
            f"speedup_over_{name}_{clock}": best[name][f"{clock}_s"]
            / best["teacher_forced"][f"{clock}_s"]
            for name in names[1:]
            for clock in ("wall", "cpu")
        },
    }


def show(console: Console, title: str, result: dict[str, Any]) -> None:
    table = Table(
        "", "wall s", "CPU s", "CPU ms/token", "slower by wall", "by CPU",
        title=f"{title}: {result['sequences']} sequences, {result['tokens']} tokens",
    )  # fmt: skip
    for name, times in result["times"].items():
        ratios = [
            f"{result[f'speedup_over_{name}_{clock}']:.2f}" if name != "teacher_forced" else ""
            for clock in ("wall", "cpu")
        ]
        each = times["cpu_s"] / result["tokens"] * 1e3
        table.add_row(
            name, f"{times['wall_s']:.2f}", f"{times['cpu_s']:.2f}", f"{each:.2f}", *ratios
        )
    console.print(table)
    console.print(
        f"teacher_forced fed {result['tokens_fed_by_teacher_forced']} tokens in "
        f"{result['decode_calls']} calls; same argmax as llama_eval at "
        f"{result['same_argmax']:.2%} of the positions"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path, help="a reference.npz, or a bundle's folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if min(args.sequences, args.rounds, args.threads) < 1 or min(args.tokens) < 4:
        parser.error("sequences, rounds and threads are 1 or more, tokens 4 or more")
    console = Console()
    try:
        check_gguf(args.model)
        with LlamaRunner(args.model, RunSettings(threads=1, parallel_sequences=1), 8) as runner:
            vocabulary = runner.n_vocab
        results: dict[str, Any] = {}
        for tokens in args.tokens:
            made = {"random": random_sequences(args.sequences, tokens, vocabulary, args.seed)}
            if args.reference is not None:
                folder = args.reference.is_dir()
                file = args.reference / "reference.npz" if folder else args.reference
                held_out = Reference.load(file).part(HELD_OUT)
                try:
                    made["held out"] = short_sequences(held_out, args.sequences, tokens)
                except EdgeDtmError as error:
                    console.print(f"{tokens} tokens: {error}")
            for kind, reference in made.items():
                name = f"{kind}, at most {tokens} tokens"
                results[name] = bench(args.model, reference, args.threads, args.rounds)
                show(console, name, results[name])
    except EdgeDtmError as error:
        sys.exit(f"error: {error}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
