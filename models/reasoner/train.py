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


@cache
def compiled_update(settings: Settings) -> Callable:
    """The compiled update (params, opt_state, batch) -> (params, opt_state, losses).

    Losses are in nats per token: "loss" of the whole batch, and by kind.
    """
    graph, transform = nnx.graphdef(new_model(settings)), optimizer(settings)

    def loss_of(params, batch):
        model = nnx.merge(graph, params)
        sums = {kind: trace_loss(model(rows.tokens[:, :-1]), *rows) for kind, rows in batch.items()}
        total = sum(loss for loss, _ in sums.values()) / sum(count for _, count in sums.values())
        return total, {"loss": total} | {kind: loss / count for kind, (loss, count) in sums.items()}

    def update(params, opt_state, batch):
        (_, losses), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, opt_state = transform.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    return jax.jit(update, donate_argnums=(0, 1))


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
    table = data.training_table(settings.largest) if table is None else table
    model = new_model(settings)
    params = initial_params(model)
    opt_state = optimizer(settings).init(params)
    update = compiled_update(settings)
    last = settings.steps if stop_at is None else min(stop_at, settings.steps)

    with ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        start, state = _restore(manager, {"params": params, "opt_state": opt_state})
        params, opt_state = state["params"], state["opt_state"]
        _cut_metrics(out / "metrics.jsonl", start)
        began = time.perf_counter()
        with (out / "metrics.jsonl").open("a") as metrics, tqdm(total=last, initial=start, unit="step") as bar:
            for step in range(start, last):
                batch = data.batch(table, settings.sizes, settings.seed, step)
                params, opt_state, losses = update(params, opt_state, batch)
                done = step + 1
                bar.update()
                if done % log_every == 0 or done == last:
                    record = {"step": done, "seconds": time.perf_counter() - began}
                    record |= {name: float(loss) for name, loss in losses.items()}
                    metrics.write(json.dumps(record) + "\n")
                    metrics.flush()
                    bar.set_postfix(loss=f"{record['loss']:.4f}")
                if done % checkpoint_every == 0 or done == last:
                    state = {"params": params, "opt_state": opt_state}
                    manager.save(done, args=ocp.args.StandardSave(state))
                    manager.wait_until_finished()  # the next update donates these buffers
    return nnx.merge(nnx.graphdef(model), params)


def _restore(manager: ocp.CheckpointManager, state: Any) -> tuple[int, Any]:
    """The newest readable checkpoint and its step; `state` and 0 where there is none.

    An unreadable one is set aside under another name, and the one before is taken.
    """
    folder, broken = Path(manager.directory), []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            return step, manager.restore(step, args=ocp.args.StandardRestore(state))
        except Exception as error:  # whatever a damaged file makes Orbax raise
            tqdm.write(f"{folder / str(step)} cannot be read ({type(error).__name__}); going back to the one before")
            (folder / str(step)).rename(folder / f"unreadable-{step}-{time.time_ns()}")
            manager.reload()
            broken.append(step)
    if broken:
        raise ValueError(
            f"none of the checkpoints {broken} under {folder} can be read; put one back under its step's name, or choose "
            "another --out to start anew"
        )
    return 0, state


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
