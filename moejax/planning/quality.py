"""`moejax plan --quality`: what experts are worth, by laws fitted to many runs.

The loss of a model, in nats a token, as arXiv:2502.05172 has it:

  L(N, D, R) = a R^delta N^(alpha + gamma ln R)
             + b R^omega D^(beta + zeta ln R) + c

N are the ops/timestep but for routers, D the tokens that it has read, R how
many parameters its experts have for each that a token meets, E / k of one
mixture; 1 is the dense twin. More experts make the first term smaller, and the
second larger: they have more to learn. With little text the dense twin is
ahead, and where the two meet is the break-even.

A loss is that of a text and its tokens. Of another text it is another, so that
of all a law says, differences and where they change their sign carry over best.
"""

import math
from numbers import Real
from typing import NamedTuple

from moejax import config as config_lib
from moejax.planning import report
from moejax.planning.plan import with_prefix
from moejax.training import cost

# The least and the largest; None where that is unknown.
Span = tuple[Real | None, Real | None]


class Law(NamedTuple):
  """Coefficients of the formula, and the spans of what they were fitted to."""

  source: str
  a: float
  delta: float
  alpha: float
  gamma: float
  b: float
  omega: float
  beta: float
  zeta: float
  c: float
  ops: Span
  tokens: Span
  ratios: Span

  def loss(self, ops: Real, tokens: Real, ratio: Real) -> float:
    """Returns nats a token; arguments are N, D and R of the formula."""
    log = math.log(ratio)
    of_size = ratio**self.delta * ops ** (self.alpha + self.gamma * log)
    of_text = ratio**self.omega * tokens ** (self.beta + self.zeta * log)
    return self.a * of_size + self.b * of_text + self.c

  def lead(self, ops: Real, tokens: Real, ratio: Real) -> float:
    """Returns by how many nats a token experts are ahead of the dense twin."""
    return self.loss(ops, tokens, 1) - self.loss(ops, tokens, ratio)

  def break_even(self, ops: Real, ratio: Real) -> float | None:
    """Returns from how many tokens on experts lead; None where they never do.

    ValueError where there are no more parameters than a token meets.
    """
    if ratio <= 1:
      raise ValueError(f"a ratio of {ratio:g} is no mixture; it is above 1.")
    # The lead has one sign below, and one above; by halves of the logarithm.
    low, high = 0.0, 100.0
    if self.lead(ops, math.exp(high), ratio) <= 0:
      return None
    for _ in range(60):
      middle = (low + high) / 2
      if self.lead(ops, math.exp(middle), ratio) > 0:
        high = middle
      else:
        low = middle
    return math.exp(high)


# Signs are those with which experts pay, as in the paper's figures.
TRANSFORMERS = Law(
  source="arXiv:2502.05172, Transformers",
  a=35.91,
  delta=-0.2285,
  alpha=-0.1889,
  gamma=0.0098,
  b=35.98,
  omega=0.5529,
  beta=-0.1775,
  zeta=-0.0259,
  c=1.3637,
  ops=(None, 2.7e9),
  tokens=(None, None),
  ratios=(1, 32),
)
LAWS = (TRANSFORMERS,)


def text(experiment: config_lib.Experiment, tokens: Real | None = None) -> str:
  """Returns a table of what the laws say of a config's experts.

  Args:
    experiment: a language model with mixtures.
    tokens: that it reads; by default all of its steps.

  Raises:
    ValueError: it translates, or has no experts to choose among.
  """
  counted = cost.count(experiment, 1)
  if "source" in experiment.shapes:
    raise ValueError(
      "--quality is of language models, and this config translates."
    )
  if counted.expert_parameters <= counted.experts:
    raise ValueError(
      "--quality tells what experts are worth, and this config has none to"
      " choose among; take one with a mixture, such as sotu/moe_32."
    )
  ratio = counted.expert_parameters / counted.experts
  tokens = tokens or experiment.train.steps * math.prod(
    experiment.shapes["mask"].shape
  )
  ops = counted.ops - counted.gates
  found = {"ops": ops, "tokens": tokens, "ratios": ratio}
  columns = ["law of", "dense", "with experts", "perplexity", "break-even"]
  table = [[*columns, "fitted to"]]
  for law in LAWS:
    least = law.break_even(ops, ratio)
    spans = [
      f"{name} {_span(getattr(law, name))}"
      + " (this is outside)" * _is_outside(getattr(law, name), value)
      for name, value in found.items()
    ]
    table.append(
      [
        law.source,
        f"{law.loss(ops, tokens, 1):.2f}",
        f"{law.loss(ops, tokens, ratio):.2f}",
        f"{100 * math.expm1(-law.lead(ops, tokens, ratio)):+.1f} %",
        f"{with_prefix(round(least))} tokens" if least else "never",
        ", ".join(spans),
      ]
    )
  return (
    f"{ops:,} ops/timestep but for routers, {ratio:.3g} parameters of experts"
    f" for each that a token meets, {with_prefix(round(tokens))} tokens. Loss"
    f" in nats a token, beside the dense twin's:\n\n{report.aligned(table)}"
  )


def _span(span: Span) -> str:
  low, high = (each and f"{each:.3g}" for each in span)
  if low and high:
    return f"{low} to {high}"
  return f"up to {high}" if high else "unknown"


def _is_outside(span: Span, value: Real) -> bool:
  low, high = span
  return bool(low and value < low or high and value > high)
