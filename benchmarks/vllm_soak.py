# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""vLLM's server under requests of all kinds, some of which are broken.

    python benchmarks/vllm_soak.py [--requests N] [--rate N] [--models dense w4a8] [--json PATH]

The small model, dense and quantized, is served by ``vllm serve`` and asked over HTTP, by
requests that arrive at random times (exponential intervals). Four of five ask about text,
an image, a sound, or an image and a sound, and are answered right where the answer's tokens
are those that transformers gives for the same prompt and files from the same folder. The
rest must be refused or do no harm: a file that is no image, one that is no sound, a prompt
longer than the model's length, a client that goes away while it is answered.

What all processes of the server hold is looked at after every twentieth of the requests;
the dense model tells what of its growth is vLLM's.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import tempfile
import threading
import time
import wave
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

import numpy as np
import torch
import transformers
import vllm
from PIL import Image
from serving_bench.vllm_server import Server
from torchao.quantization import quantize_
from transformers import AutoProcessor, Qwen2_5OmniForConditionalGeneration

from torchao_masquant import calibrate, masquant_config, save_quantized
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.testing import digits

_LENGTH = 256
_EXAMPLES = 40
_MARKS = 20
_QUESTIONS = {
    "image": "Which digit is shown?",
    "audio": "Which digit is spoken?",
    "both": "What is the sum?",
}
_BAD = ("no image", "no sound", "too long", "gone")
_OPTIONS = ("--trust-remote-code", "--enforce-eager", "--dtype", "float32")
_OPTIONS += ("--max-model-len", str(_LENGTH), "--max-num-batched-tokens", "64")
# Its pages are touched one by one, which would be taken for growth: few of them.
_OPTIONS += ("--num-gpu-blocks-override", "64")
_OPTIONS += ("--limit-mm-per-prompt", '{"image": 1, "audio": 1, "video": 0}')


@dataclass(frozen=True)
class Request:
    """What is asked, as messages of the API, and the answer; None: it has none."""

    kind: str
    parts: list[dict[str, Any]]
    answer: Optional[str] = None


@dataclass
class Outcome:
    """What became of all requests.

    Attributes:
        answered: kind to number of answers that were transformers'.
        wrong: what was asked, answered and expected.
        refused: kind to what was said of it, and how often.
        resident: (requests done, MiB that the server's processes hold).
        growth: MiB for 1,000 requests, over the second half, and its standard error.
        running: requests that the server still has at the end.
        seconds: it took.
        latencies: p50, p90, p99 of the answered, in ms.
    """

    answered: Counter = field(default_factory=Counter)
    wrong: list[Any] = field(default_factory=list)
    refused: dict[str, Counter] = field(default_factory=dict)
    gone: int = 0
    resident: list[tuple[int, float]] = field(default_factory=list)
    growth: tuple[float, float] = (float("nan"), float("nan"))
    running: float = float("nan")
    seconds: float = 0.0
    latencies: tuple[float, ...] = ()


def written(folder: Path, *, dense: bool) -> Path:
    """The folder that is served."""
    original = digits.write_folder(folder / "dense")
    if dense:
        return original
    model = _loaded(original)
    recipe = calibrate(
        model, digits.calibration_samples(32), scheme="w4a8", progress=False
    )
    quantize_(model, masquant_config(recipe))
    save_quantized(model, folder / "w4a8", beside=original)
    return folder / "w4a8"


def _loaded(folder: Path) -> Any:
    kind = Qwen2_5OmniForConditionalGeneration
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def good_requests(folder: Path, files: Path) -> list[Request]:
    """Of each task, with the answers of transformers."""
    model = _loaded(folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    found = []
    for task, examples in digits.heldout().items():
        for index in range(_EXAMPLES):
            parts: list[dict[str, Any]] = []
            media: dict[str, Any] = {}
            if examples.images is not None:
                file = digits.write_image(files / "image.png", examples.images[index])
                parts.append(_image(file.read_bytes()))
                media["images"] = [Image.open(io.BytesIO(file.read_bytes()))]
            if examples.log_mels is not None:
                file = digits.write_sound(files / "s.wav", examples.log_mels[index])
                parts.append(_sound(file.read_bytes()))
                media["audio"] = [_heard(file)]
            words = examples.prompt_ids[index][1:].tolist()
            text = " ".join(digits.VOCABULARY[token] for token in words)
            parts.append({"type": "text", "text": _QUESTIONS.get(task, text)})
            answer = _answer(model, processor, parts, media)
            found.append(Request(task, parts, answer))
    return found


def _answer(
    model: Any, processor: Any, parts: list[dict[str, Any]], media: dict[str, Any]
) -> str:
    kinds = {"image_url": "image", "input_audio": "audio"}
    content = [{**part, "type": kinds.get(part["type"], "text")} for part in parts]
    chat = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False
    )
    inputs = processor(text=chat, return_tensors="pt", **media)
    with torch.no_grad():
        tokens = model.thinker.generate(**inputs, max_new_tokens=8, do_sample=False)
    given = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(given, skip_special_tokens=True).strip()


