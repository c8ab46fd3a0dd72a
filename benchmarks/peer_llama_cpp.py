"""llama.cpp's side of compare.py: one model in one process, measured as `llama-bench` does, through llama-cpp-python's low-level calls.

    python benchmarks/peer_llama_cpp.py MODEL THREADS CONTEXT

Prints one line of JSON about itself when the model is loaded. Then, for each line {"prompt": [ids], "tokens": [ids]} on standard input,
it prints {"prefill_s": ..., "decode_s": ..., "cpu_s": ...}: the prompt in batches of 512 from an empty context, then the tokens one by
one from an empty context, the logits of the last token only; and its processor time. Between lines it waits in read(), its threads
paused, and uses no processor.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from typing import Any

import llama_cpp

BATCH = 512  # n_batch and n_ubatch
POOL_PARAMETERS_BYTES = 4096  # struct ggml_threadpool_params is 528; no fixed layout is relied on


def text(library: Any, function: str) -> str | None:
    """What a function without arguments says, None if there is none."""
    try:
        call = getattr(library, function)
    except AttributeError:
        return None
    call.restype = ctypes.c_char_p
    return str(call().decode()).strip()


class Model:
    def __init__(self, path: str, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self.library = llama_cpp.llama_cpp._lib
        start = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit("llama.cpp could not load the file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context")
        self.load_s = time.perf_counter() - start
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.pool = self.attach_pool(threads)

    def attach_pool(self, threads: int) -> ctypes.c_void_p | None:
        """Threads that live on between calls, as llama.cpp's own programs have; else a build without OpenMP starts them anew."""
        lib = self.library
        try:
            initialize, new = lib.ggml_threadpool_params_init, lib.ggml_threadpool_new
        except AttributeError:
            return None
        params = ctypes.create_string_buffer(POOL_PARAMETERS_BYTES)
        initialize.argtypes, initialize.restype = [ctypes.c_void_p, ctypes.c_int], None
        initialize(params, threads)
        new.argtypes, new.restype = [ctypes.c_void_p], ctypes.c_void_p
        pool = ctypes.c_void_p(new(params))
        lib.llama_attach_threadpool.argtypes, lib.llama_attach_threadpool.restype = [ctypes.c_void_p] * 3, None
        lib.llama_attach_threadpool(self.context, pool, None)
        return pool

    def pool_call(self, function: str) -> None:
        if self.pool is not None:
            call = getattr(self.library, function)
            call.argtypes, call.restype = [ctypes.c_void_p], None
            call(self.pool)

    def about(self) -> dict[str, Any]:
        return {
            "llama_cpp_python": llama_cpp.__version__,
            "llama_cpp": text(self.library, "llama_version"),
            "ggml": text(self.library, "ggml_version"),
            "commit": text(self.library, "ggml_commit"),
            "system_info": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
            "threadpool": self.pool is not None,
            "load_s": self.load_s,
        }

    def decode(self, ids: list[int], step: int) -> float:
        """Seconds for the ids from an empty context, `step` at a time."""
        arrays = [(llama_cpp.llama_token * len(part))(*part) for part in (ids[at : at + step] for at in range(0, len(ids), step))]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        start = time.perf_counter()
        for array in arrays:
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(array))):
                raise SystemExit("llama_decode failed")
            llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start

    def measure(self, prompt: list[int], tokens: list[int]) -> dict[str, float]:
        before = time.process_time()
        self.pool_call("ggml_threadpool_resume")
        self.decode(tokens[:1], 1)  # after another program's turn: its weights leave the cache, ours come back
        prefill_s, decode_s = self.decode(prompt, BATCH), self.decode(tokens, 1)
        self.pool_call("ggml_threadpool_pause")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        if not all(map(math.isfinite, logits[: self.vocabulary])):
            raise SystemExit("llama.cpp's logits are not finite")
        return {"prefill_s": prefill_s, "decode_s": decode_s, "cpu_s": time.process_time() - before}


def main() -> None:
    model = Model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(model.about()), flush=True)
    for line in sys.stdin:
        print(json.dumps(model.measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
