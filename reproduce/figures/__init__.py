"""Figures: one style for all; every function takes arrays or tables and returns a matplotlib Figure.

``maps``: what a detector finds (Fig. 4, 5, S3 to S5); ``comparisons``: metrics against settings and against the size
of the memory bank (Tables 1, 3, S1 to S3, Fig. S2); ``contrasts``: what a choice moves, beside the noise; ``spaces``: patch
features in two dimensions (Fig. 2, 3, S1).
Figure 1 is ``figures/figure_1.svg``.
"""

from reproduce.figures.comparisons import ablation, against_time, bank_memory  # noqa: F401
from reproduce.figures.contrasts import against, contrasts, ranks, tornado  # noqa: F401
from reproduce.figures.maps import images, refined_maps, score_histogram, score_map_sheet, score_maps, training_curve  # noqa: F401
from reproduce.figures.spaces import feature_space, figure_2  # noqa: F401
from reproduce.figures.style import caption, save  # noqa: F401
