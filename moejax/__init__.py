"""Sparsely-gated mixtures of experts in JAX.

Dimension key, in shape annotations and einsum strings alike:

  B  batch                     E  experts
  L  length                    K  experts per token
  D  model width               C  capacity: slots per expert and group
  G  groups                    A  assignments (edges) per group
  S  tokens per group          N  rows
  F  expert hidden width       O  output width
  V  vocabulary                H  LSTM width
  P  sampled classes           M  source length
"""
