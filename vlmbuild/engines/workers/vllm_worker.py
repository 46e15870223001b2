"""Run vLLM on a checkpoint: it processes prompts and images itself, and shows tokens and log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exchange

PROBABILITIES = 20
"""Most probable tokens that are asked for: vLLM's limit."""
ROOM = 64
"""Tokens of the longest context beyond the longest prompt and its answer."""


class Server:
    """vLLM in this process, which is asked nothing more after a failure that leaves a prompt in it: it would never answer."""

    def __init__(self, llm: Any, parameters: Any) -> None:
        self._llm, self._parameters = llm, parameters
        self._failure: Exception | None = None

    def run(self, case: exchange.Case) -> None:
        """Run one case."""
        case.enter("tokens")
        if self._failure is not None:
            raise RuntimeError(f"not run after an error: {self._failure}")
        try:
            self._run(case)
        except Exception as error:
            if "_OpNamespace" in str(error):  # a kernel that is compiled for other processors alone
                raise SystemExit(
                    f"this build of vLLM has no kernel for the format on this processor: {error}"
                ) from error
            if self._llm.llm_engine.has_unfinished_requests():
                self._failure = error
            raise

    def _run(self, case: exchange.Case) -> None:
        from PIL import Image

        prompt: dict[str, Any] = {"prompt": case.given["text"]}
        if case.given["images"]:
            prompt["multi_modal_data"] = {"image": [Image.open(file).convert("RGB") for file in case.given["images"]]}
        (result,) = self._llm.generate([prompt], self._parameters, use_tqdm=False)
        case.shown["tokens"] = list(result.prompt_token_ids)
        (answer,) = result.outputs
        case.shown["greedy"] = list(answer.token_ids)
        case.shown["log_probabilities"] = {token: entry.logprob for token, entry in answer.logprobs[0].items()}


def main() -> None:
    """Open the model, and run every case."""
    job = exchange.read_job()
    vllm, _ = exchange.require("vllm", "PIL")
    longest = max(len(case["tokens"]) for case in job["cases"])
    llm = vllm.LLM(
        model=job["model"],
        dtype=json.loads(Path(job["model"], "config.json").read_text(encoding="utf-8")).get("dtype", "auto"),
        max_model_len=longest + job["steps"] + ROOM,
        max_num_seqs=1,
        enforce_eager=True,
        limit_mm_per_prompt={"image": max(len(case["images"]) for case in job["cases"])},
        disable_log_stats=True,
        seed=0,
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=job["steps"], logprobs=PROBABILITIES)
    exchange.answer(job, vllm.__version__, Server(llm, parameters).run)


if __name__ == "__main__":
    exchange.start(main)
