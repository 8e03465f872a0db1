"""The engines of the speed benchmarks, each behind the same three things: what settings it has, ``run``, and answers.

An engine offers all its settings that may be the best; the benchmark tries them and takes the fastest:
- StudyTiny: none, as a user gets it; one thread of ours for each conversation.
- transformers: ``generate`` with a dynamic or a static cache, a list all at once or 8 at a time, prompts of like
  length together, padded on the left. Rows that are done stay in the batch until the last one is.
- CTranslate2: 1 or N threads in an operation, 1 or N batches side by side, 1, 8, 16 or all conversations in a batch,
  prompts of like length together. A Python callback watches the tokens only where lengths differ or the first one is
  timed. Left alone it takes AVX2 on an AMD processor, so AVX512 is measured too; its MKL was 5 times slower there.
- llama.cpp (its C functions through llama-cpp-python, without the work that its high-level class does in Python): 1 or
  N threads, flash attention on or off, key/value cache unified or one a sequence. Continuous batching: each pass takes
  the prompts that have arrived, whole, together with one token of every running conversation.
Everybody samples with temperature 0.7, top-k 50 and repetition penalty 1.1, in the engine's own code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from studytiny import Generator, SamplingConfig, Tokenizer
from studytiny.checkpoint import load_folder
from studytiny.errors import UserError
from studytiny.tokenizer import PAD_ID

TEMPERATURE, TOP_K, PENALTY = 0.7, 50, 1.1
VOCABULARY, WINDOW, MOST_AT_ONCE = 6700, 256, 32


def load_vocabulary(folder: Path) -> Tokenizer:
    """The one of all engines, where ``prepare`` of ``peers.py`` wrote it."""
    return Tokenizer.load_vocab(folder / "studytiny" / "vocab.txt")


@dataclass(frozen=True)
class Request:
    """One conversation: what the user says, and how long the reply has to be. ``arrival``: seconds after the start."""

    text: str
    prompt: list[int]
    new_tokens: int
    arrival: float
    caller: str


@dataclass
class Answer:
    """What became of a Request. Times in seconds since its arrival; ``first`` is None where nobody watched."""

    first: float | None = None
    done: float = 0.0
    tokens: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Setting:
    """One way to run a peer; each engine reads the fields it knows. ``batch`` 0: all at once."""

    label: str = "默认"
    threads: int = 0
    side_by_side: int = 1
    batch: int = 0
    cache: str = ""
    flash: bool = True
    unified: bool = True


class StudyTiny:
    """This project, through the one public way it has."""

    def __init__(self, folder: Path, threads: int, precision: str) -> None:
        torch.set_num_threads(threads)
        self.settings = [Setting()]
        self.generator = Generator(*load_folder(folder / "studytiny", "cpu"), precision=precision)

    def run(self, setting: Setting, requests: Sequence[Request], watch: bool) -> list[Answer]:
        answers = [Answer() for _ in requests]
        start = time.perf_counter()

        def converse(request: Request, answer: Answer) -> None:
            wait_until(start + request.arrival)
            sampling = SamplingConfig(TEMPERATURE, TOP_K, 1.0, PENALTY, request.new_tokens)
            messages = [{"role": "user", "content": request.text}]
            try:
                for _ in self.generator.stream(messages, sampling, caller=request.caller):
                    note(answer, start + request.arrival)
            except UserError as error:
                answer.refused = str(error)

        workers = [threading.Thread(target=converse, args=pair) for pair in zip(requests, answers, strict=True)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return answers


class HuggingFace:
    """transformers' ``generate``."""

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        import transformers

        torch.set_num_threads(threads)
        self.settings = [
            Setting(f"{cache} 缓存，{f'每批 {batch} 段' if batch else '一批'}", batch=batch, cache=cache)
            for cache in ("dynamic", "static")
            for batch in (0, 8)
        ]
        self.criterion = transformers.StoppingCriteriaList
        kind = getattr(torch, dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder / "huggingface", dtype=kind).eval()
        self.model.generation_config.eos_token_id = None  # nothing ends a reply but its length

    def run(self, setting: Setting, requests: Sequence[Request], watch: bool) -> list[Answer]:
        answers = [Answer() for _ in requests]
        start = time.perf_counter()
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
        size = setting.batch or len(order)
        for first in range(0, len(order), size):
            group = order[first : first + size]
            self._generate([requests[i] for i in group], [answers[i] for i in group], start, setting.cache)
        return answers

    def _generate(self, requests: list[Request], answers: list[Answer], start: float, cache: str) -> None:
        width = max(len(request.prompt) for request in requests)
        ids = torch.tensor([[PAD_ID] * (width - len(request.prompt)) + request.prompt for request in requests])
        wanted = torch.tensor([request.new_tokens for request in requests])

        def finished(ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
            length = ids.shape[1] - width
            for answer, request in zip(answers, requests, strict=True):
                if length <= request.new_tokens:
                    note(answer, start)
            return length >= wanted

        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=(ids != PAD_ID).long(),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                repetition_penalty=PENALTY,
                max_new_tokens=int(wanted.max()),
                pad_token_id=PAD_ID,
                stopping_criteria=self.criterion([finished]),
                cache_implementation=cache,
            )


