"""The table of measured parity in models/README.md, from the stored outputs (no torch needed):

python tests/models/golden/parity_table.py
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from families import CASES, GOLDEN, MAX_LENGTH, write_checkpoint

from latentrace import models


def largest_difference(case: str, dtype: str, arrays, shapes) -> float:
    """The largest difference from the reference's logits over 24 positions, in the same dtype."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_checkpoint(Path(folder), case, shapes[case], seed=0)
        lm = models.load(directory, dtype=dtype, max_length=MAX_LENGTH.get(case))
        logits = lm.logits(arrays[f"{case}/tokens"].astype(int))[::3]
    return float(np.abs(logits - arrays[f"{case}/" + ("logits" if dtype == "float32" else dtype)]).max())


def main() -> None:
    arrays, shapes = np.load(GOLDEN / "families.npz"), json.loads((GOLDEN / "families.json").read_text())
    rows: dict[str, list[tuple[float, float]]] = {}
    for case, (model_type, _) in CASES.items():
        found = tuple(largest_difference(case, dtype, arrays, shapes) for dtype in ("float32", "bfloat16"))
        rows.setdefault(model_type, []).append(found)
    for model_type, found in rows.items():
        exact, rounded = np.max(found, axis=0)
        print(f"| `{model_type}` | {len(found)} | {exact:.0e} | {rounded:.3f} |")


if __name__ == "__main__":
    main()
