"""The engine's side of the pipe: one vLLM engine that lives as long as its caller, in a Python of its own.

`process.py` starts this file by its path with the Python that has vLLM, which may have none of what mergesearch needs.
So it imports vLLM, torch and the standard library alone. Orders come in on the standard input and answers go out on the
standard output, one JSON object a line; tensors come in a file that both sides have mapped, whose number is the first
argument.

| order | keys | answer |
|---|---|---|
| `start` | `model`, a folder; `options` of `vllm.LLM` | `version`, `seconds` |
| `load` | | as many `more` as there are parts, each answered by `size` and `tensors`; then `seconds` |
| `generate` | `groups`: `prompts` (lists of token ids), `settings` of `SamplingParams` | `answers`, group after group |

What goes wrong is answered by `error`, and the engine stays. Where the caller is gone, so is this process.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

# of the engine in this very process, as weights are handed over by an iterator; what the user sets goes before
_SURROUNDINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Channel:
    """Orders in, answers out, on file descriptors that nothing else writes to."""

    def __init__(self) -> None:
        # libraries print what they like: that goes where errors go
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        incoming = os.fdopen(os.dup(0), encoding="utf-8")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        threading.Thread(target=self._listen, args=(incoming,), daemon=True).start()

    def _listen(self, incoming: Any) -> None:
        for line in incoming:
            self._orders.put(json.loads(line))
        os._exit(0)  # the caller is gone, whatever is under way

    def next(self) -> dict[str, Any]:
        """The next order."""
        return self._orders.get()

    def answer(self, **told: Any) -> None:
        """One answer."""
        self._out.write(json.dumps(told) + "\n")
        self._out.flush()


class Server:
    """The engine and what it is told.

    Args:
        channel: to the caller.
        shared: the file descriptor of the file that tensors come in.
    """

    def __init__(self, channel: Channel, shared: int) -> None:
        self._channel, self._shared = channel, shared
        self._engine: Any = None

    def start(self, order: dict[str, Any]) -> dict[str, Any]:
        """Makes the engine, with weights that are still to come."""
        for name, value in _SURROUNDINGS.items():
            os.environ.setdefault(name, value)
        began = time.perf_counter()
        from vllm import LLM, __version__  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        self._engine = LLM(model=order["model"], **order["options"])
        return {"version": str(__version__), "seconds": time.perf_counter() - began}

    def load(self, order: dict[str, Any]) -> dict[str, Any]:
        """Takes other weights on, in place, and forgets what was computed with those before."""
        began = time.perf_counter()
        handed = {"weights_iterator": self._tensors(), "is_checkpoint_format": True}
        self._engine.collective_rpc("reload_weights", kwargs=handed)
        self._engine.apply_model(_pack_heads)
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        return {"seconds": time.perf_counter() - began}

    def generate(self, order: dict[str, Any]) -> dict[str, Any]:
        """Continues prompts; all of them at once, so that vLLM fills its batches."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        prompts, settings = [], []
        for group in order["groups"]:
            prompts += [{"prompt_token_ids": tokens} for tokens in group["prompts"]]
            settings += [SamplingParams(**group["settings"])] * len(group["prompts"])
        outputs = self._engine.generate(prompts, settings, use_tqdm=False)
        return {"answers": [_told(output.outputs[0]) for output in outputs]}

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        """(name, tensor) part by part; each a copy, as the file's room is used again for the next part."""
        import torch

        while True:
            self._channel.answer(more=True)
            part = self._channel.next()
            if not part["tensors"]:
                return
            room = mmap.mmap(self._shared, part["size"])
            whole = torch.frombuffer(room, dtype=torch.uint8)
            for name, kind, shape, begin, end in part["tensors"]:
                # a tensor without a number has no bytes to look at
                flat = whole[begin:end].clone().view(getattr(torch, kind))
                yield name, flat.reshape(shape)
            # views of it may live on in frames of errors: it is closed when the last is gone
            del whole, room


def _pack_heads(model: Any) -> None:
    """Packs heads anew for the CPU.

    vLLM 0.32 packs a head's weights apart, and on reloading those of the embedding alone where the two are tied: the
    head would stay that of the weights before.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _told(output: Any) -> dict[str, Any]:
    logprob = output.cumulative_logprob
    return {
        "text": output.text,
        "tokens": list(output.token_ids),
        "cut": output.finish_reason == "length",
        "logprob": None if logprob is None else float(logprob),
    }


def main() -> None:
    # the caller decides what an interruption means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel()
    server = Server(channel, int(sys.argv[1]))
    does = {"start": server.start, "load": server.load, "generate": server.generate}
    while True:
        order = channel.next()
        try:
            answer = does[order["do"]](order)
        except Exception as error:
            import traceback

            traceback.print_exc()
            text = " ".join(str(error).split())[:400]
            channel.answer(error=f"{type(error).__name__}: {text}" if text else type(error).__name__)
        else:
            channel.answer(**answer)


if __name__ == "__main__":
    main()
