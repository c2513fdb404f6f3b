"""The same weights and inputs give what the public PyTorch layer gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import experts, losses, moe, router

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("mixture_of_experts")

B, L, D, E, F = 2, 32, 6, 4, 5


@pytest.mark.parametrize("factor", [0.75, 1.0, 2.0, 4.0])
def test_gshard_top_2_equals_the_public_layer(factor):
  """With drops and without; second choices all used, as ours evaluates."""
  torch.manual_seed(int(8 * factor))
  module = theirs.MoE(
    D,
    num_experts=E,
    hidden_dim=F,
    second_policy_eval="all",
    capacity_factor_eval=factor,
    loss_coef=1.0,
  ).eval()
  x = torch.randn(B, L, D)
  with torch.no_grad():
    want, want_loss = module(x)

  def array(tensor):
    return jnp.asarray(tensor.detach().numpy())

  layer = moe.MoE(
    router.ROUTERS["gshard_top_2"](E),
    experts.FeedForward(E, F),
    group_size=L,
    # Theirs counts first choices, ours all edges.
    eval_capacity_factor=factor / 2,
  )
  params = {
    "router": {"gate": {"kernel": array(module.gate.w_gating)}},
    "experts": {
      "w_in": array(module.experts.w1),
      "w_out": array(module.experts.w2),
    },
  }
  got, sown = layer.apply({"params": params}, array(x), mutable=["routing"])
  np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)
  (routing,) = losses.routings(sown)
  dropped = np.asarray(routing.dropped).sum()
  assert (dropped > 0) == (factor < 4)
  # Their balance loss is Switch's, of each group alone.
  balance = losses.switch_balance(routing, "group")
  np.testing.assert_allclose(balance, want_loss.numpy(), rtol=1e-5)
