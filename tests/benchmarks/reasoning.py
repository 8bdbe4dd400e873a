"""Learning to reason from answers alone: the shipped reasoner on arithmetic word problems.

What leads from a training problem to its answer is latent. Compared on held-out problems, at equal numbers of generated tokens:

- rejection-sampling fine-tuning: of the model's own texts those with the right answer are learned, by maximum likelihood;
- the bound of K traces (the gradient of `vi.iwae` for the model), drawn by a guide that has read the answer. The guide learns
  by forward KL: first from thoughts and answers of the model's own (the sleep phase of wake-sleep, where every text teaches),
  then, beside the model, from its own thoughts, weighted by how likely model and answer make them (the wake phases).

    python tests/benchmarks/reasoning.py --tokens 1500000
"""

import argparse
import contextlib
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latentrace import inference, models, ppl
from latentrace.inference import learning, vi
from latentrace.models.reasoner import answers, word_problems
from latentrace.models.reasoner.evaluate import bootstrap_interval

LM = models.load("reasoner")
BASE, TREE = jax.tree.flatten(LM)
SAYS = {"rejection": "right", "guide": "log q", "bound": "bound"}
"""what the cost of each way says beside"""
WARMUP = 10
"""steps"""
RATIO = np.log(3.0)
"""most nats by which the model may prefer a thought to the guide, for the control variate"""
TOKENS_OF_A_TEXT = 37
"""about; for the schedule of the learning rate"""


def lms(params):
    return TREE.unflatten(params["model"]), TREE.unflatten(params["guide"])


def tokens_of(traces):
    return sum(text.length.sum() for text in traces.values.values()).astype(jnp.float32)


def rejection(params, traces, item):
    """Less the mean log probability of texts with the right answer, others counting as 0."""
    right = (traces.values["answer"].tokens == item["answer"]).all(axis=-1)
    log_p = vi.log_density(answers.answering, traces, *lms(params), item).nats
    return -jnp.where(right, log_p, 0.0).mean(), right.mean()


def sleep(params, trace, item):
    """Less the guide's log density of a thought of the model's, having read what the model answered after it."""
    own = item | {"answer": trace.values["answer"].tokens}
    log_q = vi.log_density(answers.hinted, {"thought": trace.values["thought"]}, *lms(params), own).nats
    return -log_q, log_q


def bound(params, thoughts, item):
    """Both phases of reweighted wake-sleep from the guide's thoughts, less a control variate for the model: the mean of
    p(t) / q(t) grad log p(t) over thoughts t of the guide is 0, but for what capping the ratio changes."""
    log_p = vi.log_density(answers.answered, thoughts, *lms(params), item).nats
    log_q = vi.log_density(answers.hinted, thoughts, *lms(params), item).nats
    prior = vi.log_density(answers.thinking, thoughts, *lms(params), item).nats
    weights, ratios = vi.importance_weights(log_p - log_q), jax.lax.stop_gradient(jnp.exp(jnp.minimum(prior - log_q, RATIO)))
    gain = jnp.where(weights > 0, weights * (log_p + log_q), 0.0).sum() - (ratios * prior).mean()
    return -gain, vi.objectives.log_mean_exp(log_p - log_q)


def loss_of(cost, drawer, num_traces):
    """The mean of a cost over a batch of problems, of traces that the drawer draws as it is; how many tokens it draws, and
    what the cost says beside."""

    def objective(rng_key, params, item):
        def of(traces):
            loss, says = cost(params, traces, item)
            return loss, (tokens_of(traces), says)

        still = jax.lax.stop_gradient(lms(params))
        return vi.expectation(of, drawer, num_traces=num_traces, has_aux=True)(rng_key, *still, item)

    def loss(rng_key, params, batch):
        value, (tokens, says) = vi.mean_over(objective)(rng_key, params, batch)
        return value, {"tokens": tokens * len(batch["prompt"]), "says": says}

    return loss


class Budget(Exception):
    """Enough tokens have been generated."""


