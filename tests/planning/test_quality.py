"""Laws of the loss: their formula, where experts break even, what is said."""

import math

import pytest

from experiments import scaling
from moejax import config as config_lib
from moejax.main import main
from moejax.planning import quality
from moejax.planning.quality import TRANSFORMERS

pytestmark = pytest.mark.usefixtures("standard_promotion")


def text(name, *tokens):
  return quality.text(config_lib.parse(config_lib.load(name)), *tokens)


def by_hand(parameters, tokens, ratio):
  """The formula of 2502.05172 with the exponents written out."""
  first, last = 2.0732, 290.4521
  R = 1 / (1 / (ratio - 1 + first * last / (last - first)) + 1 / last)
  log = math.log(R)
  of_size = 35.91 / R**0.2285 / parameters ** (0.1889 - 0.0098 * log)
  of_text = 35.98 * R**0.5529 / tokens ** (0.1775 + 0.0259 * log)
  return of_size + of_text + 1.3637


@pytest.mark.parametrize("ratio", [1, 8, 64])
@pytest.mark.parametrize("tokens", [1e6, 1e10])
def test_the_loss_is_that_of_the_formula(ratio, tokens):
  got = TRANSFORMERS.loss(1e6, tokens, ratio)
  assert got == pytest.approx(by_hand(1e6, tokens, ratio), rel=1e-6)
  dense = by_hand(1e6, tokens, 1)
  assert TRANSFORMERS.lead(1e6, tokens, ratio) == pytest.approx(dense - got)


def test_the_dense_twin_is_that_of_table_4():
  """It prints 30.364 / N^0.1817 + 53.98 / D^0.1965 for one expert."""
  at = {n: TRANSFORMERS.loss(10**n, 1e300, 1) - 1.3637 for n in (6, 9)}
  exponent = math.log10(at[6] / at[9]) / 3
  assert exponent == pytest.approx(0.1817, abs=2e-4)
  assert at[6] * 1e6**exponent == pytest.approx(30.364, rel=3e-3)
  at = {n: TRANSFORMERS.loss(1e300, 10**n, 1) - 1.3637 for n in (6, 9)}
  exponent = math.log10(at[6] / at[9]) / 3
  assert exponent == pytest.approx(0.1964, abs=2e-4)
  assert at[6] * 1e6**exponent == pytest.approx(53.98, rel=3e-3)


# As it was worked out before: of these numbers of experts themselves.
PLAIN = TRANSFORMERS._replace(first=1.0, last=math.inf)


@pytest.mark.parametrize(
  "size, ratio, millions",
  [(1.3e5, 32, 9.509), (1.3e5, 1024, 23.515), (1e6, 32, 32.861)],
)
def test_experts_lead_from_the_break_even_on(size, ratio, millions):
  least = PLAIN.break_even(size, ratio)
  assert least / 1e6 == pytest.approx(millions, rel=1e-4)
  assert PLAIN.lead(size, least * 1.01, ratio) > 0
  assert PLAIN.lead(size, least * 0.99, ratio) < 0


def test_where_experts_never_lead():
  """Of a size of which the first term grows with them, too; or later."""
  assert PLAIN._replace(delta=0.5, gamma=0.0).break_even(1e8, 8) is None
  # Here the lead ends again, beyond all texts.
  least = PLAIN.break_even(2.7e10, 8)
  assert PLAIN.lead(2.7e10, 1.01 * least, 8) > 0 > PLAIN.lead(2.7e10, 1e40, 8)
  with pytest.raises(ValueError, match="a ratio of 1 is no mixture"):
    PLAIN.break_even(1e6, 1)


def test_what_is_said_of_a_config():
  said = text("transformer/olmoe_1b_7b")
  first, _, _, row, _, about = said.splitlines()
  # 2 tables of 50,304 x 2,048; 16 blocks of 4 x 2,048^2 and 8 experts.
  size = 2 * 50304 * 2048 + 16 * (4 * 2048**2 + 8 * 3 * 2048 * 1024)
  assert first.startswith(f"{size / 1e9:.3g} G parameters that a token meets, ")
  assert " of 8 times as many experts one, 419 G tokens." in first
  dense, sparse = (by_hand(size, 4.194304e11, ratio) for ratio in (1, 8))
  for value in (
    f"{dense:.2f}",
    f"{sparse:.2f}",
    f"{100 * (math.exp(sparse - dense) - 1):+.1f} %",
    "994 M tokens",
  ):
    assert f" {value}" in row
  assert about.endswith(
    "ratios 1 to 32; this config lies outside of its tokens"
  )
  said = text("transformer/olmoe_1b_7b", 1e10)
  assert " 10 G tokens." in said and "outside" not in said
  # Dense blocks beside sparse ones are no experts; of two levels all count.
  for name, ratio in (("transformer/top_k", 8), ("lm1b/moe_256_h", 64)):
    assert f" of {ratio} times as many experts one" in text(name)


def test_the_command_says_it_and_plans_nothing(capsys):
  argv = ["moejax", "plan", "--config=sotu/moe_32"]
  assert main([*argv, "--quality"]) == main([*argv, "--tokens=1e9"]) == 0
  said = capsys.readouterr().out
  assert text("sotu/moe_32", 1e9) in said and text("sotu/moe_32") in said
  assert main([*argv, "--quality", "--topology=cpu:8"]) == 1
  assert "stands in place of a plan" in capsys.readouterr().err


@pytest.mark.parametrize(
  "name, complaint",
  [
    ("sotu/moe_1_wide", "has none to choose among"),
    ("lm1b/four_lstm_512", "has none to choose among"),
    ("translate_tiny", "this config translates"),
  ],
)
def test_configs_without_experts_to_weigh(name, complaint):
  with pytest.raises(ValueError, match=complaint):
    text(name)


def test_a_fit_finds_the_law_that_made_the_losses():
  law = PLAIN._replace(a=20.0, delta=-0.2, omega=0.4, c=2.0)
  table = []
  for width in (32, 64, 128):
    for ratio in (1, 4, 16, 64):
      for step in (250, 1000, 4000):
        row = {
          "parameters": 32 * width**2,
          "ratio": ratio,
          "tokens": 4096 * step,
        }
        table.append(row | {"loss": law.loss(*scaling.about(row))})
  found = scaling.fit(table)
  for ops, tokens, ratio in ((2e4, 3e6, 8), (1e6, 5e7, 32), (2e6, 1e8, 1)):
    got = found.loss(ops, tokens, ratio)
    assert got == pytest.approx(law.loss(ops, tokens, ratio), rel=2e-3)
  assert found.parameters == (32768, 524288) and found.ratios == (1, 64)