class CTranslate2:
    """CTranslate2's ``generate_batch``; whoever waits when a batch ends is the next batch."""

    def __init__(self, folder: Path, threads: int, compute_type: str) -> None:
        import ctranslate2

        self.settings = [
            Setting(f"{inner} 线程 × {outer} 批，{f'每批 {batch} 段' if batch else '一批'}", inner, outer, batch)
            for inner, outer in dict.fromkeys([(1, 1), (threads, 1), (1, threads)])
            for batch in ((0, 8) if outer == 1 else (1, 8, 16))
        ]
        self.tokens = list(load_vocabulary(folder).vocab)
        self.load = lambda inner, outer: ctranslate2.Generator(
            str(folder / "ctranslate2"), compute_type=compute_type, intra_threads=inner, inter_threads=outer
        )
        self.loaded = {(threads, 1): self.load(threads, 1)}

    def run(self, setting: Setting, requests: Sequence[Request], watch: bool) -> list[Answer]:
        answers = [Answer() for _ in requests]
        shape = (setting.threads, setting.side_by_side)
        if shape not in self.loaded:
            self.loaded[shape] = self.load(*shape)
        generator = self.loaded[shape]
        waiting = sorted(range(len(requests)), key=lambda i: (requests[i].arrival, len(requests[i].prompt)))
        lock = threading.Lock()
        start = time.perf_counter()

        def work() -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    wait_until(start + requests[waiting[0]].arrival)
                    now = time.perf_counter() - start
                    group = [index for index in waiting if requests[index].arrival <= now]
                    group = group[: setting.batch or len(group)]
                    del waiting[: len(group)]
                self._generate(generator, [requests[i] for i in group], [answers[i] for i in group], start, watch)

        workers = [threading.Thread(target=work) for _ in range(setting.side_by_side)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return answers

    def _generate(
        self, generator: object, requests: list[Request], answers: list[Answer], start: float, watch: bool
    ) -> None:
        def watcher(step: object) -> bool:
            request, answer = requests[step.batch_id], answers[step.batch_id]
            note(answer, start + request.arrival)
            return answer.tokens >= request.new_tokens

        longest = max(request.new_tokens for request in requests)
        ragged = min(request.new_tokens for request in requests) < longest
        results = generator.generate_batch(
            [[self.tokens[index] for index in request.prompt] for request in requests],
            max_length=longest,
            min_length=longest,
            include_prompt_in_result=False,
            sampling_topk=TOP_K,
            sampling_temperature=TEMPERATURE,
            repetition_penalty=PENALTY,
            callback=watcher if watch or ragged else None,
        )
        for result, request, answer in zip(results, requests, answers, strict=True):
            answer.tokens = len(result.sequences_ids[0])
            answer.done = answer.done or time.perf_counter() - start - request.arrival


class LlamaCpp:
    """llama.cpp's own batch of sequences."""

    def __init__(self, folder: Path, threads: int, quantization: str) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        self.settings = [
            Setting(
                f"{count} 线程，flash attention {'开' if flash else '关'}，缓存{'合用' if unified else '分开'}",
                count,
                flash=flash,
                unified=unified,
            )
            for count in dict.fromkeys([threads, 1])
            for flash in (True, False)
            for unified in (True, False)
        ]
        self.quiet = api.llama_log_callback(lambda level, text, data: None)  # kept, or it would be freed under them
        api.llama_log_set(self.quiet, None)
        api.llama_backend_init()
        path = str(folder / f"{quantization}.gguf").encode()
        self.model = api.llama_model_load_from_file(path, api.llama_model_default_params())
        if not self.model:
            raise UserError("llama.cpp 读不了为它写的 GGUF 文件")
        self.batch = api.llama_batch_init(MOST_AT_ONCE * WINDOW, 0, 1)
        self.samplers = [self._sampler(seed) for seed in range(MOST_AT_ONCE)]
        self.loaded = {}

    def _sampler(self, seed: int) -> object:
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_penalties(VOCABULARY, WINDOW, PENALTY, 0.0, 0.0))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_k(TOP_K))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(TEMPERATURE))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(seed))
        return chain

    def _context(self, setting: Setting, sequences: int) -> object:
        key = (setting, sequences)
        if key not in self.loaded:
            parameters = self.api.llama_context_default_params()
            parameters.n_ctx = parameters.n_batch = sequences * WINDOW
            parameters.n_seq_max = sequences
            parameters.n_threads = parameters.n_threads_batch = setting.threads
            parameters.flash_attn_type = int(setting.flash)
            parameters.kv_unified = setting.unified
            self.loaded[key] = self.api.llama_init_from_model(self.model, parameters)
        return self.loaded[key]

    def run(self, setting: Setting, requests: Sequence[Request], watch: bool) -> list[Answer]:
        api = self.api
        context = self._context(setting, 1 if len(requests) == 1 else MOST_AT_ONCE)
        memory = api.llama_get_memory(context)
        answers = [Answer() for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda index: requests[index].arrival)
        running: dict[int, tuple[int, list[int], int]] = {}  # sequence -> request, tokens to read, their position
        start = time.perf_counter()
        while waiting or running:
            if not running:
                wait_until(start + requests[waiting[0]].arrival)
            now = time.perf_counter() - start
            while waiting and requests[waiting[0]].arrival <= now and len(running) < MOST_AT_ONCE:
                sequence = next(number for number in range(MOST_AT_ONCE) if number not in running)
                running[sequence] = (waiting[0], requests[waiting[0]].prompt, 0)
                api.llama_sampler_reset(self.samplers[sequence])
                waiting.pop(0)
            for sequence, place in self._decode(context, running).items():
                token = api.llama_sampler_sample(self.samplers[sequence], context, place)
                index, read, position = running[sequence]
                note(answers[index], start + requests[index].arrival)
                running[sequence] = (index, [token], position + len(read))
                if answers[index].tokens >= requests[index].new_tokens:
                    del running[sequence]
                    api.llama_memory_seq_rm(memory, sequence, -1, -1)
        return answers

    def _decode(self, context: object, running: dict[int, tuple[int, list[int], int]]) -> dict[int, int]:
        """One pass over what every sequence has to read; where in the batch the last token of each stands."""
        batch, size, last = self.batch, 0, {}
        for sequence, (_, tokens, position) in running.items():
            for offset, token in enumerate(tokens):
                batch.token[size], batch.pos[size] = token, position + offset
                batch.n_seq_id[size], batch.seq_id[size][0] = 1, sequence
                batch.logits[size] = offset == len(tokens) - 1
                size += 1
            last[sequence] = size - 1
        batch.n_tokens = size
        if self.api.llama_decode(context, batch):
            raise UserError("llama_decode 失败")
        return last


def wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def note(answer: Answer, arrival: float) -> None:
    """One more token is there."""
    answer.done = time.perf_counter() - arrival
    answer.first = answer.done if answer.first is None else answer.first
    answer.tokens += 1