def _heard(file: Path) -> np.ndarray:
    with wave.open(str(file)) as reader:
        data = reader.readframes(reader.getnframes())
    return np.frombuffer(data, np.int16).astype(np.float32) / 32768


def _image(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _sound(data: bytes) -> dict[str, Any]:
    known = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": known}


def bad_request(kind: str, good: Request, draw: random.Random) -> Request:
    """One of a kind that is not answered."""
    text = {"type": "text", "text": "Which digit is shown?"}
    noise = draw.randbytes(200)
    return Request(
        kind,
        {
            "no image": [_image(b"\x89PNG\r\n\x1a\n" + noise), text],
            "no sound": [_sound(b"RIFF" + noise), text],
            "too long": [{"type": "text", "text": "what is the sum of " * _LENGTH}],
            "gone": good.parts,
        }[kind],
    )


class Client:
    """Asks a server, and keeps account."""

    def __init__(self, server: Server, model: str, count: int):
        self.outcome = Outcome()
        self._server, self._model = server, model
        self._host = urlsplit(server.address).netloc
        self._every = max(1, count // _MARKS)
        self._latencies: list[float] = []
        self._done = 0
        self._account = threading.Lock()

    def ask(self, request: Request, arrived: float) -> None:
        status, said = (
            self._leave(request) if request.kind == "gone" else self._reply(request)
        )
        seconds = time.perf_counter() - arrived
        with self._account:
            self._done += 1
            if request.kind == "gone":
                self.outcome.gone += 1
            elif request.answer is None or status != 200:
                known = self.outcome.refused.setdefault(request.kind, Counter())
                known[f"{status}: {said}"] += 1
            elif said != request.answer:
                self.outcome.wrong.append((request.kind, said, request.answer))
            else:
                self.outcome.answered[request.kind] += 1
                self._latencies.append(seconds)
            if self._done % self._every == 0:
                mark = (self._done, self._server.resident / 2**20)
                self.outcome.resident.append(mark)

    def _posted(self, request: Request, **options: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._host, timeout=300)
        body = {
            "model": self._model,
            "temperature": 0,
            "messages": [{"role": "user", "content": request.parts}],
            **options,
        }
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        return connection

    def _reply(self, request: Request) -> tuple[int, str]:
        connection = self._posted(request)
        response = connection.getresponse()
        told = json.loads(response.read())
        connection.close()
        if response.status != 200:
            return response.status, str(told["error"]["message"]).split("\n")[0]
        return 200, told["choices"][0]["message"]["content"].strip()

    def _leave(self, request: Request) -> tuple[int, str]:
        connection = self._posted(
            request, stream=True, ignore_eos=True, max_tokens=_LENGTH // 2
        )
        response = connection.getresponse()
        response.read(1)
        # Closing a response that is not read to its end closes the socket.
        response.close()
        connection.close()
        return response.status, ""

    def ended(self, seconds: float) -> Outcome:
        """The account, after the last request."""
        outcome = self.outcome
        outcome.seconds = seconds
        if self._latencies:
            percentiles = np.percentile(self._latencies, (50, 90, 99))
            outcome.latencies = tuple(1000 * p for p in percentiles)
        late = outcome.resident[len(outcome.resident) // 2 :]
        if len(late) > 3:
            done, held = np.array(late).T
            line, covariance = np.polyfit(done / 1000, held, 1, cov=True)
            outcome.growth = float(line[0]), float(covariance[0, 0] ** 0.5)
        end = time.monotonic() + 60
        while (running := self._running()) and time.monotonic() < end:
            time.sleep(1)
        outcome.running = running
        return outcome

    def _running(self) -> float:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def soak(folder: Path, log: Path, count: int, rate: float, seed: int = 0) -> Outcome:
    """Serve a folder, and ask ``count`` requests, ``rate`` a second."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as files:
        good = good_requests(folder, Path(files))
    with Server(folder, log, *_OPTIONS) as server, ThreadPoolExecutor(32) as pool:
        client = Client(server, str(folder), count)
        client.ask(good[0], time.perf_counter())
        client.outcome, start = Outcome(), time.perf_counter()
        futures = []
        for number in range(count):
            request = draw.choice(good)
            if number % 5 == 4:
                request = bad_request(_BAD[number // 5 % len(_BAD)], request, draw)
            futures.append(pool.submit(client.ask, request, time.perf_counter()))
            time.sleep(draw.expovariate(rate))
        for future in futures:
            future.result()
        return client.ended(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rate", type=float, default=4.0, help="a second")
    parser.add_argument(
        "--models", nargs="+", choices=("dense", "w4a8"), default=("dense", "w4a8")
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--log", type=Path, help="what the server prints")
    given = parser.parse_args()
    runs = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = written(Path(temporary), dense=model == "dense")
            log = given.log or Path(temporary, "log")
            outcome = soak(folder, log, given.requests, given.rate)
        runs.append({"model": model, "requests": given.requests, **vars(outcome)})
    told = {
        "rate": given.rate,
        "runs": runs,
        "vllm": vllm.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[2],
    }
    print(json.dumps(told, indent=1))
    if given.json is not None:
        write_whole(given.json, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
