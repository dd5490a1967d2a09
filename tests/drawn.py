"""How hypothesis draws in these tests: how many cases, and the same ones each time unless asked."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

DEFAULT = 2000
COUNT = int(os.environ.get("FASTRNN_HYPOTHESIS_CASES", DEFAULT))


def drawn(cases: int = DEFAULT, **more: int) -> settings:
    """The settings of a test that draws so many cases, more or fewer by the factor by which
    FASTRNN_HYPOTHESIS_CASES differs from its default. Any other number than that draws anew."""
    return settings(
        max_examples=max(1, cases * COUNT // DEFAULT),
        derandomize=COUNT == DEFAULT,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **more,
    )
