"""Seconds that transformers takes on one checkpoint; started by decoding.py in an environment with torch.

python reference.py CHECKPOINT PARTICLES PROMPT NEW_TOKENS PREFILL REPEATS
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    checkpoint, (particles, prompt, new, prefill, repeats) = sys.argv[1], map(int, sys.argv[2:])
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(prompt)[None] * 37 % 50000
    long = torch.arange(prefill)[None] * 37 % 50000
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
    runs = {
        "generate": lambda: network.generate(ids.repeat(particles, 1), **options),
        "prefill": lambda: network(long, use_cache=True, logits_to_keep=1),
    }
    times = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    print(json.dumps({name: min(taken[1:]) for name, taken in times.items()}))


if __name__ == "__main__":
    main()