def train(name, loss, batch_size, params, problems, arguments, tokens):
    """Until so many tokens are generated; the parameters, and the tokens."""
    spent, found, began = 0.0, [], time.perf_counter()

    def watch(fit):
        nonlocal spent
        spent = float(np.sum(fit.stats["tokens"]))
        found[:] = [fit]
        cost, says = fit.losses[-20:].mean(), fit.stats["says"][-20:].mean()
        print(f"  {name}: step {len(fit.losses)}, {spent:,.0f} tokens, loss {cost:.3f}, {SAYS[name]} {says:.3f}, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        if spent >= tokens:
            raise Budget

    steps = WARMUP + 1 + int(tokens / (arguments.batch * arguments.traces * TOKENS_OF_A_TEXT))
    schedule = optax.warmup_cosine_decay_schedule(0.0, arguments.rate, WARMUP, steps, arguments.rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    with contextlib.suppress(Budget):
        learning.fit(loss, params, optimizer, num_steps=2 * steps, rng_key=jax.random.key(arguments.seed), data=problems,
                     batch_size=batch_size, segment=10, on_segment=watch, progress=False)  # fmt: skip
    return found[0].params, spent


def accuracy(params, questions, samples, seed=0):
    """float[N]: for each question the share of samples whose answer is right."""
    lm = TREE.unflatten(params["model"])

    @ppl.program
    def write(prompt):
        return ppl.generate("text", ppl.prompt(lm, prompt, pad_to=word_problems.PROMPT_TOKENS), max_tokens=60)[0]

    prompts = [(word_problems.format_prompt(question),) for question in questions]
    posteriors = inference.ImportanceSampling(samples).run_many(jax.random.key(seed), write, prompts, progress=False)
    right = lambda question, posterior: np.mean([word_problems.verify(question, t) for t in posterior.returned.decode()])
    return np.asarray([right(q, p) for q, p in zip(questions, posteriors)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=1.5e6, help="that each way may generate")
    parser.add_argument("--problems", type=int, default=300, help="held out")
    parser.add_argument("--samples", type=int, default=8, help="of each held-out problem")
    parser.add_argument("--traces", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--guide-share", type=float, default=0.2, help="of the tokens for the guide's first phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", default=["rejection", "bound"])
    arguments = parser.parse_args(argv)

    rng = random.Random(arguments.seed + 1)
    problems = jax.tree.map(jnp.asarray, answers.arrays(LM, [word_problems.generate(rng) for _ in range(20_000)]))
    questions = word_problems.problems(1000 + arguments.seed, arguments.problems)
    start, found = {"model": BASE, "guide": BASE}, {}

    def measure(name, params, tokens):
        found[name] = accuracy(params, questions, arguments.samples), tokens
        print(f"{name}: {found[name][0].mean():.3f}", flush=True)

    measure("base", start, 0.0)
    if "rejection" in arguments.ways:
        loss = loss_of(rejection, answers.answering, arguments.traces)
        params, tokens = train("rejection", loss, arguments.batch, start, problems, arguments, arguments.tokens)
        measure("rejection-sampling fine-tuning", params, tokens)
    if "bound" in arguments.ways:
        first, many = loss_of(sleep, answers.answering, None), arguments.batch * arguments.traces
        share = arguments.tokens * arguments.guide_share
        params, before = train("guide", first, many, start, problems, arguments, share)
        loss = loss_of(bound, answers.hinted, arguments.traces)
        params, tokens = train("bound", loss, arguments.batch, params, problems, arguments, arguments.tokens - before)
        measure("bound of K traces", params, before + tokens)
    print(f"\n{'':34}{'tokens':>12}{'accuracy':>10}{'95 %':>16}")
    for name, (each, tokens) in found.items():
        low, high = bootstrap_interval(each)
        print(f"{name:34}{tokens:12,.0f}{each.mean():10.3f}{low:8.3f}-{high:.3f}")
    if len(found) == 3:
        one, other = (found[name][0] for name in ("bound of K traces", "rejection-sampling fine-tuning"))
        low, high = bootstrap_interval(one - other)
        print(f"difference of the two, problem by problem: {(one - other).mean():.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
