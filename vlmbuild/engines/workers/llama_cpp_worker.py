"""Run a GGUF artifact in llama.cpp."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exchange

ENGINE_FILE = "llama.cpp.json"
_TEXT, _ERROR = 0, 4
"""Values of mtmd_input_chunk_type and of ggml_log_level."""
_THREADS = max(1, (os.cpu_count() or 1) // 2)
"""Threads wait for each other without sleeping: with one too many a machine that does something else stands still."""
_GAP = 256
_POINTER = ctypes.POINTER


class LlamaCpp:
    """A model with its tower. Attention has a float32 cache and no fused kernels, so that only the files' values are rounded.

    Attributes:
        settings: How the artifact wants to be started.
    """

    def __init__(self, folder: Path, longest: int) -> None:
        self._llama, self._mtmd, self._numpy, self._pillow = exchange.require(
            "llama_cpp", "llama_cpp.mtmd_cpp", "numpy", "PIL.Image"
        )
        self.settings = json.loads((folder / ENGINE_FILE).read_text(encoding="utf-8"))
        llama, mtmd = self._llama, self._mtmd
        self._errors: list[str] = []
        self._log = llama.llama_log_callback(self._keep_errors)  # is kept: llama.cpp calls it later
        for setter in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            setter(self._log, None)
        llama.llama_backend_init()
        model = llama.llama_model_default_params()
        model.n_gpu_layers, model.use_extra_bufts = 0, False  # AMX kernels end the process on small matrices
        self._model = llama.llama_model_load_from_file(str(folder / "model.gguf").encode(), model)
        self._size = -(-longest // _GAP) * _GAP + _GAP
        self._context = self._model and self._new_context()
        tower = mtmd.mtmd_context_params_default()
        tower.use_gpu, tower.print_timings, tower.warmup = False, False, False
        tower.n_threads = _THREADS
        tower.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self.settings["image_tokens"]:
            tower.image_min_tokens, tower.image_max_tokens = self.settings["image_tokens"]
        path = str(folder / "mmproj.gguf").encode()
        self._tower = self._context and mtmd.mtmd_init_from_file(path, self._model, tower)
        if not self._tower:
            raise SystemExit(
                f"llama.cpp cannot open the files: {self._errors[0] if self._errors else 'no reason given'}"
            )
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self._rows = llama.llama_vocab_n_tokens(self._vocabulary)
        self._width = llama.llama_model_n_embd_inp(self._model)

    def _new_context(self) -> Any:
        """Make a context, one for each prompt: a used one was seen to give NaN for Mistral 3."""
        llama = self._llama
        context = llama.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = self._size
        context.n_threads = context.n_threads_batch = _THREADS
        context.type_k = context.type_v = llama.GGML_TYPE_F32
        context.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return llama.llama_init_from_model(self._model, context)

    def _keep_errors(self, level: int, text: bytes, data: Any) -> None:
        """Take a line of llama.cpp's log."""
        del data
        if level == _ERROR:
            self._errors.append(text.decode(errors="replace").strip())

    def chunks(self, text: str, images: Sequence[str]) -> list[Any]:
        """Cut a prompt into texts and images, the latter resized."""
        numpy, mtmd = self._numpy, self._mtmd
        pixels = [numpy.ascontiguousarray(self._pillow.open(file).convert("RGB"), dtype=numpy.uint8) for file in images]
        bitmaps = [
            mtmd.mtmd_bitmap_init(array.shape[1], array.shape[0], array.ctypes.data_as(_POINTER(ctypes.c_uint8)))
            for array in pixels
        ]
        data = text.replace(self.settings["image"], mtmd.mtmd_default_marker().decode()).encode()
        prompt = mtmd.mtmd_input_text(data, len(data), False, True)
        self._chunks = mtmd.mtmd_input_chunks_init()  # owns the chunks
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        code = mtmd.mtmd_tokenize(self._tower, self._chunks, ctypes.byref(prompt), array, len(bitmaps))
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        if code:
            raise ValueError(f"mtmd_tokenize returns {code}")
        return [
            mtmd.mtmd_input_chunks_get(self._chunks, number)
            for number in range(mtmd.mtmd_input_chunks_size(self._chunks))
        ]

    def is_text(self, chunk: Any) -> bool:
        """Tell texts from images."""
        return bool(self._mtmd.mtmd_input_chunk_get_type(chunk) == _TEXT)

    def size(self, chunk: Any) -> int:
        """Count the tokens of a chunk."""
        return int(self._mtmd.mtmd_input_chunk_get_n_tokens(chunk))

    def text_tokens(self, chunk: Any) -> list[int]:
        """List the tokens of a text."""
        count = ctypes.c_size_t()
        found = self._mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return [int(found[number]) for number in range(count.value)]

    def features(self, chunk: Any) -> Any:
        """Compute the rows that an image becomes."""
        if code := self._mtmd.mtmd_encode_chunk(self._tower, chunk):
            raise ValueError(f"mtmd_encode_chunk returns {code}")
        rows = self.size(chunk)
        found = self._numpy.ctypeslib.as_array(self._mtmd.mtmd_get_output_embd(self._tower), (rows * self._width,))
        return found.reshape(rows, self._width).copy()

    def read(self, chunks: Sequence[Any], last: int) -> Any:
        """Read a prompt; returns the logits of its last positions, as many as the text at its end has."""
        self._llama.llama_free(self._context)
        self._context = self._new_context()
        past = self._llama.llama_pos(0)
        for chunk in chunks[:-1]:
            code = self._mtmd.mtmd_helper_eval_chunk_single(
                self._tower, self._context, chunk, past.value, 0, self._size, False, ctypes.byref(past)
            )
            if code:
                raise ValueError(f"mtmd_helper_eval_chunk_single returns {code}")
        self._past = past.value
        return self.decode(self.text_tokens(chunks[-1]), last)

    def decode(self, tokens: Sequence[int], last: int = 1) -> Any:
        """Read tokens; returns the logits of the last ones."""
        llama, count = self._llama, len(tokens)
        batch = llama.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for number, token in enumerate(tokens):
            batch.token[number], batch.pos[number] = token, self._past + number
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
            batch.logits[number] = number >= count - last
        code = llama.llama_decode(self._context, batch)
        llama.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode returns {code}")
        self._past += count
        wanted = range(max(0, count - last), count)
        rows = [llama.llama_get_logits_ith(self._context, number) for number in wanted]
        return self._numpy.stack([self._numpy.ctypeslib.as_array(row, (self._rows,)).copy() for row in rows])

    def ends(self, token: int) -> bool:
        """Tell whether a token ends an answer."""
        return bool(self._llama.llama_vocab_is_eog(self._vocabulary, token))

    def close(self) -> None:
        """Free the chunks of a prompt."""
        self._mtmd.mtmd_input_chunks_free(self._chunks)


