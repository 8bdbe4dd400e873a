"""Train the reasoner: `python -m latentrace.models.reasoner.train --out DIR --steps N --seed 0`.

A run that was stopped goes on from its last checkpoint in DIR when the same command is given again, and ends with the
same weights: a batch is a function of (seed, step).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from latentrace import models
from latentrace.inference import learning
from latentrace.models.reasoner import data, tokenizer
from latentrace.models.tokenizer import Tokenizer
from latentrace.models.transformer import Transformer, TransformerConfig, TransformerLM

Array = jax.Array


class Settings(NamedTuple):
    """Everything that determines a training run."""

    steps: int = 5200
    seed: int = 0
    game24: int = 64
    countdown: int = 16
    words: int = 20
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    hidden: int = 128
    layers: int = 5
    heads: int = 4
    intermediate: int = 352
    largest: int = data.LARGEST_EXTRA

    @property
    def sizes(self) -> data.Sizes:
        """Sequences of each kind in a batch."""
        return data.Sizes(self.game24, self.countdown, self.words)


def model_config(settings: Settings) -> TransformerConfig:
    """The shape of the model; the context leaves room for a second prompt and trace."""
    return TransformerConfig(
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        max_length=256,
        eos_id=tokenizer.END_ID,
        bos_id=tokenizer.START_ID,
        tied=False,
    )


def new_model(settings: Settings) -> Transformer:
    """An untrained model."""
    return Transformer(model_config(settings), rngs=nnx.Rngs(settings.seed))


def initial_params(model: Transformer) -> Any:
    """The weights of a new model as a nested dict, each matrix [outputs, inputs] scaled to keep its inputs' variance.

    The default scale suits wide models; at this width it would slow the first thousands of steps.
    """

    def rescale(leaf: Array) -> Array:
        return leaf if leaf.ndim < 2 else leaf / jnp.std(leaf) * leaf.shape[-1] ** -0.5

    return jax.tree.map(rescale, nnx.to_pure_dict(nnx.split(model)[1]))


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with clipping; the learning rate warms up linearly, then falls to a hundredth along a cosine."""
    warmup = min(200, max(1, settings.steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup, settings.steps, settings.learning_rate / 100
    )
    decayed = optax.adamw(schedule, b2=0.98, weight_decay=settings.weight_decay, mask=_matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), decayed)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def trace_loss(logits: Array, tokens: Array, paid: Array) -> tuple[Array, Array]:
    """Sum of the negative log probabilities, in nats, of the tokens that are paid for, and how many those are.

    logits float32[B, T - 1, V] for tokens int32[B, T], paid bool[B, T].
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * paid[:, 1:]), jnp.sum(paid[:, 1:])


def batch_loss(settings: Settings) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """The loss of a batch, in nats per token, and that of each kind of sequence in it: `loss(rng_key, params, batch)`."""
    graph = nnx.graphdef(new_model(settings))

    def loss(rng_key: Array, params: Any, batch: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
        model = nnx.merge(graph, params)
        sums = {kind: trace_loss(model(rows.tokens[:, :-1]), *rows) for kind, rows in batch.items()}
        total = jnp.stack([loss for loss, _ in sums.values()]).sum() / jnp.stack([count for _, count in sums.values()]).sum()
        return total, {kind: loss / count for kind, (loss, count) in sums.items()}

    return loss


def train(
    settings: Settings,
    out: str | Path,
    table: data.TraceTable | None = None,
    checkpoint_every: int = 100,
    log_every: int = 25,
    stop_at: int | None = None,
) -> Transformer:
    """Train, log to `out`/metrics.jsonl, checkpoint under `out`/checkpoints and resume from there.

    `stop_at` ends the run early, as an interruption would, without changing the learning rates.
    """
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(settings, out / "settings.json")
    rows = data.training_table(settings.largest) if table is None else table
    model = new_model(settings)
    last = settings.steps if stop_at is None else min(stop_at, settings.steps)
    found = learning.fit(
        batch_loss(settings),
        initial_params(model),
        optimizer(settings),
        num_steps=last,
        rng_key=jax.random.key(settings.seed),
        data=lambda step, rng_key, params: data.batch(rows, settings.sizes, settings.seed, step),
        on_segment=_Log(out / "metrics.jsonl", log_every, last),
        checkpoint=out / "checkpoints",
        checkpoint_every=checkpoint_every,
        progress=True,
    )
    if found.stopped:
        raise KeyboardInterrupt
    return nnx.merge(nnx.graphdef(model), found.params)


class _Log:
    """Writes the losses of some steps to a file, which a run that goes on continues."""

    def __init__(self, path: Path, every: int, last: int):
        self.path, self.every, self.last = path, every, last
        self.began, self.goes_on = time.perf_counter(), False

    def __call__(self, run: learning.Fit) -> None:
        if not self.goes_on:
            _cut_metrics(self.path, run.steps - 1)
            self.goes_on = True
        if run.steps % self.every == 0 or run.steps == self.last:
            record = {"step": run.steps, "seconds": time.perf_counter() - self.began, "loss": float(run.losses[-1])}
            record |= {kind: float(losses[-1]) for kind, losses in run.stats.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _cut_metrics(path: Path, last: int) -> None:
    """Drop records after a step: a run that goes on from there writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
            continue
        if record["step"] <= last:
            kept.append(line + "\n")
    path.write_text("".join(kept))


def _check_settings(settings: Settings, path: Path) -> None:
    """Record the settings of a new run; refuse to go on with an old one under others."""
    new = settings._asdict()
    if not path.exists():
        path.write_text(json.dumps(new, indent=2) + "\n")
        return
    old = json.loads(path.read_text())
    changed = {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}
    if changed:
        raise ValueError(f"{path} records a run with other settings (old, new): {changed}; choose another --out")


def export(model: Transformer, directory: str | Path, dtype: str = "float32") -> None:
    """Write a trained model in Hugging Face layout."""
    text = Tokenizer(tokenizer.build_tokenizer().to_str(), tokenizer.START_ID, tokenizer.END_ID)
    models.save(TransformerLM.from_module(model, text), directory, dtype=dtype)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of checkpoints, metrics and the exported model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the exported weights")
    for name, default in Settings()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args(argv))
    out, dtype = Path(arguments.pop("out")), arguments.pop("dtype")
    try:
        model = train(Settings(**arguments), out)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command goes on from the last checkpoint in {out / 'checkpoints'}") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None
    export(model, out / "export", dtype)


if __name__ == "__main__":
    main()
