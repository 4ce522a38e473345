"""The probe's verdict: whether the latents carry the answer, in a sentence with its numbers.

May import: what stands above `eval`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lvr_lite.eval.measures import Effect, Flips
from lvr_lite.model.spec import LatentSpec

# What noise must cost, how many pairs must flip, and the lift that counts: see `verdict`.
COSTLY = 0.20
FLIPPED = 0.40
LIFTED = 0.10


def verdict(effects: Mapping[str, Effect], ratio: float | None, spec: LatentSpec) -> str:
    """One sentence with its numbers.

    effects: by intervention.
    ratio: of R@1 to chance.

    The latents
    - carry the answer where noise costs at least COSTLY, its interval clear of 0, and at least
      FLIPPED of the pairs flip to the same-question donor;
    - matter in part where noise's cost is clear of 0, or the flips' lift is at least LIFTED;
    - are ignored otherwise.

    A sham that changed an answer makes the probe itself unsound. Latents that are all the same
    token carry nothing, whatever noise costs. In bottleneck mode the text sees nothing but the
    question and the donor's latents with their places in the picture. The donor's answer, right or
    wrong, then comes nearly by construction: lift proves nothing, and noise decides.
    """
    noise = effects.get("noise")
    donor = effects.get("donor_same_question")
    flips = None if donor is None else donor.flips
    numbers = ", ".join(_numbers(noise, flips, ratio, spec))
    sham = effects.get("self")
    if sham is not None and sham.changed_count:
        changed = f"the sham changed {sham.changed_count} answers"
        return f"the probe itself is unsound: {numbers}; {changed}"
    if spec.feedback == "token":
        reason = "the same token is fed whatever the picture"
        return f"the latents carry nothing by construction, {reason}: {numbers}"
    if noise is None or flips is None:
        return f"not judged, which takes noise and donor_same_question: {numbers}"
    # An intervention by noise applies to every subject, so its difference is a number.
    assert noise.difference is not None
    assert noise.difference_interval is not None
    cost = -noise.difference
    _, highest = noise.difference_interval
    clear = highest < 0
    flipped = flips.flips_to_donor or 0
    lift = flips.lift or 0
    if spec.mode == "bottleneck":
        lift = 0
    if clear and cost >= COSTLY and flipped >= FLIPPED:
        return f"the latents carry the answer: {numbers}"
    if clear or lift >= LIFTED:
        return f"the latents matter in part: {numbers}"
    return f"the latents are ignored: {numbers}"


def _numbers(
    noise: Effect | None,
    flips: Flips | None,
    ratio: float | None,
    spec: LatentSpec,
) -> Iterator[str]:
    if noise is not None and noise.difference is not None and noise.difference_interval:
        low, high = noise.difference_interval
        cost = _points(-noise.difference)
        interval = f"{_points(-high)} to {_points(-low)}"
        yield f"noise costs {cost} points ({interval}, n = {noise.n})"
    if flips is not None and flips.pairs:
        by_noise = ""
        if noise is not None:
            by_noise = f"; under noise {_points(flips.flips_by_noise)} %"
        reason = ""
        if spec.mode == "bottleneck":
            reason = ", nearly by construction"
        numbers = f"{_points(flips.flips_to_donor)} % of {flips.pairs} pairs"
        lift = f"(lift {_points(flips.lift)} points{by_noise})"
        yield f"the same-question donor's answer comes in {numbers} {lift}{reason}"
    elif flips is not None:
        yield "no item has a same-question donor"
    if ratio is None:
        yield "R@1 is not defined"
    else:
        yield f"R@1 is {ratio:.1f} times chance"


def _points(share: float | None) -> str:
    assert share is not None
    # + 0: no minus before a zero.
    points = round(100 * share, 1) + 0
    return f"{points:.1f}"