def image_tokens(expected: Sequence[int], first: int, count: int, media: Sequence[int]) -> list[int]:
    """Return the tokens that an image of so many rows stands for: llama.cpp counts them alone."""
    there = list(expected[first : first + count])
    return there if len(there) == count and set(there) <= set(media) else [media[0]] * count


def run(engine: LlamaCpp, job: dict[str, Any], case: exchange.Case) -> None:
    """Run one case."""
    import numpy

    case.enter("tokens")
    chunks = engine.chunks(case.given["text"], case.given["images"])
    tokens: list[int] = []
    features = []
    media = engine.settings["media"]
    for chunk in chunks:
        if engine.is_text(chunk):
            tokens += engine.text_tokens(chunk)
            continue
        own = image_tokens(case.given["tokens"], len(tokens), engine.size(chunk), media)
        case.enter("features")
        features.append(engine.features(chunk)[[token == media[0] for token in own]])
        tokens += own
    case.shown["tokens"] = tokens
    if features:
        case.value("features", numpy.concatenate(features))
    case.enter("logits")
    logits = engine.read(chunks, job["last"])
    if len(logits) == job["last"]:
        case.value("logits", logits)
    case.enter("greedy")
    greedy = [int(logits[-1].argmax())]
    while len(greedy) < job["steps"] and not engine.ends(greedy[-1]):
        greedy.append(int(engine.decode([greedy[-1]])[-1].argmax()))
    case.shown["greedy"] = greedy
    engine.close()


def main() -> None:
    """Open the files, and run every case."""
    job = exchange.read_job()
    longest = max((len(case["tokens"]) for case in job["cases"]), default=0) + job["steps"]
    engine = LlamaCpp(Path(job["model"]), longest)
    known = (
        {"features": engine.settings["sizes"], "tokens": engine.settings["sizes"]} if engine.settings["sizes"] else {}
    )
    [package] = exchange.require("llama_cpp")
    exchange.answer(job, f"llama-cpp-python {package.__version__}", lambda case: run(engine, job, case), known=known)


if __name__ == "__main__":
    exchange.start(main)
