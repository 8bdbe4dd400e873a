"""Learning to reason from answers alone: the shipped reasoner on arithmetic word problems.

What leads from a training problem to its answer is latent. Compared on held-out problems, at equal numbers of generated tokens:

- rejection: rejection-sampling fine-tuning. Of the model's own texts those with the right answer are learned, by maximum
  likelihood; on texts of the model as it is, that climbs the share of right ones.
- own: the bound of K traces on the log probability of the answer, by the model's own thoughts.
- bound: the same of thoughts drawn by a guide that has read the answer. It learns by forward KL: first from thoughts and
  answers of the model's own (the sleep phase of wake-sleep, where every text teaches), then, beside the model, from its own
  thoughts, weighted by how likely model and answer make them (the wake phases).

Held-out problems are answered several times each. Accuracy is the share of right texts; "any" and "majority" are the shares of
problems where any text, or the most common answer, is right. Intervals hold 95 % over problems (bootstrap) for one training run
each; runs whose gradients differ by rounding alone have come out .02 apart, so repeat with other seeds before believing less.

    python tests/benchmarks/reasoning.py  # the table, about 35 minutes on two cores
"""

import argparse
import contextlib
import itertools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latentrace import inference, models, ppl
from latentrace.inference import learning, vi
from latentrace.inference.vi.objectives import log_mean_exp
from latentrace.models.reasoner import answers, word_problems
from latentrace.models.reasoner.evaluate import bootstrap_interval

LM = models.load("reasoner")
BASE, TREE = jax.tree.flatten(LM)
SAYS = {"rejection": "right", "guide": "log q", "own": "bound", "bound": "bound"}
"""what the cost of each way says beside"""
NEVER = -100.0
"""nats, of what cannot be: thoughts without an end"""
WARMUP = 10
"""steps"""
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


def evidence(log_p, prior, log_q):
    """Of K thoughts, float32[K] each: less the log probability of the answer, with a control variate; its value; the weights
    float32[K] of the thoughts in it.

    An answer that is misprinted says nothing of the thoughts, so they count where it is not; the log of what they say of 1,
    the share of all thoughts, estimates 0 and takes noise from the gradient (a little bias, too, as any ratio of estimates).
    """
    log_q = jax.lax.stop_gradient(log_q)
    log_ratio = jnp.maximum(log_p - log_q, NEVER)
    log_right = answers.LOG_RIGHT + log_mean_exp(log_ratio)
    found = jnp.logaddexp(log_right, answers.LOG_MISPRINT)
    weights = jax.lax.stop_gradient(jnp.exp(log_right - found)) * vi.importance_weights(log_ratio)
    return weights.sum() * log_mean_exp(prior - log_q) - found, found, weights


def densities(params, thoughts, item):
    """Under the model: float32[K], nats, of thoughts with the problem's answer, and of thoughts."""
    log_p = vi.log_density(answers.answering.condition({"answer": item["answer"]}), thoughts, *lms(params), item).nats
    return log_p, vi.log_density(answers.thinking, thoughts, *lms(params), item).nats


def own(params, thoughts, item):
    """Less the bound of the model's own thoughts."""
    loss, found, _ = evidence(*densities(params, thoughts, item), thoughts.log_density.nats)
    return loss, found


def bound(params, thoughts, item):
    """Less the bound of the guide's thoughts, and what the guide learns from them: both wake phases of wake-sleep."""
    log_q = vi.log_density(answers.hinted, thoughts, *lms(params), item).nats
    loss, found, weights = evidence(*densities(params, thoughts, item), log_q)
    return loss - (weights * log_q).sum(), found


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


WAYS = {
    "rejection": (rejection, answers.answering),
    "own": (own, answers.thinking),
    "bound": (bound, answers.hinted),
}
"""a cost, and the program that draws its traces"""


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

    steps = WARMUP + 1 + int(max(tokens, 0.0) / (arguments.batch * arguments.traces * TOKENS_OF_A_TEXT))
    schedule = optax.warmup_cosine_decay_schedule(0.0, arguments.rate, WARMUP, steps, arguments.rate / 20)
    each = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizer = optax.partition({"model": each, "guide": each}, {"model": "model", "guide": "guide"})
    with contextlib.suppress(Budget):
        learning.fit(loss, params, optimizer, num_steps=2 * steps, rng_key=jax.random.key(arguments.seed), data=problems,
                     batch_size=batch_size, segment=10, on_segment=watch, progress=False)  # fmt: skip
    return found[0].params, spent


def accuracy(params, questions, samples, seed=0):
    """float[N, 3]: for each question the share of samples whose answer is right; whether any is; whether the most common is."""
    lm = TREE.unflatten(params["model"])

    @ppl.program
    def write(prompt):
        return ppl.generate("text", ppl.prompt(lm, prompt, pad_to=word_problems.PROMPT_TOKENS), max_tokens=60)[0]

    def judge(question, texts):
        right = [word_problems.verify(question, text) for text in texts]
        says = [text.rpartition(word_problems.ANSWER)[2] for text in texts]
        return np.mean(right), any(right), right[says.index(max(says, key=says.count))]

    prompts = [(word_problems.format_prompt(question),) for question in questions]
    posteriors = inference.ImportanceSampling(samples).run_many(jax.random.key(seed), write, prompts, progress=False)
    return np.asarray([judge(q, posterior.returned.decode()) for q, posterior in zip(questions, posteriors)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=6e5, help="that each way may generate")
    parser.add_argument("--problems", type=int, default=800, help="held out")
    parser.add_argument("--samples", type=int, default=8, help="of each held-out problem")
    parser.add_argument("--traces", type=int, default=8, help="of each problem of a step")
    parser.add_argument("--batch", type=int, default=16, help="problems of a step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--guide-share", type=float, default=0.05, help="of the tokens for the guide's first phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args(argv)

    rng = random.Random(arguments.seed + 1)
    problems = jax.tree.map(jnp.asarray, answers.arrays(LM, [word_problems.generate(rng) for _ in range(20_000)]))
    questions = word_problems.problems(1000 + arguments.seed, arguments.problems)
    start, found = {"model": BASE, "guide": BASE}, {}

    def measure(name, params, tokens):
        found[name] = accuracy(params, questions, arguments.samples), tokens
        print(f"{name}: {found[name][0][:, 0].mean():.3f}", flush=True)

    measure("base", start, 0.0)
    for name in arguments.ways:
        cost, drawer = WAYS[name]
        params, before = start, 0.0
        if name == "bound":
            first, many = loss_of(sleep, answers.answering, None), arguments.batch * arguments.traces
            params, before = train("guide", first, many, start, problems, arguments, arguments.tokens * arguments.guide_share)
        loss = loss_of(cost, drawer, arguments.traces)
        params, tokens = train(name, loss, arguments.batch, params, problems, arguments, arguments.tokens - before)
        measure(name, params, before + tokens)
    print(f"\n{'':12}{'tokens':>12}{'accuracy':>10}{'95 %':>16}{'any':>8}{'majority':>10}")
    for name, (each, tokens) in found.items():
        low, high = bootstrap_interval(each[:, 0])
        mean, some, most = each.mean(axis=0)
        print(f"{name:12}{tokens:12,.0f}{mean:10.3f}{low:8.3f} - {high:.3f}{some:8.3f}{most:10.3f}")
    for name, other in itertools.product(("own", "bound"), ("base", "rejection")):
        if name in found and other in found:
            gain = found[name][0][:, 0] - found[other][0][:, 0]
            low, high = bootstrap_interval(gain)
            print(f"{name} less {other}, problem by problem: {gain.mean():.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
