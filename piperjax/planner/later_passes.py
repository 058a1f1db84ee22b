"""This file is how many passes rows make that find no room in the first, and what these add to a layer.

Devices that share experts make as many passes as the fullest buffer among them needs (`runtime/dispatch_passes.py`).
Even where no expert is preferred, tokens choose at random, and of P^2 buffers the fullest holds more than the mean m:
about m + sqrt(2 m ln P^2). So the number of passes is an expectation, over buffers whose rows are Poisson, a little
more uneven than k distinct experts of every token. Tokens of one text choose alike, which is what `imbalance` is for.
"""

from functools import lru_cache
from math import erfc, exp, expm1, lgamma, log, log1p, sqrt
from typing import NamedTuple

from meshes.platform import Platform
from models.config import MoEFFN
from piperjax.planner.collectives import all_reduce
from piperjax.planner.kept import Share
from piperjax.planner.locality import Group

# Whether a device has rows left: a number of 32 bits.
AGREED_BYTES = 4
# Passes that are less likely than this are not counted.
LEAST_PROBABILITY = 1e-6


class LaterPasses(NamedTuple):
    """Expectations of a layer.

    Attributes:
      number: passes after the first, each of one chunk.
      waiting_fraction: rows of the busiest device that travel in them.
      agreement: seconds in which devices agree on whether there is one more: before each, and after the last.
    """

    number: float = 0.0
    waiting_fraction: float = 0.0
    agreement: float = 0.0

    def beside(
        self, once: float, back: float, *, there: float, again: float, chunks: int
    ) -> tuple[float, float]:
        """Seconds of exchanges of forward and of backward with these passes, each of one of the chunks.

        Args:
          once: of the first pass there and back, all chunks.
          back: of its gradients.
          there: of the way there alone, which backward repeats for later passes.
          again: of what backward repeats for the first.
          chunks: of the first pass.
        """
        agreement = (1 + self.number) * self.agreement
        forward = once + self.number * once / chunks + agreement
        return forward, back + again + self.number * (there + back) / chunks + agreement


def later_passes(platform: Platform, share: Share, ffn: MoEFFN, imbalance: float) -> LaterPasses:
    """Passes of one layer and microbatch after the first, and their agreement; none where all rows find room in it."""
    if not share.makes_passes(ffn):
        return LaterPasses()
    agreement = all_reduce(platform, Group(share.expert), AGREED_BYTES).seconds
    return expected_passes(share, ffn, imbalance)._replace(agreement=agreement)


@lru_cache(maxsize=8192)
def expected_passes(share: Share, ffn: MoEFFN, imbalance: float) -> LaterPasses:
    """Passes of one layer and microbatch: P(some buffer needs one) + P(some needs two) + ...

    Args:
      share: what a device works on, with its buffers.
      ffn: the experts.
      imbalance: rows of the device with the busiest experts over the mean; the others share what is left.
    """
    if not share.makes_passes(ffn):
        return LaterPasses()
    P, chunks = share.expert, share.dispatch_chunks
    places = share.buffers(ffn).experts / (P * chunks)
    mean = share.tokens / chunks * ffn.experts_per_token / P
    busiest = min(imbalance, P) * mean
    others = (P - min(imbalance, P)) / (P - 1) * mean if P > 1 else 0.0

    def some_exceed(limit: float, parts: int) -> float:
        """Probability that of buffers, each `parts` chunks together, one needs more places than the limit."""
        times = chunks // parts
        return 1 - (1 - _any(parts * busiest, limit, P * times)) * (
            1 - _any(parts * others, limit, P * (P - 1) * times)
        )

    number, turns, probability = 0.0, 0, some_exceed(places, 1)
    while probability > LEAST_PROBABILITY:
        number, turns = number + probability, turns + 1
        # What the chunks left travels together.
        probability = some_exceed((chunks + turns) * places, chunks)
    return LaterPasses(number, max(0.0, 1 - places / busiest))


def _any(mean: float, limit: float, count: int) -> float:
    """Probability that of so many Poisson variables one exceeds a limit."""
    alone = exceeds(mean, limit)
    return 1.0 if alone >= 1 and count else -expm1(count * log1p(-alone))


@lru_cache(maxsize=8192)
def exceeds(mean: float, limit: float) -> float:
    """Probability that a Poisson variable is greater than a limit; by its normal approximation where that is likely."""
    if mean <= 0:
        return 0.0
    first = int(limit) + 1
    if first <= mean:
        return min(1.0, 0.5 * erfc((first - 0.5 - mean) / sqrt(2 * mean)))
    term = total = exp(first * log(mean) - mean - lgamma(first + 1))
    while term > 1e-4 * total:
        first += 1
        term *= mean / first
        total += term
    return min(1.0, total)
