"""Learning to reason from answers alone: the shipped reasoner on arithmetic word problems.

Of a training problem only the answer is known; what leads to it is latent. Compared at equal numbers of generated tokens, on held-out
problems:

- rejection-sampling fine-tuning: the model's own texts that end in the right answer are learned by maximum likelihood;
- the bound of K traces (`vi.iwae`), which a guide draws that knows the answer. The guide, the same model with the answer in its prompt,
  learns by forward KL from the model's own traces, weighted by how likely the answer is after them, and then from its own.

    python tests/benchmarks/reasoning.py
"""

import argparse
import random
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from latentrace import inference, models, ppl
from latentrace.inference import learning, vi
from latentrace.models.reasoner import word_problems
from latentrace.models.reasoner.evaluate import bootstrap_interval
from latentrace.models.reasoner.tokenizer import ANSWER, TOKEN_ID
from latentrace.models.transformer import TransformerLM

LM = models.load("reasoner")
THOUGHT, PROMPT, HINT = 56, word_problems.PROMPT_TOKENS, 4
BASE = jax.tree.leaves(LM)
TREE = jax.tree.structure(LM)


def lm_of(params):
    return TREE.unflatten(params)


@ppl.program
def model(lm, guide_lm, item):
    """A thought up to the word before the answer, and the answer, which is known."""
    _, context = ppl.generate("thought", ppl.prompt(lm, item["prompt"]), max_tokens=THOUGHT, until=[TOKEN_ID[ANSWER]])
    ppl.score("answer", context, item["answer"])


@ppl.program
def thinking(lm, guide_lm, item):
    """The same without the answer."""
    ppl.generate("thought", ppl.prompt(lm, item["prompt"]), max_tokens=THOUGHT, until=[TOKEN_ID[ANSWER]])


@ppl.program
def guide(lm, guide_lm, item):
    """A thought by a model that has read the answer."""
    ppl.generate("thought", ppl.prompt(guide_lm, item["hinted"]), max_tokens=THOUGHT, until=[TOKEN_ID[ANSWER]])


@ppl.program
def solving(lm, item):
    """A thought and an answer."""
    _, context = ppl.generate("thought", ppl.prompt(lm, item["prompt"]), max_tokens=THOUGHT, until=[TOKEN_ID[ANSWER]])
    ppl.generate("answer", context, max_tokens=HINT)


def training_problems(count, seed):
    """Arrays of problems outside of every test set."""
    rng = random.Random(seed)
    prompts, hinted, answers = (np.full((count, size), -1, np.int32) for size in (PROMPT, PROMPT + HINT + 1, HINT))
    for i in range(count):
        question, solution = word_problems.generate(rng)
        ids = [LM.start_id, *LM.encode(word_problems.format_prompt(question))]
        answer = LM.encode(f" {solution.answer}\n")
        prompts[i, : len(ids)] = ids
        hint = [*ids, TOKEN_ID[ANSWER], *answer]
        hinted[i, : len(hint)] = hint
        answers[i] = [*answer, LM.eos_id]
    return {"prompt": prompts, "hinted": hinted, "answer": answers}


def length(trace):
    return jax.lax.stop_gradient(trace.values["thought"].length.sum() * 1.0)


def forward_kl_loss(traces):
    """The guide's, from the model's own thoughts: less the mean log density, weighted by how likely the answer is after each."""

    def cost(params, item, drawn):
        lm, guide_lm = lm_of(params["model"]), lm_of(params["guide"])
        log_w = (vi.log_density(model, drawn, lm, guide_lm, item) - drawn.log_density).nats
        weights = jax.nn.softmax(jax.lax.stop_gradient(log_w))
        return -(weights * vi.log_density(guide, drawn, lm, guide_lm, item).nats).sum()

    def loss(rng_key, params, item):
        still = lm_of(jax.lax.stop_gradient(params["model"]))
        of = lambda drawn: cost(params, item, drawn)
        return vi.expectation(of, thinking, num_traces=traces)(rng_key, still, still, item)

    return loss


def bound_loss(traces):
    """The model's: the bound of K thoughts of the guide; and the guide's: forward KL from the same thoughts."""

    def loss(rng_key, params, item):
        lm, guide_lm = lm_of(params["model"]), lm_of(params["guide"])
        return -vi.wake_phase(model, guide, traces)(rng_key, lm, guide_lm, item)

    return loss


def rejection_loss(traces):
    """Maximum likelihood of the model's own texts with the right answer."""

    def loss(rng_key, params, item):
        def cost(drawn):
            right = (drawn.values["answer"].tokens == item["answer"]).all(axis=-1)
            return -(right * vi.log_density(solving, drawn, lm_of(params["model"]), item).nats).sum() / traces

        return vi.expectation(cost, solving, num_traces=traces)(rng_key, lm_of(jax.lax.stop_gradient(params["model"])), item)

    return loss


def accuracy(params, problems, samples, seed=0):
    """float[problems]: the share of right samples for each held-out problem."""
    from latentrace.models.reasoner.rollouts import lines

    del lines
    lm = lm_of(params)

    @ppl.program
    def write(item):
        return ppl.generate("text", ppl.prompt(lm, item, pad_to=PROMPT), max_tokens=THOUGHT + HINT)[0]

    found = []
    posteriors = inference.ImportanceSampling(samples).run_many(
        jax.random.key(seed), write, [(word_problems.format_prompt(q),) for q in problems], progress=False
    )
    for question, posterior in zip(problems, posteriors):
        found.append(np.mean([word_problems.verify(question, text) for text in posterior.returned.decode()]))
    return np.asarray(found)


if __name__ == "__main__":
    pool = training_problems(8000, 1)
    held = word_problems.problems(77, 100)
    t = time.time()
    acc = accuracy(BASE, held, 8)
    print("base", acc.mean(), bootstrap_interval(acc), time.time() - t, flush=True)
    start = {"model": BASE, "guide": BASE}
    data = jax.tree.map(jnp.asarray, pool)
    for name, loss, steps, K in (("rft", rejection_loss, 60, 8), ("kl", forward_kl_loss, 60, 8), ("bound", bound_loss, 60, 8)):
        t = time.time()
        mean = vi.mean_over(loss(K))
        f = learning.fit(
            lambda k, p, b: mean(k, p, b),
            start,
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4)),
            num_steps=steps,
            rng_key=jax.random.key(3),
            data=data,
            batch_size=32,
            segment=20,
            on_segment=lambda f: print(name, float(f.losses[-20:].mean()), time.time() - t, flush=True),
        )
        if name != "kl":
            acc = accuracy(f.params["model"], held, 8)
            print(name, acc.mean(), bootstrap_interval(acc), time.time() - t, flush=True)
        if name == "kl":
            start = f.params
