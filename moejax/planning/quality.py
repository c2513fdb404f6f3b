"""`moejax plan --quality`: what experts are worth, by laws fitted to many runs.

The loss of a model, in nats a token, as arXiv:2502.05172 has it (eq. 4):

  L(N, D, R) = a R^delta N^(alpha + gamma ln R)
             + b R^omega D^(beta + zeta ln R) + c

N are the parameters that a token meets, embedding and softmax included, but for
routers'; D the tokens that the model has read; and of R experts a token meets
one: E / k of a mixture, 1 of the dense twin. More experts make the first term
smaller and the second larger, as they have more to learn: with little text the
dense twin is ahead, and where the two meet is the break-even.

A loss is that of a text and its tokens. Of another text it is another, so that
of all a law says, differences and where they change their sign carry over best.
"""

import itertools
import math
from numbers import Real
from typing import NamedTuple

from moejax import config as config_lib
from moejax.planning import report
from moejax.planning.plan import with_prefix
from moejax.training import cost

# The least and the largest.
Span = tuple[Real, Real]


class Law(NamedTuple):
  """Coefficients of the formula, and the spans of what they were fitted to.

  With numbers of experts at which their worth begins and ends, R is in the
  formula what becomes of it (2202.01169):

    1 / (1 / (R - 1 + 1 / (1 / first - 1 / last)) + 1 / last)

  Of 1 and infinity that is R.
  """

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
  parameters: Span
  tokens: Span
  ratios: Span
  first: float = 1.0
  last: float = math.inf

  def loss(self, parameters: Real, tokens: Real, ratio: Real) -> float:
    """Returns nats a token; arguments are N, D and R of the formula."""
    begin = 1 / (1 / self.first - 1 / self.last)
    ratio = 1 / (1 / (ratio - 1 + begin) + 1 / self.last)
    log = math.log(ratio)
    of_size = ratio**self.delta * parameters ** (self.alpha + self.gamma * log)
    of_text = ratio**self.omega * tokens ** (self.beta + self.zeta * log)
    return self.a * of_size + self.b * of_text + self.c

  def lead(self, parameters: Real, tokens: Real, ratio: Real) -> float:
    """Returns by how many nats a token experts are ahead of the dense twin."""
    dense = self.loss(parameters, tokens, 1)
    return dense - self.loss(parameters, tokens, ratio)

  def break_even(self, parameters: Real, ratio: Real) -> float | None:
    """Returns from how many tokens on experts lead.

    None where they never do, up to 1e16 tokens. Of very large models the lead
    may end again.
    ValueError where there are no more experts than a token meets.
    """
    if ratio <= 1:
      raise ValueError(f"a ratio of {ratio:g} is no mixture; it is above 1.")

    def leads(power):
      return self.lead(parameters, 10**power, ratio) > 0

    powers = [n / 10 for n in range(30, 161)]
    for low, high in itertools.pairwise(powers):
      if leads(high) and not leads(low):
        for _ in range(40):
          middle = (low + high) / 2
          low, high = (low, middle) if leads(middle) else (middle, high)
        return 10**high
    return None


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
  parameters=(7.9e7, 2.7e9),
  tokens=(5e8, 8e10),
  ratios=(1, 32),
  first=2.0732,
  last=290.4521,
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
  if "source" in experiment.shapes:
    raise ValueError(
      "--quality is of language models, and this config translates."
    )
  counted = cost.count(experiment, config_lib.vocab_size(experiment))
  if counted.routed_parameters <= counted.routed:
    raise ValueError(
      "--quality tells what experts are worth, and this config has none to"
      " choose among; take one with a mixture, such as sotu/moe_32."
    )
  ratio = counted.routed_parameters / counted.routed
  parameters = active(counted)
  tokens = tokens or experiment.train.steps * math.prod(
    experiment.shapes["mask"].shape
  )
  found = {"parameters": parameters, "tokens": tokens, "ratios": ratio}
  columns = ["law of", "dense", "with experts", "perplexity", "break-even"]
  table, outside = [columns], []
  for law in LAWS:
    least = law.break_even(parameters, ratio)
    lead = law.lead(parameters, tokens, ratio)
    table.append(
      [
        law.source,
        f"{law.loss(parameters, tokens, 1):.2f}",
        f"{law.loss(parameters, tokens, ratio):.2f}",
        f"{100 * math.expm1(-lead):+.1f} %",
        f"{with_prefix(round(least))} tokens" if least else "never",
      ]
    )
    spans = {name: getattr(law, name) for name in found}
    of_law = ", ".join(f"{n} {a:.3g} to {b:.3g}" for n, (a, b) in spans.items())
    beyond = [n for n, (a, b) in spans.items() if not a <= found[n] <= b]
    outside.append(
      f"{law.source}: fitted to {of_law}"
      + f"; this config lies outside of its {', '.join(beyond)}" * bool(beyond)
    )
  lines = "\n".join(outside)
  return (
    f"{with_prefix(parameters)} parameters that a token meets, of {ratio:.3g}"
    f" times as many experts one, {with_prefix(round(tokens))} tokens. Loss in"
    f" nats a token, beside the dense twin's:\n\n{report.aligned(table)}\n\n"
    f"{lines}"
  )


def active(counted: cost.Count) -> int:
  """Returns N: the parameters that a token meets, but for routers'."""
  matrices = counted.ops - counted.gates
  return matrices + counted.embedding + counted.softmax
