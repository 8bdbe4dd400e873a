"""Train the reasoner: `python -m latentrace.models.reasoner.train --out DIR --steps N --seed 0`.

A run that was stopped goes on from its last checkpoint in DIR when the same command is given again, and ends with the
same weights: a batch is a function of (seed, step).
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from latentrace import models
from latentrace.models.reasoner import data, tokenizer
from latentrace.models.tokenizer import Tokenizer
from latentrace.models.transformer import Transformer, TransformerConfig, TransformerLM

Array = jax.Array


class Settings(NamedTuple):
    """Everything that determines a training run."""

    steps: int = 5500
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    hidden: int = 128
    layers: int = 5
    heads: int = 4
    intermediate: int = 352
    largest: int = data.LARGEST_EXTRA


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
        max_length=128,
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


def trace_loss(logits: Array, tokens: Array) -> Array:
    """Mean negative log probability, in nats per token, of the tokens after the prompt.

    logits float32[B, 39, V] for tokens int32[B, 40].
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses[:, data.PROMPT_LENGTH - 1 :])


@cache
def compiled_update(settings: Settings) -> Callable:
    """The compiled update (params, opt_state, tokens int32[B, 40]) -> (params, opt_state, loss float32[])."""
    graph, transform = nnx.graphdef(new_model(settings)), optimizer(settings)

    def loss_of(params, tokens):
        return trace_loss(nnx.merge(graph, params)(tokens[:, :-1]), tokens)

    def update(params, opt_state, tokens):
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        updates, opt_state = transform.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(update, donate_argnums=(0, 1))


def train(
    settings: Settings,
    out: str | Path,
    table: data.TraceTable | None = None,
    checkpoint_every: int = 250,
    log_every: int = 25,
    stop_at: int | None = None,
) -> Transformer:
    """Train, log to `out`/metrics.jsonl, checkpoint under `out`/checkpoints and resume from there.

    `stop_at` ends the run early, as an interruption would, without changing the learning rates.
    """
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(settings, out / "settings.json")
    table = data.training_table(settings.largest) if table is None else table
    model = new_model(settings)
    params = initial_params(model)
    opt_state = optimizer(settings).init(params)
    update = compiled_update(settings)
    last = settings.steps if stop_at is None else min(stop_at, settings.steps)

    with ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        start = manager.latest_step() or 0
        if start:
            state = {"params": params, "opt_state": opt_state}
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
            params, opt_state = state["params"], state["opt_state"]
        began = time.perf_counter()
        with (out / "metrics.jsonl").open("a") as metrics, tqdm(total=last, initial=start, unit="step") as bar:
            for step in range(start, last):
                tokens = jnp.asarray(data.batch(table, settings.batch_size, settings.seed, step))
                params, opt_state, loss = update(params, opt_state, tokens)
                done = step + 1
                bar.update()
                if done % log_every == 0 or done == last:
                    record = {"step": done, "loss": float(loss), "seconds": time.perf_counter() - began}
                    metrics.write(json.dumps(record) + "\n")
                    metrics.flush()
                    bar.set_postfix(loss=f"{float(loss):.4f}")
                if done % checkpoint_every == 0 or done == last:
                    state = {"params": params, "opt_state": opt_state}
                    manager.save(done, args=ocp.args.StandardSave(state))
                    manager.wait_until_finished()  # the next update donates these buffers
    return nnx.merge(nnx.graphdef(model), params)


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
    model = train(Settings(**arguments), out)
    export(model, out / "export", dtype)


if __name__ == "__main__":
    main()
