"""python -m moejax, the same as moejax."""

from moejax.main import console

console()
