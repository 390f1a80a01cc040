"""How often equal strategies are ranked by their losses, with and without Holm's correction.

    python benchmarks/loss_rankings.py

Six strategies, 10,000 comparisons each with 3 and with 5 training seeds, all losses from one normal
distribution: every ranking is false. Takes six seconds.
"""

from itertools import combinations

import numpy as np

from vlafit.significance import holm, paired_t_p

STRATEGIES, COMPARISONS, ALPHA = 6, 10_000, 0.05


def main() -> None:
    rng = np.random.default_rng(0)
    for seeds in (3, 5):
        uncorrected = corrected = 0
        for _ in range(COMPARISONS):
            losses = rng.normal(size=(STRATEGIES, seeds))
            p = [paired_t_p((one - other).tolist()) for one, other in combinations(losses, 2)]
            uncorrected += min(p) <= ALPHA
            corrected += min(holm(p)) <= ALPHA
        share = 100 / COMPARISONS
        print(
            f"{seeds} seeds: {share * uncorrected:.1f} % of {COMPARISONS:,} comparisons have a ranking, "
            f"with Holm's correction {share * corrected:.1f} %"
        )


if __name__ == "__main__":
    main()
