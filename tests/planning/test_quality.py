"""Laws of the loss: their formula, where experts break even, what is said."""

import math

import pytest

from experiments import scaling
from moejax import config as config_lib
from moejax.main import main
from moejax.planning import quality
from moejax.planning.quality import TRANSFORMERS


def text(name, *tokens):
  return quality.text(config_lib.parse(config_lib.load(name)), *tokens)


def by_hand(ops, tokens, ratio):
  """The formula of 2502.05172 with the exponents written out."""
  log = math.log(ratio)
  of_size = 35.91 / ratio**0.2285 / ops**0.1889 * ops ** (0.0098 * log)
  of_text = 35.98 * ratio**0.5529 / tokens ** (0.1775 + 0.0259 * log)
  return of_size + of_text + 1.3637


@pytest.mark.parametrize("ratio", [1, 8, 64])
@pytest.mark.parametrize("tokens", [1e6, 1e10])
def test_the_loss_is_that_of_the_formula(ratio, tokens):
  got = TRANSFORMERS.loss(1e6, tokens, ratio)
  assert got == pytest.approx(by_hand(1e6, tokens, ratio), rel=1e-6)
  dense = by_hand(1e6, tokens, 1)
  assert TRANSFORMERS.lead(1e6, tokens, ratio) == pytest.approx(dense - got)


@pytest.mark.parametrize(
  "ops, ratio, millions",
  [(1.3e5, 32, 9.509), (1.3e5, 1024, 23.515), (1e6, 32, 32.861)],
)
def test_experts_lead_from_the_break_even_on(ops, ratio, millions):
  least = TRANSFORMERS.break_even(ops, ratio)
  assert least / 1e6 == pytest.approx(millions, rel=1e-4)
  assert by_hand(ops, least * 1.01, ratio) < by_hand(ops, least * 1.01, 1)
  assert by_hand(ops, least * 0.99, ratio) > by_hand(ops, least * 0.99, 1)


def test_a_model_may_be_too_large_for_experts_ever_to_pay():
  """Where R^(delta + gamma ln N) is above 1."""
  assert TRANSFORMERS.break_even(2 * math.exp(0.2285 / 0.0098), 8) is None
  with pytest.raises(ValueError, match="a ratio of 1 is no mixture"):
    TRANSFORMERS.break_even(1e6, 1)


def test_what_is_said_of_a_config():
  said = text("sotu/moe_32")
  first, last = said.splitlines()[0], said.splitlines()[-1]
  # 2 LSTMs and 4 experts; 32 experts of which 4 are active; 2,400 batches.
  assert first.startswith("131,072 ops/timestep but for routers, 8 parameters")
  assert " 9.83 M tokens." in first
  about = 131072, 2400 * 64 * 64, 8
  for value in (
    f"{by_hand(*about[:2], 1):.2f}",
    f"{by_hand(*about):.2f}",
    f"{100 * (math.exp(by_hand(*about) - by_hand(*about[:2], 1)) - 1):+.1f} %",
    "6.09 M tokens",
  ):
    assert f" {value} " in last
  assert "outside" not in last
  assert " 1 G tokens." in text("sotu/moe_32", 1e9).splitlines()[0]
  # Of 256 experts, 4; of groups of experts, the active ones of both levels.
  for name in ("lm1b/moe_256", "lm1b/moe_256_h"):
    said = text(name)
    assert " 64 parameters of experts" in said
    assert "ratios 1 to 32 (this is outside)" in said


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
  law = TRANSFORMERS._replace(a=20.0, delta=-0.2, omega=0.4, c=2.0)
  table = []
  for width in (32, 64, 128):
    for ratio in (1, 4, 16, 64):
      for step in (250, 1000, 4000):
        row = {"ops": 32 * width**2, "ratio": ratio, "tokens": 4096 * step}
        table.append(row | {"loss": law.loss(*scaling.about(row))})
  found = scaling.fit(table)
  for ops, tokens, ratio in ((2e4, 3e6, 8), (1e6, 5e7, 32), (2e6, 1e8, 1)):
    got = found.loss(ops, tokens, ratio)
    assert got == pytest.approx(law.loss(ops, tokens, ratio), rel=2e-3)
  assert found.ops == (32768, 524288) and found.ratios == (1, 64)
