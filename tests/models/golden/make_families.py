"""Golden outputs of small random checkpoints of every family, from transformers:

    python tests/models/golden/make_families.py

For each case the tokens are 8 random ones and their greedy continuation by 64; the logits are those of every third token.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from families import CASES, GOLDEN, config_of, write_checkpoint


def read(directory: Path, dtype: str = "float32"):
    """transformers' model in a directory."""
    options = dict(dtype=getattr(torch, dtype), attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def network_of(case: str, seed: int, directory: Path, dtype: str = "float32"):
    """transformers' model of a case, read from a checkpoint that `write_checkpoint` makes; and its tensors' shapes."""
    config = config_of(case)
    empty = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    empty.save_pretrained(directory)
    shapes = {name: tuple(t.shape) for name, t in sorted(load_file(directory / "model.safetensors").items())}
    write_checkpoint(directory, case, shapes, seed)
    return read(directory, dtype), shapes


@torch.no_grad()
def logits_of(network, tokens) -> np.ndarray:
    return network(torch.tensor(np.asarray(tokens))[None], use_cache=False).logits[0].float().numpy()


def greedy(network, tokens: list[int], count: int) -> list[int]:
    for _ in range(count):
        tokens = [*tokens, int(logits_of(network, tokens)[-1].argmax())]
    return tokens


def main() -> None:
    arrays, shapes = {}, {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            network, shapes[case] = network_of(case, 0, Path(folder))
            prompt = np.random.RandomState(0).randint(0, 40, 8).tolist()
            tokens = greedy(network, prompt, 64)
            arrays[f"{case}/tokens"] = np.array(tokens, np.uint8)
            arrays[f"{case}/logits"] = logits_of(network, tokens)[::3]
            arrays[f"{case}/bfloat16"] = logits_of(network_of(case, 0, Path(folder), "bfloat16")[0], tokens)[::3]
            arrays[f"{case}/bfloat16"] = arrays[f"{case}/bfloat16"].astype(np.float16)
            print(case, len(set(tokens)), arrays[f"{case}/logits"].std())
    np.savez_compressed(GOLDEN / "families.npz", **arrays)
    (GOLDEN / "families.json").write_text(json.dumps(shapes, indent=0))


if __name__ == "__main__":
    main()
