"""Makes logits.npz, the reference logits of transformers for the small real models (needs torch and transformers).

Run from the repository root: python tests/models/golden/make_logits.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[3] / "shared" / "data" / "models"
POSITIONS = [0, 1, 7, 30, 63]


def main() -> None:
    """Logits at POSITIONS of 64 pseudo-random tokens, for each model."""
    arrays = {"positions": np.array(POSITIONS)}
    for name in ("stories260k", "babyllama105"):
        network = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
        tokens = np.random.default_rng(0).integers(3, network.config.vocab_size, 64)
        tokens[0] = network.config.bos_token_id
        with torch.no_grad():
            logits = network(torch.tensor(tokens)[None]).logits[0].numpy()
        arrays |= {f"{name}_tokens": tokens.astype(np.int32), f"{name}_logits": logits[POSITIONS]}
    np.savez_compressed(HERE / "logits.npz", **arrays)


if __name__ == "__main__":
    main()
